"""GQA: questions about real photos, with scene graphs that place the objects (Hudson and Manning, CVPR 2019).

Files, as published at cs.stanford.edu/people/dorarad/gqa/download.html (unpack archives of several files):

    {train,val}_sceneGraphs.json                          image id -> width, height, objects{id -> name, x, y, w, h}
    {train,val}_balanced_questions.json                   question id -> imageId, question, answer, types, semantic,
    train_all_questions/train_all_questions_{0..9}.json     semanticStr, annotations, ...
    images/<image id>.jpg, or images.zip

x, y is the upper left corner, and all values are pixels of the picture. Some boxes end beyond its edge (object 1011688
of image 2318337: 185 + 178 > 362); they are passed on unchanged. ``fullAnswer``, a sentence, is not used. The graphs
of the 75,000 train images take 370 MB of memory; the questions are streamed.

Which objects a question is about (``--boxes``):

    semantic    The object in the last parentheses of ``semanticStr``: "select: man (12)->relate: person,helping,s (34)
                [0]->query: name [1]" is about 34. SAYO's paper uses the final target object. The pattern in its
                released preprocessing takes that object if there are one or two parentheses, but an earlier one,
                mostly the first, if there are three or more. Ours always takes the last one. "-", no such object in
                the image, is ``no_object``. Several ids in one pair of parentheses give several boxes (SAYO's: no row).
    grounding   The objects of ``annotations.question`` and ``annotations.fullAnswer``, in which GQA's own eval.py sums
                attention for its grounding score. It counts an object as often as it is annotated; here each gives
                one box. A comment there adds the whole image where the question is about the whole scene, but the
                test below it (is "scene" a key of a step) is never true of the published files. Our reading of the
                comment: a step that selects "scene" adds a box of the whole image, named "scene".

Left out: ``no_scene_graph`` (images n*: GQA publishes none, nor any for testdev and test), ``empty_answer``; and
``no_object``, ``unknown_object`` (one of the objects is not in the graph: an incomplete region would train the wrong
thing), which become rows without boxes with ``--keep-without-boxes``.

Licence: none is stated for the annotations. The photos are those of Visual Genome, with their photographers' terms.
Download them yourself, and do not publish rows with photos.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from sayo_verl.data.json_files import json_items
from sayo_verl.data.rows import Example, LeftOut, Source
from sayo_verl.data.sources import common
from sayo_verl.errors import SayoError

NAMED_BOXES = False
NO_GRAPH_LIMIT = 1000  # so many questions of a file without a scene graph, and none with one, stop the work
_REFERENCE = re.compile(r"\((-|[0-9]+(?: *, *[0-9]+)*)\)")
_Ids = Annotated[str, Field(pattern=r"^[0-9]+( *, *[0-9]+)*$")]
_Marks = dict[str, _Ids | list[_Ids]]
_Annotations = TypedDict("_Annotations", {"question": _Marks, "fullAnswer": _Marks})  # noqa: UP013
_Thing = TypedDict("_Thing", {"name": str, "x": float, "y": float, "w": float, "h": float})  # noqa: UP013
_Graph = TypedDict("_Graph", {"width": common.Side, "height": common.Side, "objects": dict[str, _Thing]})  # noqa: UP013


class _Question(BaseModel):
    image_id: str = Field(alias="imageId")
    question: str
    answer: Any = None
    types: dict[str, str]


class _Semantic(_Question):
    program: str = Field(alias="semanticStr")

    def objects(self) -> tuple[list[str], bool]:
        """Ids of the last object of the program, and False: no box of the whole image."""
        last = _REFERENCE.findall(self.program)[-1:]
        return _split(last if last != ["-"] else []), False


class _Grounding(_Question):
    semantic: list[dict[str, Any]]
    annotations: _Annotations

    def objects(self) -> tuple[list[str], bool]:
        """Ids of the annotated objects in their order, and whether the whole image is meant too."""
        marks = [*self.annotations["question"].values(), *self.annotations["fullAnswer"].values()]
        texts = [text for mark in marks for text in ([mark] if isinstance(mark, str) else mark)]
        scene = any(step.get("operation") == "select" and step.get("argument") == "scene" for step in self.semantic)
        return _split(texts), scene


_RULES: dict[str, type[_Question]] = {"semantic": _Semantic, "grounding": _Grounding}


def _split(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(id.strip() for text in texts for id in text.split(",")))


@dataclass(frozen=True)
class GqaSource(Source):
    """GQA as a source of examples; a folder among ``questions`` stands for the *_questions*.json in it."""

    scene_graphs: tuple[Path, ...]
    questions: tuple[Path, ...]
    images: Path
    boxes: str = "semantic"
    keep_without_boxes: bool = False
    name: str = "gqa"

    def __post_init__(self) -> None:
        for path in (*self.scene_graphs, *self._question_files()):
            common.check_input(path)

    def _question_files(self) -> list[Path]:
        return [f for q in self.questions for f in (sorted(q.glob("*_questions*.json*")) if q.is_dir() else [q])]

    def facts(self) -> dict[str, Any]:
        files = common.file_facts([*self.scene_graphs, *self._question_files()])
        return {"boxes": self.boxes, "images": str(self.images), "files": files}

    def examples(self) -> Iterator[Example | LeftOut]:
        """Questions in the order of their files. D47, D48: an unreadable file; D50: no graph of any image; D58."""
        below = self.images / "images"
        folder = common.ImageFolder(below if below.is_dir() else self.images)
        graphs = self._graphs()
        for path in self._question_files():
            with_graph = without = 0
            for id, value in json_items(path):
                where = f"{path}, question {id!r}"
                question: Any = common.parse(_RULES[self.boxes], value, where)
                if question.image_id in graphs:
                    with_graph += 1
                    yield self._example(id, question, *graphs[question.image_id], folder)
                elif (without := without + 1) == NO_GRAPH_LIMIT and not with_graph:
                    break
                else:
                    yield LeftOut(id, "no_scene_graph", question.image_id)
            if without and not with_graph:
                what, wanted = "no image of these questions has a scene graph", "graphs of the same split"
                got = f"{without} questions, none of an image of {', '.join(map(str, self.scene_graphs))}"
                fix = "give train questions with train graphs and val with val; for testdev, test, n* there are none"
                raise SayoError("D50", what, where=str(path), got=got, wanted=wanted, fix=fix)

    def _graphs(self) -> dict[str, tuple[tuple[int, int], dict[str, tuple[Any, ...]]]]:
        """Image id -> size and {object id -> (name, x, y, w, h)}."""
        graphs = {}
        for path in self.scene_graphs:
            for id, value in json_items(path):
                graph = common.parse(_Graph, value, f"{path}, image {id!r}")
                things = {key: (sys.intern(t["name"]), *map(t.get, "xywh")) for key, t in graph["objects"].items()}
                graphs[id] = ((graph["width"], graph["height"]), things)
        return graphs

    def _example(self, id: str, question: Any, size: Any, things: Any, folder: common.ImageFolder) -> Example | LeftOut:
        if not isinstance(question.answer, str):
            return LeftOut(id, "empty_answer", f"{type(question.answer).__name__} instead of text")
        ids, scene = question.objects()
        unknown = [key for key in ids if key not in things]
        found = [] if unknown else [things[key] for key in ids] + [("scene", 0, 0, *size)] * scene
        if not found and not self.keep_without_boxes:
            reason, detail = ("unknown_object", f"{unknown[0]} of image ") if unknown else ("no_object", "")
            return LeftOut(id, reason, detail + question.image_id)
        image = folder.ref(f"{question.image_id}.jpg", f"GQA question {id}")
        boxes, names = tuple(box[1:] for box in found), tuple(box[0] for box in found)
        row = (id, (image,), question.question, question.answer, (boxes,), (names,), "xywh")
        kind = question.types.get("structural", "")
        return Example(*row, f"gqa_{self.boxes}", "sayo/gqa", sizes=(size,), kind=kind)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``sayo prepare gqa``."""
    graphs, questions = "such as train_sceneGraphs.json", "of the same split, or train_all_questions/"
    boxes = f"{' (as SAYO) or '.join(_RULES)} (default: %(default)s)"
    parser.add_argument("--scene-graphs", nargs="+", type=Path, required=True, metavar="FILE", help=graphs)
    parser.add_argument("--questions", nargs="+", type=Path, required=True, metavar="FILE", help=questions)
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="folder of images, or images.zip")
    parser.add_argument("--boxes", choices=tuple(_RULES), default=GqaSource.boxes, metavar="RULE", help=boxes)


def from_args(args: argparse.Namespace) -> GqaSource:
    """The source from the flags of ``add_flags``."""
    files = tuple(args.scene_graphs), tuple(args.questions)
    return GqaSource(*files, args.images, args.boxes, args.keep_without_boxes)
