"""Records in the published formats with a value, a key or a byte changed: rows, counted drops or documented refusals.

``SAYO_DATA_SAMPLES`` may name a folder of further documents, ``gqa_graphs*.json``, ``gqa_questions*.json``,
``refocus*.json``, ``coco*.json``, ``labelme*.json``, ``jsonl*.json`` (one line), that are changed the same way; without
it the small ones below are.
"""

import copy
import datetime
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sayo_verl.data.boxes import place_boxes
from sayo_verl.data.images import store_image
from sayo_verl.data.rows import REASONS, Drop, Example, LeftOut, Source, check_text
from sayo_verl.data.sources.coco import CocoSource
from sayo_verl.data.sources.gqa import GqaSource
from sayo_verl.data.sources.jsonl import JsonlSource
from sayo_verl.data.sources.labelme import LabelmeSource
from sayo_verl.data.sources.refocus import RefocusSource
from sayo_verl.errors import SayoError

# A hang shows as a deadline; five seconds are a thousand times what an example takes.
PROPERTY = settings(
    derandomize=True,
    deadline=datetime.timedelta(seconds=5),
    max_examples=75,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

GRAPHS = {
    "7": {
        "width": 60,
        "height": 40,
        "objects": {
            "12": {"name": "cat", "x": 5, "y": 4, "w": 20, "h": 18, "attributes": ["grey"], "relations": []},
            "13": {
                "name": "mat",
                "x": 2,
                "y": 20,
                "w": 50,
                "h": 18,
                "attributes": [],
                "relations": [{"name": "under", "object": "12"}],
            },
        },
    }
}
QUESTIONS = {
    "01": {
        "imageId": "7",
        "question": "What is on the mat?",
        "answer": "cat",
        "fullAnswer": "A cat.",
        "isBalanced": True,
        "types": {"structural": "query", "semantic": "rel", "detailed": "relO"},
        "semantic": [
            {"operation": "select", "dependencies": [], "argument": "mat (13)"},
            {"operation": "relate", "dependencies": [0], "argument": "_,on,s (12)"},
        ],
        "semanticStr": "select: mat (13)->relate: _,on,s (12) [0]",
        "annotations": {"question": {"4": "13"}, "answer": {"0": "12"}, "fullAnswer": {"1": "12"}},
        "groups": {"global": None, "local": "06-mat"},
        "entailed": [],
        "equivalent": ["01"],
    }
}
REFOCUS = {
    "a": {
        "query": "What was it in 2007?",
        "answer": "4",
        "figure_path": "7.jpg",
        "type": "v_bar",
        "x_values": ["2007", "2008"],
        "y_values": ["a"],
        "x_bboxes": [{"x1": 0.1, "y1": 0.2, "x2": 0.3, "y2": 0.9}, {"x1": 0.5, "y1": 0.2, "x2": 0.7, "y2": 0.9}],
        "y_bboxes": [{"x1": 0.0, "y1": 0.1, "x2": 0.2, "y2": 0.3}],
        "figure_bbox": {"x1": 0.0, "y1": 0.0, "x2": 1.0, "y2": 1.0},
    }
}
COCO = {
    "images": [{"id": 7, "file_name": "7.jpg", "width": 60, "height": 40}],
    "categories": [{"id": 1, "name": "cat", "isthing": 1}],
    "annotations": [
        {
            "id": 3,
            "image_id": 7,
            "category_id": 1,
            "bbox": [5, 4, 20.5, 18],
            "iscrowd": 0,
            "area": 300,
            "segmentation": [[5, 4, 25, 4, 25, 22]],
        }
    ],
}
LABELME = {
    "version": "5.0.1",
    "flags": {},
    "imagePath": "7.jpg",
    "imageData": None,
    "imageHeight": 40,
    "imageWidth": 60,
    "shapes": [
        {"label": "cat", "points": [[5.5, 4.0], [25.0, 22.0]], "group_id": None, "shape_type": "rectangle", "flags": {}}
    ],
}
LINE = {
    "id": "q",
    "image": "7.jpg",
    "question": "What is it?",
    "answer": "cat",
    "boxes": [[5, 4, 25, 22]],
    "box_names": ["cat"],
    "size": [60, 40],
    "kind": "what",
}
DOCUMENTS: dict[str, Any] = {
    "gqa_graphs": GRAPHS,
    "gqa_questions": QUESTIONS,
    "refocus": REFOCUS,
    "coco": COCO,
    "labelme": LABELME,
    "jsonl": LINE,
}
SAMPLES = Path(os.environ["SAYO_DATA_SAMPLES"]) if "SAYO_DATA_SAMPLES" in os.environ else None


def source_of(kind: str, folder: Path) -> Source:
    """The source over documents in ``folder``."""
    if kind.startswith("gqa"):
        return GqaSource(
            (str(folder / "gqa_graphs.json"),),
            (str(folder / "gqa_questions.json"),),
            folder,
            boxes="grounding" if kind == "gqa_graphs" else "semantic",
        )
    if kind == "refocus":
        return RefocusSource(folder / "refocus.json", images=folder)
    if kind == "coco":
        return CocoSource(folder / "coco.json", folder, ask=("count", "presence"))
    if kind == "labelme":
        return LabelmeSource(folder / "labelme", images=folder, ask=("count", "presence"))
    return JsonlSource(folder / "jsonl.jsonl", "xyxy", images=folder)


def outcome(kind: str, folder: Path) -> list[str]:
    """What becomes of the documents: "row", a reason, or the code of the refusal that ended it."""
    found = []
    try:
        for thing in source_of(kind, folder).examples():
            if isinstance(thing, LeftOut):
                found.append(thing.reason)
                continue
            try:
                found.append(row(thing, folder))
            except Drop as drop:
                found.append(drop.reason)
    except SayoError as error:
        found.append(error.code if error.fix and error.where else "nothing to go by")
    return found


def row(example: Example, folder: Path) -> str:
    check_text(example.question, example.answer)
    stored = store_image((folder / "7.jpg").read_bytes(), where="here")
    for boxes, names, size in zip(example.boxes, example.box_names, example.sizes or [None] * 9, strict=False):
        place_boxes(
            boxes,
            names,
            box_format=example.box_format,
            frame="auto",
            stored=stored,
            annotated=size,
            rescale=False,
            where=example.id,
        )
    return "row"


def write(kind: str, text: bytes, folder: Path) -> None:
    path = {"labelme": folder / "labelme" / "a.json", "jsonl": folder / "jsonl.jsonl"}.get(
        kind, folder / f"{kind}.json"
    )
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(out, format="JPEG")
    (tmp_path / "7.jpg").write_bytes(out.getvalue())
    for kind, document in DOCUMENTS.items():
        write(kind, json.dumps(document).encode(), tmp_path)
    return tmp_path


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything in a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inside for found in places(part, (*path, key)))]


