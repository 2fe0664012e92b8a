"""The row contract on columns of any type: launch and inspection end with a finding or a refusal, never a traceback.

What each check refuses is tested in test_data_check.py (launch) and test_inspect.py (`sayo inspect`).
"""

import datetime
import decimal
import io
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.pictures import encoded

from sayo_verl.data.check import check_joined, check_parquet
from sayo_verl.data.contract import Demands, RowContract
from sayo_verl.data.rows import REASONS, Drop, check_text
from sayo_verl.errors import SayoError
from sayo_verl.inspection.audit import Audit
from sayo_verl.inspection.files import find_data
from sayo_verl.launch.split_check import check_leakage
from sayo_verl.reward import why_not_gradable

PROPERTY = settings(
    derandomize=True, deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def png() -> bytes:
    return encoded(Image.new("RGB", (40, 30), "red"))


def good() -> dict[str, Any]:
    return {
        "data_source": "my/toy",
        "prompt": [{"role": "user", "content": "<image>What colour? <answer> ... </answer>"}],
        "images": [{"bytes": png(), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": "red"},
        "extra_info": {
            "index": 0,
            "id": "a",
            "boxes": [[[0.1, 0.1, 0.9, 0.9]]],
            "image_keys": ["k"],
            "image_size_wh": [[40, 30]],
            "box_names": [["thing"]],
            "question": "What colour?",
        },
    }


MOMENT = datetime.datetime(2020, 1, 2, 3, 4)
LEAVES: list[tuple[pa.DataType, Any]] = [
    (pa.int64(), 3),
    (pa.float64(), float("nan")),
    (pa.string(), "text"),
    (pa.large_string(), "<image>"),
    (pa.binary(), b"\xff"),
    (pa.bool_(), True),
    (pa.null(), None),
    (pa.timestamp("ns"), MOMENT),
    (pa.timestamp("us", "UTC"), MOMENT),
    (pa.date32(), MOMENT.date()),
    (pa.time64("us"), MOMENT.time()),
    (pa.duration("us"), datetime.timedelta(1)),
    (pa.decimal128(9, 2), decimal.Decimal("1.5")),
    (pa.string(), "[1, 2]"),
    (pa.dictionary(pa.int8(), pa.string()), "word"),
    (pa.string(), ""),
    (pa.string(), "there.png"),
    (pa.float16(), 1.5),
]
FIELDS = (
    "role",
    "content",
    "from",
    "value",
    "bytes",
    "path",
    "image",
    "boxes",
    "id",
    "image_keys",
    "image_size_wh",
    "box_names",
    "question",
    "ground_truth",
    "style",
    "type",
    "text",
)


@st.composite
def columns(draw: st.DrawFn, depth: int = 4) -> tuple[pa.DataType, Any]:
    """A type and a value of it."""
    kind = draw(st.sampled_from(["leaf", "leaf", "list", "struct", "map", "none"])) if depth else "leaf"
    if kind in ("leaf", "none"):
        type_, value = draw(st.sampled_from(LEAVES))
        return type_, value if kind == "leaf" else None
    if kind == "struct":
        names = draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=4, unique=True))
        fields = {name: draw(columns(depth - 1)) for name in names}
        return pa.struct({name: t for name, (t, _) in fields.items()}), {name: v for name, (_, v) in fields.items()}
    inner, value = draw(columns(depth - 1))
    if kind == "map":
        return pa.map_(pa.string(), inner), [("a", value)]
    return pa.list_(inner), [value] * draw(st.integers(0, 2))


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything in a row."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inside for found in places(part, (*path, key)))]


def array_of(value: Any, at: tuple, other: tuple[pa.DataType, Any], schema: pa.DataType) -> tuple[pa.DataType, Any]:
    """The type and value of a column with another part at a place."""
    if not at:
        return other
    key, *rest = at
    if isinstance(value, dict):
        parts = {
            name: array_of(v, tuple(rest), other, schema.field(name).type)
            if name == key
            else (schema.field(name).type, v)
            for name, v in value.items()
        }
        return pa.struct({k: t for k, (t, _) in parts.items()}), {k: v for k, (_, v) in parts.items()}
    inner, changed = array_of(value[key], tuple(rest), other, schema.value_type)
    return pa.list_(inner), [changed]


def outcomes(path: Path) -> list[str]:
    """Codes of what launch, of a method of ours and of verl's own, and inspection say of a file."""
    told = []
    for attention in (True, False):
        try:
            check_joined([path, path])
            check_parquet(path, Demands(attention=attention, headers=True), keep=4, spread=4)
            check_leakage([path], [path], image_key="images", max_images=9)
        except SayoError as error:
            told.append(error.code if "\n" not in str(error) else "more than one line")
    try:
        told += [finding.code for finding in Audit(find_data([path])).run()[0].sorted()]
    except SayoError as error:
        told.append(error.code)
    return told


@PROPERTY
@given(data=st.data())
def test_no_type_of_a_column_is_a_traceback(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_bytes(png())
    row, schema = good(), pa.Table.from_pylist([good()]).schema
    at = data.draw(st.sampled_from([place for place in places(row) if place]))
    type_, value = array_of(row[at[0]], at[1:], data.draw(columns()), schema.field(at[0]).type)
    try:
        arrays = {name: pa.array([row[name]], schema.field(name).type) for name in row} | {
            at[0]: pa.array([value], type_)
        }
        pq.write_table(pa.table(arrays), tmp_path / "rows.parquet")
    except (pa.ArrowException, TypeError, ValueError):  # parquet cannot hold it
        return
    assert all(re.fullmatch(r"[DV]\d\d", code) for code in outcomes(tmp_path / "rows.parquet"))


def test_the_good_row_is_good(tmp_path):
    pq.write_table(pa.Table.from_pylist([good()]), tmp_path / "rows.parquet")
    assert outcomes(tmp_path / "rows.parquet") == ["D65", "D65"]  # training and validation are the same file


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("prompt", "<image>What?", "str <image>"),
        ("prompt", '[{"role": "user", "content": "?"}]', "not text"),
        ("prompt", None, "NoneType"),
        ("prompt", [], "list"),
        ("prompt", ["<image>?"], "role"),
        ("prompt", [{"role": "user", "content": None}], "None"),
        ("prompt", [None], "None"),
        ("prompt", [{"from": "human", "value": "<image>?"}], "rename from to role"),
        ("prompt", [{"role": "user", "content": [{"type": "text", "text": "?", "image": None}]}], "of their own"),
        ("images", {"bytes": png(), "path": None}, "a list"),
        ("images", png(), "bytes"),
        ("images", "a.png", "str"),
        ("extra_info", '{"boxes": [[[0, 0, 1, 1]]]}', "JSON"),
        ("extra_info", [1], "list"),
        ("reward_model", None, "NoneType"),
        ("reward_model", "red", "str"),
        ("reward_model", {"style": "a"}, "style"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_column_of_another_type_is_refused(column, value, says, attention):
    looked = RowContract(Demands(attention=attention)).look(good() | {column: value}, "f row 0")
    (fault,) = looked.faults
    assert looked.mistyped
    assert (fault.code, fault.where) == ("D72", f"f row 0, {column}")
    assert says in str(fault)


def test_what_is_mistyped_or_absent_is_one_finding(tmp_path):
    """Nothing is said of the boxes of a row that cannot be read, nor of questions about images that are not there."""
    rows = [
        good() | {"images": ["absent.png"], "extra_info": {"index": i, "boxes": [[[0.1, 0.1, 0.9, 0.9]]]}}
        for i in range(2)
    ]
    for changed, code in (([good() | {"extra_info": "{}"}] * 2, "D72"), (rows, "D73")):
        pq.write_table(pa.Table.from_pylist(changed), tmp_path / "rows.parquet")
        found, _ = Audit(find_data([tmp_path / "rows.parquet"])).run()
        assert [(finding.code, finding.count) for finding in found.sorted()] == [(code, 2)]


@pytest.mark.parametrize("column", ["images", "extra_info"])
def test_null_and_absent_columns_that_verl_takes(column):
    row = good() | {"prompt": [{"role": "user", "content": "2 + 2?"}], "images": None}
    row["extra_info"] = {"index": 0}
    for changed in (row | {column: None}, {k: v for k, v in row.items() if k != column}):
        for attention in (True, False):
            assert RowContract(Demands(attention=attention)).look(changed, "").faults == []


def test_content_in_parts_of_text_passes():
    row = good() | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}], "images": None}
    del row["extra_info"]
    assert RowContract(Demands()).look(row, "").faults == []


