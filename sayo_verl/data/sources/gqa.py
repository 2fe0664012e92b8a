"""GQA: questions about real photos, with scene graphs that place the objects (Hudson and Manning, CVPR 2019).

Files, as published at cs.stanford.edu/people/dorarad/gqa/download.html, plain, .gz or .zip ("sceneGraphs.zip::NAME"
names a member where a .zip holds several):

    {train,val}_sceneGraphs.json                          image id -> width, height, objects{id -> name, x, y, w, h}
    {train,val,testdev}_balanced_questions.json           question id -> imageId, question, answer, types, semantic,
    train_all_questions/train_all_questions_{0..9}.json     semanticStr, annotations, isBalanced, ...
    images/<image id>.jpg, or images.zip

x, y is the upper left corner, and all values are pixels of the picture. Some boxes end beyond its edge (object 1011688
of image 2318337: 185 + 178 > 362); they are passed on unchanged. The short ``answer`` is the answer; ``fullAnswer``, a
sentence, is not used.

Which objects a question is about (``--boxes``):

    semantic    The object in the last parentheses of ``semanticStr``: "select: man (12)->relate: person,helping,s (34)
                [0]->query: name [1]" is about 34. SAYO's paper uses the final target object. The pattern in its
                released preprocessing takes that object if there are one or two parentheses, but an earlier one,
                mostly the first, if there are three or more. Ours always takes the last one.
                "-", no such object in the image, is ``no_object`` (SAYO's pattern finds none either, but for such an
                earlier one). Several ids in one pair of parentheses give several boxes (SAYO's: no row).
    grounding   The objects of ``annotations.question`` and ``annotations.fullAnswer``, in which GQA's own eval.py sums
                attention for its grounding score. It counts an object as often as it is annotated; here each gives
                one box. A comment there adds the whole image where the question is about the whole scene, but the
                test below it (is "scene" a key of a step) is never true of the published files. Our reading of the
                comment: a step that selects "scene" adds a box of the whole image, named "scene".

Left out: ``no_scene_graph`` (images n*: GQA publishes none, nor any for testdev and test), ``no_object``,
``unknown_object`` (one of the objects is not in the graph; the others then get no box either, because an incomplete
region would train the wrong thing), ``empty_answer``. With ``--keep-without-boxes``, ``no_object`` and
``unknown_object`` become rows without boxes, which are neutral to the methods; ``build`` counts them as such, no longer
by these reasons. ``--kinds`` and ``--balanced-only`` choose questions; the others are not counted.

Licence: the pages do not state one for GQA's annotations. The photos come from Visual Genome (COCO and Flickr, with
their photographers' terms). Download them yourself, and do not publish rows with photos.

Errors: D47, D48 unreadable files, D49 a record of another format, D50 files that do not belong together, D51 options.
"""

import argparse
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sayo_verl.data.building.shards import Hashes
from sayo_verl.data.image_files import check_member
from sayo_verl.data.rows import Example, ImageRef, LeftOut
from sayo_verl.data.streams import Place, json_items, place_of
from sayo_verl.errors import SayoError, did_you_mean

RULES = ("semantic", "grounding")
KINDS = ("query", "verify", "choose", "logical", "compare")
NO_GRAPH_LIMIT = 1000  # so many questions of a file without a scene graph, and none with one, stop the work

_IDS = re.compile(r"[0-9]{1,18}(?: *, *[0-9]{1,18})*")
_REFERENCE = re.compile(rf"\((-|{_IDS.pattern})\)")
_IMAGE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_QUESTION_FILE = re.compile(
    r"((?:train|val|testdev|test|challenge|submission)_(?:all|balanced))_questions(?:_(\d+))?(?:\.json(?:\.gz|\.zip)?|\.zip)"
)
_SIZE = struct.Struct("<ii")  # width, height
_OBJECT = struct.Struct("<QiiiiI")  # id, x, y, w, h, index of the name
_MAX_PIXEL = 2**31 - 1

Box = tuple[float, float, float, float]


class Graph(NamedTuple):
    """What is kept of a scene graph: size of the picture, and object id -> (name, (x, y, w, h))."""

    size: tuple[int, int]
    objects: Mapping[int, tuple[str, Box]]


