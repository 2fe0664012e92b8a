"""The check of a training parquet: what passes, and every mistake by its code."""

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

from sayo_verl.data.check import check_parquet
from sayo_verl.data.contract import Demands
from sayo_verl.data.images import MAX_PIXELS
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


def test_good_rows_are_counted(check):
    assert check(row(), row(boxes=[[]]), row()) == "3 rows, 2 with boxes, 3 images decoded"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_kinds_of_image(check, kind):
    assert "1 images decoded" in check(row(images=[{"bytes": encoded(kind), "path": None}]))


def test_several_images_and_several_messages(check):
    two = row(images=[{"bytes": encoded(), "path": None}] * 2, boxes=[[], [[0.0, 0.0, 1.0, 1.0]]])
    two["prompt"] = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": "<image>First."},
        {"role": "user", "content": "Second: <image>"},
    ]
    assert check(two) == "1 rows, 1 with boxes, 2 images decoded"


def test_rows_without_an_image_among_rows_with_one(check):
    assert check(row(), row(images=[], boxes=[], text="2 + 2?")) == "2 rows, 1 with boxes, 1 images decoded"


@pytest.mark.parametrize(
    ("rows", "limit", "decoded"),
    [(10, 3, 3), (10, 10, 10), (10, 100, 10), (10, 1, 1), (10, 4, 4), (10, 0, 0), (10, -1, 0), (1, 512, 1)],
)
def test_images_are_sampled_over_the_file(check, rows, limit, decoded):
    found = check(*[row()] * rows, max_images=limit)
    assert int(found.split()[-3]) <= max(limit, 0)
    assert int(found.split()[-3]) == pytest.approx(decoded, abs=1)
    assert (int(found.split()[-3]) == 0) == (decoded == 0)


def test_the_sample_reaches_beyond_the_first_rows(check):
    rows = [row() for _ in range(10)]
    rows[5] = row(images=[{"bytes": encoded("JPEG", (200, 200))[:900], "path": None}])
    assert "1 images" in check(*rows, max_images=1)
    with refusal("D07"):
        check(*rows, max_images=2)


def test_pixels_are_read_of_the_sample_and_headers_of_all(check):
    cut = row(images=[{"bytes": encoded("JPEG", (200, 200))[:900], "path": None}])
    assert "1 images decoded" in check(row(), cut, max_images=1)
    with refusal("D07"):
        check(row(), cut, max_images=2)


def test_every_row_is_checked_beyond_the_first_batch(check):
    with refusal("V02") as caught:
        check(*[row()] * 300, row(boxes=[[[0.5, 0.5, 0.1, 0.9]]]), max_images=1)
    assert "row 300" in caught.value.where


def test_rows_without_boxes_are_enough_where_none_are_needed(check):
    bare = row()
    del bare["extra_info"]["boxes"]
    assert check(bare, need_boxes=False) == "1 rows, 0 with boxes, 1 images decoded"


# --------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut(tmp_path, share):
    path = tmp_path / "cut.parquet"
    pq.write_table(pa.Table.from_pylist([row()] * 20), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with refusal("D02", "cannot be read") as caught:
        check_file(path)
    assert caught.value.where == str(path)


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "rows.parquet").write_text("version https://git-lfs.github.com/spec/v1\n" * 20)
    with refusal("D02"):
        check_file(tmp_path / "rows.parquet")


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


def test_no_column_of_boxes(check):
    bare = row()
    del bare["extra_info"]["boxes"]
    with refusal("D04") as caught:
        check(bare)
    assert "extra_info.boxes" in str(caught.value)
    assert "algorithm.adv_estimator=grpo" in caught.value.fix


@pytest.mark.parametrize("boxes", [[[]], [], None], ids=["no box", "no lists", "null"])
def test_no_row_has_a_box(check, boxes):
    schema = pa.Table.from_pylist([row()]).schema
    with refusal("D04"):
        check(row(boxes=boxes), row(boxes=boxes), schema=schema)
    assert "1 with boxes" in check(row(boxes=boxes), row(), schema=schema)


