"""The anchoring stage: its loss against transformers' eager attention in float64, the token, LoRA, the folder written.

Shape suffixes: B rows, R rows with boxes, S tokens, H heads, V visual tokens.
"""

import copy
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.family_models import TINY
from transformers import AutoModelForImageTextToText, AutoProcessor

from sayo_verl.cli import main as sayo
from sayo_verl.data.scenes import ROW_SCHEMA, SceneConfig, sample_scene, scene_row
from sayo_verl.errors import SayoError
from sayo_verl.focus import report, respond, trainer
from sayo_verl.focus.loss import (
    IGNORE,
    anchor_divergence,
    default_layers,
    focus_log_attention,
    forbidden_excess,
    forward_with_focus,
    target_distribution,
)
from sayo_verl.focus.rows import FOCUS_KEY, AnchorRows, FocusCollator
from sayo_verl.focus.token import FOCUS, HEADER, INITIAL_WORDS, add_focus_token, focus_template, focus_token_id
from sayo_verl.focus.trainer import FocusConfig, anchor, load_with_focus, trainable
from sayo_verl.models.families import family_of
from sayo_verl.probe.plan import ChatTokens, image_tiles, plan_row
from sayo_verl.tiny.policy import IMAGE
from sayo_verl.vision.grids import Tile, merged_grid

FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl")
GRID = (merged_grid(1, 6, 8, 2, where="test"),)
quick = settings(derandomize=True, deadline=None, max_examples=60)


