"""GQA: examples from files in the published format, and everything that must stop or be left out."""

import argparse
import gzip
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gqa_files import GRAPHS, QUESTIONS, pack, question, source, told, with_question
from support.refusals import refusal

from sayo_verl.data.image_files import read_image
from sayo_verl.data.rows import Example, LeftOut
from sayo_verl.data.sources import gqa
from sayo_verl.data.sources.gqa import GqaSource

# ------------------------------------------------------------------------------------------------------------ the rules


def test_semantic_takes_the_last_object_of_the_program(folder):
    assert told(source(folder).examples()) == {
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
    assert told(source(folder, boxes="grounding").examples()) == {
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

    assert told(with_question(folder, change).examples())["01"] == ("table", "cup")


def test_the_scene_does_not_make_up_for_an_unknown_object(folder):
    def change(record):
        record["semantic"][0]["argument"] = "scene"
        record["annotations"]["question"] = {"4": "99"}

    assert told(with_question(folder, change).examples())["01"] == "unknown_object"
    (bare, *_) = gqa.GqaSource(**{**vars(with_question(folder, change)), "keep_without_boxes": True}).examples()
    assert isinstance(bare, Example)
    assert bare.boxes == ((),)


def test_an_example_has_all_that_a_row_needs(folder):
    example = next(iter(source(folder).examples()))
    assert isinstance(example, Example)
    assert (example.id, example.question, example.answer) == ("01", "What is on the table?", "cup")
    assert example.boxes == (((10, 20, 30, 40),),)
    assert (example.box_format, example.box_source, example.data_source) == ("xywh", "gqa_semantic", "sayo/gqa")
    assert (example.sizes, example.kind) == (((640, 480),), "query")
    assert (example.images[0].key, read_image(example.images[0])) == ("1001", b"jpeg 1001")


def test_a_box_past_the_edge_is_passed_on(folder):
    (mirror,) = (e for e in source(folder).examples() if e.id == "03")
    assert isinstance(mirror, Example)
    assert mirror.boxes == (((185, 3, 178, 244),),)
    assert mirror.sizes == ((362, 500),)


def test_missing_objects_leave_no_boxes_and_the_row_only_where_asked(folder):
    for boxes, reasons in (
        ("semantic", {"no_object": 2, "unknown_object": 1, "no_scene_graph": 1}),
        ("grounding", {"unknown_object": 1, "no_scene_graph": 1}),
    ):
        items = list(source(folder, boxes=boxes).examples())
        kept = list(source(folder, boxes=boxes, keep_without_boxes=True).examples())
        assert Counter(e.reason for e in items if isinstance(e, LeftOut)) == reasons
        assert [e.id for e in kept] == [e.id for e in items]
        assert Counter(e.reason for e in kept if isinstance(e, LeftOut)) == {"no_scene_graph": 1}
        bare = [e for e in kept if isinstance(e, Example) and not e.boxes[0]]
        assert len(bare) == sum(reasons.values()) - 1
        assert all(e.boxes == ((),) and e.box_names == ((),) and e.sizes[0] is not None for e in bare)
        with_boxes = [e for e in kept if isinstance(e, Example) and e.boxes[0]]
        assert with_boxes == [e for e in items if isinstance(e, Example)]


def test_kinds_and_the_balanced_set_choose(folder):
    def ids(**options):
        return [e.id for e in source(folder, **options).examples()]

    assert ids() == list(QUESTIONS)
    assert ids(kinds=("verify", "logical")) == ["02", "07"]
    assert ids(balanced_only=True) == ["01", "03", "04", "05", "06", "08"]
    assert ids(balanced_only=True, kinds=("logical",)) == []
    assert set(gqa.KINDS) == {r["types"]["structural"] for r in QUESTIONS.values()}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.lists(st.sampled_from(["11", "12", "13", "0", "99", "-"]), min_size=1, max_size=3), max_size=5))
def test_boxes_are_those_of_the_ids(tmp_path_factory, references):
    folder = tmp_path_factory.mktemp("gqa")
    references = [["-"] if "-" in ids else ids for ids in references]
    record = question(
        "1001", "q", "a", [("select", f"x ({','.join(ids)})") for ids in references] + [("query", "name")]
    )
    (folder / "q.json").write_text(json.dumps({"1": record}))
    (folder / "g.json").write_text(json.dumps(GRAPHS))
    (folder / "1.jpg").touch()
    (made,) = GqaSource((folder / "g.json",), (folder / "q.json",), folder).examples()
    last = references[-1] if references else ["-"]
    objects = GRAPHS["1001"]["objects"]
    if last == ["-"]:
        assert isinstance(made, LeftOut)
        assert made.reason == "no_object"
    elif "99" in last:
        assert isinstance(made, LeftOut)
        assert made.reason == "unknown_object"
    else:
        assert isinstance(made, Example)
        assert made.boxes == (tuple(tuple(objects[id][side] for side in "xywh") for id in last),)
        assert made.box_names == (tuple(objects[id]["name"] for id in last),)


