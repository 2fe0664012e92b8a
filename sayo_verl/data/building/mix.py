"""One folder from several prepared ones: rows drawn by shares, no train image among the held-out ones of any.

    sayo prepare mix --from gqa=data/gqa --from refocus=data/refocus --mix gqa=0.5,refocus=0.5 --rows 6000 \\
        --out data/mix

``--mix`` gives each part its share of the train rows: numbers that add up to 1, or "all" (every row it has) and "rest"
(the missing rows). Counts are exact, by largest remainder; a part with too few rows stops the work. Rows are drawn
without replacement: those with the smallest hash(seed, part, id). Validation rows are drawn by the same shares, as many
as the scarcest part allows, or ``--val-rows``; parts without held-out rows are skipped.

A train row of one part whose picture, by its bytes, was held out in another part is left out before the draw and
counted. Ids and image keys get the part's name as a prefix ("gqa/201307251"). The order of rows of different
parts is drawn as well. Within a part rows keep their order, so that folders are read in order, one row group at a time
(twice: to draw, and to write). verl shuffles train rows by default. Memory: 16 bytes for a row, 12 to 24 for a
held-out image, a row group of each part.

The training set of SAYO, as its released code makes it: a quarter of ReFocus-Chart's train rows at random (seed 42), of
these the rows with a focus area, each with its first box; GQA's train questions, each with the last object of its
semantic string, until there are 20,000 rows; 1 % held out. With these commands:

    sayo prepare refocus --data ReFocus_Data/data --first-box --fall-back none --share 0.25 --seed 42 --out data/refocus
    sayo prepare gqa --scene-graphs train_sceneGraphs.json --questions train_all_questions_0.json --images images.zip \\
        --boxes semantic --limit 30000 --out data/gqa
    sayo prepare mix --from refocus=data/refocus --from gqa=data/gqa --mix refocus=all,gqa=rest --rows 19800 \\
        --out data/sayo

Ours differs in what is drawn (the seed is of another generator; GQA's rows are drawn from the whole file, not taken
from its beginning), in that images are held out, not rows, and in that boxes that say little are left out.

Error codes: D53 the folder is of something else, D56 a part is damaged, D57 what is asked for cannot be had.
"""

import argparse
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sayo_verl.data.building.folder import IN_OTHER_SPLIT, Built, check_folder
from sayo_verl.data.building.meter import Meter, finished
from sayo_verl.data.building.output import Output
from sayo_verl.data.building.shards import IMAGE_BYTES, SPLITS, Hashes, Layout, bytes64, file_sha256, hash64, read_rows
from sayo_verl.data.building.shares import ALL, REST, Share, check_shares, train_counts, val_counts
from sayo_verl.data.prepared import MANIFEST
from sayo_verl.errors import SayoError

_LAYOUT = Layout()
_NAME = re.compile(r"[a-z0-9_.-]+")


class _Split(NamedTuple):
    """What can be drawn from one split of one part: hashes, and the places of their rows, in the part's order."""

    hashes: np.ndarray
    places: np.ndarray


def mix_folders(
    parts: Mapping[str, tuple[Path, Share]],
    rows: int,
    out: Path,
    seed: int = 0,
    *,
    val_rows: int = -1,
    layout: Layout = _LAYOUT,
    overwrite: bool = False,
) -> Built:
    """Make the folder, go on with it where it was begun, or take it as it is where it is finished.

    Args:
        parts: name -> (prepared folder, share); a share is a number, "all" or "rest".
        rows: train rows of the mixture.
        out: its folder.
        seed: of the draw.
        val_rows: validation rows; -1: as many as the shares allow.
        layout: sizes of shards.
        overwrite: start over in a folder that was made of something else.

    Raises:
        SayoError: D53, D56, D57 as the module says.
    """
    _check_parts(parts, rows, val_rows)
    parts = dict(sorted(parts.items()))  # their order decides nothing
    manifests = {name: check_folder(folder) for name, (folder, _) in parts.items()}
    facts = {
        name: {"share": str(share), "manifest": file_sha256(folder / MANIFEST)}
        for name, (folder, share) in parts.items()
    }
    options = {"rows": rows, "val_rows": val_rows, "seed": seed, **layout._asdict()}
    output = Output(out, {"name": "mix", "facts": {"parts": facts}}, options, layout, overwrite=overwrite)
    meter = Meter("sayo prepare mix")
    return finished(output, meter, lambda: _Mix(parts, manifests, output, meter).run(rows, val_rows, seed))