def main(arguments: list[str]) -> int:
    return sayo(["focus", *arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    out = {}
    for name in FAMILIES:
        out[name] = tmp_path_factory.mktemp(name)
        TINY[name].build(out[name])
    return out


def scene_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    config = SceneConfig()
    rows = [
        scene_row(sample_scene(random.Random(f"{seed}/{i}"), config), config, split="train", index=i) for i in range(n)
    ]
    return [{**row, "_where": f"row {i}"} for i, row in enumerate(rows)]


def mixed_rows() -> list[dict[str, Any]]:
    """One box; none; two boxes; two images of which the second has a box; long response; text only."""
    a, b, c, d, e, f = scene_rows(6)
    b["extra_info"]["boxes"] = [[]]
    c["extra_info"]["boxes"] = [[*c["extra_info"]["target_boxes"][0], [0.05, 0.1, 0.93, 0.4]]]
    d["prompt"][0]["content"] = "<image><image>" + d["extra_info"]["question"]
    d["images"] = [a["images"][0], d["images"][0]]
    d["extra_info"]["boxes"] = [[], d["extra_info"]["boxes"][0]]
    e["response"] = "<think> red circle . blue star . green ring .</think><answer> red</answer>"
    f["prompt"][0]["content"], f["images"], f["extra_info"]["boxes"] = "What colour?", [], []
    return [a, b, c, d, e, f]


def load(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> tuple[Any, Any]:
    eager = {"experts_implementation": "eager"} if "moe" in folder.name else {}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=attention, **eager)
    processor = AutoProcessor.from_pretrained(folder)
    add_focus_token(model, processor)
    return model.eval(), processor


def batch_of(model: Any, processor: Any, rows: list[dict[str, Any]], side: str = "right", alpha: float = 0.1):
    batch = FocusCollator(processor, model.config, alpha=alpha, padding_side=side)(rows)
    return batch, batch.pop(FOCUS_KEY)


def naive_loss(model: Any, batch: dict[str, Any], focus: Any, layers: tuple[int, ...]) -> torch.Tensor:
    """L of the docstring, from whole attention matrices; one row at a time, without logarithms of sums."""
    output = model(**batch, use_cache=False, output_attentions=True)
    kls = []
    for b, has in enumerate(focus.has_target):
        if not has:
            continue
        columns = focus.image[b].nonzero().flatten()
        a_V = torch.stack([output.attentions[layer][b, :, focus.at[b], columns] for layer in layers]).mean((0, 1))
        p_V, q_V = a_V / a_V.sum(), focus.target[b, columns].to(a_V.dtype)
        kls.append((q_V * (q_V / p_V).log()).sum())
    return output.loss + torch.stack(kls).mean()


def our_loss(model: Any, batch: dict[str, Any], focus: Any, layers: tuple[int, ...]) -> torch.Tensor:
    output, figures = forward_with_focus(model, batch, focus, layers)
    return output.loss + figures["divergence"].mean()


def gradients(model: Any, loss: torch.Tensor, layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    decoder = model.model.language_model
    out = {f"{n}{i}": getattr(decoder.layers[i].self_attn, n).weight.grad for i in layers for n in ("q_proj", "k_proj")}
    out["below"] = decoder.layers[0].self_attn.v_proj.weight.grad
    out["embedding"] = model.get_input_embeddings().weight.grad[-1]
    return {name: grad.detach().double().clone() for name, grad in out.items()}


# ------------------------------------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("side", "layers"), [("right", (2,)), ("left", (0, 2))])
def test_loss_and_gradient_are_those_of_eager_attention_in_float64(folders, family, side, layers):
    model, processor = load(folders[family])
    batch, focus = batch_of(model, processor, mixed_rows(), side)
    assert focus.has_target == (True, False, True, True, True, False)
    loss = our_loss(model, batch, focus, layers)
    ours = gradients(model, loss, layers)
    exact, _ = load(folders[family], torch.float64, "eager")
    # padded on the right whatever ours is: in float64 transformers' softmax gives NaN for padding on the left
    batch, focus = batch_of(exact, processor, mixed_rows())
    batch["pixel_values"] = batch["pixel_values"].double()
    truth = naive_loss(exact, batch, focus, layers)
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), abs=1e-5)
    for name, grad in gradients(exact, truth, layers).items():
        scale = grad.abs().max()
        assert scale > 1e-4, f"{name} gets no gradient: the comparison is empty"
        torch.testing.assert_close(ours[name], grad, atol=2e-4 * float(scale), rtol=0, msg=name)


def test_gradient_by_finite_differences(folders):
    model, processor = load(folders["qwen3_vl"])
    batch, focus = batch_of(model, processor, mixed_rows()[:1])
    weight = model.model.language_model.layers[2].self_attn.q_proj.weight

    def divergence() -> torch.Tensor:
        return forward_with_focus(model, batch, focus, (2,))[1]["divergence"].sum()

    divergence().backward()
    place = np.unravel_index(int(weight.grad.abs().argmax()), weight.shape)
    slope, step, values = float(weight.grad[place]), 1e-2, []
    with torch.no_grad():
        for sign in (1, -1):
            weight[place] += sign * step
            values.append(float(divergence()))
            weight[place] -= sign * step
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_gradient_checkpointing_changes_nothing(folders, family):
    model, processor = load(folders[family])
    model.train()
    batch, focus = batch_of(model, processor, mixed_rows())
    plain = gradients(model, our_loss(model, batch, focus, (1,)), (1,))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, grad in gradients(model, our_loss(model, batch, focus, (1,)), (1,)).items():
        torch.testing.assert_close(grad, plain[name], atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_is_refused(folders):
    model, processor = load(folders["qwen3_vl"])
    model.train()
    model.enable_input_require_grads()
    batch, focus = batch_of(model, processor, mixed_rows()[:1])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(SayoError, match="F07"):
        our_loss(model, batch, focus, (1,))


def test_rows_without_boxes_train_the_language_model_alone(folders):
    model, processor = load(folders["qwen3_vl"])
    rows = mixed_rows()
    batch, focus = batch_of(model, processor, [rows[1], rows[5]])
    output, figures = forward_with_focus(model, batch, focus, (2,))
    assert focus.has_target == (False, False)
    assert figures["divergence"].shape == (0,)
    plain = model(**batch)
    torch.testing.assert_close(output.loss, plain.loss, rtol=0, atol=0)


def test_other_rows_and_padding_do_not_matter(folders):
    model, processor = load(folders["qwen3_vl"])
    rows = mixed_rows()
    together, focus = batch_of(model, processor, rows)
    alone, alone_focus = batch_of(model, processor, rows[:1])
    poisoned = dict(together)
    padding = together["attention_mask"] == 0
    assert padding[0].any()
    poisoned["input_ids"] = torch.where(padding, 5, together["input_ids"])
    with torch.no_grad():
        values = [
            forward_with_focus(model, b, f, (2,))[1]["divergence"][0]
            for b, f in ((alone, alone_focus), (together, focus), (poisoned, focus))
        ]
    torch.testing.assert_close(torch.stack(values), values[0].expand(3), rtol=0, atol=1e-5)


def test_keys_outside_of_the_row_are_never_read():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 8, generator=generator, requires_grad=True)
    clean = torch.randn(2, 2, 10, 8, generator=generator)
    visible = torch.zeros(2, 10, dtype=torch.bool)
    visible[0, :7] = visible[1, 3:9] = True
    image = torch.zeros_like(visible)
    image[0, 1:4] = image[1, 4:6] = True
    target = torch.where(image, 1.0 / image.sum(1, keepdim=True), float("nan"))
    results = []
    for fill in (0.0, float("nan")):
        key = torch.where(visible[:, None, :, None], clean, fill).requires_grad_()
        log_p, mass = focus_log_attention([query], [key], [0.35], visible, image)
        kl = anchor_divergence(log_p, target, image)
        grads = torch.autograd.grad(kl.sum(), (query, key))
        assert all(bool(torch.isfinite(x).all()) for x in (log_p, mass, kl, *grads))
        results.append((log_p, mass, kl, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert bool((results[0][0] != 0).sum() == image.sum())


def test_an_image_that_gets_next_to_no_attention_still_has_an_exact_loss():
    query = torch.zeros(1, 1, 4)
    query[..., 0] = 400.0
    key = torch.zeros(1, 1, 4, 4)
    key[0, 0, 0, 0] = 1.0  # a sink 400 nats above the rest
    key[0, 0, 2, 1], query[..., 1] = 1.0, 1.0
    visible = torch.ones(1, 4, dtype=torch.bool)
    image = torch.tensor([[False, True, True, False]])
    log_p, mass = focus_log_attention([query], [key], [1.0], visible, image)
    truth = torch.tensor([0.0, 1.0]).log_softmax(0)
    torch.testing.assert_close(log_p[0, 1:3], truth)
    assert float(mass) == pytest.approx(-400 + float(torch.tensor([0.0, 1.0]).logsumexp(0)), abs=1e-3)


def test_a_batch_that_is_not_the_prepared_one_is_refused(folders):
    model, processor = load(folders["qwen3_vl"])
    rows = mixed_rows()
    batch, _ = batch_of(model, processor, rows)
    _, focus = batch_of(model, processor, rows[:2])
    with pytest.raises(SayoError, match="F08"):
        forward_with_focus(model, batch, focus, (2,))


def test_forbidden_excess():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0] = torch.tensor([0.0, -50.0, -50.0, 0.0])
    labels = torch.tensor([[IGNORE, 0, IGNORE]])
    assert float(forbidden_excess(logits, labels, (1, 2))) == 0
    logits[0, 0, 1] = 0.0
    assert float(forbidden_excess(logits, labels, (1, 2))) == pytest.approx(20 - np.log(3), abs=1e-5)
    assert float(forbidden_excess(logits, torch.full((1, 3), IGNORE), (1, 2))) == 0


# ---------------------------------------------------------------------------------------------------------- the target
corner = st.floats(0, 0.95, allow_nan=False)
side = st.floats(1e-6, 1.0, allow_nan=False)
box = st.tuples(corner, corner, side, side).map(
    lambda b: [b[0], b[1], min(1.0, b[0] + b[2] * 0.999), min(1.0, b[1] + b[3] * 0.999)]
)


@quick
@given(st.lists(box, min_size=1, max_size=3), st.floats(0, 0.99))
def test_target_sums_to_one_and_keeps_its_background(boxes, alpha):
    q_V = target_distribution([[], boxes], [GRID[0], GRID[0]], alpha, where="test")
    assert q_V.shape == (24,)
    assert q_V.sum() == pytest.approx(1, abs=1e-12)
    assert (q_V >= alpha / 24 - 1e-15).all()
    np.testing.assert_allclose(q_V[:12], alpha / 24, atol=1e-15)  # the first image has no box


def test_target_by_hand():
    tiles = (Tile(2, 2),)
    q = target_distribution([[[0.0, 0.0, 0.75, 0.5]]], [tiles], 0.1, where="test")
    np.testing.assert_allclose(q, [0.9 * 2 / 3 + 0.025, 0.9 / 3 + 0.025, 0.025, 0.025])
    two = target_distribution([[[0.0, 0.0, 0.75, 0.5], [0.0, 0.0, 0.5, 0.25]]], [tiles], 0.1, where="test")
    np.testing.assert_allclose(two, q)  # a box within another adds nothing
    thin = target_distribution([[[0.6, 0.6, np.nextafter(0.6, 1), 0.7]]], [tiles], 0.0, where="test")
    np.testing.assert_allclose(thin, [0, 0, 0, 1])


@pytest.mark.parametrize(
    ("boxes", "alpha", "code"),
    [
        ([[[0, 0, 1, 1]]], 1.0, "F05"),
        ([[[0, 0, 1, 1]]], float("nan"), "F05"),
        ([[]], 0.1, "F06"),
        ([[[0, 0, 1, 1]], []], 0.1, "D05"),
        ([[[0.5, 0, 0.2, 1]]], 0.1, "V02"),
    ],
)
def test_malformed_targets_are_refused(boxes, alpha, code):
    with pytest.raises(SayoError, match=code):
        target_distribution(boxes, [GRID[0]], alpha, where="test")


# ----------------------------------------------------------------------------------------------------------- the token
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 5])
def test_the_token_is_added_once_and_nothing_else_changes(folders, family, tied, spare):
    model = AutoModelForImageTextToText.from_pretrained(folders[family], dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folders[family])
    known = len(processor.tokenizer)
    if tied:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
        model.tie_weights()
    if spare:
        model.resize_token_embeddings(known + spare, mean_resizing=False)
    before = copy.deepcopy(model.state_dict())
    focus = add_focus_token(model, processor)
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert focus == known == focus_token_id(processor)
    assert embedding.shape[0] == model.config.get_text_config().vocab_size == known + max(spare, 1)
    for name, weight in model.state_dict().items():
        old = before[name]
        same = torch.arange(weight.shape[0])[: old.shape[0]] != focus
        assert torch.equal(weight[: old.shape[0]][same], old[same]), name
    words = processor.tokenizer.encode(INITIAL_WORDS, add_special_tokens=False)
    torch.testing.assert_close(embedding[focus], embedding[words].mean(0))
    assert (output.data_ptr() == embedding.data_ptr()) == tied
    if not tied:
        assert torch.equal(output[focus], output[processor.tokenizer.convert_tokens_to_ids(IMAGE)])
    after = copy.deepcopy(model.state_dict())
    assert add_focus_token(model, processor) == focus
    assert all(torch.equal(weight, after[name]) for name, weight in model.state_dict().items())
    assert len(processor.tokenizer) == known + 1