class SceneGraphs:
    """Image id -> scene graph, packed. An object takes 28 bytes and an image about 170 more: 45 MB for the 74,942 train
    images with the 16 objects they have on average."""

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}
        self._names: dict[str, int] = {}
        self._name_of: list[str] = []

    def __len__(self) -> int:
        return len(self._packed)

    def read(self, place: Place) -> None:
        """Add the graphs of a file.

        Raises:
            SayoError: D41, D47, D48 of ``json_items``, D49 for a graph of another format, D50 for an image that was
                there before.
        """
        for image_id, graph in json_items(*place):
            where = f"{place}, image {image_id!r}"
            if image_id in self._packed:
                raise SayoError(
                    "D50",
                    "two files have a scene graph of one image",
                    where=where,
                    wanted="one",
                    fix="leave one of the files out",
                )
            self._packed[image_id] = self._pack(graph, where)

    def _pack(self, graph: Any, where: str) -> bytes:
        size = [_pixels(_field(graph, side, where), f"{where}, {side}") for side in ("width", "height")]
        if min(size) < 1:
            raise _not_gqa("the size of an image is not positive", where, got=size)
        packed = [_SIZE.pack(*size)]
        objects = _field(graph, "objects", where, dict)
        for id, thing in objects.items():
            there = f"{where}, object {id!r}"
            if not id.isascii() or not id.isdigit() or str(int(id)) != id or len(id) > 18:
                raise _not_gqa("the id of an object is not a whole number", there, wanted="digits")
            box = [_pixels(_field(thing, side, there), f"{there}, {side}") for side in "xywh"]
            name = _field(thing, "name", there, str)
            if name not in self._names:
                self._names[name] = len(self._name_of)
                self._name_of.append(name)
            packed.append(_OBJECT.pack(int(id), *box, self._names[name]))
        return b"".join(packed)

    def get(self, image_id: str) -> Graph | None:
        packed = self._packed.get(image_id)
        if packed is None:
            return None
        width, height = _SIZE.unpack_from(packed)
        names = self._name_of
        return Graph(
            (width, height),
            {id: (names[n], (x, y, w, h)) for id, x, y, w, h, n in _OBJECT.iter_unpack(packed[_SIZE.size :])},
        )


@dataclass(frozen=True)
class GqaSource:
    """GQA as a source of examples.

    Attributes:
        scene_graphs: files; each a path, or "archive.zip::member".
        questions: the same, or folders with the question files of one kind ("train_all_questions").
        images: folder or zip file.
        boxes: of ``RULES``.
        kinds: of ``KINDS``; empty for all.
        keep_without_boxes: make rows without boxes of questions whose object is missing.
        balanced_only: only questions of the balanced set.
    """

    scene_graphs: tuple[str | Path, ...]
    questions: tuple[str | Path, ...]
    images: Path
    boxes: str = "semantic"
    kinds: tuple[str, ...] = ()
    keep_without_boxes: bool = False
    balanced_only: bool = False
    name: str = "gqa"

    def __post_init__(self) -> None:
        for flag, given, known in (("--boxes", (self.boxes,), RULES), ("--kinds", self.kinds, KINDS)):
            for value in given:
                if value not in known:
                    raise SayoError(
                        "D51",
                        f"there is no {value!r}{did_you_mean(value, known)}",
                        where=flag,
                        wanted=", ".join(known),
                        fix="write one of these",
                    )
        for flag, files in (("--scene-graphs", self.scene_graphs), ("--questions", self.questions)):
            if not files or isinstance(files, str):
                raise SayoError("D51", "no files are given", where=flag, got=files, fix="name at least one file")
        for place in (*self._graph_places(), *self._question_places()):
            if not place.path.is_file():
                raise SayoError("D51", "there is no such file", where=str(place), fix="correct the path")
        if not self.images.exists():
            raise SayoError(
                "D51", "there is no such folder or zip file of images", where=str(self.images), fix="correct --images"
            )

    def facts(self) -> dict[str, Any]:
        return {
            "source": self.name,
            "boxes": self.boxes,
            "kinds": sorted(self.kinds),
            "keep_without_boxes": self.keep_without_boxes,
            "balanced_only": self.balanced_only,
            "scene_graphs": _named(self._graph_places()),
            "questions": _named(self._question_places()),
            "images": [self.images.name, self.images.stat().st_size if self.images.is_file() else None],
        }

    def examples(self) -> Iterator[Example | LeftOut]:
        """Questions in the order of their files.

        Raises:
            SayoError: D41, D47, D48, D49, D50.
        """
        image_of = _images(self.images)
        graphs = SceneGraphs()
        for place in self._graph_places():
            graphs.read(place)
        seen = Hashes()
        for place in self._question_places():
            met = without = 0
            for id, record in json_items(*place, seen=seen):
                made = self._example(id, record, f"{place}, question {id!r}", graphs, image_of)
                if made is None:
                    continue
                if isinstance(made, LeftOut) and made.reason == "no_scene_graph":
                    without += 1
                else:
                    met += 1
                if without == NO_GRAPH_LIMIT and not met:
                    raise self._strangers(place, without)
                yield made
            if without and not met:
                raise self._strangers(place, without)

    def _strangers(self, place: Place, count: int) -> SayoError:
        graphs = ", ".join(str(graph) for graph in self._graph_places())
        return SayoError(
            "D50",
            "no image of these questions has a scene graph",
            where=str(place),
            got=f"{count} questions, none of an image of {graphs}",
            wanted="graphs of the same split",
            fix="give train questions with train graphs and val with val; for testdev, test and images "
            "n* none are published",
        )

    def _example(
        self, id: str, record: Any, where: str, graphs: SceneGraphs, image_of: Callable[[str], ImageRef]
    ) -> Example | LeftOut | None:
        image_id = _field(record, "imageId", where, str)
        if not _IMAGE_ID.fullmatch(image_id):
            raise _not_gqa(
                "the id of an image is not plain", where, got=ascii(image_id)[:80], wanted="letters and digits"
            )
        kind = _field(_field(record, "types", where, dict), "structural", where, str)
        if kind not in KINDS:
            raise _not_gqa(f"unknown kind of question {kind!r}", where, wanted=", ".join(KINDS))
        if self.kinds and kind not in self.kinds:
            return None
        if self.balanced_only and not _field(record, "isBalanced", where, bool):
            return None
        question = _field(record, "question", where, str)
        graph = graphs.get(image_id)
        if graph is None:
            return LeftOut(id, "no_scene_graph", image_id)
        answer = record.get("answer")
        if not isinstance(answer, str):
            return LeftOut(id, "empty_answer", f"{type(answer).__name__} instead of text")
        ids, scene = (_semantic if self.boxes == "semantic" else _grounding)(record, where)
        unknown = [of for of in ids if of not in graph.objects]
        found = [graph.objects[of] for of in ids] if not unknown else []
        if scene and not unknown:
            found.append(("scene", (0, 0, *graph.size)))
        if not found and not self.keep_without_boxes:
            if unknown:
                return LeftOut(id, "unknown_object", f"{unknown[0]} of image {image_id}")
            return LeftOut(id, "no_object", image_id)
        return Example(
            id=id,
            images=(image_of(image_id),),
            question=question,
            answer=answer,
            boxes=(tuple(box for _, box in found),),
            box_names=(tuple(name for name, _ in found),),
            box_format="xywh",
            box_source=f"gqa_{self.boxes}",
            data_source="sayo/gqa",
            sizes=(graph.size,),
            kind=kind,
        )

    def _graph_places(self) -> list[Place]:
        return [place_of(file) for file in self.scene_graphs]

    def _question_places(self) -> list[Place]:
        places = []
        for file in self.questions:
            place = place_of(file)
            places += _question_files(place.path) if place.path.is_dir() else [place]
        return places


