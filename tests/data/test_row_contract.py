"""The row contract: a bad row gets one verdict everywhere, and no type of a column is a traceback.

What the launcher refuses of a file is tested in test_check.py, what `sayo inspect` counts in tests/inspection.
"""

import datetime
import decimal
import io
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sayo_verl.data.check import check_joined
from sayo_verl.data.contract import Demands, RowContract
from sayo_verl.data.messages import images_of
from sayo_verl.data.rows import Drop, check_text
from sayo_verl.errors import SayoError
from sayo_verl.focus.rows import AnchorRows
from sayo_verl.hooks.capture import plan_micro_batch
from sayo_verl.inspection.audit import Audit
from sayo_verl.launch.row_check import check_parquet
from sayo_verl.launch.split_check import check_leakage
from sayo_verl.models.families import FAMILIES
from sayo_verl.probe.statistics import Statistic, StatisticsRequest
from sayo_verl.reward import why_not_gradable

IMAGE, VIDEO, TEXT = 5, 6, 9  # tokens
GRID = [[1, 4, 4]]  # four visual tokens
WHOLE = [0.0, 0.0, 1.0, 1.0]


def png(width: int = 40, height: int = 30, **how: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(out, "PNG", **how)
    return out.getvalue()


def row(**changes: Any) -> dict[str, Any]:
    """A valid row with other columns, or with other fields of ``extra_info``."""
    info = {"index": 0, "id": "a", "question": "What?", "boxes": [[[0.1, 0.1, 0.9, 0.9]]]}
    info |= {"image_keys": ["k"], "image_size_wh": [[40, 30]], "box_names": [["thing"]]}
    columns = {
        "data_source": "my/toy",
        "prompt": said("<image>What? <answer> ... </answer>"),
        "images": [{"bytes": png(), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": "red"},
    }
    fields = {name: value for name, value in changes.items() if name not in (*columns, "videos", "extra_info")}
    info = {name: value for name, value in (info | fields).items() if value is not ...}
    return columns | {"extra_info": info} | {k: v for k, v in changes.items() if k not in fields}


def said(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory, with one picture."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_bytes(png())
    return tmp_path


def by_launcher(path: Path, bad: dict[str, Any]) -> None:
    check_parquet(path, Demands())


def by_launcher_for_verl(path: Path, bad: dict[str, Any]) -> None:
    check_parquet(path, Demands(attention=False))


def inspected(path: Path) -> list[Any]:
    return Audit({"train": [path], "val": []}).run()


def by_inspection(path: Path, bad: dict[str, Any]) -> None:
    failed = [finding for finding in inspected(path) if finding.level == "FAIL"]
    if failed:
        raise SayoError(failed[0].code, failed[0].what, where=failed[0].rows[0], fix=failed[0].fix)


def by_focus_stage(path: Path, bad: dict[str, Any]) -> None:
    images_of(AnchorRows([path])[0])


def by_plan(path: Path, bad: dict[str, Any]) -> None:
    images, videos = len(bad["images"]), len(bad.get("videos") or [])
    ids = torch.tensor([[TEXT, *[VIDEO] * 4 * videos, *[IMAGE] * 4 * images, TEXT, TEXT]])
    inputs = {"image_grid_thw": torch.tensor(GRID * images)} if images else {}
    inputs |= {"video_grid_thw": torch.tensor(GRID * videos)} if videos else {}
    vision = SimpleNamespace(spatial_merge_size=2)
    config = SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO, vision_config=vision)
    batch = {"input_ids": ids, "response_mask": torch.ones(1, 1), "multi_modal_inputs": [inputs]}
    batch["extra_info"] = [bad["extra_info"]]
    request = StatisticsRequest((Statistic("region_mass"),))
    plan_micro_batch(batch, SimpleNamespace(hf_config=config, tokenizer=None), FAMILIES["qwen3_vl"], request)


FILES = (by_launcher, by_inspection, by_focus_stage)
BARE: dict[str, Any] = {"image_keys": ..., "image_size_wh": ..., "box_names": ...}


def verdict(judge: Any, bad: dict[str, Any]) -> str:
    try:
        judge(write(Path("rows.parquet"), bad), bad)
    except SayoError as error:
        return error.code
    return "-"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"boxes": None},
        {"boxes": [[]], "box_names": [[]]},
        *({"images": [image]} for image in ("there.png", "file://there.png", {"image": "there.png"})),
        {"images": [{"image": "there.png", "path": None}]},
    ],
)
def test_a_valid_row_passes_everywhere(here, changes):
    assert [verdict(judge, row(**changes)) for judge in (*FILES, by_plan)] == ["-"] * 4


