"""`sayo look`: what it writes and prints, what it refuses, and that it needs no training stack."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.engine_rows import RowShape
from support.looked import response_of, row_of
from support.refusals import refusal

from sayo_verl.cli import main
from sayo_verl.errors import SayoError
from sayo_verl.look import answer
from sayo_verl.look.command import given_response, in_words, row_ranges
from sayo_verl.look.observe import Observer
from sayo_verl.look.prompt import row_of_images, with_question
from sayo_verl.probe.statistics import Statistic, StatisticsRequest
from sayo_verl.view.store import prompt_from_json, response_from_json

BOX = [[[0.0, 0.0, 0.5, 0.5]]]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list:
    """What the page of `sayo look` is given."""
    given, module = [], ModuleType("sayo_verl.look.page")

    def write_page(path, title, items, about):
        given.append((title, items, about))
        path.write_text("<p>page</p>")

    module.write_page = write_page
    monkeypatch.setitem(sys.modules, "sayo_verl.look.page", module)
    return given


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with rows in two validation files: 2 with boxes, then 1 without boxes and 1 without an image."""
    folder = tmp_path_factory.mktemp("data")
    shapes = [RowShape(((96, 64),), 0, BOX), RowShape(((64, 64),), 0, BOX), RowShape(((64, 96),), 0, [[]])]
    rows = [row_of(shape, n) for n, shape in enumerate([*shapes, RowShape((), 0, [])])]
    for n in (0, 2):
        pq.write_table(pa.Table.from_pylist(rows[n : n + 2]), folder / f"val-{n}.parquet")
    return folder


def look(folder: Path, tmp_path: Path, *flags: object) -> int:
    return main(["look", "--model", str(folder), "--out", str(tmp_path / "out" / "p.html"), *map(str, flags)])


def test_a_picture_and_a_question_become_a_page_with_numbers_in_words(folder_of, pages, picture, tmp_path, capsys):
    flags = ["--image", picture, "--question", "<b>what?", "--boxes", "0,0,0.5,1", "--max-new-tokens", 5]
    written = tmp_path / "numbers.json"
    assert look(folder_of("qwen3_vl"), tmp_path, *flags, "--json", written, "--heads") == 0
    ((title, [(prompt, response)], about),) = pages
    assert title == f"Where {folder_of('qwen3_vl').name} looks"
    assert about["answered by"] == "transformers"
    assert about["attention kernel"] == "sdpa"
    assert prompt.question == "<b>what?"
    assert prompt.images[0].boxes == ((0.0, 0.0, 0.5, 1.0),)
    assert 1 <= response.facts["tokens"] <= 5
    assert response.heads is not None
    (item,) = json.loads(written.read_text())["items"]
    assert response_from_json(item["response"]).text == response.text
    assert prompt_from_json(item["prompt"]).region.tolist() == prompt.region.tolist()
    shown = capsys.readouterr().out
    assert f"page: {tmp_path / 'out' / 'p.html'}" in shown
    assert [line for line in in_words(response) if line not in shown] == []
    assert "50.0 %" in in_words(response)[1]  # of the visual tokens are in the box


def test_rows_of_a_folder_are_measured_with_a_given_text(folder_of, pages, data, tmp_path, capsys):
    assert (
        look(folder_of("qwen3_vl"), tmp_path, "--data", data, "--rows", "0:2,2", "--response", "the circle is red") == 0
    )
    ((_, items, about),) = pages
    assert [prompt.where for prompt, _ in items] == [f"row {n} of val-{m}.parquet" for n, m in [(0, 0), (1, 0), (0, 2)]]
    assert {response.text for _, response in items} == {"the circle is red<|im_end|>"}
    assert about["answered by"] == "a given text"
    assert "temperature" not in about
    assert "may have used other tokens" in items[0][1].notes[0]
    assert [any("no boxes" in note for note in response.notes) for _, response in items] == [False, False, True]
    assert "region_mass" not in items[2][1].values
    assert "box_hit" not in items[2][1].heads.values
    assert "The word that looked most" in capsys.readouterr().out