def test_the_prompt_ends_in_the_token_and_decoding_shows_it(folders):
    _, processor = load(folders["qwen3_vl"])
    for template in (processor, processor.tokenizer):
        text = template.apply_chat_template(
            [{"role": "user", "content": "q"}], add_generation_prompt=True, tokenize=False
        )
        assert text.endswith(HEADER + FOCUS)
        assert FOCUS not in template.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)
    ids = processor.tokenizer.encode(f"a{FOCUS}<think> red", add_special_tokens=False)
    assert ids.count(focus_token_id(processor)) == 1
    assert FOCUS in processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert focus_template(processor.chat_template) == processor.chat_template


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: t.replace("assistant\\n", "assistant\\n<think>"), "F01"),
        (lambda t: t + "{%- set add_generation_prompt = false -%}", "F02"),
    ],
)
def test_templates_that_cannot_take_it_are_refused(folders, change, code):
    model = AutoModelForImageTextToText.from_pretrained(folders["qwen3_vl"], dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folders["qwen3_vl"])
    processor.chat_template = change(processor.chat_template)
    with pytest.raises(SayoError, match=code):
        add_focus_token(model, processor)


def test_a_tokenizer_beside_another_model_is_refused(folders):
    _, processor = load(folders["qwen3_vl"])
    bare = AutoModelForImageTextToText.from_pretrained(folders["qwen3_vl"], dtype=torch.float32)
    with pytest.raises(SayoError, match="F04"):
        add_focus_token(bare, processor)
    with pytest.raises(SayoError, match="F03"):
        focus_token_id(AutoProcessor.from_pretrained(folders["qwen3_vl"]))


