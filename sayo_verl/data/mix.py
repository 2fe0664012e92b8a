"""One folder from several prepared ones: training rows drawn by shares, validation rows of all.

    sayo prepare mix --from data/gqa=0.5 --from data/refocus=0.5 --rows 6000 --out data/mix

A share is a number (all numbers add up to 1), "all" (every row of the folder) or "rest" (the rows that are missing
then). Rows are drawn at random without replacement, and shuffled. A training row is left out if its picture, by its
bytes, is a validation picture of another folder.

Errors: D53 the folder is not empty, D56 a part is damaged, D57 the rows cannot be drawn, D64 parts do not fit together.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sayo_verl.data.build import IN_OTHER_SPLIT, quiet_bars, rows_of, write_split
from sayo_verl.data.check import check_joined
from sayo_verl.data.contract import Demands, RowContract
from sayo_verl.data.folder import LEFT_OUT, SPLITS, Built, check_folder, new_folder, read_folder, write_manifest
from sayo_verl.data.reading import image_digest
from sayo_verl.errors import SayoError

if TYPE_CHECKING:
    from datasets import Dataset

ALL, REST = "all", "rest"


def mix_folders(shares: Mapping[Path, str], rows: int, out: Path, seed: int = 0, *, overwrite: bool = False) -> Built:
    """Make a folder of rows of other folders.

    Args:
        shares: prepared folder -> a number, "all" or "rest".
        rows: training rows of the mixture.
        out: its folder.
        seed: of the draw.
        overwrite: replace a folder of prepared data.

    Raises:
        SayoError: D53, D56, D57, D64 (see the module), D65 for two rows of one data source and id.
    """
    from datasets import Dataset, concatenate_datasets

    files = {folder: read_folder(folder).files for folder in shares}
    check_joined([file for of_folder in files.values() for split in SPLITS for file in of_folder[split]])
    with new_folder(out, overwrite=overwrite) as new:
        quiet_bars()
        tables: dict[str, dict[Path, Dataset]] = {
            split: {
                folder: Dataset.from_parquet([str(file) for file in of_folder[split]], cache_dir=new / "tables")
                for folder, of_folder in files.items()
                if of_folder[split]
            }
            for split in SPLITS
        }
        left_out: list[dict[str, str]] = []
        pictures = {folder: _pictures(table, f"{folder}, val") for folder, table in tables["val"].items()}
        usable = {folder: _apart(folder, tables["train"].get(folder), pictures, left_out) for folder in shares}
        counts = train_counts(shares, rows, {folder: len(numbers) for folder, numbers in usable.items()})
        generator = np.random.default_rng(seed)
        drawn = {folder: np.sort(generator.permutation(usable[folder])[:n]) for folder, n in counts.items() if n}
        mixed = concatenate_datasets([tables["train"][folder].select(numbers) for folder, numbers in drawn.items()])
        mixed = mixed.shuffle(seed=seed)
        held_out = [*tables["val"].values()]
        contract = RowContract(Demands())
        for number, row in enumerate(rows_of(mixed, ["data_source", "extra_info"])):
            contract.check_id(row["data_source"], row["extra_info"]["id"], f"row {number} of the mixture")
        write_split(mixed, new, "train")
        if held_out:
            write_split(concatenate_datasets(held_out), new, "val")
        (new / LEFT_OUT).write_text("".join(json.dumps(line) + "\n" for line in left_out), encoding="utf-8")
        n_rows = {"train": len(mixed), "val": sum(map(len, held_out))}
        del tables, mixed, held_out  # mapped from the files that go now
        shutil.rmtree(new / "tables")
        manifests = {folder: check_folder(folder) for folder in shares}
        parts = {str(folder): {"train": n, "source": manifests[folder]["source"]} for folder, n in counts.items()}
        write_manifest(
            new,
            source={"name": "mix", "parts": parts},
            options={
                "shares": {str(folder): share for folder, share in shares.items()},
                "rows": rows,
                "seed": seed,
                "keep_without_boxes": any(of["options"].get("keep_without_boxes") for of in manifests.values()),
            },
            rows=n_rows,
            left_out={IN_OTHER_SPLIT: len(left_out)} if left_out else {},
        )
    return read_folder(out)


def _pictures(table: "Dataset", where: str) -> set[bytes]:
    return {image_digest(image, where) for row in rows_of(table, ["images"]) for image in row["images"]}


def _apart(
    part: Path, train: "Dataset | None", held_out: Mapping[Path, set[bytes]], left_out: list[dict[str, str]]
) -> np.ndarray:
    """Numbers of the training rows of a folder without a validation picture of another folder."""
    others = {picture for folder, pictures in held_out.items() if folder != part for picture in pictures}
    kept = []
    for number, row in enumerate(rows_of(train, ["images", "extra_info"]) if train else ()):
        if others and any(image_digest(image, f"{part} row {number}") in others for image in row["images"]):
            left_out.append({"id": row["extra_info"]["id"], "reason": IN_OTHER_SPLIT, "detail": str(part)})
        else:
            kept.append(number)
    return np.array(kept, dtype=int)


def train_counts(shares: Mapping[Path, str], rows: int, there: Mapping[Path, int]) -> dict[Path, int]:
    """How many training rows each part gives; they add up to ``rows``.

    Args:
        shares: part -> a number, "all" or "rest".
        rows: of all together.
        there: part -> rows it has.

    Raises:
        SayoError: D57 for invalid shares, and if the parts have too few rows, or those that give all too many.
    """
    numbers = {part: 1.0 if share == REST else _number(share) for part, share in shares.items() if share != ALL}
    alone = REST not in shares.values() or len(numbers) == 1
    if (
        not alone
        or not all(0 < number <= 1 for number in numbers.values())
        or abs(sum(numbers.values()) - bool(numbers)) > 1e-6
    ):
        got = " ".join(f"{part}={share}" for part, share in shares.items())
        wanted = "numbers that add up to 1, or one rest; beside them any number of all"
        raise SayoError("D57", "the shares are invalid", where="--from", got=got, wanted=wanted, fix="correct --from")
    counts = {part: there[part] for part in shares if part not in numbers}
    exact = {part: number * max(rows - sum(counts.values()), 0) for part, number in numbers.items()}
    counts |= {part: int(value) for part, value in exact.items()}
    for part in sorted(exact, key=lambda part: counts[part] - exact[part])[: max(rows - sum(counts.values()), 0)]:
        counts[part] += 1  # those with the largest remainder
    scarce = [f"{part} has {there[part]} rows, {n} wanted" for part, n in counts.items() if n > there[part]]
    if scarce or rows < 1 or sum(counts.values()) != rows:
        what = "the parts do not have the rows of the mixture"
        fix = "correct --rows or the shares, or prepare more rows"
        got = "; ".join(scarce) or f"{rows} wanted, {sum(counts.values())} in the folders that give all"
        raise SayoError("D57", what, where="--rows", got=got, wanted="every row once", fix=fix)
    return {part: counts[part] for part in shares}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0  # invalid, as a negative share