TRUTHS = [
    "red",
    "3",
    "1,000",
    "(A)",
    "",
    " ",
    "?",
    "<answer> red </answer>",
    "\\boxed{3}",
    "“”",
    "It is. Answer: red",
    None,
    ["red"],
    {"a": 1},
    True,
    3,
    3.0,
    float("nan"),
]


@pytest.mark.parametrize("truth", TRUTHS, ids=str)
def test_launch_inspection_and_prepare_ask_the_reward_which_truths_can_be_graded(tmp_path, truth):
    row, right = good(), why_not_gradable(truth) is None
    row["reward_model"]["ground_truth"] = truth
    pq.write_table(
        pa.Table.from_pylist(
            [row, row | {"extra_info": None, "images": None, "prompt": [{"role": "user", "content": "2 + 2?"}]}]
        ),
        tmp_path / "rows.parquet",
    )
    for demands in (Demands(), Demands(attention=False)):
        try:
            check_parquet(tmp_path / "rows.parquet", demands)
            found = None
        except SayoError as error:
            found = error
        assert (found is None) == right
        assert found is None or (found.code == "D74" and "rows.parquet row 0" in found.where)
    check_parquet(tmp_path / "rows.parquet", Demands(judge=None))  # another reward function may grade it
    counts = [f.count for f in Audit(find_data([tmp_path / "rows.parquet"])).run()[0].sorted() if f.code == "D74"]
    assert counts == ([] if right else [2])
    if isinstance(truth, str):
        try:
            check_text("What?", truth)
            reason = None
        except Drop as drop:
            reason = drop.reason
        assert (reason is None) == right
        assert right or reason in ("empty_answer", "ungradable_answer")
        assert right or reason in REASONS


