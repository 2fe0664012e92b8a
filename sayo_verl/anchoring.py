"""The old name of ``sayo focus``. It ends in an error that says the new one."""

import sys

from sayo_verl.errors import SayoError


def main() -> int:
    """Print the error; 2, as for every refusal."""
    error = SayoError(
        "F25",
        "the anchoring stage has a new name",
        where="python -m sayo_verl.anchoring",
        wanted="sayo focus train|respond|report",
        fix="give the same arguments to `sayo focus`; on N devices: torchrun --nproc_per_node=N -m sayo_verl.focus ...",
    )
    print(error, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