def test_an_image_by_path_is_the_image_of_its_bytes_in_every_room(here):
    seen = []
    for images in ([{"bytes": png(), "path": None}], [{"image": str(here / "there.png")}], ["there.png"]):
        path = write(here / "rows.parquet", row(images=images))
        audit = Audit({"train": [path], "val": []}, n_sample=1)
        findings = [(finding.kind, finding.count) for finding in audit.run()]
        counted = check_parquet(path, Demands(), keep=4, spread=1)
        pixels = [image.tobytes() for image in images_of(AnchorRows([path])[0])]
        seen.append((findings, audit.figures(), str(counted), counted.largest[0][0], pixels))
    assert seen[0] == seen[1] == seen[2]


TURNED = Image.Exif()
TURNED[0x0112] = 6
# The plan sees the boxes, and how many images and videos there are. Text and pixels are tokens there.
SEEN_BY_ALL: list[tuple[str, dict[str, Any]]] = [
    *(("D05", {"boxes": boxes}) for boxes in ([WHOLE], [[WHOLE], [WHOLE]], [[], []], "0 0 1 1")),
    *(("V01", {"boxes": [[box]]}) for box in ([0.0, 0.0, 1.0], [0.0, 0.0, 1.0, float("nan")], ["0", "0", "1", "1"])),
    ("V02", {"boxes": [[[0.5, 0.5, 0.2, 0.9]]]}),
    ("V03", {"boxes": [[[0.0, 0.0, 30.0, 20.0]]]}),
    ("D66", {"videos": ["a.mp4"], "prompt": said("<video><image>What?")}),
]
SEEN_IN_FILES: list[tuple[str, dict[str, Any]]] = [
    ("D72", {"prompt": "<image>What?"}),
    ("D72", {"images": "a.png"}),
    ("D72", {"reward_model": "red"}),
    ("D09", {"prompt": said("What?")}),
    ("D09", {"images": []}),
    ("D06", {"images": [{"bytes": None, "path": "there.png"}]}),
    ("D06", {"images": [{"path": "there.png"}]}),
    ("D73", {"images": ["absent.png"]}),
    ("D07", {"images": [{"bytes": b"no image", "path": None}]}),
    ("D67", {"images": [{"bytes": png(exif=TURNED), "path": None}]}),
    ("D67", {"image_size_wh": [[1, 1]]}),
    ("D77", {"images": [{"bytes": png(2, 900), "path": None}], "image_size_wh": ...}),
    ("D74", {"reward_model": {"style": "rule", "ground_truth": None}}),
    ("D74", {"reward_model": {"style": "rule", "ground_truth": "<answer>red</answer>"}}),
    ("D81", {"data_source": "sayo/walk"}),
    ("D66", {"data_source": "numina_math"}),
    ("D66", {"prompt": said("<image>"), "question": ""}),
    ("D66", {"prompt": said("<image>What <|image_pad|>?")}),
    ("D05", {"box_names": [["a", "b"]]}),
    ("D05", {"image_keys": ["a", "b"]}),
]


@pytest.mark.parametrize(("code", "changes"), SEEN_BY_ALL + SEEN_IN_FILES)
def test_an_invalid_row_gets_one_verdict(here, repo, code, changes):
    bad = row(**BARE | changes)
    judges = (*FILES, by_plan) if (code, changes) in SEEN_BY_ALL else FILES
    assert [verdict(judge, bad) for judge in judges] == [code] * len(judges)
    cells = next(cells for cells in table(repo)[code] if cells[4] != "-")
    assert verdict(by_launcher_for_verl, bad) == ("-" if cells[5] == "-" else code), "docs/data.md"


