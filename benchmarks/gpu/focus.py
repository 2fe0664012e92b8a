"""The focus stage of ``attn_faithful`` at a true shape: its own trainer on synthetic rows, LoRA, random weights."""

import io
import json
import random
import tempfile
import time
from typing import Any

import numpy as np
from cost.cells import duration
from cost.shapes import Lengths
from PIL import Image
from torch.utils.data import Dataset
from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, TrainerCallback, TrainingArguments

from gpu import models
from gpu.report import Stage
from sayo_verl.focus.rows import FocusCollator
from sayo_verl.focus.token import add_focus_token
from sayo_verl.focus.trainer import FocusConfig, FocusTrainer, focus_layers, trainable
from sayo_verl.tiny.policy import CHAT_TEMPLATE, IMAGE, VIDEO, VISION_END, VISION_START, build_tokenizer, task_words

STEPS = 3  # timed, after one that is not timed
ROWS = 2  # of a forward, as in configs/focus/qwen2_5vl_7b.yaml


def run(stage: Stage, family: str) -> None:
    stage.stood_in |= {"weights": "random", "tokenizer": "the tiny policy's, some 300 words"}
    held: dict[str, Any] = {}
    if stage.run("model", _make, stage, family, held, needs=20) is not None:
        stage.run("steps", _train, stage, held, needs=15)


def _make(stage: Stage, family: str, held: dict[str, Any]) -> dict[str, Any]:
    shape, tokenizer = models.shape_of(family, stage.tiny), build_tokenizer()
    config = models.hf_config(shape, stage.tiny)
    names = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    for name, token in names.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    if stage.tiny:  # the vocabulary of the tiny shape is smaller than the tokenizer's
        config.text_config.vocab_size = len(tokenizer)
    model = models.at_random(config, stage.dtype, stage.device)
    images = models.image_processor(config)
    videos = Qwen2VLVideoProcessor(size=dict(images.size), patch_size=images.patch_size, merge_size=images.merge_size)
    processor = Qwen2_5_VLProcessor(
        image_processor=images, video_processor=videos, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE
    )
    held |= {"model": model, "processor": processor, "focus": add_focus_token(model, processor)}
    return {"shape": shape.name, "peak_gib": stage.peak_gib()}


class _Rows(Dataset):
    """Rows with a noise image and one box, as in the parquet files of the stage."""

    def __init__(self, lengths: Lengths, side: int) -> None:
        rows, columns = lengths.image
        noise = np.random.default_rng(0).integers(0, 255, (rows * side, columns * side, 3), dtype=np.uint8)
        picture = io.BytesIO()
        Image.fromarray(noise).save(picture, "PNG")
        chosen, words_of = random.Random(0), [word for word in task_words() if word.startswith(" ")]
        words = " ".join(chosen.choice(words_of).strip() for _ in range(lengths.response))
        self._row = {
            "prompt": [{"role": "user", "content": "<image>What colour is the circle?"}],
            "images": [{"bytes": picture.getvalue()}],
            "response": f"<think> {words}</think><answer> red</answer>",
            "reward_model": {"ground_truth": "red"},
            "extra_info": {"boxes": [[models.BOX]]},
            "_where": "a synthetic row",
        }

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._row)


class _Clock(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.seconds = stage, []  # type: ignore[var-annotated]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.stage.sync()
        self._start = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.stage.sync()
        self.seconds.append(round(time.monotonic() - self._start, 3))


def _train(stage: Stage, held: dict[str, Any]) -> dict[str, Any]:
    model, focus = held["model"], held["focus"]
    lengths = Lengths(0, (2, 3), 0, 8) if stage.tiny else Lengths(0, (32, 32), 0, 512)
    config = FocusConfig(
        lora_rank=4 if stage.tiny else 64,
        lora_alpha=128,
        checkpointing=True,
        batch_size=ROWS,
        dtype="float32" if stage.tiny else "bfloat16",
    )
    layers = focus_layers(model, config.layers)
    images = model.config.image_token_id, model.config.video_token_id
    collate = FocusCollator(held["processor"], model.config, alpha=config.alpha)
    side = model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    clock = _Clock(stage)
    stage.reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=1 + STEPS,
            per_device_train_batch_size=ROWS,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            remove_unused_columns=False,
            bf16=not stage.tiny,
            use_cpu=stage.tiny,
            learning_rate=config.learning_rate,
            disable_tqdm=True,
        )
        trainer = FocusTrainer(
            model=trainable(model, focus, config),
            args=settings,
            train_dataset=_Rows(lengths, side),
            data_collator=collate,
            processing_class=held["processor"],
            layers=layers,
            weight=config.weight,
            forbidden=(focus, *images),
            callbacks=[clock],
        )
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "anchor_loss" in entry]
    losses = [round(entry["anchor_loss"], 5) for entry in history]
    timed = sorted(clock.seconds[1:])[STEPS // 2]
    stage.figure(
        f"a step of {ROWS} rows of {lengths.image_tokens:,} visual and {lengths.response} response tokens, "
        f"LoRA rank {config.lora_rank}",
        f"{duration(timed)}, peak {stage.peak_gib()} GiB",
    )
    return {
        "layers": list(layers),
        "step_s": clock.seconds,
        "peak_gib": stage.peak_gib(),
        "anchor_loss": losses,
        "log": json.dumps(history[-1]),
        "wrong": len(losses) != 1 + STEPS,
    }
