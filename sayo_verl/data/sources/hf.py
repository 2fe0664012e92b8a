"""Any table of questions, answers, images and boxes: parquet files, or a data set of the Hugging Face hub.

``--map image=img,question=query,answer=label,boxes=objects.bbox`` names the column of each field; "." enters structs. A
field that is not named is the column of the same name. The fields:

    image      {bytes, path} as ``datasets`` stores it, bytes, or a file name with --images; a list of these: several
    question   text; image tags around it are removed where there is one for each image
    answer     text or a number. A list of answers is refused: choose one, because it decides the reward
    boxes      boxes of four numbers; one box alone; with several images: one list of boxes for each image
    id         optional; unique. Without it: name of the file (or of the split) and number of the row
    box_names, kind, width, height    optional; width and height of the picture that the boxes were drawn on

``--box-format`` is required, because columns called bbox may hold any of the formats.

A local path is read with pyarrow alone. A data set of the hub is streamed, its images left as the bytes they are; it
is pinned to a commit (``--revision``, else the newest at the start), which the manifest names. No code from the hub
runs here: ``datasets`` 4 and later refuses a data set that needs its own script, and older ones are not used.
Licence: that of the data set's card.
"""

import argparse
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sayo_verl.data.rows import RUNS_CODE, Drop, Example, LeftOut, check_text
from sayo_verl.data.sources import fields, inputs
from sayo_verl.errors import SayoError

