"""Tables of questions, images and boxes: parquet files, and data sets of the hub, which is stood in for."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.pictures import encoded
from support.refusals import refusal

from sayo_verl.data.rows import Example, LeftOut
from sayo_verl.data.sources import hf
from sayo_verl.data.sources.hf import HfSource, parse_map

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def png(colour: str) -> bytes:
    return encoded(Image.new("RGB", (8, 6), colour))


def row(**changed) -> dict:
    return {
        "image": {"bytes": png("red"), "path": "a.png"},
        "question": "What?",
        "answer": "x",
        "boxes": [[1.0, 2.0, 3.0, 4.0]],
        **changed,
    }


def parquet(folder: Path, *rows: dict, name: str = "train-00000-of-00001.parquet") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def read(path: Path, **options) -> list[Example | LeftOut]:
    return list(HfSource(str(path), **{"box_format": "xyxy", **options}).examples())


def one(folder: Path, options: dict | None = None, **changed) -> Example | LeftOut:
    (example,) = read(parquet(folder, row(**changed)), **(options or {}))
    return example


def test_a_row_of_a_parquet_file(tmp_path):
    example = one(tmp_path, id=5, box_names=["dog"], kind="k", width=80, height=60)
    assert (example.id, example.question, example.answer, example.kind) == ("5", "What?", "x", "k")
    assert example.images[0].data == png("red")
    assert example.sizes == ((80, 60),)
    assert example.boxes == (((1.0, 2.0, 3.0, 4.0),),)
    assert example.box_names == (("dog",),)
    assert (example.box_format, example.box_source, example.data_source) == ("xyxy", "hf", "sayo/hf")
    plain = one(tmp_path)
    assert (plain.id, plain.sizes, plain.kind) == ("train-00000-of-00001.parquet:0", (None,), "")


def test_columns_of_other_names_and_within_structs(tmp_path):
    objects = {"bbox": [[1, 2, 3, 4]], "name": ["d"]}
    told = {"img": png("red"), "q": "What?", "labels": {"text": "x"}, "objects": objects, "qid": "7"}
    columns = parse_map("image=img, question=q,answer=labels.text,boxes=objects.bbox,box_names=objects.name,id=qid")
    (example,) = read(parquet(tmp_path, told), columns=columns)
    assert (example.id, example.answer, example.box_names) == ("7", "x", (("d",),))
    assert example.boxes == (((1.0, 2.0, 3.0, 4.0),),)
    assert example.images[0].data == png("red")
    with refusal("D58", "no column 'objects.boxes'"):
        read(parquet(tmp_path, told), columns={**columns, "boxes": "objects.boxes"})
    with refusal("D58", "no column 'quest'"):
        read(parquet(tmp_path, told), columns={**columns, "question": "quest"})
    with refusal("D58", "unknown key 'box'"):
        read(parquet(tmp_path, told), columns={"box": "objects.bbox"})


def test_the_map_of_the_command_line(tmp_path):
    parser = argparse.ArgumentParser()
    hf.add_flags(parser)
    path = parquet(tmp_path, {**row(), "q": "Why?"})
    args = ["--dataset", str(path), "--box-format", "xywh", "--map", "question=q", "--name", "mine"]
    source = hf.from_args(parser.parse_args(args))
    (example,) = source.examples()
    assert (example.question, example.box_format, example.data_source) == ("Why?", "xywh", "sayo/mine")
    assert json.loads(json.dumps(source.facts()))["columns"] == {"question": "q"}
    for text in ("question", "question=", "=q", "a=b,a=c"):
        with refusal("D58", "map"):
            parse_map(text)
    assert parse_map("") == {}
    with pytest.raises(SystemExit):
        parser.parse_args(["--dataset", "x"])


def test_one_box_alone_no_boxes_and_boxes_of_several_images(tmp_path):
    assert one(tmp_path, boxes=[1.0, 2.0, 3.0, 4.0]).boxes == (((1.0, 2.0, 3.0, 4.0),),)
    assert one(tmp_path, boxes=None).boxes == ((),)
    images = [{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}]
    two = one(tmp_path, image=images, boxes=[[[1, 2, 3, 4]], []])
    assert [len(of) for of in two.boxes] == [1, 0]
    assert two.images[0].key != two.images[1].key
    with refusal("D05", "nested by image"):
        one(tmp_path, image=images, boxes=[[1, 2, 3, 4]])
    assert one(tmp_path, image=[], boxes=[]).reason == "image_missing"


def test_folders_and_splits(tmp_path):
    for name in (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-0.parquet",
        "default/val/0000.parquet",
        "training-set.parquet",
    ):
        parquet(tmp_path, row(), name=name)
    ids = [e.id for e in read(tmp_path)]
    assert ids == ["data/train-00000-of-00002.parquet:0", "data/train-00001-of-00002.parquet:0"]
    assert len(read(tmp_path, split="val")) == len(read(tmp_path, split="test")) == 1
    with refusal("D63", "no parquet file of the split 'dev'"):
        read(tmp_path, split="dev")
    assert len(HfSource(str(tmp_path), "xyxy").facts()["files"]) == 2


def test_images_as_file_names(tmp_path):
    path = parquet(tmp_path, row(image="a.png"))
    assert read(path, images=tmp_path)[0].images[0].path == tmp_path / "a.png"
    with refusal("D60", "no bytes"):
        read(path)
    with refusal("D60", "outside"):
        read(parquet(tmp_path, row(image="../a.png")), images=tmp_path)


def test_an_image_without_bytes_stops_the_work(tmp_path):
    with refusal("D60", "no bytes") as caught:
        read(parquet(tmp_path, row(), row(image={"bytes": None, "path": "a.png"})))
    assert "row 1" in caught.value.where
    assert "wanted" in str(caught.value)


def test_tags_and_images_that_differ_in_number_stop_the_work(tmp_path):
    with refusal("D09"):
        one(tmp_path, question="<image><image>What?")
    assert one(tmp_path, question="<image>\nWhat?").question == "What?"
    assert one(tmp_path, question="What of <image> this?").reason == "reserved_text"


def test_wrong_boxes_stop_the_work(tmp_path):
    for boxes in ([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0, float("nan")]], [["1", "2", "3", "4px"]]):
        with refusal("D42") as caught:
            one(tmp_path, boxes=boxes)
        assert "row 0, boxes" in caught.value.where
    with refusal("D59", "not a list"):
        one(tmp_path, boxes={"x1": 1})
    with refusal("D59", "names"):
        one(tmp_path, box_names=["a", "b"])


def test_an_id_that_comes_twice_stops_the_work(tmp_path):
    with refusal("D62"):
        read(parquet(tmp_path, row(id="a"), row(id="a")))


def test_answers_that_are_no_text_drop_the_row(tmp_path):
    assert one(tmp_path, answer=["a", "b"]) == LeftOut("train-00000-of-00001.parquet:0", "empty_answer")
    assert one(tmp_path, answer=2.0).answer == "2"


def test_a_parquet_file_cut_short_stops_the_work(tmp_path):
    path = parquet(tmp_path, row())
    path.write_bytes(path.read_bytes()[:-200])
    with refusal("D63", "cannot be read"):
        read(path)


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".npy"])
def test_formats_that_can_run_code_stop_the_work(tmp_path, suffix):
    path = tmp_path / f"train{suffix}"
    with refusal("D63", "run code"):
        HfSource(path.name, "xyxy")
    path.write_bytes(b"\x80")
    with refusal("D63", "run code"):
        HfSource(str(path), "xyxy")
    with refusal("D63", "run code"):
        HfSource(str(tmp_path), "xyxy")


def test_the_format_of_boxes_is_never_guessed(tmp_path):
    path = parquet(tmp_path, row())
    with refusal("D46"):
        HfSource(str(path), "")
    with pytest.raises(TypeError):
        HfSource(str(path))  # type: ignore[call-arg]


# ------------------------------------------------------------------------------------------------------------------ hub


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set, whose image column is of ``datasets.Image`` as there."""
    hf._commit.cache_clear()
    asked = []
    rows = [row(), row(question="Who?", image={"bytes": png("blue"), "path": None})]
    whole = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())

    def load_dataset(*args, **options):
        asked.append((args, options))
        return whole.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    info = lambda self, name, revision=None: SimpleNamespace(sha=COMMIT)  # noqa: E731
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    yield asked
    hf._commit.cache_clear()