class _Mix:
    def __init__(
        self, parts: Mapping[str, tuple[Path, Share]], manifests: Mapping[str, Any], output: Output, meter: Meter
    ) -> None:
        self.parts, self.output, self.meter = parts, output, meter
        self.files = {
            (part, split): [name for name in sorted(manifest["files"]) if name.startswith(f"{split}-")]
            for part, manifest in manifests.items()
            for split in SPLITS
        }
        self.left_out: list[tuple[str, str]] = []  # id, what it shares

    def run(self, rows: int, val_rows: int, seed: int) -> None:
        there: dict[str, dict[str, _Split]] = {"val": {}, "train": {}}
        held_out: dict[str, Hashes] = {}
        for part in self.parts:
            held_out[part] = Hashes()
            there["val"][part] = self._survey(part, "val", seed, held_out[part], {})
        for part in self.parts:
            others = {other: hashes for other, hashes in held_out.items() if other != part and len(hashes)}
            there["train"][part] = self._survey(part, "train", seed, None, others)
        n_there = {
            split: {part: len(found.places) for part, found in of_parts.items()} for split, of_parts in there.items()
        }
        train = train_counts({part: share for part, (_, share) in self.parts.items()}, rows, n_there["train"])
        counts = {"train": train, "val": val_counts(train, val_rows, n_there["val"])}
        for ordinal, (id, detail) in enumerate(self.left_out):
            if ordinal >= self.output.consumed:
                self.output.leave_out(id, IN_OTHER_SPLIT, detail)
                self.output.used(ordinal)
        ordinal = len(self.left_out)
        for split in SPLITS:
            for part, row in self._drawn(split, there[split], counts[split]):
                self._add(part, row, ordinal)
                ordinal += 1
        self.output.close_shards()
        self.output.finish(parts={part: {split: counts[split][part] for split in SPLITS} for part in self.parts})

    def _survey(
        self, part: str, split: str, seed: int, pictures: Hashes | None, held_out: Mapping[str, Hashes]
    ) -> _Split:
        """Go over the rows of a split; ``pictures`` takes their images, and those in ``held_out`` are left out."""
        hashes, places = array("Q"), array("Q")
        columns = ["extra_info.id", *([IMAGE_BYTES] if pictures is not None or held_out else [])]
        for place, row in enumerate(read_rows(self.parts[part][0], self.files[part, split], columns)):
            id = row["extra_info"]["id"]
            found = [bytes64(image["bytes"]) for image in row["images"]] if len(columns) > 1 else []
            shared = [other for other, there in held_out.items() if any(value in there for value in found)]
            if shared:
                self.left_out.append((f"{part}/{id}", f"held out in {', '.join(shared)}"))
                continue
            if pictures is not None:
                for value in found:
                    pictures.add(value)
            hashes.append(hash64(f"mix {seed}", part, id))
            places.append(place)
        return _Split(np.array(hashes, dtype=np.uint64), np.array(places, dtype=np.uint64))

    def _drawn(
        self, split: str, there: Mapping[str, _Split], counts: Mapping[str, int]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows of the parts in the order in which they follow one another."""
        names = list(self.parts)
        first = {part: np.argsort(there[part].hashes, kind="stable")[: counts[part]] for part in names}
        rows = {part: self._rows_at(part, split, np.sort(there[part].places[first[part]])) for part in names}
        hashes = np.concatenate([there[part].hashes[first[part]] for part in names])
        owners = np.repeat(np.arange(len(names)), [counts[part] for part in names])
        for owner in owners[np.argsort(hashes, kind="stable")]:
            yield names[owner], next(rows[names[owner]])

    def _rows_at(self, part: str, split: str, places: np.ndarray) -> Iterator[dict[str, Any]]:
        wanted = iter(places.tolist())
        place = next(wanted, None)
        if place is None:
            return
        for at, row in enumerate(read_rows(self.parts[part][0], self.files[part, split])):
            if at == place:
                yield row
                place = next(wanted, None)
                if place is None:
                    return

    def _add(self, part: str, row: dict[str, Any], ordinal: int) -> None:
        again = ordinal < self.output.consumed
        if again and ordinal not in self.output.pending:
            return
        info = row["extra_info"]
        info["index"] = self.output.rows(info["split"])
        info["id"] = f"{part}/{info['id']}"
        info["image_keys"] = [f"{part}/{key}" for key in info["image_keys"]]
        self.output.add(row, ordinal)
        tally = self.output.counts["tally"]
        if not again:
            boxes = sum(map(len, info["boxes"]))
            tally.update(examples=1, boxes=boxes, without_boxes=not boxes)
            self.output.used(ordinal)
        self.meter.show(tally["examples"], tally["examples"], len(self.left_out))


def _check_parts(parts: Mapping[str, tuple[Path, Share]], rows: int, val_rows: int) -> None:
    if rows < 1 or val_rows < -1:
        raise SayoError(
            "D57",
            "a number of rows is out of range",
            where="--rows, --val-rows",
            got=f"{rows}, {val_rows}",
            wanted="at least 1; -1 or more",
            fix="correct it",
        )
    for part in parts:
        if not _NAME.fullmatch(part):
            raise SayoError(
                "D57",
                "the name of a part is not plain",
                where="--from",
                got=repr(part),
                wanted=_NAME.pattern,
                fix="rename it",
            )
    check_shares({part: share for part, (_, share) in parts.items()})
    folders = [folder.resolve() for folder, _ in parts.values()]
    if len(set(folders)) != len(folders):
        raise SayoError(
            "D57",
            "one folder stands for two parts",
            where="--from",
            got=[str(f) for f in folders],
            wanted="different folders",
            fix="name each folder once",
        )


# --------------------------------------------------------------------------------------------------------------- flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare mix``."""
    parser.add_argument(
        "--from",
        dest="parts",
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="a prepared folder and what to call it; once for each part",
    )
    parser.add_argument(
        "--mix", required=True, metavar="NAME=SHARE,...", help="share of the train rows of each part, or all, or rest"
    )
    parser.add_argument("--rows", type=int, required=True, help="train rows of the mixture")
    parser.add_argument(
        "--val-rows",
        type=int,
        default=-1,
        help="validation rows; -1: as many as the shares allow (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument(
        "--shard-rows", type=int, default=_LAYOUT.shard_rows, help="rows of a shard (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start over in a folder made of something else")


def from_args(args: argparse.Namespace) -> Built:
    """Mix by the flags of ``add_flags``."""
    folders, shares = _pairs("--from", args.parts), _pairs("--mix", args.mix.split(","))
    if folders.keys() != shares.keys():
        raise SayoError(
            "D57",
            "--from and --mix name different parts",
            where="--mix",
            got=sorted(shares),
            wanted=sorted(folders),
            fix="give each part a folder and a share",
        )
    parts = {name: (Path(folder), _share(shares[name])) for name, folder in folders.items()}
    return mix_folders(
        parts,
        args.rows,
        args.out,
        args.seed,
        val_rows=args.val_rows,
        layout=Layout(shard_rows=args.shard_rows),
        overwrite=args.overwrite,
    )


def _pairs(flag: str, given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=")[::2] for text in given]
    if not all(name and value for name, value in pairs) or len(dict(pairs)) != len(pairs):
        raise SayoError(
            "D57",
            f"{flag} is not understood",
            where=flag,
            got=list(given),
            wanted="NAME=..., each once",
            fix="see `sayo prepare mix --help-all`",
        )
    return dict(pairs)


def _share(text: str) -> Share:
    try:
        return text if text in (ALL, REST) else float(text)
    except ValueError:
        return text  # refused by mix_folders, with its name
