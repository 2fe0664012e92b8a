"""Runs as groups: which differ in nothing but the seed, and in what else they differ."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

from sayo_verl.metrics import PREFIX
from sayo_verl.report import catalogue as c
from sayo_verl.report.card import load_config
from sayo_verl.report.runs import UNKNOWN, Run, load_run

# Settings that do not change what is trained: names, places, what is saved and shown.
NEUTRAL = (
    "*seed",
    "sayo.out",
    "sayo.resume",
    "sayo.resume_anyway",
    "sayo.fingerprint",
    "sayo.viz_*",
    "sayo.preflight_*",
    "sayo.gpu_memory_gib",
    "sayo.wait_for_nodes",
    "sayo.dry_run",
    "trainer.experiment_name",
    "trainer.project_name",
    "trainer.logger",
    "trainer.default_local_dir",
    "trainer.resume_*",
    "trainer.save_freq",
    "trainer.max_*_ckpt_to_keep",
    "trainer.log_val_generations",
    "trainer.*_data_dir",
    "ray_kwargs.*",
    "hydra*",
)
# What must be the same for a fair comparison: name, patterns of the settings.
DATA, MODEL, REWARD, METHOD = (
    ("sayo.data", "data.train_files", "data.val_files", "data.*_max_samples", "data.*_key"),
    ("actor_rollout_ref.model.*",),
    ("reward.*", "custom_reward_function.*", "reward_model.*", "sayo.correct_from"),
    ("algorithm.attn.*", "algorithm.adv_estimator", "+method", "actor_rollout_ref.model.external_lib"),
)
MOST_SETTINGS = 12  # named in a remark
LONGEST_NAMING = 16  # characters of a setting that names a group


@dataclass(frozen=True)
class Member:
    """A run of a group, with its configuration (dotted key -> value; empty if it was not recorded)."""

    run: Run
    config: dict[str, Any]

    @property
    def seed(self) -> tuple[tuple[str, str], ...]:
        return tuple((key, str(value)) for key, value in sorted(self.config.items()) if key.endswith("seed"))

    def settings(self) -> dict[str, str]:
        """What is trained, without seeds. Of the methods' settings, only those of the run's own method."""
        kept = {key: str(value) for key, value in self.config.items() if not _matches(key, NEUTRAL)}
        method = self.run.estimator.removeprefix("attn_")
        if self.run.estimator == c.MIX:
            return kept
        unused = {key for key in kept if key.startswith("algorithm.attn.") and key.split(".")[2] != method}
        return {key: value for key, value in kept.items() if key not in unused}

    def files(self) -> list[str]:
        """Data files by name and size where both are known, so that a copy in another folder is the same."""
        named = [self.config.get(key) for key in ("data.train_files", "data.val_files")]
        files = [str(file) for value in named for file in (value if isinstance(value, list) else [value])]
        return [f"{Path(file).name}, {self.run.data[file]} bytes" if file in self.run.data else file for file in files]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed, or that were given one label."""

    label: str
    members: tuple[Member, ...]

    @property
    def runs(self) -> list[Run]:
        return [member.run for member in self.members]

    @property
    def seeds(self) -> list[tuple[tuple[str, str], ...]]:
        return [member.seed for member in self.members]


def read_member(path: Path) -> Member:
    """Read a run with its configuration; errors of ``load_run`` and ``load_config``."""
    run = load_run(path)
    return Member(run, load_config(run.files[-1], run.overrides))


def group_runs(members: Sequence[Member], labels: Sequence[str]) -> list[Group]:
    """Group runs by their labels, or by what they are apart from the seed."""
    keys: list[Any] = list(labels)
    if not labels:
        # Without a recorded configuration nobody knows whether two runs differ in more than the seed.
        keys = [
            (m.run.estimator, *sorted(m.settings().items()), *m.files()) if m.config else str(m.run.path)
            for m in members
        ]
    grouped: dict[Any, list[Member]] = {}
    for key, member in zip(keys, members, strict=True):
        grouped.setdefault(key, []).append(member)
    if labels:
        return [Group(label, tuple(of_label)) for label, of_label in grouped.items()]
    return _labelled(list(grouped.values()))


