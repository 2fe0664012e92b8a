"""verl's own training worker (FSDP2, packed rows, vision tower) with random weights, and its log-prob pass."""

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from cost.shapes import Shape

from gpu import models
from gpu.report import Stage
from gpu.stand_ins import absent_packages, flash_attention

JAGGED = ("prompts", "responses", "input_ids", "position_ids", "response_mask", "loss_mask")


def prepare(stage: Stage) -> None:
    """Replace missing packages and start a process group of one. Call it before verl is imported."""
    if absent := absent_packages("ray", "fastapi", "uvicorn"):
        stage.stood_in[", ".join(absent)] = "importable names that raise when called"
    if what := flash_attention(stage.tiny):
        stage.stood_in["flash-attn"] = what
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo" if stage.tiny else "cpu:gloo,cuda:nccl")


def build(stage: Stage, shape: Shape, lora: bool) -> Any:
    """Build the worker without a tokenizer; its processor handles images only."""
    import verl.utils.model as verl_model
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    stage.stood_in |= {"weights": "random", "processor": "the image processor only"}
    adapter = {"lora_rank": 16, "lora_alpha": 32, "target_modules": "all-linear", "exclude_modules": ".*visual.*"}
    # verl's attention of Qwen2.5-VL rounds float32 queries to bfloat16 for the kernel
    exact = stage.tiny and shape.family == "qwen3_vl"
    loader = models.loader_at_random(stage.device)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(verl_model, "get_hf_auto_model_class", return_value=loader),
    ):
        models.hf_config(shape, stage.tiny).save_pretrained(folder)
        built = TrainingWorker(
            config=TrainingWorkerConfig(
                model_type="language_model",
                model_config=HFModelConfig(
                    path=folder,
                    load_tokenizer=False,
                    external_lib="sayo_verl.hooks.engine",
                    use_remove_padding=True,
                    override_config={"attn_implementation": "flash_attention_2"},
                    **(adapter if lora else {}),
                ),
                engine_config=FSDPEngineConfig(
                    strategy="fsdp2",
                    model_dtype="fp32" if stage.tiny else "bf16",
                    use_dynamic_bsz=True,
                    use_torch_compile=not stage.tiny,
                    forward_only=False,
                    infer_max_token_len_per_gpu=60 if stage.tiny else 16384,
                    mixed_precision={
                        "param_dtype": "fp32" if exact else "bf16",
                        "reduce_dtype": "fp32",
                        "buffer_dtype": "fp32",
                    },
                ),
                optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=1),
                checkpoint_config=CheckpointConfig(),
            )
        )
        built.reset()
    images = models.image_processor(built.engine.model_config.hf_config, half=shape.family == "qwen3_vl")
    built.engine.model_config.processor = SimpleNamespace(image_processor=images)
    stage.sync()
    return built


def log_prob_pass(built: Any, rows: Sequence[dict[str, Any]], **extra: Any) -> Any:
    """Call verl's ``infer_batch`` as the old-log-prob pass does.

    Args:
        built: the worker.
        rows: see ``models.random_rows``.
        extra: settings of the call, such as the probe's request.
    """
    from verl.utils import tensordict_utils as tu

    batch = tu.list_of_dict_to_tensordict(list(rows))
    for name in JAGGED:
        if not batch[name].is_nested:
            batch[name] = torch.nested.as_nested_tensor(list(batch[name].unbind()), layout=torch.jagged)
    settings = {"calculate_entropy": True, "compute_loss": False, "temperature": 1.0, "global_token_num": None, **extra}
    for name, value in settings.items():
        tu.assign_non_tensor_data(batch, name, value)
    return built.infer_batch(batch)


@contextmanager
def queries_and_keys() -> Iterator[list[tuple[Any, torch.Tensor, torch.Tensor, float]]]:
    """Copy the probe's inputs of each micro-batch: plans of the rows, queries, keys, scale."""
    from sayo_verl.probe.measure import Measurement

    captured: list[tuple[Any, torch.Tensor, torch.Tensor, float]] = []
    original = Measurement.read

    def read(self: Any, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float, *more: Any) -> None:
        original(self, layer, query, key, scale, *more)
        captured.append((self.rows, query.clone(), key.clone(), scale))

    with mock.patch.object(Measurement, "read", read):
        yield captured
