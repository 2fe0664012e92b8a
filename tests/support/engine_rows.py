"""Rows as verl's agent loop makes them, and a training worker on CPU: what the engine and trainer tests share."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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

QUESTION = "what colour is the circle ?"
SYSTEM = "the square . red"

# (image width, image height, response length, boxes); None: a row without an image. 32 px are one visual token.
ROWS: list[tuple[int, int, int, list[list[float]]] | None] = [
    (96, 96, 6, [[0.05, 0.05, 0.6, 0.3]]),
    (128, 64, 9, [[0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.2, 1.0]]),
    (96, 96, 3, []),
    None,
    (64, 128, 7, [[0.3, 0.3, 0.35, 0.35]]),
    (96, 64, 5, [[0.0, 0.0, 1.0, 1.0]]),
]


@dataclass(frozen=True)
class RowShape:
    """A row to be made: any number of images.

    Attributes:
        images: (width, height) of each, in pixels.
        response_length: tokens.
        boxes: for each image its boxes. verl's padding rows have no image and keep a real row's boxes.
        text_between: the question follows every image; else the images lie side by side and the question comes last.
        system: the conversation begins with a system turn.
    """

    images: tuple[tuple[int, int], ...]
    response_length: int
    boxes: list[list[list[float]]]
    text_between: bool = False
    system: bool = False


def mixed_rows(cell: int) -> list[RowShape]:
    """Eight rows: no image, one, two and three; boxes in some images and not in others; responses of 1 to 9 tokens.

    Args:
        cell: pixels per side of a visual token.
    """

    def size(columns: int, rows: int) -> tuple[int, int]:
        return columns * cell, rows * cell

    left, right, thin = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0], [0.3, 0.3, 0.35, 0.35]
    return [
        RowShape((size(3, 3),), 6, [[[0.05, 0.05, 0.6, 0.3]]]),
        RowShape((size(2, 3), size(4, 2)), 9, [[left], [right, thin]], text_between=True),
        RowShape((), 4, [[[0.1, 0.1, 0.4, 0.4]]]),
        RowShape((size(2, 2), size(3, 2)), 3, [[], [left]], system=True),
        RowShape((size(4, 2),), 7, [[]], text_between=True, system=True),
        RowShape((size(2, 2), size(1, 3), size(2, 1)), 5, [[thin], [], [[0.0, 0.0, 1.0, 1.0]]]),
        RowShape((size(2, 4),), 1, [[thin]]),
        RowShape((), 6, [[]]),
    ]


def free_port() -> int:
    """A port nobody listens on, so that two test runs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def single_process_group(port: int = 0) -> None:
    """The environment verl's engine reads instead of a launcher's; port 0: any free one."""
    if not torch.distributed.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(port or free_port())
        torch.distributed.init_process_group("gloo")


def model_config(
    policy: Path,
    *,
    packed: bool,
    attention: str = "sdpa",
    lora_rank: int = 0,
    adapter: Path | None = None,
    fused: bool = False,
    checkpointing: bool = True,
) -> HFModelConfig:
    """verl's model settings.

    Args:
        policy: folder of the model.
        packed: verl's ``use_remove_padding``.
        attention: ``attn_implementation``.
        lora_rank: of a new adapter; 0 for none.
        adapter: folder of a trained adapter of that rank.
        fused: ``use_fused_kernels`` with the torch backend.
        checkpointing: ``enable_gradient_checkpointing``.
    """
    lora = {"lora_rank": lora_rank, "target_modules": "all-linear"} if lora_rank else {}
    if adapter is not None:
        lora["lora_adapter_path"] = str(adapter)
    return HFModelConfig(
        path=str(policy),
        external_lib="sayo_verl.hooks.engine",
        override_config={"attn_implementation": attention},
        use_remove_padding=packed,
        enable_gradient_checkpointing=checkpointing,
        use_fused_kernels=fused,
        fused_kernel_options={"impl_backend": "torch"} if fused else {},
        **lora,
    )


def worker(
    config: HFModelConfig,
    *,
    dynamic: bool,
    micro_batch: int = 2,
    strategy: str = "fsdp2",
    sequence_parallel: int = 1,
    param_dtype: str = "fp32",
    bucket: int = 0,
    token_budget: int = 120,
) -> TrainingWorker:
    """A real training worker on CPU processes.

    Args:
        config: see ``model_config``.
        dynamic: micro-batches by token count instead of by ``micro_batch`` rows.
        micro_batch: rows of a static micro-batch.
        strategy: ``fsdp`` or ``fsdp2``.
        sequence_parallel: ``ulysses_sequence_parallel_size``.
        param_dtype: of the forward pass; weights are kept in float32. ``bf16`` is verl's default.
        bucket: packed rows are filled up to a multiple of so many tokens (``pad_to_length``); 0: they are not.
        token_budget: of a dynamic micro-batch.
    """
    precision = {"param_dtype": param_dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine = FSDPEngineConfig(
        strategy=strategy,
        model_dtype="fp32",
        mixed_precision=precision,
        use_torch_compile=False,
        use_dynamic_bsz=dynamic,
        infer_max_token_len_per_gpu=token_budget,
        infer_micro_batch_size_per_gpu=micro_batch,
        ulysses_sequence_parallel_size=sequence_parallel,
        pad_to_length=bucket > 0,
        pad_to_length_bucket=bucket or 1,
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


@contextmanager
def fsdp1_on_cpu() -> Iterator[None]:
    """FSDP1 without what it does on accelerators only: spreading rank 0's weights, for which verl leaves the weights of
    the other ranks empty. Here every rank reads them."""
    import verl.workers.engine.fsdp.transformer_impl as engine

    names = ("FSDP", "get_init_weight_context_manager")
    before = {name: getattr(engine, name) for name in names}

    class OwnWeights(before["FSDP"]):
        def __init__(self, module: Any, *, sync_module_states: bool, **kwargs: Any) -> None:
            assert sync_module_states
            super().__init__(module, sync_module_states=False, **kwargs)

    engine.FSDP = OwnWeights
    engine.get_init_weight_context_manager = lambda use_meta_tensor, mesh: nullcontext
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(engine, name, value)


def make_rows(
    processor: Any, seed: int = 0, shapes: Sequence[RowShape | tuple | None] | None = None
) -> list[dict[str, Any]]:
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
    for i, given in enumerate(ROWS if shapes is None else shapes):
        shape = _row_shape(given)
        images = [
            Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in shape.images
        ]
        question = {"type": "text", "text": QUESTION}
        content = [part for _ in images for part in ({"type": "image"}, *([question] if shape.text_between else []))]
        turns = [{"role": "system", "content": SYSTEM}] if shape.system else []
        text = processor.apply_chat_template(
            [*turns, {"role": "user", "content": [*content, question]}], add_generation_prompt=True, tokenize=False
        )
        prompt = processor(text=[text], images=images or None, return_tensors="pt")["input_ids"][0]
        response = torch.tensor(rng.integers(20, 200, shape.response_length))
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
                "extra_info": {"index": i, "boxes": shape.boxes},
                "uid": f"u{i // 2}",
            }
        )
    return rows


def _row_shape(given: RowShape | tuple | None) -> RowShape:
    if isinstance(given, RowShape):
        return given
    if given is None:
        return RowShape((), 4, [[[0.1, 0.1, 0.4, 0.4]]])
    width, height, response_length, boxes = given
    return RowShape(((width, height),), response_length, [boxes])


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
