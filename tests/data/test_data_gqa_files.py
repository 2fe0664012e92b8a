"""Files of GQA that do not belong together or have another format."""

import json
import stat
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from support.gqa_files import GRAPHS, QUESTIONS, pack, program, question, source, thing, told, with_question
from support.refusals import refusal

from sayo_verl.data.rows import Example
from sayo_verl.data.sources.gqa import GqaSource, SceneGraphs
from sayo_verl.data.streams import place_of


def with_graph(folder: Path, change) -> GqaSource:
    graphs = json.loads(json.dumps(GRAPHS))
    change(graphs["1001"])
    (folder / "changed.json").write_text(json.dumps(graphs))
    return source(folder, scene_graphs=(folder / "changed.json",))


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
