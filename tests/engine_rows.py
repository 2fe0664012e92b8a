"""Rows as verl's agent loop makes them, and a training worker on CPU: what the engine and trainer tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

# (image width, image height, response length, boxes); None: a row without an image. 32 px are one visual token.
ROWS: list[tuple[int, int, int, list[list[float]]] | None] = [
    (96, 96, 6, [[0.05, 0.05, 0.6, 0.3]]),
    (128, 64, 9, [[0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.2, 1.0]]),
    (96, 96, 3, []),
    None,
    (64, 128, 7, [[0.3, 0.3, 0.35, 0.35]]),
    (96, 64, 5, [[0.0, 0.0, 1.0, 1.0]]),
]


def single_process_group(port: int) -> None:
    """The environment verl's engine reads instead of a launcher's."""
    if not torch.distributed.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.distributed.init_process_group("gloo")


def model_config(policy: Path, *, packed: bool, attention: str = "sdpa", lora_rank: int = 0) -> HFModelConfig:
    lora = {"lora_rank": lora_rank, "target_modules": "all-linear"} if lora_rank else {}
    return HFModelConfig(
        path=str(policy),
        external_lib="sayo_verl.engine",
        override_config={"attn_implementation": attention},
        use_remove_padding=packed,
        enable_gradient_checkpointing=True,
        **lora,
    )


def worker(config: HFModelConfig, *, dynamic: bool, micro_batch: int = 2) -> TrainingWorker:
    """A real training worker with FSDP2 on one CPU process."""
    precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        model_dtype="fp32",
        mixed_precision=precision,
        use_torch_compile=False,
        use_dynamic_bsz=dynamic,
        infer_max_token_len_per_gpu=120,
        infer_micro_batch_size_per_gpu=micro_batch,
        forward_only=False,
    )
    built = TrainingWorker(
        config=TrainingWorkerConfig(
            model_type="language_model",
            model_config=config,
            engine_config=engine,
            optimizer_config=FSDPOptimizerConfig(lr=1e-4, total_training_steps=1),
            checkpoint_config=CheckpointConfig(),
        )
    )
    built.reset()
    return built


def make_rows(processor: Any, seed: int = 0, shapes: list | None = None) -> list[dict[str, Any]]:
    """One dict per row with the fields verl's agent loop stores, from the model's own processor and rope rule."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    class Loop(AgentLoopWorker):
        def __init__(self) -> None:
            self.processor, self.tokenizer, self.mm_processor_kwargs = processor, processor.tokenizer, {}

    class Output:
        mm_processor_kwargs = None

        def __init__(self, images: list | None) -> None:
            self.multi_modal_data = {"images": images} if images else {}

    loop, rng, rows = Loop(), np.random.default_rng(seed), []
    for i, shape in enumerate(shapes or ROWS):
        images = None
        content: list[dict[str, str]] = [{"type": "text", "text": "what colour is the circle ?"}]
        response_length, boxes = 4, [[0.1, 0.1, 0.4, 0.4]]  # a padding row of verl keeps a real row's boxes
        if shape is not None:
            width, height, response_length, boxes = shape
            images = [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))]
            content.insert(0, {"type": "image"})
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        prompt = processor(text=[text], images=images, return_tensors="pt")["input_ids"][0]
        response = torch.tensor(rng.integers(20, 200, response_length))
        ids = torch.cat([prompt, response])
        multi_modal = loop._compute_multi_modal_inputs(Output(images), ids)
        positions = loop._compute_position_ids(ids[None], torch.ones_like(ids)[None], multi_modal).squeeze(0)
        rows.append(
            {
                "prompts": prompt,
                "responses": response,
                "input_ids": ids,
                "position_ids": positions,
                "response_mask": torch.ones_like(response),
                "loss_mask": torch.ones_like(response),
                "multi_modal_inputs": multi_modal,
                "extra_info": {"index": i, "boxes": [boxes]},
                "uid": f"u{i // 2}",
            }
        )
    return rows


def log_prob_pass(built: TrainingWorker, rows: list[dict[str, Any]], request: dict | None, **extra: Any) -> TensorDict:
    """verl's infer_batch over the rows, as the old-log-prob pass calls it."""
    batch = tu.list_of_dict_to_tensordict(rows)
    for name in ("prompts", "responses", "input_ids", "position_ids", "response_mask", "loss_mask"):
        if not batch[name].is_nested:  # TransferQueue hands out jagged tensors also when all rows are equally long
            batch[name] = torch.nested.as_nested_tensor(list(batch[name].unbind()), layout=torch.jagged)
    settings = {"calculate_entropy": True, "compute_loss": False, "temperature": 1.0, "global_token_num": None, **extra}
    if request is not None:
        settings["sayo_probe"] = request
    for key, value in settings.items():
        tu.assign_non_tensor_data(batch, key, value)
    return built.infer_batch(batch)
