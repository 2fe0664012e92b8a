"""GQA: examples from files in the published format, and everything that must stop or be left out."""

import argparse
import gzip
import json
import stat
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import refusal

from sayo_verl.data.image_files import read_image
from sayo_verl.data.rows import Example, LeftOut
from sayo_verl.data.sources import gqa
from sayo_verl.data.sources.gqa import GqaSource, SceneGraphs
from sayo_verl.data.streams import place_of


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


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train_sceneGraphs.json").write_text(json.dumps(GRAPHS))
    (tmp_path / "train_balanced_questions.json").write_text(json.dumps(QUESTIONS))
    (tmp_path / "images").mkdir()
    for image in GRAPHS:
        (tmp_path / "images" / f"{image}.jpg").write_bytes(b"jpeg " + image.encode())
    return tmp_path


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


def with_graph(folder: Path, change) -> GqaSource:
    graphs = json.loads(json.dumps(GRAPHS))
    change(graphs["1001"])
    (folder / "changed.json").write_text(json.dumps(graphs))
    return source(folder, scene_graphs=(folder / "changed.json",))


def told(items) -> dict[str, object]:
    """id -> names of its boxes, or the reason that it was left out."""
    return {e.id: e.reason if isinstance(e, LeftOut) else e.box_names[0] for e in items}


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


def pack(path: Path, members) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


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


# ------------------------------------------------------------------------------- files that do not belong to each other


def strangers(count: int, image: str = "77") -> dict:
    return {f"x{i}": question(image, "q", "a", program("cup (1)")) for i in range(count)}


@pytest.mark.parametrize(("count", "read"), [(1, 1), (999, 999), (1500, 999)])
def test_questions_of_another_split_stop_the_work(folder, count, read):
    (folder / "val.json").write_text(json.dumps(strangers(count)))
    items = source(folder, questions=(folder / "val.json",)).examples()
    for _ in range(read):
        assert next(items).reason == "no_scene_graph"
    with refusal("D50", "no image of these questions") as refused:
        next(items)
    assert "val.json" in refused.value.where
    assert "train_sceneGraphs.json" in str(refused.value.got)


def test_one_known_image_among_many_others_is_enough(folder):
    mixed = {**strangers(999), **QUESTIONS, **{f"y{i}": r for i, r in enumerate(strangers(1500).values())}}
    (folder / "mixed.json").write_text(json.dumps(mixed))
    items = list(source(folder, questions=(folder / "mixed.json",)).examples())
    assert len(items) == len(mixed)
    (folder / "val.json").write_text(json.dumps(strangers(3)))
    with refusal("D50", "no image of these questions"):  # each file is asked by itself
        list(source(folder, questions=(folder / "train_balanced_questions.json", folder / "val.json")).examples())


def test_ids_come_once(folder):
    (folder / "again.json").write_text(json.dumps({"00": QUESTIONS["01"], "03": QUESTIONS["03"]}))
    files = (folder / "train_balanced_questions.json", folder / "again.json")
    with refusal("D47", "'03' comes twice"):
        list(source(folder, questions=files).examples())
    (folder / "val_sceneGraphs.json").write_text(json.dumps({"1": GRAPHS["1003"], "1002": GRAPHS["1002"]}))
    with refusal("D50", "two files have a scene graph") as refused:
        list(
            source(folder, scene_graphs=(folder / "train_sceneGraphs.json", folder / "val_sceneGraphs.json")).examples()
        )
    assert "'1002'" in refused.value.where
    one = json.dumps(GRAPHS)[:-1] + ', "1001": ' + json.dumps(GRAPHS["1003"]) + "}"
    (folder / "twice.json").write_text(one)
    with refusal("D47", "'1001' comes twice"):
        list(source(folder, scene_graphs=(folder / "twice.json",)).examples())


def test_train_and_val_graphs_together(folder):
    (folder / "val_sceneGraphs.json").write_text(json.dumps({"n123": GRAPHS["1003"]}))
    both = (folder / "train_sceneGraphs.json", folder / "val_sceneGraphs.json")
    assert told(source(folder, scene_graphs=both, boxes="grounding").examples())["05"] == ("scene",)


