"""The launcher's check of parquet files: what is counted, the file itself, and the images of its rows.

Single rows are tested in test_contract.py.
"""

import base64
import copy
import io
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as DatasetsImage
from PIL import Image
from support.refusals import refusal

from sayo_verl.data.contract import Demands
from sayo_verl.data.images import MAX_PIXELS
from sayo_verl.launch.row_check import check_parquet
from sayo_verl.launch.split_check import check_boxes_of_run

NAN = float("nan")


def encoded(kind: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    out = io.BytesIO()
    picture = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20).convert("RGB")
    picture.save(out, kind)
    return out.getvalue()


GOOD_BOXES = [[[0.0, 0.25, 0.5, 1.0]]]


def row(*, boxes: Any = GOOD_BOXES, images: Any = ..., text: str = "<image>What colour?", **other: Any) -> dict:
    return {
        "data_source": "sayo/scenes",
        "prompt": [{"role": "user", "content": text}],
        "images": [{"bytes": encoded(), "path": None}] if images is ... else images,
        "reward_model": {"style": "rule", "ground_truth": "red"},
        "extra_info": {"index": 0, "boxes": boxes},
    } | other


@pytest.fixture
def check(tmp_path: Path):
    """``check(row, row, ..., need_boxes=..., max_images=...)`` on a parquet of these rows."""

    def run(*rows: dict, schema: pa.Schema | None = None, **options: Any) -> str:
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
        return check_file(path, **options)

    return run


def check_file(path: Path, *, need_boxes: bool = True, max_images: int = 512, **demands: Any) -> str:
    asked = Demands(headers=max_images > 0, **demands)
    counted = check_parquet(path, asked, max_images=max_images)
    if need_boxes:
        check_boxes_of_run(counted, str(path))
    return str(counted)


# ---------------------------------------------------------------------------------------------------------- what passes


def test_rows_boxes_and_images_are_counted(check):
    bare = row(images=[], boxes=[], text="2 + 2?")
    two = row(images=[{"bytes": encoded("JPEG")}, {"bytes": encoded("WEBP")}], boxes=[[], [[0.0, 0.0, 1.0, 1.0]]])
    two["prompt"] = [{"role": "user", "content": text} for text in ("<image>First.", "Second: <image>")]
    assert check(two, row(boxes=[[]]), bare) == "3 rows, 1 with boxes, 3 images decoded"


@pytest.mark.parametrize(
    ("rows", "limit", "decoded"), [(10, 3, 3), (10, 10, 10), (10, 100, 10), (10, 0, 0), (10, -1, 0), (1, 512, 1)]
)
def test_images_are_sampled_over_the_file(check, rows, limit, decoded):
    assert f" {decoded} images decoded" in check(*[row()] * rows, max_images=limit)


def test_the_sample_reaches_beyond_the_first_rows(check):
    rows = [row() for _ in range(10)]
    rows[5] = row(images=[{"bytes": encoded("JPEG", (200, 200))[:900], "path": None}])
    assert "1 images" in check(*rows, max_images=1)
    with refusal("D07"):
        check(*rows, max_images=2)


def test_every_row_is_checked_beyond_the_first_batch(check):
    with refusal("V02") as caught:
        check(*[row()] * 300, row(boxes=[[[0.5, 0.5, 0.1, 0.9]]]), max_images=1)
    assert "row 300" in caught.value.where


