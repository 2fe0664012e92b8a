"""What the doctor reports: one finding per thing that it looked at."""

import dataclasses
from dataclasses import dataclass
from typing import Any

SCHEMA = 1  # of --json; a number per incompatible change


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        id: stable, for programs, such as ``"version.torch"``; the part before the dot is the group.
        name: what was looked at, for people.
        found: what this machine has.
        wanted: what a run needs, or an empty string.
        right: whether the two agree; None: not checked.
        fix: what to do if they do not.
    """

    id: str
    name: str
    found: str
    wanted: str
    right: bool | None
    fix: str = ""

    @property
    def group(self) -> str:
        """The part of the id before the dot."""
        return self.id.partition(".")[0]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``: only a problem has a fix; ``right`` is null for what was not checked."""
        return dataclasses.asdict(self) | {"group": self.group, "fix": self.fix if self.right is False else ""}