def test_an_image_that_qwens_resize_refuses_is_a_fault():
    for width, wrong in ((400, False), (402, True)):
        out = io.BytesIO()
        Image.new("RGB", (width, 2)).save(out, "PNG")
        row = good() | {"images": [{"bytes": out.getvalue(), "path": None}]}
        del row["extra_info"]["image_size_wh"]
        for attention in (True, False):
            codes = [fault.code for fault in RowContract(Demands(attention=attention)).look(row, "").faults]
            assert codes == ["D77"] * wrong
        assert RowContract(Demands(qwen_resize=False)).look(row, "").faults == []  # InternVL makes tiles


def test_verls_own_estimators_need_no_more_than_verl():
    """What only attention methods need, all wrong at once."""
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (40, 30)).save(out, "JPEG", exif=exif)
    row = good() | {
        "data_source": "numina_x",
        "images": [{"bytes": out.getvalue(), "path": None}],
        "prompt": [{"role": "user", "content": "<image><|im_end|>"}],
    }
    row["extra_info"] = {"boxes": [[[5.0, 5.0, 1.0, 1.0]]], "box_names": [], "image_keys": 7, "id": [1]}
    contract = RowContract(Demands(attention=False))
    assert contract.look(row, "a").faults == contract.look(row, "b").faults == []
    codes = [fault.code for fault in RowContract(Demands()).look(row, "").faults]
    assert codes == ["D66", "D66", "V02", "D05", "D67"]