# ------------------------------------------------------------------------------------------------------------ the rows
def test_batches_hold_prompt_token_and_response(folders):
    model, processor = load(folders["qwen3_vl"])
    rows = mixed_rows()
    for side_ in ("right", "left"):
        batch, focus = batch_of(model, processor, rows, side_)
        for b, row in enumerate(rows):
            labels = batch["labels"][b]
            text = processor.tokenizer.decode(labels[labels != IGNORE])
            truth = row["reward_model"]["ground_truth"]
            assert text == row.get("response", f"<think> </think><answer> {truth}</answer>") + "<|im_end|>"
            own = batch["attention_mask"][b].bool()
            first = int((labels != IGNORE).nonzero()[0])
            assert focus.at[b] == first - 1
            assert batch["input_ids"][b, focus.at[b]] == focus_token_id(processor)
            assert torch.equal(focus.visible[b], own & (torch.arange(len(own)) <= focus.at[b]))
            assert int(focus.image[b].sum()) == 9 * len(row["images"])
            assert float(focus.target[b].sum()) == pytest.approx(float(focus.has_target[b]), abs=1e-6)
            assert not (focus.target[b] > 0)[~focus.image[b]].any()
    best = focus.target[3].argmax()  # two images: the box is in the second
    assert best in focus.image[3].nonzero().flatten()[9:]


def test_rows_that_cannot_be_used_are_refused(folders, tmp_path):
    model, processor = load(folders["qwen3_vl"])
    row = scene_rows(1)[0]

    def refused(code: str, row: dict, **kwargs: Any) -> None:
        with pytest.raises(SayoError, match=code):
            FocusCollator(processor, model.config, alpha=0.1, **kwargs)([row])

    refused("D09", {**row, "prompt": [{"role": "user", "content": "no place for an image"}]})
    refused("F14", row, max_tokens=10)
    refused(
        "D05",
        {**row, "extra_info": {**row["extra_info"], "boxes": row["extra_info"]["boxes"] * 2}}
        | {"prompt": [{"role": "user", "content": "<image><image><image>"}], "images": row["images"] * 3},
    )
    processor.chat_template = processor.chat_template.replace(FOCUS, "")
    refused("F13", row)
    with pytest.raises(SayoError, match="F12"):
        FocusCollator(processor, SimpleNamespace(model_type="internvl"), alpha=0.1)
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "a.parquet")
    for read in (AnchorRows, lambda files: respond.write_responses(folders["qwen3_vl"], files, tmp_path / "out")):
        with pytest.raises(SayoError, match=r"F10: .* at .*a.parquet .* got \['prompt'\]"):
            read([tmp_path / "a.parquet"])
        with pytest.raises(SayoError, match=r"F20: .* got .*train-\*.parquet"):
            read([tmp_path / "train-*.parquet"])


# ---------------------------------------------------------------------------------------------------------- the stage
@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    rows = [{k: v for k, v in row.items() if k != "_where"} for row in scene_rows(48)]
    for row in rows[::8]:
        row["extra_info"]["boxes"] = []
    file = tmp_path_factory.mktemp("rows") / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), file)
    return file


SHORT = FocusConfig(
    steps=24,
    batch_size=8,
    learning_rate=3e-3,
    warmup_steps=1,
    layers=(-1,),
    trainer_args={"logging_steps": 3, "disable_tqdm": True, "use_cpu": True},
)


def prompt_logits(model: Any, processor: Any) -> torch.Tensor:
    batch, _ = batch_of(model, processor, scene_rows(2, seed=9))
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_training_lowers_the_loss_and_the_folder_is_the_model(folders, parquet, tmp_path, monkeypatch):
    kept = {}
    export = trainer.export
    monkeypatch.setattr(trainer, "export", lambda t, *args: (kept.update(model=t.model), export(t, *args)))
    base = AutoModelForImageTextToText.from_pretrained(folders["qwen3_vl"], dtype=torch.float32)
    done = anchor(folders["qwen3_vl"], [parquet], tmp_path / "out", SHORT)
    log = [entry for entry in done["history"] if "anchor_loss" in entry]
    assert log[-1]["anchor_loss"] < 0.8 * log[0]["anchor_loss"]
    assert log[-1]["lm_loss"] < 0.7 * log[0]["lm_loss"]
    assert (done["rows"], done["rows_without_boxes"], done["rows_without_response"], done["layers"]) == (48, 6, 48, [2])
    assert sum(entry["rows_without_boxes"] for entry in log) == 6 * 24 * 8 / 48  # four times through the rows
    model, processor, focus = load_with_focus(tmp_path / "out", SHORT)
    assert focus == focus_token_id(processor)
    assert torch.equal(prompt_logits(model, processor), prompt_logits(kept["model"], processor))
    assert all(
        torch.equal(a, b) for a, b in zip(base.model.visual.parameters(), model.model.visual.parameters(), strict=True)
    ), "the vision tower was to stay"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"]["vocab_size"] == focus + 1
    assert written.get("use_cache", True), "the Trainer's setting must not stay in the folder"
    assert model.generation_config.eos_token_id == base.generation_config.eos_token_id
    with pytest.raises(SayoError, match="F16"):
        anchor(folders["qwen3_vl"], [parquet], tmp_path / "out", SHORT)