def test_answers_with_one_seed_are_equal_and_with_another_differ(observer_of):
    observer = observer_of("qwen3_vl")
    prompts = [observer.prompt(row_of(RowShape(((96, 64),), 0, BOX)), "a row")]
    sampled = [answer.answers(observer, prompts, max_new_tokens=12, temperature=1.0, seed=n) for n in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_nothing_of_the_training_stack_is_imported(folder_of, picture, tmp_path):
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("verl", "ray", "vllm", "transfer_queue", "tensordict"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from sayo_verl.cli import main
picture, out, *models = sys.argv[1:]
for n, model in enumerate(models):
    given = ["--image", picture, "--question", "what?", "--max-new-tokens", "3", "--out", f"{out}/{n}.html"]
    assert main(["look", "--model", model, *given]) == 0
"""
    models = [str(folder_of(family)) for family in ("qwen3_vl", "internvl")]
    command = [sys.executable, "-c", code, str(picture), str(tmp_path), *models]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.html", "1.html"]


@pytest.mark.parametrize(
    ("code", "flags"),
    [
        ("W01", []),
        ("W01", ["--image", "x.png", "--data", "y.parquet", "--question", "what?"]),
        ("W01", ["--data", "y.parquet", "--boxes", "0,0,1,1"]),
        ("W01", ["--image", "x.png", "--question", "what?", "--rows", "3"]),
        ("W02", ["--image", "no-such.png", "--question", "what?"]),
        ("W04", ["--image", "x.png"]),
        ("W04", ["--image", "x.png", "--question", " "]),
        ("W07", ["--image", "x.png", "--question", "what?", "--response", ""]),
        ("W15", ["--data", "y.parquet", "--rows", "one"]),
        ("W16", ["--data", "y.parquet"]),
        ("W17", ["--data", "y.parquet", "--rows", "0:2", "--png", "z.png"]),
        ("W19", ["--image", "PICTURE", "--question", "what?", "--device", "warp:9"]),
        ("V02", ["--image", "PICTURE", "--question", "what?", "--boxes", "0.5,0,0.5,1"]),
        ("P03", ["--image", "PICTURE", "--question", "what?", "--layers", "7"]),
        ("P03", ["--image", "PICTURE", "--question", "what?", "--layers", "last"]),
        ("W11", ["--image", "PICTURE", "--question", "what?", "--maps", "mean,L9"]),
        ("V03", ["--image", "PICTURE", "--question", "what?", "--boxes", "10,20,60,90"]),
        ("W34", ["--image", "PICTURE", "--question", "what?", "--max-new-tokens", "0"]),
        ("W34", ["--image", "PICTURE", "--question", "what?", "--temperature", "nan"]),
        ("W34", ["--image", "PICTURE", "--question", "what?", "--coverage", "5"]),
        ("W11", ["--image", "PICTURE", "--question", "what?", "--maps", "L1H9"]),
        ("W11", ["--image", "PICTURE", "--question", "what?", "--maps", "layer 1"]),
        ("W08", ["--image", "PICTURE", "--question", "what?", "--response", "<|im_end|>"]),
        ("W09", ["--image", "PICTURE", "--question", "what?", "--response", "red <|image_pad|>"]),
    ],
)
def test_a_wrong_command_is_refused(code, flags, folder_of, pages, picture, tmp_path, capsys):
    flags = [picture if flag == "PICTURE" else flag for flag in flags]
    assert look(folder_of("qwen3_vl"), tmp_path, *flags) == 2
    assert capsys.readouterr().err.startswith(f"SAYO-{code}: ")
    assert pages == []


def test_rows_that_do_not_exist_or_have_no_image_are_refused(folder_of, pages, data, tmp_path, capsys):
    for code, rows in (("W16", "4"), ("W16", "0:9"), ("W15", "2:2"), ("W03", "3")):
        assert look(folder_of("qwen3_vl"), tmp_path, "--data", data, "--rows", rows) == 2
        assert capsys.readouterr().err.startswith(f"SAYO-{code}: "), rows


def test_a_page_that_cannot_be_written_is_refused(folder_of, pages, picture, tmp_path, capsys):
    (tmp_path / "out").write_text("a file where a folder should be")
    flags = ["--image", picture, "--question", "what?", "--response", "red"]
    assert look(folder_of("qwen3_vl"), tmp_path, *flags) == 2
    assert capsys.readouterr().err.startswith("SAYO-W18: ")


def test_models_that_are_not_there_or_of_an_unknown_family_are_refused(tmp_path, picture, pages, capsys):
    flags = ["--image", picture, "--question", "what?"]
    assert look(tmp_path / "nowhere", tmp_path, *flags) == 2
    assert capsys.readouterr().err.startswith("SAYO-L17: ")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert look(tmp_path, tmp_path, *flags) == 2
    assert capsys.readouterr().err.startswith("SAYO-L18: ")


def test_a_folder_without_weights_is_refused_when_they_are_needed(folder_of, tmp_path):
    for file in folder_of("qwen3_vl").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    observer = Observer(str(tmp_path), device="cpu")
    with refusal("W06"):
        _ = observer.model
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with refusal("W06"):
        _ = observer.model


def test_fixes_name_what_the_command_takes(folder_of, picture, tmp_path, capsys):
    for flags, said in (
        (["--maps", "L9"], "got L9, wanted mean, a layer (L0 to L2)"),
        (["--layers", "7"], "--layers -1 is the last layer"),
        (["--boxes", "16,24,32,96"], "pixels of the picture of 64 x 96: --boxes 0.25,0.25,0.5,1"),
    ):
        assert look(folder_of("qwen3_vl"), tmp_path, "--image", picture, "--question", "what?", *flags) == 2
        assert said in capsys.readouterr().err
    assert look(tmp_path / "nowhere", tmp_path, "--image", picture, "--question", "what?") == 2
    assert "inspect" not in capsys.readouterr().err


def test_an_answer_to_a_row_with_a_ground_truth_is_scored(folder_of, pages, tmp_path, capsys):
    row = row_of(RowShape(((96, 64),), 0, BOX))
    truths = [{"ground_truth": "red"}, {"ground_truth": "blue"}, None]
    rows = [{**row, "data_source": "sayo/scenes", "reward_model": truth} for truth in truths]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "val.parquet")
    flags = ["--data", tmp_path / "val.parquet", "--rows", "0:3", "--response", "<answer>red</answer>"]
    assert look(folder_of("qwen3_vl"), tmp_path, *flags) == 0
    ((_, items, about),) = pages
    assert [response.facts.get("accuracy") for _, response in items] == [1.0, 0.0, None]
    assert about["row of attention"] == "the token as input"
    assert "query_row" not in items[0][1].facts, "it is said once, for all rows"
    assert "The answer is right." in capsys.readouterr().out


def test_layers_of_linear_attention_are_left_out_and_refused_by_name(folder_of, observer_of):
    assert observer_of("qwen3_5").layers == (0, 1, 3)
    with refusal("P11"):
        Observer(str(folder_of("qwen3_5")), layers=[2])
    with refusal("P11"):
        observer_of("qwen3_5").check_maps(["L2"])


def test_prompts_and_responses_beyond_the_context_are_refused(observer_of, monkeypatch):
    observer = observer_of("qwen3_vl")
    prompt = observer.prompt(row_of(RowShape(((96, 64),), 0, BOX)), "a row")
    monkeypatch.setattr(observer.config.get_text_config(), "max_position_embeddings", len(prompt.ids) + 3)
    with refusal("W05") as error:
        observer.answer([prompt], max_new_tokens=4)
    assert "6 of them visual (96 x 64 pixels)" in str(error.value)
    with refusal("W05") as error:
        observer.observe(prompt, response_of(4))
    assert "--max-new-tokens" not in str(error.value), "it does nothing for a given response"
    monkeypatch.setattr(observer.config.get_text_config(), "max_position_embeddings", len(prompt.ids))
    with refusal("W05"):
        observer.prompt(row_of(RowShape(((96, 64),), 0, BOX)), "a row")


def test_responses_that_cannot_be_measured_are_refused(observer_of):
    observer = observer_of("qwen3_vl")
    prompt = observer.prompt(row_of(RowShape(((96, 64),), 0, BOX)), "a row")
    end, image = observer.ends[0], observer.config.image_token_id
    for code, ids in (("W07", []), ("W08", [end, end]), ("W09", [30, image]), ("W10", [30, 10**6])):
        for read in (observer.observe, lambda p, i: observer.measure(p, i, StatisticsRequest(()))):
            with refusal(code):
                read(prompt, ids)


def test_attention_that_is_not_finite_stops_with_the_layer(folder_of):
    observer = Observer(str(folder_of("qwen3_vl")), device="cpu")
    prompt = observer.prompt(row_of(RowShape(((96, 64),), 0, BOX)), "a row")
    with torch.no_grad():
        observer.model.model.language_model.layers[1].self_attn.q_norm.weight[0] = float("nan")
    with refusal("W12") as error:
        observer.observe(prompt, response_of(4))
    assert "layer 1 of " in str(error.value)


def test_a_text_that_the_tokenizer_changes_is_said_to_be_changed(observer_of, monkeypatch):
    observer = observer_of("qwen3_vl")
    ids, notes = given_response(observer, "the circle is red")
    assert ids[-1] == observer.ends[0]
    assert len(notes) == 1
    monkeypatch.setattr(type(observer.processor.tokenizer), "decode", lambda *_, **__: "the circle")
    assert "changed it" in given_response(observer, "the circle is red")[1][1]
    again, _ = given_response(observer, "the circle is red<|im_end|>")
    assert again == ids


def test_an_image_that_the_processor_makes_smaller_is_said_to_be_smaller(observer_of):
    observer = observer_of("qwen2_5_vl")  # at most 64 visual tokens
    prompt = observer.prompt(row_of(RowShape(((600, 600),), 0, [[]])), "a row")
    assert prompt.notes == (
        "Image 1 has 600 x 600 pixels; the model's processor made it 196 x 196, so the model saw 49 visual tokens of "
        "it.",
    )
    assert observer.prompt(row_of(RowShape(((112, 112),), 0, [[]])), "a row").notes == ()


def test_a_turned_picture_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 96), "red").save(tmp_path / "turned.jpg", exif=exif)
    (stored,) = row_of_images([tmp_path / "turned.jpg"], "what?")["images"]
    (tmp_path / "upright.jpg").write_bytes(stored["bytes"])
    assert Image.open(tmp_path / "upright.jpg").size == (96, 64)


def test_the_neutral_question_replaces_the_text_and_keeps_the_images(observer_of):
    observer = observer_of("internvl")
    prompt = observer.prompt(row_of(RowShape(((128, 64), (64, 64)), 0, [])), "a row")
    neutral = with_question(prompt, "Describe the image.", **observer._own())
    image = observer.config.image_token_id
    assert (neutral.ids == image).sum() == (prompt.ids == image).sum() == prompt.seen.tokens
    text = observer.processor.tokenizer.decode(neutral.ids)
    assert "Describe the image." in text
    assert "circle" not in text


@pytest.mark.parametrize(
    ("text", "found"), [("3", [(3, 4)]), ("0:8,12", [(0, 8), (12, 13)]), (":2, 4:", [(0, 2), (4, None)])]
)
def test_rows_are_chosen_by_numbers_and_slices(text, found):
    assert row_ranges(text) == found


@pytest.mark.parametrize("text", ["", "-1", "a", "1:b", "1,,2", "0:4:2"])
def test_what_is_no_choice_of_rows_is_refused(text):
    with refusal("W15"):
        row_ranges(text)


class TestVllm:
    """The process of vLLM is replaced; ``tests/look`` does not start one."""

    @pytest.fixture
    def answered(self, monkeypatch: pytest.MonkeyPatch):
        """``answered(change)`` replaces the process; ``change(job)`` makes its results, or raises."""

        def replace(change):
            def run(command, **_):
                assert command[1:3] == ["-m", "sayo_verl.look.vllm_answers"]
                asked, out = map(Path, command[3:])
                try:
                    out.write_text(json.dumps(change(json.loads(asked.read_text()))))
                except RuntimeError as error:
                    return subprocess.CompletedProcess(command, 1, "", f"traceback\nRuntimeError: {error}\n")
                return subprocess.CompletedProcess(command, 0, "", "")

            monkeypatch.setattr(answer.subprocess, "run", run)
            monkeypatch.setattr(answer, "find_spec", lambda name: object())

        return replace

    @pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
    def test_prompts_have_one_placeholder_per_image_and_answers_end_at_the_end_token(self, name, observer_of, answered):
        observer = observer_of(name)
        prompt = observer.prompt(row_of(RowShape(((128, 128), (128, 64)), 0, [])), "a row")
        image, end = observer.config.image_token_id, observer.ends[0]

        def change(job):
            (asked,) = job["prompts"]
            assert asked["ids"].count(image) == len(asked["images"]) == 2
            around = {image, *observer.processor.tokenizer.convert_tokens_to_ids(list(observer.family.delimiters))}
            assert [n for n in asked["ids"] if n not in around] == [n for n in prompt.ids.tolist() if n not in around]
            return [{"prompt_ids": prompt.ids.tolist(), "ids": [30, end, 31]}]

        answered(change)
        assert answer.answers(observer, [prompt], engine="vllm") == [[30, end]]

    def test_another_prompt_than_the_measured_one_is_refused(self, observer_of, answered):
        observer = observer_of("qwen3_vl")
        prompt = observer.prompt(row_of(RowShape(((96, 64),), 0, BOX)), "a row")
        answered(lambda job: [{"prompt_ids": job["prompts"][0]["ids"], "ids": [30]}])
        with refusal("W13"):
            answer.answers(observer, [prompt], engine="vllm")

    def test_a_failure_is_reported_with_its_cause(self, observer_of, answered, monkeypatch):
        observer = observer_of("qwen3_vl")
        prompt = observer.prompt(row_of(RowShape(((96, 64),), 0, BOX)), "a row")

        def fail(_):
            raise RuntimeError("no memory")

        answered(fail)
        with refusal("W14") as error:
            answer.answers(observer, [prompt], engine="vllm")
        assert "RuntimeError: no memory" in str(error.value)
        monkeypatch.setattr(answer, "find_spec", lambda name: None)
        with pytest.raises(SayoError, match="W14: vLLM is not installed"):
            answer.answers(observer, [prompt], engine="vllm")

    def test_auto_is_vllm_on_a_gpu_only(self, monkeypatch):
        monkeypatch.setattr(answer, "find_spec", lambda name: object())
        assert answer.chosen_engine("auto", torch.device("cuda")) == "vllm"
        assert answer.chosen_engine("auto", torch.device("cpu")) == "transformers"
        monkeypatch.setattr(answer, "find_spec", lambda name: None)
        assert answer.chosen_engine("auto", torch.device("cuda")) == "transformers"
        assert answer.chosen_engine("vllm", torch.device("cpu")) == "vllm"


def test_measured_responses_are_a_batch_that_methods_read(observer_of):
    from sayo_verl.look.measure import signals
    from sayo_verl.methods import RegionMethod

    observer, method = observer_of("qwen3_vl"), RegionMethod(weight=0.5)
    prompt = observer.prompt(row_of(RowShape(((96, 64),), 0, BOX)), "a row")
    measured = [observer.measure(prompt, response_of(n, n), method.needs().statistics) for n in (3, 7)]
    batch = signals(measured, ["a", "a"], None)
    batch.check()
    (term,) = method.credit(batch).terms
    assert batch.response_mask.sum(-1).tolist() == [3, 7]
    assert term.value.shape == (2,)
    assert Statistic("region_mass") in batch.statistics