# ------------------------------------------------------------------------------------------------ objects of a question


def _semantic(record: Mapping[str, Any], where: str) -> tuple[list[int], bool]:
    """Ids of the last object of the program, and False: no box of the whole image."""
    references = _REFERENCE.findall(_field(record, "semanticStr", where, str))
    return (_numbers(references[-1]) if references and references[-1] != "-" else []), False


def _grounding(record: Mapping[str, Any], where: str) -> tuple[list[int], bool]:
    """Ids of the annotated objects, each once in the order of the annotations, and whether the scene is meant too."""
    annotations = _field(record, "annotations", where, dict)
    ids: dict[int, None] = {}
    for part in ("question", "fullAnswer"):
        there = f"{where}, annotations.{part}"
        for value in _field(annotations, part, there, dict).values():
            for text in value if isinstance(value, list) else [value]:
                if not isinstance(text, str) or not _IDS.fullmatch(text):
                    raise _not_gqa(
                        "an annotation is not the id of an object",
                        there,
                        got=repr(text)[:80],
                        wanted='"12", "12,34" or a list of such',
                    )
                ids.update(dict.fromkeys(_numbers(text)))
    steps = _field(record, "semantic", where, list)
    scene = any(
        _field(step, "operation", where, str) == "select" and _field(step, "argument", where, str) == "scene"
        for step in steps
    )
    return list(ids), scene


def _numbers(text: str) -> list[int]:
    return [int(id) for id in text.split(",")]


# --------------------------------------------------------------------------------------------------------------- fields


def _field(record: Any, key: str, where: str, kind: type = object) -> Any:
    if not isinstance(record, dict) or key not in record:
        got = ", ".join(sorted(record)[:15]) if isinstance(record, dict) else type(record).__name__
        raise _not_gqa(f"there is no {key!r}", where, got=got)
    value = record[key]
    if not isinstance(value, kind):
        raise _not_gqa(f"{key!r} is of the wrong type", where, got=repr(value)[:80], wanted=kind.__name__)
    return value