def table(repo: Path) -> dict[str, list[list[str]]]:
    """Code -> lines of the table of checks in docs/data.md, in cells."""
    text = (repo / "docs" / "data.md").read_text().split("### Which check")[1]
    lines = [[c.strip() for c in line.strip("|\n").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {code: [cells for cells in lines if code in cells[1]] for code in re.findall(r"\b[DLV]\d\d\b", str(lines))}


def test_the_table_of_checks_names_every_code_and_no_other(repo):
    package = repo / "sayo_verl"
    files = [package / "data" / f"{name}.py" for name in ("check", "contract", "reading")]
    files += [package / "launch" / f"{name}.py" for name in ("data_check", "prompt_check", "split_check")]
    files += [package / "reward" / "walk.py", package / "vision" / "masks.py", *(package / "inspection").glob("*.py")]
    raised = {code for file in files for code in re.findall(r'"([DLV]\d\d)"', file.read_text())}
    other = {"V04", "V05", "L17", "L18", "L20", "L23"}  # of a grid, of a model
    assert set(table(repo)) - other == raised - other


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("prompt", '[{"role": "user", "content": "?"}]', "not text"),
        ("prompt", None, "NoneType"),
        ("prompt", ["<image>?"], "role"),
        ("prompt", said(None), "None"),
        ("prompt", [{"from": "human", "value": "<image>?"}], "rename from to role"),
        ("prompt", said([{"type": "text", "text": "?", "image": None}]), "of their own"),
        ("images", {"bytes": png(), "path": None}, "a list"),
        ("extra_info", '{"boxes": [[[0, 0, 1, 1]]]}', "JSON"),
        ("reward_model", None, "NoneType"),
        ("reward_model", {"style": "a"}, "style"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_column_of_another_type_is_one_fault(column, value, says, attention):
    looked = RowContract(Demands(attention=attention)).look(row() | {column: value}, "f row 0")
    (fault,) = looked.faults
    assert looked.mistyped
    assert (fault.code, fault.where) == ("D72", f"f row 0, {column}")
    assert says in str(fault)


@pytest.mark.parametrize("attention", [True, False])
def test_null_and_absent_columns_and_content_in_parts_pass(attention):
    for content in ("2 + 2?", [{"type": "text", "text": "2 + 2?"}]):
        bare = row(prompt=said(content), images=None, extra_info={"index": 0})
        for column in ("images", "extra_info"):
            for changed in (bare | {column: None}, {k: v for k, v in bare.items() if k != column}):
                assert RowContract(Demands(attention=attention)).look(changed, "").faults == []


LEAVES: list[tuple[pa.DataType, Any]] = [
    *[(pa.int64(), 3), (pa.float64(), float("nan")), (pa.large_string(), "<image>"), (pa.binary(), b"\xff")],
    *[(pa.null(), None), (pa.timestamp("ns"), datetime.datetime(2020, 1, 2)), (pa.string(), "there.png")],
    *[(pa.decimal128(9, 2), decimal.Decimal("1.5")), (pa.dictionary(pa.int8(), pa.string()), "word")],
]
FIELDS = ["role", "content", "from", "bytes", "path", "image", "boxes", "id", "image_keys", "box_names"]


@st.composite
def columns(draw: st.DrawFn, depth: int = 4) -> tuple[pa.DataType, Any]:
    """A type and a value of it."""
    kind = draw(st.sampled_from(["leaf", "leaf", "list", "struct", "none"])) if depth else "leaf"
    if kind in ("leaf", "none"):
        type_, value = draw(st.sampled_from(LEAVES))
        return type_, value if kind == "leaf" else None
    if kind == "struct":
        names = draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=4, unique=True))
        fields = {name: draw(columns(depth - 1)) for name in names}
        return pa.struct({name: t for name, (t, _) in fields.items()}), {name: v for name, (_, v) in fields.items()}
    inner, value = draw(columns(depth - 1))
    return pa.list_(inner), [value] * draw(st.integers(0, 2))


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything in a row."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inside for found in places(part, (*path, key)))]


def changed(value: Any, at: tuple, other: tuple[pa.DataType, Any], type_: pa.DataType) -> tuple[pa.DataType, Any]:
    """The type and value of a column with another part at a place."""
    if not at:
        return other
    if isinstance(value, list):
        inner, part = changed(value[at[0]], at[1:], other, type_.value_type)
        return pa.list_(inner), [part]
    parts = {k: (type_.field(k).type, v) for k, v in value.items()}
    parts[at[0]] = changed(value[at[0]], at[1:], other, parts[at[0]][0])
    return pa.struct({k: t for k, (t, _) in parts.items()}), {k: v for k, (_, v) in parts.items()}


@settings(derandomize=True, deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_type_of_a_column_is_a_traceback(here, data):
    good = pa.Table.from_pylist([row()])
    at = data.draw(st.sampled_from([place for place in places(row()) if place]))
    type_, value = changed(row()[at[0]], at[1:], data.draw(columns()), good.schema.field(at[0]).type)
    try:
        number = good.schema.get_field_index(at[0])
        pq.write_table(good.set_column(number, at[0], pa.array([value], type_)), "rows.parquet")
    except (pa.ArrowException, TypeError, ValueError):  # parquet cannot hold it
        return
    codes = [at_launch(Path("rows.parquet"), attention=attention) for attention in (True, False)]
    codes += [finding.code for finding in inspected(Path("rows.parquet"))]
    assert all(re.fullmatch(r"[DV]\d\d", code) for code in codes)


def at_launch(path: Path, *, attention: bool) -> str:
    """The code of what launch refuses of a file as training and validation file; D65 if there is nothing else."""
    try:
        check_joined([path, path])
        check_parquet(path, Demands(attention=attention), keep=4, spread=4)
        return check_leakage([path], [path], image_key="images", max_images=9)
    except SayoError as error:
        return error.code if "\n" not in str(error) else str(error)


TRUTHS = ["red", "1,000", "(A)", "", "?", "\\boxed{3}", "Answer: red", None, ["red"], True, 3.0]


@pytest.mark.parametrize("truth", TRUTHS, ids=str)
def test_launch_inspection_and_prepare_agree_on_which_truths_can_be_graded(here, truth):
    code = "-" if why_not_gradable(truth) is None else "D74"
    bad = row(reward_model={"style": "rule", "ground_truth": truth})
    assert [verdict(judge, bad) for judge in (*FILES, by_launcher_for_verl)] == [code] * 4
    check_parquet(Path("rows.parquet"), Demands(judge=None))  # another reward function may grade it
    if isinstance(truth, str):
        with nullcontext() if code == "-" else pytest.raises(Drop, match=r"empty_answer|ungradable_answer"):
            check_text("What?", truth)


def test_only_qwens_resize_refuses_a_narrow_image():
    for width, codes in ((400, []), (402, ["D77"])):
        narrow = row(images=[{"bytes": png(width, 2), "path": None}], image_size_wh=...)
        assert [fault.code for fault in RowContract(Demands()).look(narrow, "").faults] == codes
        assert RowContract(Demands(qwen_resize=False)).look(narrow, "").faults == []  # InternVL makes tiles


def test_ids_are_compared_within_a_data_source():
    contract = RowContract(Demands())
    assert contract.look(row(), "first").faults == contract.look(row(data_source="other"), "second").faults == []
    (fault,) = contract.look(row(), "third").faults
    assert (fault.code, fault.got) == ("D65", "'a', as first")
    assert "prepare one of them with another --name" in fault.fix


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"images": None}, ""),
        ({"extra_info": {"index": 0}}, ""),
        ({"images": ["there.png"]}, "images"),
        ({"images": [{"image": "there.png"}]}, "images"),
        ({"extra_info": "{}"}, "extra_info"),
        ({"reward_model": {"style": "rule", "ground_truth": 3}}, "reward_model.ground_truth"),
    ],
    ids=str,
)
def test_files_join_where_verls_reader_joins_them(here, changes, wrong):
    import datasets

    paths = [write(here / "0.parquet", row() | changes), write(here / "1.parquet", row())]
    parts = [datasets.Dataset.from_parquet(str(path), cache_dir=str(here / "cache")) for path in paths]
    if not wrong:
        check_joined(paths)
        assert len(datasets.concatenate_datasets(parts)) == 2
        return
    with pytest.raises(SayoError, match=rf"^SAYO-D64: .*{wrong}: ") as caught:
        check_joined(paths)
    assert ("--link" in caught.value.fix) == (wrong == "images")
    with pytest.raises(ValueError, match="aligned"):
        datasets.concatenate_datasets(parts)
