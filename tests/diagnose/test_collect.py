"""Responses of a tiny model to drawn rows: measured once, resumed, refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.diagnosed import answers as invented
from support.refusals import refusal

from sayo_verl.cli import build_parser, main
from sayo_verl.diagnose import collect as module
from sayo_verl.diagnose.answers import needs_of, usable_methods
from sayo_verl.diagnose.collect import collect, rows_of
from sayo_verl.diagnose.config import Asked
from sayo_verl.diagnose.run import diagnose, examples_of, what_was_run
from sayo_verl.look.answer import accuracy_of
from sayo_verl.look.observe import Observer
from sayo_verl.probe.statistics import log_probs_key

ROWS, SAMPLES, LONGEST = 4, 2, 6


@pytest.fixture(scope="module")
def observer(random_policy: Path) -> Observer:
    return Observer(str(random_policy), device="cpu")


@pytest.fixture(scope="module")
def asked(scenes: Path) -> Asked:
    return Asked(scenes, ROWS, SAMPLES, max_new_tokens=LONGEST)


@pytest.fixture(scope="module")
def done(observer: Observer, asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done")
    collect(observer, asked, out)
    return out


def arrays(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {file.name: dict(np.load(file)) for file in sorted(folder.glob("row-*.npz"))}


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a finished row was answered again")


def test_every_response_is_measured_once(observer: Observer, asked: Asked, done: Path):
    answers = collect(observer, asked, done)
    interventions = needs_of(usable_methods()[0].values()).interventions
    assert len(answers) == ROWS * SAMPLES
    for a in answers:
        assert a.image_tokens > a.region_tokens > 0
        assert a.tokens == len(a.ids) <= LONGEST
        assert all(np.isfinite(value).all() for value in a.values.values())
        assert interventions
        assert {log_probs_key(i) for i in interventions} <= a.values.keys()
        assert ("heads/box_hit" in a.values) == (a.sample == 0)
        assert a.accuracy in (0, 1)


def test_an_interrupted_run_goes_on_and_gives_the_same(
    observer: Observer, asked: Asked, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, left = module.write_row, 2

    def killed_while_writing(file: Path, answers: list) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            file.with_name(f".{file.name}.123").write_bytes(b"half")
            raise KeyboardInterrupt
        real(file, answers)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_row", killed_while_writing)
        with pytest.raises(KeyboardInterrupt):
            collect(observer, asked, tmp_path)
    before = arrays(tmp_path)
    assert len(before) == 2
    collect(observer, asked, tmp_path)
    after, whole = arrays(tmp_path), arrays(done)
    assert after.keys() == whole.keys()
    for name, own in after.items():
        assert all(np.array_equal(value, whole[name][key]) for key, value in own.items())


def test_finished_rows_are_not_answered_again_and_fewer_may_be_used(
    random_policy: Path, scenes: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = shutil.copytree(done, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Observer, "answer", refuse)
        fewer = collect(Observer(str(random_policy)), Asked(scenes, 2, SAMPLES, max_new_tokens=LONGEST), out)
    assert len(fewer) == 2 * SAMPLES


@pytest.mark.parametrize("change", [{"seed": 1}, {"samples": 1}, {"temperature": 0.5}, {"max_new_tokens": 7}])
def test_a_folder_of_other_settings_is_refused(observer: Observer, scenes: Path, done: Path, change: dict):
    own = {"samples": SAMPLES, "max_new_tokens": LONGEST} | change
    with refusal("W32", f"got .*{next(iter(change))}"):
        collect(observer, Asked(scenes, ROWS, **own), done)


def test_a_folder_of_another_set_or_of_other_files_is_refused(observer: Observer, asked: Asked, done: Path, tmp_path):
    other = pq.read_table(next(asked.data.glob("val-*.parquet"))).slice(0, 2)
    pq.write_table(other, tmp_path / "other.parquet")
    with refusal("W32", "other.parquet"):
        collect(observer, Asked(tmp_path / "other.parquet", ROWS, SAMPLES, max_new_tokens=LONGEST), done)
    with refusal("W32", "none of a diagnosis"):
        collect(observer, asked, tmp_path)


def test_a_run_that_measured_nothing_does_not_block_the_next_one(
    observer: Observer, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "diagnosis" / "model"
    with refusal("W05", "longer than the model's context"):
        collect(observer, Asked(asked.data, ROWS, SAMPLES, max_new_tokens=10**6), out)
    with refusal("W35", "/nope"):
        diagnose([observer.name], Asked(Path("/nope")), tmp_path / "diagnosis")
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_row", refuse)
        with pytest.raises(AssertionError):
            collect(observer, asked, out)
    assert len(collect(observer, Asked(asked.data, 1, 1, max_new_tokens=LONGEST), out)) == 1


def test_a_response_is_as_long_as_the_context_leaves_if_no_length_is_given(
    observer: Observer, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    limit = observer.config.get_text_config().max_position_embeddings
    prompt = observer.prompt(next(rows_of(asked)).values, "row 0")
    room = 5
    monkeypatch.setattr(observer.config.get_text_config(), "max_position_embeddings", len(prompt.ids) + room)
    assert limit > len(prompt.ids) + room
    (answer,) = collect(observer, Asked(asked.data, 1, 1), tmp_path)
    assert answer.tokens <= room
    assert "what the model's context leaves" in " ".join(what_was_run({"m": [answer]}, Asked(asked.data, 1, 1)))


def test_damaged_files_are_measured_again_and_left_over_ones_do_not_matter(
    observer: Observer, asked: Asked, done: Path, tmp_path: Path
):
    out = shutil.copytree(done, tmp_path / "out")
    whole = (out / "row-000001.npz").read_bytes()
    (out / "row-000001.npz").write_bytes(whole[: len(whole) // 2])
    (out / "row-000002.npz").write_bytes(b"")
    (out / ".settings.json").write_text("{")
    collect(observer, asked, out)
    after, before = arrays(out), arrays(done)
    assert all(np.array_equal(value, before[name][key]) for name, own in after.items() for key, value in own.items())
    (out / "settings.json").write_text("{")
    with refusal("W32", "a readable settings.json"):
        collect(observer, asked, out)
    left = tmp_path / "killed"
    left.mkdir()
    (left / ".settings.json").write_text("{")
    assert collect(observer, Asked(asked.data, 1, 1, max_new_tokens=LONGEST), left)


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_named(
    observer: Observer, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with refusal("W36", "/proc/nope"):
        collect(observer, asked, Path("/proc/nope/model"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with refusal("W36", "No space left on device"):
        collect(observer, asked, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["settings.json"]


@pytest.mark.parametrize("name", ["/nope", "/nope.parquet", "empty"])
def test_data_that_are_not_there_are_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with refusal("W35", "there are no rows at this path"):
        Asked(Path(name)).files()


def table_with(scenes: Path, out: Path, edit: Callable[[dict], object]) -> Path:
    """The validation rows, edited, in one file."""
    table = pq.read_table(next(scenes.glob("val-*.parquet")))
    rows = table.to_pylist()
    for row in rows:
        edit(row)
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), out)
    return out


def test_a_set_without_rows_or_without_images_is_refused(observer: Observer, scenes: Path, tmp_path: Path):
    file = next(scenes.glob("val-*.parquet"))
    pq.write_table(pq.read_table(file).slice(0, 0), tmp_path / "empty.parquet")
    with refusal("W30", "empty.parquet"):
        collect(observer, Asked(tmp_path / "empty.parquet"), tmp_path / "a")
    table_with(scenes, tmp_path / "text.parquet", lambda row: row.update(images=[]))
    with refusal("W31", "no row of the set has an image"):
        collect(observer, Asked(tmp_path / "text.parquet"), tmp_path / "b")


def test_a_model_that_answers_nothing_is_refused(
    observer: Observer, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Observer, "answer", lambda self, prompts, **_: [self.ends[:1] for _ in prompts])
    with refusal("W33", "special tokens only"):
        collect(observer, asked, tmp_path)


@pytest.mark.parametrize(
    "change", [{"rows": 0}, {"samples": 0}, {"samples": 2, "temperature": 0}, {"max_new_tokens": 0}, {"seed": -1}]
)
def test_options_out_of_range_are_refused(change: dict):
    with refusal("W34"):
        Asked(Path("x"), **change)


def test_rows_without_a_ground_truth_have_no_accuracy():
    assert np.isnan(accuracy_of({"reward_model": None}, "red"))
    assert np.isnan(accuracy_of({}, "red"))


def test_the_command_writes_a_page_with_examples(scenes: Path, random_policy: Path, done: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    shutil.copytree(done, out / "model")
    flags = ["--rows", str(ROWS), "--samples", str(SAMPLES), "--max-new-tokens", str(LONGEST), "--out", str(out)]
    assert main(["diagnose", "--model", str(random_policy), "--data", str(scenes), *flags]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    html = (out / "report.html").read_text()
    assert "highest target attention" in html
    assert "there is no second model" in html
    assert json.loads((out / "summary.json").read_text())["settings"]["samples"] == SAMPLES


def test_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["diagnose", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_what_is_said_of_the_run_counts_rows_without_boxes_and_responses(scenes: Path, observer: Observer):
    said = " ".join(what_was_run({"m": invented(4, boxes=False)}, Asked(scenes, 6)))
    assert "16 responses to 4 questions, 4 of them without boxes" in said
    assert "2 rows have no image or no response" in said
    assert "fewer than 3 questions" in " ".join(what_was_run({"m": invented(1, 1)}, Asked(scenes, 1)))
    assert examples_of(observer, invented(2, boxes=False), Asked(scenes, 2)) == []
