"""The stage: what it trains and the folder that it writes."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.focus_rows import SHORT, batch_of, load, scene_rows
from transformers import AutoModelForImageTextToText, AutoProcessor

from sayo_verl.errors import SayoError
from sayo_verl.focus import trainer
from sayo_verl.focus.loss import (
    default_layers,
)
from sayo_verl.focus.token import focus_token_id
from sayo_verl.focus.trainer import FocusConfig, anchor, load_with_focus, trainable
from sayo_verl.models.families import family_of
from sayo_verl.probe.plan import ChatTokens, image_tiles, plan_row


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


def test_an_interruption_while_the_folder_is_written_leaves_none(folders, parquet, tmp_path, monkeypatch):
    config = replace(SHORT, steps=1, warmup_steps=0, trainer_args={"disable_tqdm": True, "use_cpu": True})
    export = trainer.export

    def stops(t, processor, base, out, config):
        export(t, processor, base, out, config)
        (out / "stale").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "export", stops)
    with pytest.raises(KeyboardInterrupt):
        anchor(folders["qwen3_vl"], [parquet], tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(trainer, "export", export)
    anchor(folders["qwen3_vl"], [parquet], tmp_path / "out", config)
    assert not (tmp_path / "out" / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-checkpoints"]


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
    config = replace(SHORT, steps=4, lora_rank=4, checkpointing=True)
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


def test_images_by_path_give_the_batch_of_their_bytes(folders, tmp_path):
    model, processor = load(folders["qwen3_vl"])
    (tmp_path / "a.png").write_bytes(scene_rows(1)[0]["images"][0]["bytes"])
    of_bytes, focus = batch_of(model, processor, scene_rows(1))
    for image in (str(tmp_path / "a.png"), {"image": f"file://{tmp_path}/a.png"}):
        batch, at = batch_of(model, processor, [scene_rows(1)[0] | {"images": [image]}])
        assert all(torch.equal(batch[name], of_bytes[name]) for name in of_bytes)
        assert torch.equal(at.target, focus.target)


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
    hybrid, _ = load(folders["qwen3_5"])  # two thirds are layer 2, which has linear attention
    assert default_layers(hybrid) == (3,)
