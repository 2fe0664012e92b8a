"""The anchoring stage: a transformers ``Trainer`` whose loss is L_LM + weight * L_anchor, and the folder it writes.

Why not verl's own SFT trainer: docs/anchoring.md. The Trainer does distribution (DDP, FSDP, DeepSpeed), precision,
checkpointing and logging; ``trainer_args`` sets any field of ``TrainingArguments``.

Shape suffixes: B rows, R rows with boxes, S tokens.
"""

import copy
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from sayo_verl.errors import SayoError
from sayo_verl.focus.config import FocusConfig, check_new_folder
from sayo_verl.focus.files import check_boxes
from sayo_verl.focus.loss import (
    FORBIDDEN_WEIGHT,
    FocusBatch,
    default_layers,
    forbidden_excess,
    forward_with_focus,
)
from sayo_verl.focus.rows import FOCUS_KEY, AnchorRows, FocusCollator
from sayo_verl.focus.token import add_focus_token
from sayo_verl.probe.taps import attention_kinds, check_full_attention, resolve_layers, text_attention_layers

# projections of the decoder; the vision tower of Qwen2.5-VL has modules of the same names
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def load_with_focus(folder: Path | str, config: FocusConfig) -> tuple[Any, Any, int]:
    """Model, processor and id of ``<Focus>``, which is added if the folder does not have it."""
    how = {"attn_implementation": config.attention} if config.attention else {}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, config.dtype), **how)
    processor = AutoProcessor.from_pretrained(folder)
    return model, processor, add_focus_token(model, processor)


def focus_layers(model: nn.Module, named: Sequence[int]) -> tuple[int, ...]:
    """Layer numbers from 0; the default layer if none is named.

    Raises:
        SayoError: P02, P03 and P11 for a model or layer that cannot be read.
    """
    attention, n_layers = text_attention_layers(model)
    layers = resolve_layers(named, n_layers, where="--layers") if named else default_layers(model)
    check_full_attention(layers, attention_kinds(attention, n_layers), where="--layers")
    return layers


def trainable(model: Any, focus: int, config: FocusConfig) -> Any:
    """The model with its trained parameters marked: a PEFT model under LoRA, otherwise itself."""
    if config.lora_rank == 0:
        model.model.visual.requires_grad_(config.train_vision)
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=LORA_TARGETS,
        trainable_token_indices={"embed_tokens": [focus]},
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    model.enable_input_require_grads()  # checkpointed layers need an input with a graph
    return get_peft_model(model, lora)