@pytest.mark.parametrize(
    "boxes",
    [
        [0.0, 0.0, 0.5, 0.5],
        [[0.0, 0.0, 0.5, 0.5]],
        "[[[0, 0, 1, 1]]]",
        [[{"x0": 0.0}]],
        [[[0.0, 0.0, 0.5, 0.5]], [[0.0, 0.0, 0.5, 0.5]]],
        [[], []],
    ],
    ids=["one box", "boxes", "text", "named", "two lists for one image", "two empty lists for one image"],
)
def test_boxes_that_are_not_nested_by_image(check, boxes):
    with refusal("D05", "nested") as caught:
        check(row(boxes=boxes))
    assert "row 0" in caught.value.where
    assert "extra_info.boxes" in caught.value.where


@pytest.mark.parametrize(
    ("code", "box"),
    [
        ("V01", [0.0, 0.0, 1.0]),
        ("V01", [0.0, 0.0, NAN, 1.0]),
        ("V01", [0.0, None, 1.0, 1.0]),
        ("V01", ["0", "0", "1", "1"]),
        ("V01", []),
        ("V02", [0.5, 0.0, 0.25, 1.0]),
        ("V02", [0.0, 0.5, 1.0, 0.25]),
        ("V02", [0.5, 0.0, 0.5, 1.0]),
        ("V03", [0.0, 0.0, 1.01, 1.0]),
        ("V03", [-0.1, 0.0, 1.0, 1.0]),
        ("V03", [10.0, 20.0, 30.0, 40.0]),
    ],
)
def test_V_a_malformed_box(check, code, box):
    with refusal(code) as caught:
        check(row(boxes=[[box]]), need_boxes=False)
    assert "row 0, extra_info.boxes" in caught.value.where
    assert "1 rows" in check(row(boxes=[[box]]), need_boxes=False, attention=False)  # verl reads no boxes


def test_a_bad_box_after_good_ones(check):
    with refusal("V03") as caught:
        check(row(), row(boxes=[[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, 2.0]]]))
    assert "row 1" in caught.value.where


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


def test_an_image_of_a_web_address_is_not_read_and_counted(check):
    assert "1 images of web addresses not read" in check(row(images=["https://example.org/a.png"]))


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


def damaged_png() -> bytes:
    data = bytearray(encoded())
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def png_with_a_cut_header() -> bytes:
    signature, body = b"\x89PNG\r\n\x1a\n", b"IHDR" + b"\x00" * 4
    return signature + (4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


@pytest.mark.parametrize(
    "data",
    [
        b"not an image",
        encoded()[:40],
        encoded()[:-30],
        damaged_png(),
        png_with_a_cut_header(),
        encoded("JPEG")[:200],
        encoded("WEBP")[:60],
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
    ids=["text", "PNG header", "PNG cut", "PNG bit", "PNG short header", "JPEG cut", "WEBP cut", "SVG"],
)
def test_an_image_that_cannot_be_decoded(check, data):
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


@pytest.mark.parametrize(
    ("text", "n_images", "says"),
    [
        ("What colour?", 1, "each image once"),
        ("<image><image>?", 1, "each image once"),
        ("<image>?", 2, "each image once"),
        ("<image>?", 0, "no image"),
        ("<Image>?", 1, "each image once"),
    ],
)
def test_placeholders_that_do_not_fit_the_images(check, text, n_images, says):
    images = [{"bytes": encoded(), "path": None}] * n_images
    with refusal("D09", says) as caught:
        check(row(), row(text=text, images=images, boxes=[[]] * n_images))
    assert "row 1" in caught.value.where
    assert f"{n_images} images" in str(caught.value)


def test_a_null_image_column_is_no_image(check):
    schema = pa.Table.from_pylist([row()]).schema
    assert "1 images decoded" in check(row(), row(images=None, boxes=[], text="2 + 2?"), schema=schema)
