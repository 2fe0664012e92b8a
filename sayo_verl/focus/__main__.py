"""``sayo focus`` as a module, for ``torchrun --nproc_per_node=N -m sayo_verl.focus train ...``."""

import argparse
import sys
from collections.abc import Sequence

from sayo_verl.errors import SayoError
from sayo_verl.focus import command


def main(argv: Sequence[str] | None = None) -> int:
    """0 for success, 2 for a refusal, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m sayo_verl.focus",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_flags(parser)
    args = parser.parse_args(argv)
    try:
        return command.run(args)
    except SayoError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