def _pixels(value: Any, where: str) -> int:
    """A whole number of pixels, which is what GQA publishes; 12.0 is one."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value != int(value) or abs(value) > _MAX_PIXEL:
        raise _not_gqa("a coordinate is not a whole number of pixels", where, got=repr(value)[:80], wanted="a number")
    return int(value)


def _not_gqa(what: str, where: str, *, got: object = None, wanted: object = None) -> SayoError:
    """D49: a record does not have the form of GQA's."""
    return SayoError(
        "D49",
        what,
        where=where,
        got=got,
        wanted=wanted,
        fix="use the train or val files of GQA's download page; test questions have no answers, and "
        "mirrors that changed the format are not read",
    )


# ---------------------------------------------------------------------------------------------------------------- files


def _named(places: Sequence[Place]) -> list[list[Any]]:
    return [[place.path.name, place.member, place.path.stat().st_size] for place in places]


def _question_files(folder: Path) -> list[Place]:
    """The question files of a folder, if they are of one set: balanced questions are also among all questions."""
    sets: dict[str, list[tuple[int, str]]] = {}
    for file in sorted(os.listdir(folder)):
        match = _QUESTION_FILE.fullmatch(file)
        if match:
            sets.setdefault(match[1], []).append((int(match[2] or 0), file))
    if len(sets) != 1:
        raise SayoError(
            "D51",
            "the folder does not hold the questions of one set",
            where=str(folder),
            got=", ".join(sorted(sets)) or "no question files",
            wanted="such as train_all_questions_*.json",
            fix="name the files one by one",
        )
    return [Place(folder / file, None) for _, file in sorted(*sets.values())]


def _images(images: Path) -> Callable[[str], ImageRef]:
    """Image id -> where it is. That it is there, ``read_image`` finds out; that some images are, is checked here.

    Raises:
        SayoError: D41 for an archive with an unsafe member, D50 where there are no images or in several folders.
    """
    if images.is_dir():
        for folder in (images, images / "images"):
            if folder.is_dir() and any(islice((e for e in os.scandir(folder) if e.name.endswith(".jpg")), 1)):
                return lambda image_id: ImageRef(image_id, folder / f"{image_id}.jpg")
        raise _no_images(images, "no .jpg")
    try:
        with zipfile.ZipFile(images) as archive:
            prefixes: set[str] = set()
            for info in archive.infolist():
                check_member(info, where=str(images))
                if info.filename.endswith(".jpg") and not info.filename.startswith("__MACOSX/"):
                    prefixes.add(info.filename[: info.filename.rfind("/") + 1])
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        message = " ".join(str(error).split())
        raise SayoError(
            "D48",
            f"the zip file cannot be read ({message})",
            where=str(images),
            fix="give a folder or a whole zip file; download it again",
        ) from error
    if len(prefixes) != 1:
        raise _no_images(images, f".jpg in {sorted(prefixes)[:5]}" if prefixes else "no .jpg")
    (prefix,) = prefixes
    return lambda image_id: ImageRef(image_id, images, f"{prefix}{image_id}.jpg")


def _no_images(images: Path, got: str) -> SayoError:
    return SayoError(
        "D50",
        "these are not GQA's images",
        where=str(images),
        got=got,
        wanted="<image id>.jpg",
        fix="give the folder images/ or images.zip of the download page",
    )


# ---------------------------------------------------------------------------------------------------------------- flags


SHOWN = ("--boxes",)  # on the page of --help, beside the required flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare gqa``."""
    parser.add_argument(
        "--scene-graphs",
        nargs="+",
        required=True,
        metavar="FILE",
        help="train_sceneGraphs.json; or sceneGraphs.zip::train_sceneGraphs.json",
    )
    parser.add_argument(
        "--questions",
        nargs="+",
        required=True,
        metavar="FILE",
        help="question files of the same split, or the folder train_all_questions",
    )
    parser.add_argument("--images", type=Path, required=True, help="the folder of images, or images.zip")
    parser.add_argument(
        "--boxes",
        choices=RULES,
        default="semantic",
        help="which objects a question is about: semantic as SAYO, grounding as GQA's evaluation "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=(),
        metavar="KIND",
        help=f"only questions of these kinds: {', '.join(KINDS)}",
    )
    parser.add_argument(
        "--keep-without-boxes",
        action="store_true",
        help="keep questions whose object is missing, as rows without boxes",
    )
    parser.add_argument("--balanced-only", action="store_true", help="only questions of the balanced set")


def from_args(args: argparse.Namespace) -> GqaSource:
    """The source from the flags of ``add_flags``."""
    return GqaSource(
        tuple(args.scene_graphs),
        tuple(args.questions),
        args.images,
        args.boxes,
        tuple(args.kinds),
        args.keep_without_boxes,
        args.balanced_only,
    )
