"""One folder from several prepared ones: training rows drawn by shares, validation rows of all.

    sayo prepare mix --from gqa=data/gqa --from refocus=data/refocus --mix gqa=0.5,refocus=0.5 --rows 6000 \\
        --out data/mix

``--mix`` gives each part its share of the training rows: numbers that add up to 1, or "all" (every row it has) and
"rest" (the rows that are missing then). Rows are drawn at random without replacement, and shuffled. A training row is
left out if its picture, by its bytes, is a validation picture of another part.

The training set of SAYO, as its released code makes it: a quarter of ReFocus-Chart's training rows at random (seed 42),
of these the rows with a focus area, each with its first box; GQA's training questions, each with the last object of its
semantic string, until there are 20,000 rows; 1 % held out. With these commands, N a quarter of ReFocus-Chart's rows:

    sayo prepare refocus --data ReFocus_Data/data --first-box --limit N --seed 42 --out data/refocus
    sayo prepare gqa --scene-graphs train_sceneGraphs.json --questions train_all_questions_0.json --images images.zip \\
        --boxes semantic --limit 30000 --out data/gqa
    sayo prepare mix --from refocus=data/refocus --from gqa=data/gqa --mix refocus=all,gqa=rest --rows 19800 \\
        --out data/sayo

Ours differs in what is drawn (another generator; GQA's rows are drawn from the whole file), in that pictures are held
out, not rows, and in that rows are left out whose boxes are nearly the whole picture or smaller than a visual token.

Errors: D53 the folder is not empty, D56 a part is damaged, D57 an option is invalid.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sayo_verl.data.build import IN_OTHER_SPLIT, quiet_bars, rows_of, write_split
from sayo_verl.data.folder import LEFT_OUT, MANIFEST, SPLITS, Built, new_folder, read_folder, write_manifest
from sayo_verl.data.reading import image_digest
from sayo_verl.errors import Rule, SayoError, raise_first

if TYPE_CHECKING:
    from datasets import Dataset

ALL, REST = "all", "rest"


def mix_folders(
    parts: Mapping[str, Path],
    shares: Mapping[str, str],
    rows: int,
    out: Path,
    seed: int = 0,
    *,
    overwrite: bool = False,
) -> Built:
    """Make a folder of rows of other folders.

    Args:
        parts: name -> prepared folder.
        shares: name -> a number, "all" or "rest".
        rows: training rows of the mixture.
        out: its folder.
        seed: of the draw.
        overwrite: replace a folder of prepared data.

    Raises:
        SayoError: D53, D56, D57 (see the module).
    """
    from datasets import Dataset, concatenate_datasets

    _check(parts, shares, rows)
    folders = {part: read_folder(folder) for part, folder in parts.items()}
    with new_folder(out, overwrite=overwrite) as folder:
        quiet_bars()
        tables = {
            (part, split): Dataset.from_parquet([str(file) for file in built.files[split]], cache_dir=folder / "tables")
            for part, built in folders.items()
            for split in SPLITS
            if built.files[split]
        }
        _check_images({part: table for (part, _), table in tables.items()})
        train = {part: table for (part, split), table in tables.items() if split == "train"}
        val = {part: table for (part, split), table in tables.items() if split == "val"}
        left_out: list[dict[str, str]] = []
        usable = {part: _apart(part, train.get(part), val, left_out) for part in parts}
        counts = train_counts(shares, rows, {part: len(numbers) for part, numbers in usable.items()})
        generator = np.random.default_rng(seed)
        drawn = {part: np.sort(generator.permutation(usable[part])[: counts[part]]) for part in sorted(parts)}
        mixed = concatenate_datasets([train[part].select(numbers) for part, numbers in drawn.items() if len(numbers)])
        mixed = mixed.shuffle(seed=seed)
        _check_ids(mixed)
        held_out = concatenate_datasets([val[part] for part in sorted(val)]) if val else mixed.select([])
        for split, table in (("train", mixed), ("val", held_out)):
            write_split(table, folder, split)
        (folder / LEFT_OUT).write_text("".join(json.dumps(line) + "\n" for line in left_out), encoding="utf-8")
        n_rows = {"train": len(mixed), "val": len(held_out)}
        del tables, train, val, mixed, held_out  # mapped from the files that go now
        shutil.rmtree(folder / "tables")
        facts = {part: json.loads((built.folder / MANIFEST).read_text()) for part, built in folders.items()}
        write_manifest(
            folder,
            source={
                "name": "mix",
                "parts": {part: {"folder": str(parts[part]), **facts[part]["source"]} for part in parts},
            },
            options={"mix": dict(shares), "rows": rows, "seed": seed},
            rows=n_rows,
            left_out={IN_OTHER_SPLIT: len(left_out)} if left_out else {},
            drawn=counts,
        )
    return read_folder(out)


def _apart(
    part: str, train: "Dataset | None", val: Mapping[str, "Dataset"], left_out: list[dict[str, str]]
) -> np.ndarray:
    """Numbers of the training rows of a part without a validation picture of another part."""
    if train is None:
        return np.zeros(0, dtype=int)
    others = {
        image_digest(image, f"{name} val")
        for name, table in val.items()
        if name != part
        for row in rows_of(table, ["images"])
        for image in row["images"]
    }
    kept = []
    for number, row in enumerate(rows_of(train, ["images", "extra_info"])):
        if others and any(image_digest(image, f"{part} row {number}") in others for image in row["images"]):
            left_out.append({"id": f"{part}/{row['extra_info']['id']}", "reason": IN_OTHER_SPLIT, "detail": ""})
        else:
            kept.append(number)
    return np.array(kept, dtype=int)


def train_counts(shares: Mapping[str, str], rows: int, there: Mapping[str, int]) -> dict[str, int]:
    """How many training rows each part gives; they add up to ``rows``.

    Args:
        shares: part -> a number, "all" or "rest".
        rows: of all together.
        there: part -> rows it has.

    Raises:
        SayoError: D57 if a part has too few, or those that give all have too many.
    """
    counts = {part: there[part] for part, share in shares.items() if share == ALL}
    left = rows - sum(counts.values())
    numbers = {part: 1.0 if share == REST else float(share) for part, share in shares.items() if share != ALL}
    exact = {part: left * number / sum(numbers.values()) for part, number in numbers.items()}
    counts |= {part: int(max(value, 0)) for part, value in exact.items()}
    for part in sorted(exact, key=lambda part: counts[part] - exact[part])[: rows - sum(counts.values())]:
        counts[part] += 1  # those with the largest remainder
    scarce = [f"{part} has {there[part]} rows, {n} wanted" for part, n in counts.items() if n > there[part]]
    if scarce or sum(counts.values()) != rows or left < 0:
        raise SayoError(
            "D57",
            "the parts do not have the rows of the mixture",
            where="--rows",
            got="; ".join(scarce) or f"{rows} wanted, {sum(counts.values())} in the parts that give all",
            wanted="every row once",
            fix="correct --rows or --mix, or prepare more rows of the part",
        )
    return {part: counts[part] for part in shares}


def _check(parts: Mapping[str, Path], shares: Mapping[str, str], rows: int) -> None:
    numbers = [_number(share) for share in shares.values() if share not in (ALL, REST)]
    rest = sum(share == REST for share in shares.values())
    valid = all(0 < number <= 1 for number in numbers) and (
        (rest == 1 and not numbers) or (rest == 0 and (not numbers or abs(sum(numbers) - 1) < 1e-6))
    )
    folders = [str(folder.resolve()) for folder in parts.values()]

    def rule(broken: bool, what: str, where: str, got: object, wanted: str) -> Rule:
        return Rule("D57", broken, what, where=where, got=got, wanted=wanted, fix=f"correct {where}")

    raise_first(
        [
            rule(parts.keys() != shares.keys(), "parts and shares differ", "--mix", sorted(shares), str(sorted(parts))),
            rule(len(set(folders)) < len(folders), "a folder is named twice", "--from", folders, "different folders"),
            rule(rows < 1, "a number of rows is out of range", "--rows", rows, "1 or more"),
            rule(
                not valid,
                "the shares do not add up to 1",
                "--mix",
                dict(shares),
                "numbers that add up to 1, beside parts that give all; or one part that gives the rest",
            ),
        ]
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0  # out of range


def _check_images(tables: Mapping[str, "Dataset"]) -> None:
    kinds = {part: str(table.features["images"]) for part, table in tables.items()}
    if len(set(kinds.values())) > 1:
        raise SayoError(
            "D57",
            "some parts hold bytes of images and others paths, which verl cannot join",
            where="--from",
            got={part: "paths" if "'image'" in kind else "bytes" for part, kind in kinds.items()},
            wanted="one kind",
            fix="prepare the parts again, all with or all without --link",
        )


def _check_ids(mixed: "Dataset") -> None:
    seen: set[tuple[str, str]] = set()
    for row in rows_of(mixed, ["data_source", "extra_info"]):
        name = (row["data_source"], row["extra_info"]["id"])
        if name in seen:
            raise SayoError(
                "D57",
                "two parts have a row of one data source and id",
                where="--from",
                got=name,
                wanted="ids that differ",
                fix="leave one of the parts out, or prepare it with another --name",
            )
        seen.add(name)


# --------------------------------------------------------------------------------------------------------------- flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare mix``."""
    parser.add_argument(
        "--from",
        dest="parts",
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="a prepared folder; repeat it",
    )
    parser.add_argument("--mix", required=True, metavar="NAME=SHARE,...", help="share of each part, or all, or rest")
    parser.add_argument("--rows", type=int, required=True, metavar="N", help="training rows of the mixture")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the mixture")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of prepared data")


def from_args(args: argparse.Namespace) -> Built:
    """Mix by the flags of ``add_flags``."""
    parts = {part: Path(folder) for part, folder in _pairs("--from", args.parts).items()}
    shares = _pairs("--mix", args.mix.split(","))
    return mix_folders(parts, shares, args.rows, args.out, args.seed, overwrite=args.overwrite)


def _pairs(flag: str, given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=")[::2] for text in given]
    if not all(name and value for name, value in pairs) or len(dict(pairs)) != len(pairs):
        raise SayoError(
            "D57",
            f"{flag} is invalid",
            where=flag,
            got=list(given),
            wanted="NAME=..., each once",
            fix=f"correct {flag}",
        )
    return dict(pairs)