class FocusTrainer(Trainer):
    """``Trainer`` with the anchoring loss; logs both parts."""

    def __init__(
        self, *args: Any, layers: Sequence[int], weight: float, forbidden: Sequence[int], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # means of micro-batches are averaged over an accumulated step
        self._layers, self._weight, self._forbidden = tuple(layers), weight, tuple(forbidden)
        self._parts: list[dict[str, torch.Tensor]] = []

    def _prepare_input(self, data: Any) -> Any:
        return data.to(self.args.device) if isinstance(data, FocusBatch) else super()._prepare_input(data)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        inputs = dict(inputs)
        focus: FocusBatch = inputs.pop(FOCUS_KEY)
        output, figures = forward_with_focus(model, inputs, focus, self._layers)
        divergence_R = figures["divergence"]
        anchor = divergence_R.sum() / max(divergence_R.numel(), 1)
        excess = forbidden_excess(output.logits, inputs["labels"], self._forbidden)
        loss = output.loss + self._weight * anchor + FORBIDDEN_WEIGHT * excess
        if not bool(torch.isfinite(loss)):
            raise SayoError(
                "F15",
                "the loss is not finite",
                where=f"step {self.state.global_step}",
                got=f"L_LM {output.loss.item()}, L_anchor {anchor.item()}, guard {excess.item()}",
                fix="lower the learning rate; check the images",
            )
        self._parts.append(
            {
                "lm_loss": output.loss.detach(),
                "divergence": divergence_R.detach().sum(),
                "forbidden_excess": excess.detach(),
                "rows": torch.tensor(float(len(focus.at))),
                "boxed_rows": torch.tensor(float(divergence_R.numel())),
            }
        )
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._parts and "loss" in logs:
            total = {name: sum(float(part[name]) for part in self._parts) for name in self._parts[0]}
            logs["lm_loss"] = total["lm_loss"] / len(self._parts)
            logs["forbidden_excess"] = total["forbidden_excess"] / len(self._parts)
            logs["anchor_loss"] = total["divergence"] / max(total["boxed_rows"], 1.0)
            logs["rows_without_boxes"] = total["rows"] - total["boxed_rows"]
            self._parts.clear()
        super().log(logs, *args, **kwargs)


def anchor(base: Path | str, files: Sequence[Path | str], out: Path | str, config: FocusConfig) -> dict[str, Any]:
    """Run the stage and write a model folder that transformers, verl and vLLM load.

    Args:
        base: folder or hub name of a Qwen2.5-VL or Qwen3-VL model.
        files: parquet files of rows.
        out: the folder; must not exist or be empty. Checkpoints, if any, go to ``<out>-checkpoints``.
        config: settings of the training.

    Returns:
        ``layers``, ``rows``, ``rows_without_boxes``, ``rows_without_response``, ``seconds``, ``history`` (the Trainer's
        log).

    Raises:
        SayoError: F codes, see ``token``, ``loss`` and ``rows``; F16 when ``out`` has files, F17 when several GPUs are
            driven by one process, F22 when no row has a box.
    """
    out = Path(out)
    check_new_folder(out, "name a new folder (--out)")
    unfinished = out.with_name(f"{out.name}.unfinished")  # so that ``out`` is there as a whole or not at all
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(unfinished, ignore_errors=True)
    if config.weight:
        check_boxes(files)
    rows = AnchorRows(files)
    counts = {
        "rows": len(rows),
        "rows_without_boxes": rows.without_boxes(),
        "rows_without_response": rows.without_response(),
    }
    model, processor, focus = load_with_focus(base, config)
    layers = focus_layers(model, config.layers)
    collate = FocusCollator(processor, model.config, alpha=config.alpha, max_tokens=config.max_tokens or None)
    if config.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    written = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)  # the Trainer changes both
    model = trainable(model, focus, config)
    settings: dict[str, Any] = {
        "output_dir": f"{out}-checkpoints",
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup_steps,
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.clip,
        "seed": config.seed,
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 10,
        "bf16": config.dtype == "bfloat16",
    }
    args = TrainingArguments(**(settings | config.trainer_args))
    if args.n_gpu > 1:
        raise SayoError(
            "F17",
            "one process drives several GPUs",
            where="the launch",
            got=f"{args.n_gpu} GPUs",
            wanted="one process per GPU",
            fix="start it with torchrun --nproc_per_node=GPUS",
        )
    trainer = FocusTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=collate,
        processing_class=processor,
        layers=layers,
        weight=config.weight,
        forbidden=(focus, written[0].image_token_id, written[0].video_token_id),
    )
    done = trainer.train()
    export(trainer, processor, base, unfinished, config)
    if trainer.is_world_process_zero():
        for part in written:
            part.save_pretrained(unfinished)
        unfinished.rename(out)
    return {
        "layers": list(layers),
        **counts,
        "seconds": done.metrics["train_runtime"],
        "history": trainer.state.log_history,
    }


def export(trainer: Trainer, processor: Any, base: Path | str, out: Path, config: FocusConfig) -> None:
    """Write weights, config, tokenizer, chat template and generation config.

    The first process merges LoRA in a new copy of the base model, on the CPU. This works under every wrapper. The
    adapter stays in the folder ``adapter`` of the checkpoints.
    """
    if config.lora_rank == 0:
        trainer.save_model(str(out))  # gathers shards; all processes take part
    else:
        adapter = Path(trainer.args.output_dir) / "adapter"
        trainer.save_model(str(adapter))
        if trainer.is_world_process_zero():
            merge_adapter(base, adapter, config).save_pretrained(out)
    if trainer.is_world_process_zero():
        processor.save_pretrained(out)
        (out / "training_args.bin").unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()


def merge_adapter(base: Path | str, adapter: Path | str, config: FocusConfig) -> Any:
    """The base model with ``<Focus>`` and the trained adapter in its weights."""
    from peft import PeftModel

    model, _, _ = load_with_focus(base, config)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
