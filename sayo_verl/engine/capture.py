"""The engine mixin: attention statistics from the log-prob pass, beside ``log_probs`` and ``entropy``.

It overrides one method of verl's engine, ``forward_step``, and does nothing unless the call carries a request (the
trainer mixin raises it for the old-log-prob pass only: the reference pass of a LoRA run uses the same worker call and
would otherwise overwrite the statistics with the base model's).

verl concatenates every jagged tensor in ``model_output`` over micro-batches, restores the order after dynamic batching
and stores it in TransferQueue under its key, so an extra key needs no other change.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_torch_device

from sayo_verl.errors import SayoError
from sayo_verl.methods.base import StatisticsRequest
from sayo_verl.probe.plan import MassReader, RowPlan, plan_row
from sayo_verl.probe.statistics import REQUEST_KEY, WIRE_PREFIX
from sayo_verl.probe.taps import QueryKeyTap, resolve_layers, text_attention_layers


class AttentionStatisticsMixin:
    """In front of ``FSDPEngineWithLMHead``."""

    module: torch.nn.Module
    model_config: Any
    use_ulysses_sp: bool

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> tuple[Any, dict]:
        request = tu.get_non_tensor_data(micro_batch, REQUEST_KEY, default=None)
        if request is None:
            return super().forward_step(micro_batch, loss_function, forward_only)  # type: ignore[misc]
        if self.use_ulysses_sp:
            raise SayoError(
                "P09",
                "attention statistics are not available under Ulysses sequence parallelism",
                where="actor_rollout_ref.actor.ulysses_sequence_parallel_size",
                wanted="1",
                fix="set it to 1, or set algorithm.adv_estimator=grpo",
            )
        wanted = StatisticsRequest(**request)
        packed = bool(tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True))
        clock = _Clock()
        with clock:
            attention = text_attention_layers(self.module)
            layers = resolve_layers(wanted.layers, len(attention), where="algorithm.attn.*.layers")
            rows = plan_micro_batch(micro_batch, self.model_config.hf_config, wanted.coverage)
            device = next(self.module.parameters()).device
            rows = [_to(row, device) for row in rows]
            reader = MassReader(rows, n_layers=len(layers), query_row=wanted.query_row, packed=packed, device=device)

        def read(layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
            with clock:
                reader(layer, query, key, scale)

        with QueryKeyTap(self.module, layers, read):
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)  # type: ignore[misc]
        output["model_output"].update(wire_tensors(rows, reader.mass_KL, clock.seconds))
        return loss, output


def plan_micro_batch(micro_batch: TensorDict, model_config: Any, coverage: float) -> list[RowPlan]:
    """Plans for the rows of a micro-batch, from the fields verl gives every row.

    Args:
        micro_batch: with ``input_ids`` and ``response_mask`` (jagged [N, .]), ``multi_modal_inputs`` and ``extra_info``
            (one dict per row).
        model_config: HF config with ``image_token_id`` and ``vision_config.spatial_merge_size``.
        coverage: see ``region_mask``.

    Raises:
        SayoError: P10 for a missing field, P07 for a video, and what ``plan_row`` raises.
    """
    for field in ("input_ids", "response_mask", "multi_modal_inputs", "extra_info"):
        if field not in micro_batch.keys():
            raise SayoError(
                "P10",
                f"the log-prob pass has no field {field!r}",
                where="AttentionStatisticsMixin.forward_step",
                got=sorted(micro_batch.keys()),
                fix="train on parquet rows with an image and extra_info.boxes (docs: the row contract in the README)",
            )
    ids = micro_batch["input_ids"].unbind()
    masks = micro_batch["response_mask"].unbind()
    images, infos = _rows_of(micro_batch["multi_modal_inputs"]), _rows_of(micro_batch["extra_info"])
    plans = []
    for n, (ids_S, mask_T, image, info) in enumerate(zip(ids, masks, images, infos, strict=True)):
        where = f"row {n} of the micro-batch (extra_info.index {info.get('index', 'absent')})"
        if "video_grid_thw" in image:
            raise SayoError("P07", "a row has a video", where=where, fix="remove videos; only images are supported")
        plans.append(
            plan_row(
                ids_S,
                mask_T.shape[0],
                image_token_id=model_config.image_token_id,
                grids=image["image_grid_thw"].tolist() if "image_grid_thw" in image else [],
                merge_size=model_config.vision_config.spatial_merge_size,
                boxes=info.get("boxes", []),
                coverage=coverage,
                where=where,
            )
        )
    return plans


def wire_tensors(rows: Sequence[RowPlan], mass_KL: torch.Tensor, seconds: float) -> dict[str, torch.Tensor]:
    """The statistics as jagged tensors: per-token ones over whole rows, per-row ones as rows of length one."""
    device = mass_KL.device
    lengths = torch.tensor([0, *(row.length for row in rows)], device=device)
    single = torch.arange(len(rows) + 1, device=device)
    per_row = {
        "image_tokens": [row.image_tokens for row in rows],
        "region_tokens": [row.region_tokens for row in rows],
        "probe_seconds": [seconds / len(rows)] * len(rows),
    }
    out = {
        name: torch.nested.nested_tensor_from_jagged(mass_KL[k].clone(), lengths.cumsum(0))
        for k, name in enumerate(("image_mass", "region_mass"))
    }
    for name, values in per_row.items():
        values_N = torch.tensor(values, dtype=torch.float32, device=device)
        out[name] = torch.nested.nested_tensor_from_jagged(values_N, single)
    return {WIRE_PREFIX + name: tensor for name, tensor in out.items()}


def _rows_of(stack: Any) -> list[dict]:
    """Per-row dicts of a non-tensor field, which tensordict hands out bare or wrapped depending on its history."""
    return [row.data if isinstance(row, NonTensorData) else row for row in stack]


def _to(row: RowPlan, device: torch.device) -> RowPlan:
    return RowPlan(row.length, row.response_length, row.marked.to(device), row.image_tokens, row.region_tokens)


class _Clock:
    """Adds up the wall time of its ``with`` blocks; waits for the device on both ends: the time is then the probe's."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> None:
        get_torch_device().synchronize()
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        get_torch_device().synchronize()
        self.seconds += time.perf_counter() - self._start