def changed(document: Any, path: tuple, change: Any) -> Any:
    """A copy with the part at ``path`` replaced, or taken out where ``change`` is ``...``."""
    document = copy.deepcopy(document)
    if not path:
        return None if change is ... else change
    *way, last = path
    parent = document
    for key in way:
        parent = parent[key]
    if change is ...:
        del parent[last]
    else:
        parent[last] = change
    return document


JUNK = st.one_of(
    st.just(...),
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(
        [
            "",
            "-",
            "12,13",
            "../x",
            "http://x/y",
            "<image>",
            "\0",
            "\ud800",
            "a" * 300,
            [],
            {},
            [[]],
            [[1, 2]],
            {"a": {}},
            [1e308] * 4,
            [3, 3, 1, 1],
            [[0, 0, 1, 1]] * 3,
            [{}],
            "9" * 30,
            -1,
            0,
            10**9,
        ]
    ),
)
ORIGINALS = list(DOCUMENTS.items())
if SAMPLES is not None:
    ORIGINALS += [
        (kind, json.loads(p.read_text())) for kind in DOCUMENTS for p in sorted(SAMPLES.glob(f"{kind}*.json"))
    ]


def test_unchanged_documents_are_rows(folder):
    for kind in DOCUMENTS:
        found = outcome(kind, folder)
        assert found
        assert set(found) == {"row"}, (kind, found)


@pytest.mark.parametrize(("kind", "document"), ORIGINALS, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(ORIGINALS)])
@PROPERTY
@given(data=st.data())
def test_changed_values_are_rows_drops_or_refusals(folder, kind, document, data):
    path = data.draw(st.sampled_from(places(document)))
    text = json.dumps(changed(document, path, data.draw(JUNK)))
    write(kind, text.encode("utf-8", "surrogatepass"), folder)
    for found in outcome(kind, folder):
        assert found == "row" or found in REASONS or found[0] in "DV"


@pytest.mark.parametrize("kind", DOCUMENTS)
@PROPERTY
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_changed_bytes_are_rows_drops_or_refusals(folder, kind, at, byte, cut):
    text = bytearray(json.dumps(DOCUMENTS[kind]).encode())
    at %= len(text)
    text[at] = byte
    write(kind, bytes(text[:at] if cut else text), folder)
    for found in outcome(kind, folder):
        assert found == "row" or found in REASONS or found[0] in "DV"