@pytest.mark.parametrize("tied", [False, True])
def test_lora_trains_the_row_of_the_token_and_is_merged(folders, parquet, tmp_path, tied):
    from peft import PeftModel

    base = folders["qwen3_vl"]
    if tied:
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
        base = tmp_path / "tied"
        model.save_pretrained(base)
        AutoProcessor.from_pretrained(folders["qwen3_vl"]).save_pretrained(base)
    config = replace(SHORT, lora_rank=4, checkpointing=True)
    anchor(base, [parquet], tmp_path / "out", config)
    start, processor, focus = load_with_focus(base, config)
    merged, _, _ = load_with_focus(tmp_path / "out", config)
    old, new = (m.get_input_embeddings().weight for m in (start, merged))
    others = torch.arange(len(old)) != focus
    assert torch.equal(old[others], new[others])
    assert float((old[focus] - new[focus]).detach().abs().max()) > 1e-3
    assert (merged.get_output_embeddings().weight.data_ptr() == new.data_ptr()) == tied
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    adapter = PeftModel.from_pretrained(start, str(tmp_path / "out-checkpoints" / "adapter"))
    torch.testing.assert_close(
        prompt_logits(merged, processor), prompt_logits(adapter, processor), atol=1e-4, rtol=1e-4
    )


def test_lora_leaves_the_vision_tower_alone(folders):
    model, processor = load(folders["qwen2_5_vl"])  # its tower has gate_proj, up_proj and down_proj too
    wrapped = trainable(model, focus_token_id(processor), replace(SHORT, lora_rank=2))
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert sum("lora_A" in name for name in trained) == 7 * 3
    assert sum("trainable_tokens" in name for name in trained) == 1
    assert not any("visual" in name for name in trained)


def test_the_probe_plans_prompts_that_end_in_the_token(folders):
    model, processor = load(folders["qwen3_vl"])
    batch, focus = batch_of(model, processor, scene_rows(1))
    family = family_of(model.config.model_type, where="test")
    ids, at = batch["input_ids"][0], focus.at[0]
    plan = plan_row(
        ids,
        len(ids) - at - 1,
        image_token_id=model.config.image_token_id,
        images=image_tiles(batch, family, model.config, where="test"),
        boxes=scene_rows(1)[0]["extra_info"]["boxes"],
        coverage=0.5,
        where="test",
        chat=ChatTokens.of(processor.tokenizer, family),
    )
    assert torch.equal(plan.keys["image"], focus.image[0])
    assert torch.equal(plan.keys["region"], focus.region[0])
    assert not any(bool(plan.keys[name][at]) for name in ("question", "system", "response", "image"))
    assert bool(plan.keys["question"].any())


@pytest.mark.parametrize(
    "change",
    [{"alpha": 1.0}, {"weight": -1.0}, {"dtype": "half"}, {"steps": 0}, {"lora_rank": 4, "train_vision": True}],
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(SayoError, match="F05"):
        FocusConfig(**change)


def test_layers_default_to_two_thirds(folders):
    model, _ = load(folders["qwen3_vl"])
    assert default_layers(model) == (2,)
    assert trainer.focus_layers(model, (0, -1)) == (0, 2)
    with pytest.raises(SayoError, match="P03"):
        trainer.focus_layers(model, (3,))


# ------------------------------------------------------------------------------------------ responses, report, commands
def test_respond_keeps_right_answers_only(folders, parquet, tmp_path, monkeypatch):
    calls = []

    def sample(_model, _processor, rows, *_):
        calls.append(len(rows))
        answers = [row["reward_model"]["ground_truth"] for row in rows]
        return [
            f"<think> x</think><answer> {answer}</answer>" if i % 2 else f"{answer}" for i, answer in enumerate(answers)
        ]

    monkeypatch.setattr(respond, "_sample", sample)
    done = respond.write_responses(
        folders["qwen3_vl"], [parquet], tmp_path / "r.parquet", tries=2, batch_size=64, max_rows=8
    )
    assert calls == [8, 4]
    assert done == {"rows": 8, "kept": 6}
    rows = AnchorRows([tmp_path / "r.parquet"])
    assert rows.without_response() == 0
    assert all(rows[i]["reward_model"]["ground_truth"] in rows[i]["response"] for i in range(6))


def test_respond_says_when_nothing_is_right(folders, parquet, tmp_path):
    with pytest.raises(SayoError, match="F18"):
        respond.write_responses(
            folders["qwen3_vl"], [parquet], tmp_path / "r.parquet", tries=1, max_new_tokens=3, max_rows=2
        )
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(parquet).slice(0, 0), empty)
    with pytest.raises(SayoError, match="F10"):
        respond.write_responses(folders["qwen3_vl"], [empty], tmp_path / "e.parquet")