REQUIRED = ("image", "question", "answer", "boxes")
OPTIONAL = ("id", "box_names", "kind", "width", "height")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HfSource:
    """A table.

    Attributes:
        dataset: parquet file, folder of parquet files, or "owner/name" on the hub.
        box_format: key of ``sayo_verl.data.boxes.BOX_FORMATS``.
        split: "train" and so on.
        columns: field -> column.
        config: of the data set on the hub, where it has several.
        revision: branch, tag or commit on the hub.
        images: folder or zip file that file names are looked up in.
        name: of the data set; data_source is "sayo/<name>".
    """

    dataset: str
    box_format: str
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)
    config: str | None = None
    revision: str | None = None
    images: Path | None = None
    name: str = "hf"

    def __post_init__(self) -> None:
        fields.check_box_format(self.box_format)
        fields.check_name(self.name)
        fields.check_keys(dict(self.columns), (), REQUIRED + OPTIONAL, "--map")
        if not self._is_local and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.dataset):
            raise inputs.unreadable(
                self.dataset,
                "there is no such file or folder, and it is no name on the hub",
                "correct the path, or write owner/name",
            )
        if self._is_local:
            inputs.parquet_files(Path(self.dataset), self.split)
        else:
            _refuse_unsafe(self.dataset)

    @property
    def _is_local(self) -> bool:
        return Path(self.dataset).exists()

    def facts(self) -> dict[str, Any]:
        local = self._is_local
        files = inputs.file_facts(inputs.parquet_files(Path(self.dataset), self.split)) if local else {}
        return {
            "source": "hf",
            "name": self.name,
            "dataset": self.dataset,
            "commit": None if local else _commit(self.dataset, self.revision),
            "files": files,
            "config": self.config,
            "split": self.split,
            "columns": dict(self.columns),
            "box_format": self.box_format,
            "images": str(self.images) if self.images else None,
        }

    def examples(self) -> Iterator[Example | LeftOut]:
        """Raises:
        SayoError: D05, D09, D58-D62 as the row is wrong, D63 where the data cannot be had.
        """
        folder = inputs.ImageFolder(self.images) if self.images else None
        seen = fields.Seen()
        for default, row, where in self._local() if self._is_local else self._hub():
            id = seen.add(fields.text(row.get("id")) or default, where)
            try:
                yield self._example(id, row, folder, where)
            except Drop as drop:
                yield LeftOut(id, drop.reason, drop.detail)

    def _chosen(self, there: list[str], where: str) -> dict[str, str]:
        """Field -> column, for the fields that there are."""
        chosen = dict(self.columns)
        chosen |= {name: name for name in REQUIRED if name not in chosen}
        chosen |= {name: name for name in OPTIONAL if name not in chosen and name in there}
        inputs.need_columns([column.partition(".")[0] for column in chosen.values()], there, f"{where}, --map")
        return chosen

    def _local(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        root = Path(self.dataset)
        for path in inputs.parquet_files(root, self.split):
            label = path.relative_to(root).as_posix() if root.is_dir() else path.name
            chosen = self._chosen(_names(path), str(path))
            columns = sorted({column.partition(".")[0] for column in chosen.values()})
            for i, row in enumerate(inputs.parquet_rows(path, columns)):
                where = f"{path} row {i}"
                yield f"{label}:{i}", {name: _at(row, column, where) for name, column in chosen.items()}, where

    def _hub(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        label = f"{self.dataset} {self.split}"
        commit = _commit(self.dataset, self.revision)
        rows = iter(_stream(self.dataset, self.config, self.split, commit))
        chosen: dict[str, str] = {}
        i = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise _unreachable(label, error) from error
            chosen = chosen or self._chosen(list(row), label)
            where = f"{label} row {i}"
            yield f"{self.split}:{i}", {name: _at(row, column, where) for name, column in chosen.items()}, where
            i += 1

    def _example(self, id: str, row: dict[str, Any], folder: inputs.ImageFolder | None, where: str) -> Example:
        value = row["image"]
        each = value if isinstance(value, list) else [value]
        if not each:
            raise Drop("image_missing", "an empty list")
        images = tuple(inputs.stored_image(image, f"{where}, image", folder) for image in each)
        boxes = row["boxes"]
        if isinstance(boxes, list) and len(boxes) == 4 and len(images) == 1 and not any(_nested(v) for v in boxes):
            boxes = [boxes]  # one box alone
        found = fields.boxes_of_images(boxes, len(images), f"{where}, boxes")
        names = fields.names_of_boxes(row.get("box_names"), found, f"{where}, box_names")
        sides = (row.get("width"), row.get("height"))
        size = None if None in sides or len(images) > 1 else fields.picture_size(*sides, where)
        question = fields.untagged(fields.text(row["question"]), len(images), where)
        answer = fields.text(row["answer"])
        check_text(question, answer)
        return Example(
            id,
            images,
            question,
            answer,
            found,
            names,
            self.box_format,
            self.name,
            f"sayo/{self.name}",
            (size,) * len(images),
            fields.text(row.get("kind")),
        )


def _nested(value: Any) -> bool:
    return isinstance(value, list | tuple | dict)


def _names(path: Path) -> list[str]:
    try:
        return pq.read_schema(path).names
    except (OSError, ValueError, NotImplementedError) as error:
        raise inputs.damaged(path, error) from error


def _at(row: Mapping[str, Any], dotted: str, where: str) -> Any:
    """A value by the name of its column, "." going into structs; None where a struct is null."""
    value: Any = row
    for name in dotted.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            raise fields.refuse(
                f"there is no column {dotted!r}",
                f"{where}, --map",
                "name the columns as the table does",
                got=sorted(value) if isinstance(value, Mapping) else fields.shown(value),
            )
        value = value[name]
    return value


def _refuse_unsafe(name: str) -> None:
    if Path(name).suffix.lower() in RUNS_CODE:
        inputs.check_file(Path(name))


# --------------------------------------------------------------------------------------------------------------- hub


def _unreachable(dataset: str, error: Exception) -> SayoError:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return inputs.unreadable(
        dataset,
        "the data set cannot be loaded from the hub",
        "check the name, the network, HF_HUB_OFFLINE and, for a "
        "gated data set, `hf auth login`; or download its parquet files and give their folder",
        got=said[:300],
    )


@functools.lru_cache(maxsize=8)
def _commit(dataset: str, revision: str | None) -> str:
    """The commit that a branch or tag stands for now; asked once, so that facts and examples are of one."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(dataset, revision=revision).sha
    except Exception as error:  # the errors of the hub's client and of the network have no common base
        raise _unreachable(dataset, error) from error
    if commit is None:
        raise _unreachable(dataset, ValueError("the hub names no commit"))
    return commit


def _stream(dataset: str, config: str | None, split: str, commit: str) -> Any:
    """Rows of a data set on the hub, images as {bytes, path}."""
    import datasets

    if int(datasets.__version__.partition(".")[0]) < 4:
        raise inputs.unreadable(
            dataset,
            "this version of datasets can run a data set's own script",
            "pip install -U 'datasets>=4', or download the parquet files",
            got=f"datasets {datasets.__version__}",
        )
    try:
        rows = datasets.load_dataset(dataset, config, split=split, streaming=True, revision=commit)
    except Exception as error:  # as in _commit
        raise _unreachable(f"{dataset} {split}", error) from error
    return rows.decode(False)


def parse_map(text: str) -> dict[str, str]:
    """``"image=img,question=q"`` as a mapping.

    Raises:
        SayoError: D58.
    """
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    wrong = [name for name, _, column in pairs if not name.strip() or not column.strip()]
    names = [name.strip() for name, _, _ in pairs]
    if wrong or len(set(names)) != len(names):
        raise fields.refuse(
            "the map is not field=column,field=column",
            "--map",
            "write each field once, as in image=img,question=query",
            got=text,
        )
    return {name.strip(): column.strip() for name, _, column in pairs}


SHOWN = ("--map", "--images", "--split")  # on the page of --help, beside the required flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare hf``."""
    parser.add_argument("--dataset", required=True, help="parquet file, folder of them, or owner/name on the hub")
    parser.add_argument("--box-format", required=True, metavar="FORMAT", help=fields.box_format_help())
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument(
        "--map",
        default="",
        metavar="FIELD=COLUMN,...",
        help=f"columns of {', '.join(REQUIRED + OPTIONAL)}, where they have other names",
    )
    parser.add_argument("--config", help="of the data set on the hub, where it has several")
    parser.add_argument("--revision", help="branch, tag or commit on the hub (default: the newest commit)")
    parser.add_argument("--images", type=Path, help="where images are file names: their folder or zip file")
    parser.add_argument("--name", default="hf", help="name of the data set in metrics (default: %(default)s)")


def from_args(args: argparse.Namespace) -> HfSource:
    """The source from the flags of ``add_flags``."""
    return HfSource(
        args.dataset,
        args.box_format,
        args.split,
        parse_map(args.map),
        args.config,
        args.revision,
        args.images,
        args.name,
    )
