"""GQA: examples from files in the published format, and what stops the work or is left out."""

import argparse
import gzip
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gqa_files import GRAPHS, QUESTIONS, outcomes, pack, program, question, source, with_question
from support.refusals import refusal

from sayo_verl.data.images import image_bytes
from sayo_verl.data.rows import Example, LeftOut
from sayo_verl.data.sources import gqa
from sayo_verl.data.sources.gqa import GqaSource

# ------------------------------------------------------------------------------------------------------------ the rules


def test_semantic_takes_the_last_object_of_the_program(folder):
    assert outcomes(source(folder).examples()) == {
        "01": ("cup",),
        "02": "no_object",  # the last one is "-"
        "03": ("mirror",),
        "04": "no_object",
        "05": "no_scene_graph",
        "06": ("cup",),  # that 99, which is not the last, is not in the graph, does not matter
        "07": ("cup", "cup"),
        "08": "unknown_object",  # three references: the last one, not the first
    }


def test_grounding_takes_the_annotated_objects_and_the_scene(folder):
    assert outcomes(source(folder, boxes="grounding").examples()) == {
        "01": ("table", "cup"),  # of the question first; the table, annotated twice, once
        "02": ("cup",),
        "03": ("mirror",),
        "04": ("scene",),
        "05": "no_scene_graph",
        "06": "unknown_object",  # one of two: no box of the other either
        "07": ("cup", "cup", "lamp"),
        "08": ("table",),
    }
    boxes = {e.id: e.boxes for e in source(folder, boxes="grounding").examples() if isinstance(e, Example)}
    assert boxes["04"] == (((0, 0, 500, 375),),)  # the whole picture of 1003
    assert boxes["07"] == (((10, 20, 30, 40), (50, 20, 30, 41), (300, 0, 20, 60)),)


def test_only_a_step_that_selects_the_scene_adds_the_whole_image(folder):
    def change(record):
        record["semantic"] += [
            {"operation": "select", "argument": "scenery (12)", "dependencies": []},
            {"operation": "verify", "argument": "scene", "dependencies": []},
        ]

    assert outcomes(with_question(folder, change).examples())["01"] == ("table", "cup")


def test_the_scene_does_not_replace_an_unknown_object(folder):
    def change(record):
        record["semantic"][0]["argument"] = "scene"
        record["annotations"]["question"] = {"4": "99"}

    made = with_question(folder, change)
    assert outcomes(made.examples())["01"] == "unknown_object"
    (bare, *_) = GqaSource(**{**vars(made), "keep_without_boxes": True}).examples()
    assert bare.boxes == ((),)


def test_an_example_has_all_that_a_row_needs(folder):
    example = next(iter(source(folder).examples()))
    assert (example.id, example.question, example.answer) == ("01", "What is on the table?", "cup")
    assert example.boxes == (((10, 20, 30, 40),),)
    assert (example.box_format, example.box_source, example.data_source) == ("xywh", "gqa_semantic", "sayo/gqa")
    assert (example.sizes, example.kind) == (((640, 480),), "query")
    assert image_bytes(example.images[0]) == b"jpeg 1001"
    (mirror,) = (e for e in source(folder).examples() if e.id == "03")
    assert (mirror.boxes, mirror.sizes) == ((((185, 3, 178, 244),),), ((362, 500),))  # past the edge: passed on


@pytest.mark.parametrize(
    ("boxes", "reasons"),
    [
        ("semantic", {"no_object": 2, "unknown_object": 1, "no_scene_graph": 1}),
        ("grounding", {"unknown_object": 1, "no_scene_graph": 1}),
    ],
)
def test_questions_of_missing_objects_are_kept_without_boxes_only_on_request(folder, boxes, reasons):
    items = list(source(folder, boxes=boxes).examples())
    kept = list(source(folder, boxes=boxes, keep_without_boxes=True).examples())
    assert Counter(e.reason for e in items if isinstance(e, LeftOut)) == reasons
    assert [e.id for e in kept] == [e.id for e in items] == list(QUESTIONS)
    assert Counter(e.reason for e in kept if isinstance(e, LeftOut)) == {"no_scene_graph": 1}
    bare = [e for e in kept if isinstance(e, Example) and not e.boxes[0]]
    assert len(bare) == sum(reasons.values()) - 1
    assert all(e.boxes == ((),) and e.box_names == ((),) and e.sizes[0] is not None for e in bare)
    assert [e for e in kept if e not in bare and isinstance(e, Example)] == [e for e in items if isinstance(e, Example)]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from(["11", "12", "13", "0", "99", "-"]), min_size=1, max_size=3), max_size=5))
def test_boxes_are_those_of_the_ids(tmp_path_factory, references):
    folder = tmp_path_factory.mktemp("gqa")
    references = [["-"] if "-" in ids else list(dict.fromkeys(ids)) for ids in references]
    steps = [("select", f"x ({','.join(ids)})") for ids in references] + [("query", "name")]
    (folder / "q.json").write_text(json.dumps({"1": question("1001", "q", "a", steps)}))
    (folder / "g.json").write_text(json.dumps(GRAPHS))
    (made,) = GqaSource((folder / "g.json",), (folder / "q.json",), folder).examples()
    last = references[-1] if references else ["-"]
    objects = GRAPHS["1001"]["objects"]
    if last == ["-"] or "99" in last:
        assert made.reason == ("no_object" if last == ["-"] else "unknown_object")
    else:
        assert made.boxes == (tuple(tuple(objects[id][side] for side in "xywh") for id in last),)
        assert made.box_names == (tuple(objects[id]["name"] for id in last),)


