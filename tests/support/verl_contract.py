"""The contract of one version of verl: what is recorded, and how the installed version differs from a record.

``scripts/contract.sh`` runs this module in an environment with that version; tests/hooks/test_contract.py uses the same
comparison.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from sayo_verl.hooks.contract import CONTRACT, SUPPORTED_VERL, Seam

RECORDS = Path(__file__).resolve().parents[1] / "hooks" / "contract"
Record = dict[str, dict[str, str]]  # path of a seam -> its source (hash) and signature


def record_of(verl: str) -> Path:
    return RECORDS / f"verl-{verl}.json"


def measure(seams: Sequence[Seam]) -> Record:
    """Source and signature of every seam that the installed verl has; a name that is gone is left out."""
    found: Record = {}
    for seam in seams:
        try:
            found[seam.path] = {"source": seam.source_hash(), "signature": seam.signature()}
        except (ImportError, AttributeError):
            continue
    return found


def difference(recorded: dict[str, str] | None, found: dict[str, str] | None) -> str:
    """What changed of one seam, the gravest first: ``gone``, ``signature``, ``source``, ``only here`` or ``same``."""
    if recorded == found:
        return "same"
    if recorded is None or found is None:
        return "only here" if recorded is None else "gone"
    return "signature" if recorded["signature"] != found["signature"] else "source"


def report(verl: str, found: Record, reference: Record, own: Record | None) -> tuple[list[str], bool]:
    """A line for each seam that this version changed, with "!" where it is not as recorded, and whether none is.

    Args:
        verl: the installed version.
        found: its seams.
        reference: record of the newest supported version.
        own: record of the installed version; None: there is none, so every change counts.
    """
    expected, lines, counts = own if own is not None else reference, [], Counter()
    for seam in CONTRACT:
        here = found.get(seam.path)
        change = difference(reference.get(seam.path), here)
        if change == "gone" and not seam.applies(verl):
            change = "unused"  # this version does it by a name that is only here
        unread = seam.applies(verl) and here != expected.get(seam.path)
        if here is not None or change != "same":
            counts[change] += 1
        if change != "same" or unread:
            name = seam.path.split(":")[1]
            lines.append(f"{'!' if unread else ' '} {change:<9}  {name:<45}  {seam.use}: {seam.why}")
    lines.append(f"verl {verl} beside {SUPPORTED_VERL[-1]}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    unread = sum(line.startswith("!") for line in lines)
    if unread:
        lines.append(f"{unread} marked '!' are not as recorded: read them in this version, repair, then use --record")
    elif own is None:
        lines.append("nothing that sayo-verl uses changed")
    else:
        lines.append(f"all as recorded in {record_of(verl).name}")
    return lines, unread == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="compare the installed verl with the contract of sayo-verl")
    parser.add_argument("--record", action="store_true", help="write the record of this version first")
    verl, path = version("verl"), record_of(version("verl"))
    found = measure([seam for seam in CONTRACT if seam.applies(verl)])
    if parser.parse_args().record:
        path.write_text(json.dumps(found, indent=1) + "\n")
    own = json.loads(path.read_text()) if path.exists() else None
    lines, as_recorded = report(verl, found, json.loads(record_of(SUPPORTED_VERL[-1]).read_text()), own)
    print("\n".join(lines))
    return 0 if as_recorded else 1


if __name__ == "__main__":
    sys.exit(main())