def test_the_hub_is_streamed_at_one_commit_with_images_as_they_are(hub):
    source = HfSource("owner/name", "xyxy", split="val", config="all")
    first, second = source.examples()
    assert first.images[0].data == png("red")
    assert second.images[0].data == png("blue")
    assert (first.id, second.id, second.question) == ("val:0", "val:1", "Who?")
    ((args, options),) = hub
    assert args == ("owner/name", "all")
    assert options == {"split": "val", "streaming": True, "revision": COMMIT}  # and never trust_remote_code
    assert source.facts()["commit"] == COMMIT
    with refusal("D58", "no column 'text'"):
        list(HfSource("owner/name", "xyxy", columns={"answer": "text"}).examples())


def test_an_old_datasets_that_could_run_scripts_is_not_used(hub, monkeypatch):
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with refusal("D63", "own script"):
        list(HfSource("owner/name", "xyxy").examples())
    assert not hub


def test_what_the_hub_says_no_to_is_told(hub, monkeypatch):
    def away(*args, **options):
        raise ConnectionError("no route to host\nat all")

    monkeypatch.setattr(datasets, "load_dataset", away)
    with refusal("D63", "cannot be loaded") as caught:
        list(HfSource("owner/name", "xyxy").examples())
    assert "ConnectionError: no route to host at all" in str(caught.value)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", away)
    hf._commit.cache_clear()
    with refusal("D63", "cannot be loaded"):
        HfSource("owner/name", "xyxy").facts()
    assert HfSource("owner/name", "xyxy", revision=COMMIT).facts()["commit"] == COMMIT  # is asked of nobody


def test_a_connection_lost_on_the_way_is_told_and_a_wrong_row_keeps_its_own_error(hub, monkeypatch):
    def rows():
        yield row()
        raise OSError("connection reset")

    class Rows:
        def decode(self, enable):
            assert enable is False
            return rows()

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: Rows())
    found = HfSource("owner/name", "xyxy").examples()
    assert next(found).id == "train:0"
    with refusal("D63", "cannot be loaded"):
        next(found)
    with refusal("D63", "no name on the hub"):
        HfSource("a/b/c", "xyxy")


def test_offline_is_told_by_the_real_client(monkeypatch):
    hf._commit.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with refusal("D63", "cannot be loaded") as caught:
        HfSource("owner/name", "xyxy").facts()
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert "Offline" in str(caught.value)