# ------------------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("prefix", ["images/", "", "gqa/images/"])
def test_plain_and_packed_files_give_the_same_examples(folder, prefix):
    (folder / "q.json.gz").write_bytes(gzip.compress(json.dumps(QUESTIONS).encode()))
    graphs = pack(folder / "g.zip", {"train_sceneGraphs.json": json.dumps(GRAPHS)})
    photos = {f"{prefix}{image}.jpg": b"jpeg " + image.encode() for image in GRAPHS}
    images = pack(folder / "images.zip", {**photos, "__MACOSX/._1001.jpg": b"junk"})
    plain = list(source(folder).examples())
    for other in (
        source(folder, images=images, questions=(folder / "q.json.gz",), scene_graphs=(graphs,)),
        source(folder, images=folder),  # that holds images/
    ):
        for one, same in zip(plain, other.examples(), strict=True):
            if isinstance(one, LeftOut):
                assert one == same
            else:
                assert image_bytes(one.images[0]) == image_bytes(same.images[0])
                assert (one.id, one.boxes, one.box_names) == (same.id, same.boxes, same.box_names)


def test_several_files_and_a_folder_of_questions(folder):
    parts = folder / "train_all_questions"
    parts.mkdir()
    for number, id in ((2, "03"), (1, "02"), (0, "01")):
        (parts / f"train_all_questions_{number}.json").write_text(json.dumps({id: QUESTIONS[id]}))
    (parts / "readme.txt").write_text("?")
    assert [e.id for e in source(folder, questions=(parts,)).examples()] == ["01", "02", "03"]
    (folder / "val_sceneGraphs.json").write_text(json.dumps({"n123": GRAPHS["1003"]}))
    both = (folder / "train_sceneGraphs.json", folder / "val_sceneGraphs.json")
    assert outcomes(source(folder, scene_graphs=both, boxes="grounding").examples())["05"] == ("scene",)


def strangers(count: int) -> dict:
    return {f"x{i}": question("77", "q", "a", program("cup (1)")) for i in range(count)}


@pytest.mark.parametrize(("count", "read"), [(1, 1), (999, 999), (1500, 999)])
def test_questions_of_another_split_stop_the_work(folder, count, read):
    (folder / "val.json").write_text(json.dumps(strangers(count)))
    items = source(folder, questions=(folder / "train_balanced_questions.json", folder / "val.json")).examples()
    for _ in range(len(QUESTIONS) + read):
        assert isinstance(next(items), Example | LeftOut)
    with refusal("D50", "no image of these questions.*val.json.*train_sceneGraphs.json"):
        next(items)


def test_one_known_image_among_many_others_is_enough(folder):
    mixed = {**strangers(999), **QUESTIONS, **{f"y{i}": r for i, r in enumerate(strangers(1500).values())}}
    (folder / "mixed.json").write_text(json.dumps(mixed))
    assert len(list(source(folder, questions=(folder / "mixed.json",)).examples())) == len(mixed)


def test_options_of_the_command_line(folder):
    parser = argparse.ArgumentParser()
    gqa.add_flags(parser)
    made = source(folder)
    words = ["--scene-graphs", *made.scene_graphs, "--questions", *made.questions, "--images", made.images]
    args = parser.parse_args([*map(str, words), "--boxes", "grounding"])
    args.keep_without_boxes = True  # a flag of every source
    assert gqa.from_args(args) == source(folder, boxes="grounding", keep_without_boxes=True)
    with refusal("D63", "no such file"):
        source(folder, questions=(folder / "none.json",))
    assert made.facts() != source(folder, boxes="grounding").facts()


# --------------------------------------------------------------------------------------------- records of other formats

GRAPH_FAULTS = {
    "width": lambda g: g.pop("width"),
    "height": lambda g: g.update(height=0),
    "objects": lambda g: g.update(objects=list(g["objects"].values())),
    "objects.11.name": lambda g: g["objects"]["11"].pop("name"),
    "objects.11.x": lambda g: g["objects"]["11"].update(x="12px"),
    "objects.11.h": lambda g: g["objects"]["11"].update(h=None),
}


@pytest.mark.parametrize("key", GRAPH_FAULTS)
def test_a_graph_of_another_format(folder, key):
    graphs = json.loads(json.dumps(GRAPHS))
    GRAPH_FAULTS[key](graphs["1001"])
    (folder / "changed.json").write_text(json.dumps(graphs))
    with refusal("D58", f"{key}.*image '1001'"):
        next(source(folder, scene_graphs=(folder / "changed.json",)).examples())


QUESTION_FAULTS = {
    "imageId": lambda q: q.update(imageId=1001),
    "question": lambda q: q.pop("question"),
    "annotations": lambda q: q.pop("annotations"),
    "annotations.fullAnswer": lambda q: q["annotations"].pop("fullAnswer"),
    "annotations.question": lambda q: q["annotations"].update(question=[{"objectId": "4", "value": "12"}]),
    "annotations.question.4": lambda q: q["annotations"].update(question={"4": "table"}),
    "semantic.0": lambda q: q.update(semantic=["select: scene"]),
}


@pytest.mark.parametrize("key", QUESTION_FAULTS)
def test_a_question_of_another_format(folder, key):
    with refusal("D58", f"{key}.*question '01'"):
        next(with_question(folder, QUESTION_FAULTS[key]).examples())


@pytest.mark.parametrize("answer", [None, ["cup"], 3])
def test_an_answer_that_is_no_text_is_left_out(folder, answer):
    items = outcomes(with_question(folder, lambda q: q.update(answer=answer)).examples())
    assert (items["01"], items["03"]) == ("empty_answer", ("mirror",))