def table(repo: Path) -> dict[str, list[list[str]]]:
    """Code -> lines of the table in docs/data.md, in cells."""
    lines = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in (repo / "docs" / "data.md").read_text().split("### Which check")[1].splitlines()
        if line.startswith("| ")
    ]
    return {code: [cells for cells in lines if code in cells[1]] for code in re.findall(r"\b[DLV]\d\d\b", str(lines))}


def test_the_table_of_checks_names_every_code_and_no_other(repo):
    modules = (
        "data/check.py",
        "data/contract.py",
        "data/reading.py",
        "launch/data_check.py",
        "launch/prompt_check.py",
        "inspection/audit.py",
        "inspection/command.py",
        "inspection/sample.py",
        "vision/masks.py",
    )
    raised = {
        code for module in modules for code in re.findall(r'"([DLV]\d\d)"', (repo / "sayo_verl" / module).read_text())
    }
    assert set(table(repo)) == raised - {"D52", "V04", "V05"}  # D52: of prepared folders; V04, V05: of a grid


WRONG: dict[str, dict[str, Any]] = {
    "D72": {"prompt": "What?"},
    "D09": {"prompt": [{"role": "user", "content": "What?"}]},
    "D06": {"images": [{"bytes": None, "path": "a.png"}]},
    "D73": {"images": ["absent.png"]},
    "D07": {"images": [{"bytes": b"no image", "path": None}]},
    "D74": {"reward_model": {"style": "rule", "ground_truth": None}},
    "D05": {"extra_info": {"boxes": [[], []]}},
    "V01": {"extra_info": {"boxes": [[[1.0]]]}},
    "V02": {"extra_info": {"boxes": [[[0.5, 0.5, 0.1, 0.1]]]}},
    "V03": {"extra_info": {"boxes": [[[0.0, 0.0, 9.0, 9.0]]]}},
    "D66": {"data_source": "numina_x"},
    "D67": {"extra_info": {"image_size_wh": [[1, 1]]}},
}


@pytest.mark.parametrize("code", WRONG)
def test_launch_refuses_what_the_table_says_for_ours_and_for_verls_own(repo, tmp_path, code):
    pq.write_table(pa.Table.from_pylist([good() | WRONG[code]]), tmp_path / "rows.parquet")
    cells = next(cells for cells in table(repo)[code] if cells[4] != "-")
    for attention, cell in ((True, cells[4]), (False, cells[5])):
        try:
            check_parquet(tmp_path / "rows.parquet", Demands(attention=attention))
            told = "-"
        except SayoError as error:
            told = error.code
        assert told == ("-" if cell == "-" else code)
    found, _ = Audit(find_data([tmp_path / "rows.parquet"])).run()
    assert code in [finding.code for finding in found.sorted()]
    assert cells[3] != "-"


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        (({"images": None}, {}), ""),
        (({"images": ...}, {}), ""),
        (({"extra_info": {"index": 0}}, {}), ""),
        (({"reward_model": {"style": "rule", "ground_truth": None}}, {}), ""),
        (({"images": ["a.png"]}, {}), "images"),
        (({"extra_info": "{}"}, {}), "extra_info"),
        (({"reward_model": {"style": "rule", "ground_truth": 3}}, {}), "reward_model.ground_truth"),
    ],
    ids=str,
)
def test_files_join_where_verls_reader_joins_them(tmp_path, files, wrong):
    import datasets

    paths = []
    for i, changes in enumerate(files):
        row = {k: v for k, v in (good() | changes).items() if v is not ...}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{i}.parquet")
        paths.append(tmp_path / f"{i}.parquet")
    parts = [datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache")) for path in paths]
    if not wrong:
        check_joined(paths)
        assert len(datasets.concatenate_datasets(parts)) == 2
        return
    with pytest.raises(SayoError, match=r"^SAYO-D64: ") as caught:
        check_joined(paths)
    assert f"{wrong}: " in str(caught.value.got)
    with pytest.raises(ValueError, match="aligned"):
        datasets.concatenate_datasets(parts)
    found, _ = Audit(find_data(paths)).run()
    assert "D64" in [finding.code for finding in found.sorted()]
