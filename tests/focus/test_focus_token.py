"""The <Focus> token in tokenizer, model and template; rows to batches."""

import copy
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.focus_rows import FAMILIES, batch_of, load, mixed_rows, scene_rows
from transformers import AutoModelForImageTextToText, AutoProcessor

from sayo_verl.errors import SayoError
from sayo_verl.focus import respond
from sayo_verl.focus.loss import (
    IGNORE,
)
from sayo_verl.focus.rows import AnchorRows, FocusCollator
from sayo_verl.focus.token import FOCUS, HEADER, INITIAL_WORDS, add_focus_token, focus_template, focus_token_id
from sayo_verl.tiny.policy import IMAGE

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