def _labelled(groups: Sequence[Sequence[Member]]) -> list[Group]:
    """Name each group by its method, and by the settings in which groups of one method differ."""
    found: list[Group] = []
    for group in groups:
        first = group[0]
        like = [other[0].settings() for other in groups if other[0].run.estimator == first.run.estimator]
        label = first.run.path.resolve().name if first.run.estimator == UNKNOWN else first.run.estimator
        label = label.removeprefix("attn_")
        differing = [key for key in first.settings() if len({str(one.get(key)) for one in like}) > 1]
        of_method = [key for key in differing if _matches(key, METHOD)]
        naming = [key for key in of_method or differing if len(first.settings()[key]) <= LONGEST_NAMING]
        if naming:
            label += " " + ", ".join(f"{key.split('.')[-1]}={first.settings()[key]}" for key in naming[:2])
        alike = len(like) > 1 and not naming and first.run.estimator != UNKNOWN
        if alike or label in [other.label for other in found]:
            label += f" ({first.run.path.resolve().name})"
        found.append(Group(label, tuple(group)))
    return found


def _short(value: str) -> str:
    value = value.strip("[]'")
    return value if len(value) <= 30 else f"…{value[-29:]}"


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


def remarks(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """Why the runs are not comparable, and other remarks."""
    members = [member for group in groups for member in group.members]
    unfair, notes = [], []
    unknown = [member.run.path.name for member in members if not member.config]
    if unknown:
        unfair.append(f"model, data and settings of {', '.join(unknown)} were not recorded (no run.yaml)")
    known = [member for member in members if member.config]
    settings = [member.settings() for member in known]
    differing = [
        key for key in dict.fromkeys(chain(*settings)) if len({one.get(key, "not set") for one in settings}) > 1
    ]

    def spelled(key: str) -> str:
        values: dict[str, list[str]] = {}
        for group in groups:
            for member in group.members:
                if member.config:
                    value = member.settings().get(key, "not set")
                    shown = value.strip("[]'") if _matches(key, DATA) else _short(value)
                    values.setdefault(shown, []).append(group.label)
        sides = (f"{value} ({', '.join(dict.fromkeys(labels))})" for value, labels in values.items())
        return f"{key}: {' / '.join(sides)}"

    def report(name: str, keys: Sequence[str]) -> None:
        if keys:
            unfair.append(f"the {name} is not the same: {'; '.join(spelled(key) for key in keys[:3])}")

    if len({tuple(sorted(member.files())) for member in known}) > 1:
        report("data", [key for key in ("data.train_files", "data.val_files", "sayo.data") if key in differing])
        if not set(differing) & {"data.train_files", "data.val_files", "sayo.data"}:
            unfair.append("the data is not the same: files of the same name have different sizes")
    keys = [key for key in differing if _matches(key, DATA[3:])]
    report("use of the data", keys)
    report("model", [key for key in differing if _matches(key, MODEL) and not _matches(key, METHOD)])
    report("reward function", [key for key in differing if _matches(key, REWARD)])
    rest = [key for key in differing if not _matches(key, (*DATA, *MODEL, *REWARD, *METHOD, "+job"))]
    if rest:
        more = f" and {len(rest) - MOST_SETTINGS} more" if len(rest) > MOST_SETTINGS else ""
        notes.append(f"Settings beside the method differ: {'; '.join(map(spelled, rest[:MOST_SETTINGS]))}{more}.")
    for package in dict.fromkeys(chain(*(member.run.versions for member in members))):
        found = {group.label: {run.versions.get(package, UNKNOWN) for run in group.runs} for group in groups}
        if len(set(chain(*found.values()))) > 1:
            sides = "; ".join(f"{label} {', '.join(sorted(versions))}" for label, versions in found.items())
            notes.append(f"Versions of {package} differ: {sides}.")
    for group in groups:
        seeds = group.seeds
        if len(seeds) > 1 and all(seeds) and len(set(seeds)) < len(seeds):
            notes.append(f"{group.label}: some runs have the same seed; they count as repetitions.")
        for run in group.runs:
            missing = [note for note in run.notes if "NaN" in note and note.startswith((PREFIX, "critic/", "actor/en"))]
            notes += [f"{run.path.name}: {note}" for note in missing]
    return unfair, notes