@pytest.mark.parametrize(
    "wrong",
    [
        {"tries": 0},
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"max_rows": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_respond_refuses_numbers_out_of_range(parquet, tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(SayoError, match=f"F05: .* at --{name.replace('_', '-')}"):
        respond.write_responses("no model is loaded", [parquet], tmp_path / "r.parquet", **wrong)
    assert not list(tmp_path.iterdir())


def test_respond_samples_without_the_penalties_of_the_models_generation_config(folders, parquet, tmp_path, monkeypatch):
    changed = tmp_path / "changed"
    shutil.copytree(folders["qwen3_vl"], changed)
    file = changed / "generation_config.json"
    values = json.loads(file.read_text()) if file.exists() else {}
    penalties = {"repetition_penalty": 1.05, "no_repeat_ngram_size": 1, "top_k": 1}
    file.write_text(json.dumps(values | {"do_sample": True, "eos_token_id": [3, 5]} | penalties))
    sample, used = respond._sample, []

    def spy(model, *args):
        inner = model._get_logits_processor

        def processors(generation_config, *args, **kwargs):
            used.append(generation_config)
            return inner(generation_config, *args, **kwargs)

        model._get_logits_processor = processors
        return sample(model, *args)

    monkeypatch.setattr(respond, "_sample", spy)
    with pytest.raises(SayoError, match="F18"):
        respond.write_responses(changed, [parquet], tmp_path / "r.parquet", tries=1, max_new_tokens=3, max_rows=2)
    (config,) = used
    assert config.eos_token_id == [3, 5]
    assert config.repetition_penalty in (None, 1.0)
    assert not config.no_repeat_ngram_size


def test_respond_brings_files_of_different_columns_together(folders, parquet, tmp_path, guesses):
    table = pq.read_table(parquet).slice(0, 12)
    other = table.append_column("source", pa.array(["b"] * 12))
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(table.append_column("n", pa.nulls(12)), files[0])
    pq.write_table(other.append_column("n", pa.array(range(12))), files[1])
    done = respond.write_responses(folders["qwen3_vl"], files, tmp_path / "r.parquet", tries=4)
    kept = pq.read_table(tmp_path / "r.parquet")
    assert kept.num_rows == done["kept"]
    assert set(zip(kept["source"].to_pylist(), (n is None for n in kept["n"].to_pylist()), strict=True)) == {
        (None, True),
        ("b", False),
    }
    assert AnchorRows([tmp_path / "r.parquet"]).without_response() == 0


def test_F24_files_whose_columns_do_not_go_together(parquet, tmp_path):
    table = pq.read_table(parquet).slice(0, 2)
    pq.write_table(table.append_column("n", pa.array([1, 2])), tmp_path / "a.parquet")
    pq.write_table(table.append_column("n", pa.array(["x", "y"])), tmp_path / "b.parquet")
    with pytest.raises(SayoError, match=r"F24: .* at .*b\.parquet .* wanted types as in .*a\.parquet"):
        respond.write_responses(
            "no model is loaded", [tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "r.parquet"
        )
    assert not (tmp_path / "r.parquet.parts").exists()


@pytest.fixture
def guesses(monkeypatch):
    """Answers drawn from torch's generator, about half of them right; a list of the rows that were sampled."""
    sampled: list[str] = []

    def sample(_model, _processor, rows, *_):
        sampled.extend(row["_where"] for row in rows)
        right = torch.rand(len(rows)) < 0.5
        return [
            f"<think> {float(torch.rand(1)):.6f}</think><answer> {row['reward_model']['ground_truth']}</answer>"
            if ok
            else "no"
            for row, ok in zip(rows, right, strict=True)
        ]

    monkeypatch.setattr(respond, "_sample", sample)
    return sampled


def test_responses_do_not_depend_on_the_number_of_processes(folders, parquet, tmp_path, guesses):
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]  # 30 and 18 rows
    table = pq.read_table(parquet)
    pq.write_table(table.slice(0, 30), files[0])
    pq.write_table(table.slice(30), files[1])
    settings_ = {"tries": 2, "batch_size": 2, "max_rows": 45, "seed": 3}
    one = respond.write_responses(folders["qwen3_vl"], files, tmp_path / "one.parquet", **settings_)
    guesses.clear()
    first = respond.write_responses(folders["qwen3_vl"], files, tmp_path / "two.parquet", rank=1, world=2, **settings_)
    assert first == {"rows": 45, "left": 3}, (
        "blocks of 8 rows, none across files: 4 of the first file and 2 of the second"
    )
    assert not (tmp_path / "two.parquet").exists()
    second = respond.write_responses(folders["qwen3_vl"], files, tmp_path / "two.parquet", rank=0, world=2, **settings_)
    assert second == one
    assert 0 < one["kept"] < 45
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    kept = pq.read_table(tmp_path / "one.parquet")
    order = [row["index"] for row in kept["extra_info"].to_pylist()]
    assert order == sorted(order)
    assert len(set(kept["response"].to_pylist())) == one["kept"], "each block has random numbers of its own"


def test_an_interrupted_run_goes_on_where_it_stood(folders, parquet, tmp_path, guesses, monkeypatch):
    whole, cut = tmp_path / "whole.parquet", tmp_path / "cut.parquet"
    settings_ = {"tries": 2, "batch_size": 4, "seed": 1}
    done = respond.write_responses(folders["qwen3_vl"], [parquet], whole, **settings_)
    answers, n = respond._answers, 0

    def stops(*args: Any, **kwargs: Any) -> Any:
        nonlocal n
        n += 1
        if n == 3:
            raise KeyboardInterrupt
        return answers(*args, **kwargs)

    monkeypatch.setattr(respond, "_answers", stops)
    with pytest.raises(KeyboardInterrupt):
        respond.write_responses(folders["qwen3_vl"], [parquet], cut, **settings_)
    assert not cut.exists()
    monkeypatch.setattr(respond, "_answers", answers)
    guesses.clear()
    assert respond.write_responses(folders["qwen3_vl"], [parquet], cut, **settings_) == done
    assert {int(where.split()[1]) for where in guesses} == set(range(32, 48)), "the third block of 16"
    assert cut.read_bytes() == whole.read_bytes()
    monkeypatch.setattr(respond, "AutoModelForImageTextToText", None)  # nothing is left to sample: no model is loaded
    assert respond.write_responses(folders["qwen3_vl"], [parquet], cut, **settings_) == done


@pytest.mark.parametrize("change", [{"tries": 3}, {"seed": 2}, {"max_rows": 40}, {"batch_size": 2}])
def test_F19_responses_begun_with_other_settings(folders, parquet, tmp_path, guesses, change):
    out, settings_ = tmp_path / "r.parquet", {"tries": 2, "batch_size": 4, "seed": 1}
    respond.write_responses(folders["qwen3_vl"], [parquet], out, rank=0, world=2, **settings_)
    with pytest.raises(SayoError, match=r"F19: .*settings.json.* got {.*}, wanted {.*} .*rm -r"):
        respond.write_responses(folders["qwen3_vl"], [parquet], out, **(settings_ | change))
    assert "kept" in respond.write_responses(folders["qwen3_vl"], [parquet], out, **settings_)


def test_report_measures_what_the_loss_is_about(folders, tmp_path):
    model, processor = load(folders["qwen3_vl"])
    rows = mixed_rows()
    figures, looks = report.measure(model, processor, rows, SHORT, batch_size=4)
    batch, focus = batch_of(model, processor, rows)
    with torch.no_grad():
        divergence = forward_with_focus(model, batch, focus, (2,))[1]["divergence"]
    assert figures["anchor_loss"] == pytest.approx(float(divergence.mean()), abs=1e-5)
    assert (figures["rows"], figures["rows_with_boxes"]) == (6, 4)
    assert [look is not None for look in looks] == [True, False, True, False, True, False]
    assert all(float(look.p.sum()) == pytest.approx(1, abs=1e-5) and look.grid == (3, 3) for look in looks if look)
    exact, _ = load(folders["qwen3_vl"], attention="eager")
    with torch.no_grad():
        attention_S = exact(**batch, output_attentions=True).attentions[2][0, :, focus.at[0]].mean(0)
    p_S = attention_S * focus.image[0] / attention_S[focus.image[0]].sum()
    only, _ = report.measure(model, processor, rows[:1], SHORT)
    assert only["region_share"] == pytest.approx(float(p_S[focus.region[0]].sum()), abs=1e-5)
    assert only["image_mass"] == pytest.approx(float(attention_S[focus.image[0]].sum()), abs=1e-5)
    assert "lm_loss" not in figures
    assert report.draw(rows, looks, looks, tmp_path / "a.png", n=2).stat().st_size > 10_000


def test_the_commands_work_together(folders, parquet, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["--base", str(folders["qwen3_vl"]), "--rows", str(parquet)]
    quiet = json.dumps({"disable_tqdm": True, "use_cpu": True})
    assert (
        main(
            [
                "train",
                *common,
                "--out",
                str(out),
                "--steps",
                "2",
                "--batch-size",
                "4",
                "--layers",
                "1",
                "-1",
                "--trainer-args",
                quiet,
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(out)
    assert "layers [1, 2]" in captured.err
    assert main(["report", *common, "--after", str(out), "--out", str(tmp_path), "--max-rows", "4"]) == 0
    assert set(json.loads((tmp_path / "focus.json").read_text())) == {"base", "before", "after"}
    assert "L_anchor" in capsys.readouterr().out
    assert main(["train", *common, "--out", str(out), "--alpha", "2"]) == 2
    assert "SAYO-F05" in capsys.readouterr().err


@pytest.fixture(scope="module")
def no_boxes(parquet: Path) -> Path:
    rows = pq.read_table(parquet).to_pylist()
    for row in rows:
        row["extra_info"]["boxes"] = []
    file = parquet.with_name("no_boxes.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), file)
    return file


@pytest.mark.parametrize(
    ("command", "arguments", "code"),
    [
        ("train", ["--alpha", "2"], "F05"),
        ("train", ["--trainer-args", '{"sav_strategy": "steps"}'], "F21"),
        ("train", [], "F22"),
        ("report", ["--after", "x"], "F22"),
    ],
)
def test_a_check_refuses_wrong_arguments_before_a_model_is_looked_for(
    no_boxes, tmp_path, capsys, command, arguments, code
):
    common = [command, "--base", "no/model", "--rows", str(no_boxes), "--out", str(tmp_path / "out"), "--check"]
    assert main([*common, *arguments]) == 2
    assert f"SAYO-{code}: " in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*common, *arguments, "--wieght", "1"])
    assert stop.value.code == 2
    assert not (tmp_path / "out").exists()


def test_a_check_of_right_arguments_is_silent_and_starts_nothing(parquet, tmp_path, capsys):
    common = ["--base", "no/model", "--out", str(tmp_path / "out"), "--check", "--rows"]
    quiet = json.dumps({"disable_tqdm": True})
    assert main(["train", *common, str(parquet), "--trainer-args", quiet]) == 0
    assert main(["respond", *common, str(parquet)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["report", *common, "absent.parquet", "--after", "x"]) == 0
    assert capsys.readouterr().out == "not checked, not there yet: absent.parquet\n"
    assert not (tmp_path / "out").exists()


def test_F22_rows_without_boxes(no_boxes, tmp_path):
    with pytest.raises(SayoError, match="F22"):
        anchor("no/model", [no_boxes], tmp_path / "out", SHORT)
    with pytest.raises(SayoError, match="F22"):
        report.compare("no/model", "no/model", no_boxes, SHORT, picture=tmp_path / "a.png")


def gpu_script(repo: Path, tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "scripts/run_faithful_anchor_qwen2_5vl_7b.sh", *arguments],
        cwd=repo,
        text=True,
        capture_output=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "OUT": str(tmp_path / "out"), **variables},
    )


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [
        (["--wieght", "1"], {}, "unrecognized arguments: --wieght"),
        ([], {"ALPHA": "2"}, "SAYO-F05"),
        ([], {"NGPUS": "0"}, "SAYO-F23: a setting has to be a whole number, at least 1 | at NGPUS | got 0"),
        ([], {"ROWS": "many"}, "at ROWS | got many"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dry", ["0", "1"])
def test_the_gpu_script_refuses_wrong_arguments_of_a_later_step_before_the_first(
    repo, tmp_path, arguments, variables, told, dry
):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0\n")
    (tmp_path / "torchrun").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    # As in an environment that has all packages; the check itself is real.
    (tmp_path / "python3").write_text('#!/bin/sh\n[ "$1 $4" = "-c " ] || exec "$PYTHON" "$@"\n')
    for name in ("nvidia-smi", "torchrun", "python3"):
        (tmp_path / name).chmod(0o755)
    done = gpu_script(
        repo, tmp_path, *arguments, DRY_RUN=dry, PATH=f"{tmp_path}:/usr/bin:/bin", PYTHON=sys.executable, **variables
    )
    assert done.returncode == 2
    assert told in done.stderr
    assert not (tmp_path / "started").exists()
    assert not (tmp_path / "out").exists()


def gpu_plan(repo: Path, tmp_path: Path, **variables: str) -> str:
    done = gpu_script(repo, tmp_path, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    return done.stdout


def test_the_gpu_script_prints_its_plan(repo, tmp_path):
    plan = gpu_plan(repo, tmp_path)
    for told in (
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "--nproc_per_node=8",
        "sayo_verl.focus train",
        "NOT THERE YET",
        "nothing was started",
    ):
        assert told in plan


def test_the_gpu_script_samples_on_all_devices_within_a_limit(repo, tmp_path):
    sample = next(line for line in gpu_plan(repo, tmp_path).splitlines() if " respond " in line)
    assert "torchrun --standalone --nproc_per_node=8 -m sayo_verl.focus respond" in sample
    assert sample.rstrip().endswith("--tries 4 --max-new-tokens 1024 --batch-size 32 --max-rows 8192")
    sample = next(
        line for line in gpu_plan(repo, tmp_path, ROWS="all", TRIES="2", NGPUS="4").splitlines() if " respond " in line
    )
    assert "--max-rows" not in sample
    assert "--nproc_per_node=4" in sample
    assert "--tries 2" in sample


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, ["31 min for 8192 rows", "62 min if none", "per step   64 rows", "32000 rows seen: 3.9 passes"]),
        ({"NGPUS": "1"}, ["4.1 h for 8192 rows", "per step   64 rows", "--accumulation 32"]),
        ({"NGPUS_PER_NODE": "4"}, ["--nproc_per_node=4", "per step   64 rows"]),
        ({"NGPUS_PER_NODE": "4", "NGPUS": "2"}, ["--nproc_per_node=2", "per step   64 rows"]),
        ({"NGPUS": "6"}, ["per step   60 rows", "30000 rows seen"]),
        ({"NGPUS": "64", "BATCH_SIZE": "4"}, ["per step   256 rows", "--accumulation 1"]),
        ({"ACCUMULATION": "3"}, ["per step   48 rows"]),
        ({"ROWS": "38870"}, ["2.4 h for 38870 rows", "4.9 h if none"]),
        ({"ROWS": "all"}, ["for every 10000 rows", "32000 rows seen; time not estimated"]),
    ],
    ids=str,
)
def test_the_plan_of_the_gpu_script_estimates_sampling_and_keeps_64_rows_a_step(repo, tmp_path, variables, told):
    plan = gpu_plan(repo, tmp_path, **variables)
    assert [line for line in told if line not in plan] == [], plan


def test_the_plan_of_the_gpu_script_ends_with_the_command_of_the_reinforcement_stage(repo, tmp_path):
    then = next(line for line in gpu_plan(repo, tmp_path, DATA="data/a b").splitlines() if line.startswith("then "))
    assert then.split(maxsplit=1)[1] == (
        f"MODEL_PATH={tmp_path}/out/policy DATA=data/a\\ b bash scripts/run_faithful_qwen2_5vl_7b.sh"
    )


def test_the_gpu_script_takes_all_shards_of_a_prepared_folder(repo, tmp_path, parquet):
    names = ["train-00000.parquet", "train-00001.parquet", "val-00000.parquet"]
    for name in names:
        (tmp_path / name).write_bytes(parquet.read_bytes())
    plan = gpu_plan(repo, tmp_path, DATA=str(tmp_path))
    assert "NOT THERE YET" not in plan
    assert f"--rows {tmp_path}/{names[0]} {tmp_path}/{names[1]} --out" in plan
    assert f"--rows {tmp_path}/{names[2]} --out" in plan
    plan = gpu_plan(repo, tmp_path, DATA=str(tmp_path), RESPOND="0")
    assert " respond " not in plan
    train = next(line for line in plan.splitlines() if " train " in line)
    assert f"--rows {tmp_path}/{names[0]} {tmp_path}/{names[1]} --out" in train