def test_images_that_are_none(folder):
    (folder / "empty").mkdir()
    with refusal("D50", "not GQA's images"):
        next(source(folder, images=folder / "empty").examples())
    with refusal("D50", "not GQA's images"):
        next(source(folder, images=pack(folder / "a.zip", {"x.txt": b"?"})).examples())
    with refusal("D50", "not GQA's images") as refused:
        next(source(folder, images=pack(folder / "b.zip", {"a/1.jpg": b"?", "b/2.jpg": b"?"})).examples())
    assert "'a/', 'b/'" in str(refused.value)
    with refusal("D48", "cannot be read"):
        next(source(folder, images=folder / "train_sceneGraphs.json").examples())


def test_images_in_an_unsafe_archive(folder):
    for name in ("../1001.jpg", "/1001.jpg", "C:\\1001.jpg"):
        with refusal("D41", "leads out"):
            next(source(folder, images=pack(folder / "a.zip", {"images/1.jpg": b"?", name: b"?"})).examples())
    link = zipfile.ZipInfo("images/1001.jpg")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(folder / "b.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with refusal("D41", "link or a device"):
        next(source(folder, images=folder / "b.zip").examples())


# --------------------------------------------------------------------------------------------- records of other formats


@pytest.mark.parametrize("value", [12.5, "12px", "12", None, True, [1], 2**40])
@pytest.mark.parametrize("side", ["x", "h"])
def test_coordinates_that_are_no_pixels(folder, value, side):
    with refusal("D49", "pixels") as refused:
        next(with_graph(folder, lambda g: g["objects"]["12"].update({side: value})).examples())
    assert refused.value.where.endswith(f"image '1001', object '12', {side}")


def test_not_a_number_is_no_json(folder):
    with refusal("D47"):
        next(with_graph(folder, lambda g: g["objects"]["12"].update(x=float("nan"))).examples())


def test_whole_numbers_with_a_point_are_pixels(folder):
    example = next(with_graph(folder, lambda g: g["objects"]["11"].update(x=10.0, w=-3)).examples())
    assert isinstance(example, Example)
    assert example.boxes == (((10, 20, -3, 40),),)  # what is wrong with a box, the one who places it says


GRAPH_FAULTS = {
    "no width": lambda g: g.pop("width"),
    "no objects": lambda g: g.pop("objects"),
    "objects in a list": lambda g: g.update(objects=list(g["objects"].values())),
    "no size": lambda g: g.update(height=0),
    "no name": lambda g: g["objects"]["11"].pop("name"),
    "no x": lambda g: g["objects"]["11"].pop("x"),
    "an object that is none": lambda g: g["objects"].update({"11": [1, 2, 3, 4]}),
    "an id with letters": lambda g: g["objects"].update({"a1": g["objects"]["11"]}),
    "an id in two spellings": lambda g: g["objects"].update({"011": g["objects"]["11"]}),
    "a huge id": lambda g: g["objects"].update({"9" * 20: g["objects"]["11"]}),
}


@pytest.mark.parametrize("fault", GRAPH_FAULTS)
def test_a_graph_of_another_format(folder, fault):
    with refusal("D49") as refused:
        next(with_graph(folder, GRAPH_FAULTS[fault]).examples())
    assert "image '1001'" in refused.value.where


QUESTION_FAULTS = {
    "no image": lambda q: q.pop("imageId"),
    "an image as a number": lambda q: q.update(imageId=1001),
    "an image elsewhere": lambda q: q.update(imageId="../1001"),
    "no question": lambda q: q.pop("question"),
    "no types": lambda q: q.pop("types"),
    "an unknown kind": lambda q: q["types"].update(structural="count"),
    "no annotations": lambda q: q.pop("annotations"),
    "a part missing": lambda q: q["annotations"].pop("fullAnswer"),
    "annotations in lists": lambda q: q["annotations"].update(question=[{"objectId": "4", "value": "12"}]),
    "an id as a number": lambda q: q["annotations"].update(question={"4": 12}),
    "a name for an id": lambda q: q["annotations"].update(question={"4": "table"}),
    "a minus for an id": lambda q: q["annotations"].update(question={"4": "-"}),
    "no id": lambda q: q["annotations"].update(question={"4": ""}),
    "nothing for an id": lambda q: q["annotations"].update(question={"4": None}),
    "other digits": lambda q: q["annotations"].update(question={"4": "١٢"}),
    "no semantic": lambda q: q.pop("semantic"),
    "semantic of strings": lambda q: q.update(semantic=["select: scene"]),
}


@pytest.mark.parametrize("fault", QUESTION_FAULTS)
def test_a_question_of_another_format(folder, fault):
    with refusal("D49") as refused:
        next(with_question(folder, QUESTION_FAULTS[fault]).examples())
    assert "question '01'" in refused.value.where


def test_a_program_is_needed_for_semantic_boxes(folder):
    (folder / "q.json").write_text(json.dumps({"01": {k: v for k, v in QUESTIONS["01"].items() if k != "semanticStr"}}))
    with refusal("D49", "no 'semanticStr'"):
        next(source(folder, questions=(folder / "q.json",)).examples())
    with refusal("D49", "no 'isBalanced'"):
        next(
            with_question(folder, lambda q: q.pop("isBalanced"))
            .__class__(
                (folder / "train_sceneGraphs.json",), (folder / "changed.json",), folder / "images", balanced_only=True
            )
            .examples()
        )
    (folder / "list.json").write_text(json.dumps([QUESTIONS["01"]]))
    with refusal("D47", "another kind"):
        next(source(folder, questions=(folder / "list.json",)).examples())


@pytest.mark.parametrize("answer", [None, ["cup"], 3, {}])
def test_an_answer_that_is_no_text_is_left_out(folder, answer):
    items = told(with_question(folder, lambda q: q.update(answer=answer)).examples())
    assert items["01"] == "empty_answer"
    assert items["03"] == ("mirror",)
    assert told(with_question(folder, lambda q: q.pop("answer")).examples())["01"] == "empty_answer"


def test_a_file_that_was_cut_short(folder):
    text = json.dumps(QUESTIONS)
    (folder / "cut.json").write_text(text[: len(text) // 2])
    with refusal("D47") as refused:
        list(source(folder, questions=(folder / "cut.json",)).examples())
    assert "cut.json, after entry" in refused.value.where
    (folder / "cut.json").write_text(json.dumps(GRAPHS)[:-40])
    with refusal("D47"):
        next(source(folder, scene_graphs=(folder / "cut.json",)).examples())


# ------------------------------------------------------------------------------------------------------------ the index


def test_graphs_come_back_from_the_index(folder):
    graphs = SceneGraphs()
    graphs.read(place_of(folder / "train_sceneGraphs.json"))
    assert len(graphs) == 3
    assert graphs.get("n123") is None
    for image, graph in GRAPHS.items():
        got = graphs.get(image)
        assert got is not None
        assert got.size == (graph["width"], graph["height"])
        assert got.objects == {
            int(id): (o["name"], (o["x"], o["y"], o["w"], o["h"])) for id, o in graph["objects"].items()
        }


def test_the_index_is_small(folder):
    count, objects = 500, {str(i): thing(f"name{i % 40}", i, i, 9, 9) for i in range(16)}
    text = json.dumps({str(i): {"width": 500, "height": 375, "objects": objects} for i in range(count)})
    (folder / "many.json").write_text(text)
    graphs = SceneGraphs()
    tracemalloc.start()
    graphs.read(place_of(folder / "many.json"))
    size = tracemalloc.get_traced_memory()[0] / count
    tracemalloc.stop()
    print(f"{size:.0f} bytes an image of 16 objects; {len(text) / count:.0f} in JSON")
    assert size < 900  # plain dictionaries take some 10,000