# ------------------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("prefix", ["images/", "", "gqa/images/"])
@pytest.mark.parametrize("boxes", gqa.RULES)
def test_plain_and_packed_files_give_the_same_examples(folder, prefix, boxes):
    graphs, questions = json.dumps(GRAPHS), json.dumps(QUESTIONS)
    pack(folder / "sceneGraphs.zip", {"train_sceneGraphs.json": graphs, "val_sceneGraphs.json": "{}"})
    pack(folder / "q.zip", {"train_balanced_questions.json": questions})
    (folder / "q.json.gz").write_bytes(gzip.compress(questions.encode()))
    photos = {f"{prefix}{image}.jpg": b"jpeg " + image.encode() for image in GRAPHS}
    images = pack(folder / "images.zip", {**photos, "__MACOSX/._1001.jpg": b"junk"})
    plain = list(source(folder, boxes=boxes).examples())
    for packed in (
        source(
            folder,
            boxes=boxes,
            images=images,
            questions=(folder / "q.zip",),
            scene_graphs=(f"{folder}/sceneGraphs.zip::train_sceneGraphs.json",),
        ),
        source(folder, boxes=boxes, images=images, questions=(folder / "q.json.gz",)),
        source(folder, boxes=boxes, images=folder),
    ):
        items = list(packed.examples())
        for one, other in zip(plain, items, strict=True):
            if isinstance(one, LeftOut):
                assert one == other
                continue
            assert isinstance(other, Example)
            assert read_image(one.images[0]) == read_image(other.images[0])
            assert (one.images[0].key, one.question, one.boxes, one.box_names, one.sizes) == (
                other.images[0].key,
                other.question,
                other.boxes,
                other.box_names,
                other.sizes,
            )


def test_a_folder_of_questions_is_read_in_the_order_of_its_numbers(folder):
    parts = folder / "train_all_questions"
    parts.mkdir()
    for number, id in ((10, "03"), (2, "02"), (0, "01")):
        (parts / f"train_all_questions_{number}.json").write_text(json.dumps({id: QUESTIONS[id]}))
    (parts / "readme.txt").write_text("?")
    assert [e.id for e in source(folder, questions=(parts,)).examples()] == ["01", "02", "03"]
    (parts / "train_balanced_questions.json").write_text("{}")
    with refusal("D51", "one set") as refused:
        source(folder, questions=(parts,))
    assert "train_all, train_balanced" in str(refused.value)
    with refusal("D51", "one set"):
        source(folder, questions=(folder / "images",))


def test_facts_name_what_decides(folder):
    facts = source(folder).facts()
    assert facts == json.loads(json.dumps(facts))
    others = [
        source(folder, boxes="grounding"),
        source(folder, kinds=("query",)),
        source(folder, balanced_only=True),
        source(folder, keep_without_boxes=True),
        source(folder, images=folder),
    ]
    (folder / "more.json").write_text(json.dumps({"1": QUESTIONS["01"]}))
    others.append(source(folder, questions=(folder / "train_balanced_questions.json", folder / "more.json")))
    others.append(source(folder, scene_graphs=(folder / "train_sceneGraphs.json", folder / "more.json")))
    assert all(other.facts() != facts for other in others)
    assert list(source(folder).examples()) == list(source(folder).examples())
    (folder / "train_balanced_questions.json").write_text(json.dumps({"1": QUESTIONS["01"]}))
    assert source(folder).facts() != facts


def test_flags(folder):
    parser = argparse.ArgumentParser()
    gqa.add_flags(parser)
    base = ["--scene-graphs", "g.zip::a.json", "b.json", "--questions", "q.json", "--images", "i"]
    for name in ("g.zip", "b.json", "q.json", "i"):
        (folder / name).touch()

    def made(*more):
        words = [str(folder / w) if w[0] != "-" else w for w in base] + list(more)
        return gqa.from_args(parser.parse_args(words))

    assert made() == GqaSource((f"{folder}/g.zip::a.json", f"{folder}/b.json"), (f"{folder}/q.json",), folder / "i")
    options = made("--boxes", "grounding", "--kinds", "query", "choose", "--keep-without-boxes", "--balanced-only")
    assert (options.boxes, options.kinds, options.keep_without_boxes, options.balanced_only) == (
        "grounding",
        ("query", "choose"),
        True,
        True,
    )


def test_wrong_options(folder):
    with refusal("D51", r"did you mean 'semantic'"):
        source(folder, boxes="semantics")
    with refusal("D51", "verfy"):
        source(folder, kinds=("verfy",))
    for key in ("scene_graphs", "questions"):
        with refusal("D51", "no such file"):
            source(folder, **{key: (folder / "none.json",)})
        with refusal("D51", "no files"):
            source(folder, **{key: ()})
    with refusal("D51", "no such folder"):
        source(folder, images=folder / "none")
