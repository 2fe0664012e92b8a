"""Small files as GQA publishes them."""

import json
import zipfile
from pathlib import Path

from sayo_verl.data.rows import LeftOut
from sayo_verl.data.sources.gqa import GqaSource


def thing(name, x, y, w, h):
    return {
        "name": name,
        "x": x,
        "y": y,
        "w": w,
        "h": h,
        "attributes": ["red"],
        "relations": [{"name": "near", "object": "7"}],
    }


GRAPHS = {
    "1001": {
        "width": 640,
        "height": 480,
        "location": "kitchen",
        "objects": {
            "11": thing("cup", 10, 20, 30, 40),
            "12": thing("table", 0, 200, 640, 280),
            "13": thing("cup", 50, 20, 30, 41),
            "0": thing("lamp", 300, 0, 20, 60),
        },
    },
    "1002": {"width": 362, "height": 500, "objects": {"1011688": thing("mirror", 185, 3, 178, 244)}},
    "1003": {"width": 500, "height": 375, "weather": "sunny", "objects": {}},
}


def question(image, text, answer, program, *, kind="query", marks=(), full=(), balanced=True):
    """A record as GQA writes it; ``program`` is a list of (operation, argument)."""
    semantic = [
        {"operation": o, "argument": a, "dependencies": [i - 1] if i else []} for i, (o, a) in enumerate(program)
    ]
    steps = [f"{s['operation']}: {s['argument']}" + "".join(f" [{d}]" for d in s["dependencies"]) for s in semantic]
    return {
        "semantic": semantic,
        "entailed": [],
        "equivalent": ["1"],
        "question": text,
        "imageId": image,
        "isBalanced": balanced,
        "groups": {"global": None, "local": "06-x"},
        "answer": answer,
        "semanticStr": "->".join(steps),
        "annotations": {"answer": {}, "question": dict(marks), "fullAnswer": dict(full)},
        "types": {"detailed": "x", "semantic": "rel", "structural": kind},
        "fullAnswer": f"It is {answer}.",
    }


def program(*arguments):
    return [("select" if i == 0 else "relate", a) for i, a in enumerate(arguments)] + [("query", "name")]


QUESTIONS = {
    "01": question(
        "1001",
        "What is on the table?",
        "cup",
        program("table (12)", "_,on,s (11)"),
        marks={"4": "12"},
        full={"1": "11", "6": "12"},
    ),
    "02": question(
        "1001",
        "Is there a dog near the cup?",
        "no",
        program("cup (11)", "dog,near,s (-)"),
        kind="verify",
        marks={"5": "11"},
        full={"6": "11"},
        balanced=False,
    ),
    "03": question("1002", "What is on the wall?", "mirror", program("mirror (1011688)"), full={"1": "1011688"}),
    "04": question(
        "1003",
        "Is it indoors or outdoors?",
        "outdoors",
        [("select", "scene"), ("choose location", "indoors|outdoors")],
        kind="choose",
    ),
    "05": question("n123", "Which room is it?", "bedroom", [("select", "scene"), ("query", "room")]),
    "06": question(
        "1001",
        "What is left of the cup?",
        "cup",
        program("cup (99)", "_,left,s (13)"),
        marks={"4": "99"},
        full={"1": "13"},
    ),
    "07": question(
        "1001",
        "Do both cups and the lamp shine?",
        "yes",
        program("lamp (0)", "x (12)", "cups (11,13)"),
        kind="logical",
        marks={"2:4": "11,13", "7": "0"},
        full={"1": ["13", "0"], "3": "11"},
        balanced=False,
    ),
    "08": question(
        "1001",
        "Which is larger?",
        "table",
        program("cup (11)", "x (0)", "table (98)"),
        kind="compare",
        full={"2": "12"},
    ),
}


def source(folder: Path, **options) -> GqaSource:
    files = {
        "scene_graphs": (folder / "train_sceneGraphs.json",),
        "images": folder / "images",
        "questions": (folder / "train_balanced_questions.json",),
    }
    return GqaSource(**{**files, **options})


def with_question(folder: Path, change) -> GqaSource:
    """The source, with question 01 changed."""
    records = json.loads(json.dumps(QUESTIONS))
    change(records["01"])
    (folder / "changed.json").write_text(json.dumps(records))
    return source(folder, questions=(folder / "changed.json",), boxes="grounding")


def outcomes(items) -> dict[str, object]:
    """id -> names of its boxes, or the reason that it was left out."""
    return {e.id: e.reason if isinstance(e, LeftOut) else e.box_names[0] for e in items}


def pack(path: Path, members) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path