# --------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut(tmp_path, share):
    path = tmp_path / "cut.parquet"
    pq.write_table(pa.Table.from_pylist([row()] * 20), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)] or b"version https://git-lfs\n" * 20)
    with refusal("D02", "cannot be read") as caught:
        check_file(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("at", [4, 40])
def test_a_page_that_was_overwritten(tmp_path, at):
    # The footer is whole, so the file opens; the damage, in the first column, shows when rows are read.
    path = tmp_path / "damaged.parquet"
    pq.write_table(
        pa.Table.from_pylist([row()] * 20).select(["prompt", "images", "reward_model", "extra_info", "data_source"]),
        path,
    )
    data = bytearray(path.read_bytes())
    data[at : at + 60] = b"\xff" * 60
    path.write_bytes(data)
    assert pq.ParquetFile(path).metadata.num_rows == 20
    with refusal("D02", "cannot be read"):
        check_file(path)


@pytest.mark.parametrize("column", ["prompt", "data_source", "reward_model"])
def test_a_column_is_missing(check, column):
    bare = row()
    del bare[column]
    with refusal("D03", column) as caught:
        check(bare)
    assert "images" in str(caught.value.got)


def test_a_file_without_rows(tmp_path):
    path = tmp_path / "empty.parquet"
    pq.write_table(pa.Table.from_pylist([row()]).slice(0, 0), path)
    with refusal("D03", "no rows"):
        check_file(path)


# ------------------------------------------------------------------------------------------ boxes


@pytest.mark.parametrize("boxes", [[[]], [], None], ids=["no box", "no lists", "null"])
def test_no_row_has_a_box(check, boxes):
    schema = pa.Table.from_pylist([row()]).schema
    with refusal("D04", "extra_info.boxes.*METHOD=dual, anchor, faithful"):
        check(row(boxes=boxes), row(boxes=boxes), schema=schema)
    with refusal("D04", "no training row has an image"):
        check(row(boxes=None, images=[], text="2 + 2?"))
    assert check(row(boxes=boxes), schema=schema, need_boxes=False) == "1 rows, 0 with boxes, 1 images decoded"
    assert "1 with boxes" in check(row(boxes=boxes), row(), schema=schema)


# --------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(
    ("code", "image"),
    [
        ("D06", {"bytes": None, "path": None}),
        ("D06", {"bytes": b"", "path": None}),
        ("D06", {"bytes": b"", "path": ""}),
        ("D06", None),
        ("D06", ""),
        ("D06", {"path": "there.png"}),
        ("D06", {"bytes": None, "path": "there.png"}),
        ("D06", {"bytes": None, "image": "there.png"}),
        ("D06", {"image": None}),
        ("D73", "absent.png"),
        ("D73", "."),
        ("D73", {"image": "absent.png"}),
        ("D73", {"image": {"bytes": encoded()}}),
        ("D73", "file://absent.png"),
        ("D73", "s3://bucket/a.png"),
        ("D73", "x" * 5000),
        ("D73", "a\0b"),
        ("D73", 7),
        ("D73", b"bytes"),
        ("D07", "data:image/png;base64,AAAA"),
        ("D07", "data:image/png;base64,A"),
        ("D07", "text.png"),
    ],
    ids=str,
)
def test_an_image_that_verl_does_not_open(check, image, code, attention, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_bytes(encoded())
    (tmp_path / "text.png").write_text("not an image")
    with refusal(code) as caught:
        check(row(images=[image]), attention=attention, need_boxes=False)
    assert "row 0, images[0]" in caught.value.where
    opened = verl_opens(image)
    assert isinstance(opened, Exception), opened


def verl_opens(image: Any) -> Any:
    """The picture that verl makes of an entry of the column, or its error."""
    from qwen_vl_utils import process_vision_info
    from verl.utils.dataset.rl_dataset import RLHFDataset

    data = object.__new__(RLHFDataset)
    vars(data).update(image_key="images", video_key="videos", audio_key="audios", processor=object())
    example = {"prompt": [{"role": "user", "content": "<image>?"}], "images": [copy.deepcopy(image)]}
    try:
        (picture,), _ = process_vision_info(data._build_messages(example, key="prompt"))
    except Exception as error:  # noqa: BLE001 (whatever it is, verl's run ends with it)
        return error
    return picture


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(
    "image",
    [
        {"bytes": encoded()},
        {"bytes": encoded(), "path": "absent.png"},
        "there.png",
        "file://there.png",
        {"image": "there.png"},
        {"image": "there.png", "path": None},
        {"image_url": "there.png"},
        {"bytes": encoded(), "image": None},
        "data:image/png;base64," + base64.b64encode(encoded()).decode(),
    ],
    ids=lambda image: str(image)[:60],
)
def test_every_form_that_verl_opens_passes(check, image, attention, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_bytes(encoded())
    assert "1 images decoded" in check(row(images=[image]), attention=attention, need_boxes=attention)
    assert isinstance(verl_opens(image), Image.Image)


@pytest.mark.parametrize("address", ["https://example.org/a.png", "http://169.254.169.254/"])
def test_an_image_of_a_web_address_is_refused_unless_it_is_allowed(check, address):
    assert "1 images of web addresses not read" in check(row(images=[address]))
    with refusal("D79", "sayo.web_images=True"):
        check(row(images=[address]), web=False)


@pytest.mark.parametrize("start", [b"%!PS-Adobe-3.0 EPSF-3.0", b"SIMPLE  =                    T", b"<svg/>"])
def test_a_picture_of_a_format_that_runs_a_program_or_is_no_picture_is_not_opened(check, start):
    with refusal("D07", "cannot identify"):
        check(row(images=[{"bytes": start + b" " * 3000}]))


def test_a_column_that_datasets_marks_as_images_is_opened_as_datasets_does(tmp_path, monkeypatch):
    """`datasets` opens the path of such a column itself, where verl alone would open bytes only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_bytes(encoded())
    features = Features(
        {
            "data_source": Value("string"),
            "prompt": [{"role": Value("string"), "content": Value("string")}],
            "images": List(DatasetsImage()),
            "reward_model": {"style": Value("string"), "ground_truth": Value("string")},
        }
    )
    rows = [{k: v for k, v in row(images=["there.png"]).items() if k != "extra_info"}]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    path = tmp_path / "alone.parquet"
    stored = pq.read_table(tmp_path / "rows.parquet")
    alone = stored.set_column(
        2,
        stored.schema.field("images"),
        pa.array([[{"bytes": None, "path": "there.png"}]], stored.schema.field("images").type),
    )
    pq.write_table(alone, path)
    for file in (tmp_path / "rows.parquet", path):
        assert "1 images decoded" in check_file(file, need_boxes=False)
    pq.write_table(alone.replace_schema_metadata(None), path)
    with refusal("D06"):
        check_file(path, need_boxes=False)


@pytest.mark.parametrize(("kind", "cut"), [("PNG", 40), ("PNG", -30), ("JPEG", 200), ("WEBP", 60), ("PNG", 0)], ids=str)
def test_an_image_that_cannot_be_decoded(check, kind, cut):
    data = encoded(kind)[:cut] or b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    with refusal("D07", "cannot be decoded") as caught:
        check(row(), row(images=[{"bytes": data, "path": None}]))
    assert "row 1" in caught.value.where


def test_an_image_that_is_too_large(check):
    out = io.BytesIO()
    side = int(MAX_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(out, "PNG", compress_level=1)
    with refusal("D08") as caught:
        check(row(images=[{"bytes": out.getvalue(), "path": None}]))
    assert str(side) in str(caught.value)


def test_an_image_bomb_is_refused_by_its_header(check):
    body = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    idat = b"IDAT" + zlib.compress(b"")
    chunks = [(len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big") for part in (body, idat)]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    with refusal("D07", "decompression bomb"):
        check(row(images=[{"bytes": bomb, "path": None}]))
