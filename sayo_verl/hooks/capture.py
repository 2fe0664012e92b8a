"""The engine mixin, which adds attention statistics to the output of the log-prob pass.

It overrides one method of verl's engine, ``forward_step``. Without a request in the call it does nothing. The
trainer sets the request for the old-log-prob pass only, because the reference pass of a LoRA run uses the same worker
call and would overwrite the statistics with the base model's. A call with an intervention is a counterfactual pass.

verl concatenates every jagged tensor in ``model_output`` over micro-batches and restores the order after dynamic
batching. It then stores the tensor in TransferQueue under its key, so an extra key needs no other change.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_torch_device
from verl.utils.ulysses import get_ulysses_sequence_parallel_group, get_ulysses_sequence_parallel_rank
from verl.workers.utils.padding import response_from_nested

from sayo_verl.errors import SayoError
from sayo_verl.hooks.counterfactual import counterfactual_micro_batch, plain_rows
from sayo_verl.models.families import Family, family_of
from sayo_verl.probe.measure import Measurement, Shard
from sayo_verl.probe.plan import ChatTokens, RowPlan, image_tiles, plan_row, video_tokens
from sayo_verl.probe.statistics import (
    FAST_LSE,
    INTERVENTION_KEY,
    REQUEST_KEY,
    WIRE_PREFIX,
    StatisticsRequest,
    check_lse_path,
    log_probs_key,
)
from sayo_verl.probe.taps import ForwardTap, asked_layers
from sayo_verl.probe.transfer import to_device
from sayo_verl.vision.intervention import Intervention

LAYERS = "algorithm.attn.*.layers"


class AttentionStatisticsMixin:
    """Mixin for ``FSDPEngineWithLMHead``; it comes first in the bases."""

    module: torch.nn.Module
    model_config: Any
    use_ulysses_sp: bool
    ulysses_sequence_parallel_size: int

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> tuple[Any, dict]:
        change = tu.get_non_tensor_data(micro_batch, INTERVENTION_KEY, default=None)
        if change is not None:
            return self._counterfactual_step(micro_batch, loss_function, forward_only, change)
        wire = tu.get_non_tensor_data(micro_batch, REQUEST_KEY, default=None)
        if wire is None:
            return super().forward_step(micro_batch, loss_function, forward_only)  # type: ignore[misc]
        packed = bool(tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True))
        device = torch.device(get_device_id())  # where verl computes; parameters may be offloaded
        request = StatisticsRequest.from_wire(wire)
        family = family_of(self.model_config.hf_config.model_type, where="the loaded model")
        shard = self._shard(family, packed)
        check_lse_path(request.path, packed=packed, ranks=shard.size if shard else 1)
        numbers = asked_layers(self.module, request.layers, where=LAYERS)
        clock = _Clock(device)

        @functools.cache
        def measurement() -> Measurement:
            # Created when the first layer is read. The device is then busy with earlier layers, so it does not idle.
            rows = plan_micro_batch(micro_batch, self.model_config, family, request)
            return Measurement(request, rows, numbers, packed=packed, device=device, shard=shard)

        def read(*args: Any) -> None:
            with clock:
                measurement().read(*args)

        def read_hidden(hidden: torch.Tensor) -> None:
            with clock:
                measurement().read_hidden(hidden)

        attention = {numbers[n] for s in request.statistics if s.spec.source != "hidden" for n in s.layers}
        hidden = any(s.spec.source == "hidden" for s in request.statistics)
        tap = ForwardTap(
            self.module, sorted(attention), read, read_hidden if hidden else None, with_lse=request.path == FAST_LSE
        )
        with tap:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)  # type: ignore[misc]
        with clock:
            results = measurement().finish()
        output["model_output"].update(wire_tensors(measurement().rows, results, clock.seconds(), device))
        return loss, output

    def _counterfactual_step(
        self, micro_batch: TensorDict, loss_function: Any, forward_only: bool, change: Mapping[str, Any]
    ) -> tuple[Any, dict]:
        """Return log-probs of the response for a changed image under a separate name.

        verl stores all outputs of a pass by name, and the log-probs of the real image must stay. verl would store those
        of the prompt too.
        """
        family = family_of(self.model_config.hf_config.model_type, where="the loaded model")
        copy = counterfactual_micro_batch(micro_batch, self.model_config, family, change)
        loss, output = super().forward_step(copy, loss_function, forward_only)  # type: ignore[misc]
        log_probs = response_from_nested(output["model_output"]["log_probs"], copy["response_mask"])
        output["model_output"] = {log_probs_key(Intervention.from_wire(change)): log_probs}
        return loss, output

    def _shard(self, family: Family, packed: bool) -> Shard | None:
        """This rank's place among the ranks that share a sequence; None without sequence parallelism.

        Raises:
            SayoError: P09 for a sequence-parallel run with padded rows or a family that does not support it.
        """
        if not self.use_ulysses_sp:
            return None
        if not family.sequence_parallel or not packed:
            raise SayoError(
                "P09",
                "attention statistics are not available under this sequence parallelism",
                where="actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size",
                got=f"{self.ulysses_sequence_parallel_size}, {family.model_type}, "
                f"{'packed' if packed else 'padded'} rows",
                wanted="a family whose inputs verl slices, and use_remove_padding=True",
                fix="set it to 1, or set algorithm.adv_estimator=grpo",
            )
        group = get_ulysses_sequence_parallel_group()
        return Shard(get_ulysses_sequence_parallel_rank(), self.ulysses_sequence_parallel_size, group)


def plan_micro_batch(
    micro_batch: TensorDict, model_config: Any, family: Family, request: StatisticsRequest
) -> list[RowPlan]:
    """Plan the rows of a micro-batch from verl's fields.

    Args:
        micro_batch: with ``input_ids`` and ``response_mask`` (jagged [N, .]), ``multi_modal_inputs`` and ``extra_info``
            (one dict per row).
        model_config: verl's, with ``hf_config`` and ``tokenizer``.
        family: the model's.
        request: what to measure.

    Raises:
        SayoError: P10 for a missing field, and the errors of ``image_tiles`` and ``plan_row``.
    """
    for field in ("input_ids", "response_mask", "multi_modal_inputs", "extra_info"):
        if field not in micro_batch.keys():
            raise SayoError(
                "P10",
                f"the log-prob pass has no field {field!r}",
                where="AttentionStatisticsMixin.forward_step",
                got=sorted(micro_batch.keys()),
                fix="train on parquet rows with an image and extra_info.boxes (docs/data.md, the row contract)",
            )
    names = {s.name for s in request.statistics}
    chat = ChatTokens.of(model_config.tokenizer, family) if names & {"system_mass", "question_mass"} else None
    n_boxes = max((s.size for s in request.statistics if s.name == "box_mass"), default=0)
    ids = micro_batch["input_ids"].unbind()
    masks = micro_batch["response_mask"].unbind()
    images, infos = plain_rows(micro_batch["multi_modal_inputs"]), plain_rows(micro_batch["extra_info"])
    plans = []
    for n, (ids_S, mask_T, image, info) in enumerate(zip(ids, masks, images, infos, strict=True)):
        where = f"row {n} of the micro-batch (extra_info.index {info.get('index', 'absent')})"
        plans.append(
            plan_row(
                ids_S,
                mask_T.shape[0],
                image_token_id=model_config.hf_config.image_token_id,
                images=image_tiles(image, family, model_config.hf_config, where=where),
                video_token_id=model_config.hf_config.video_token_id if family.geometry == "grid" else None,
                videos=video_tokens(image, family, model_config.hf_config, where=where),
                boxes=info.get("boxes"),
                coverage=request.coverage,
                where=where,
                n_boxes=n_boxes,
                chat=chat,
            )
        )
    return plans


def wire_tensors(
    rows: Sequence[RowPlan],
    results: Mapping[str, tuple[torch.Tensor, list[int]]],
    seconds: float,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Jagged tensors of the statistics from ``Measurement.finish`` and the per-row numbers (rows of length one)."""
    per_row = {
        "image_tokens": [row.image_columns.numel() for row in rows],
        "region_tokens": [row.region_tokens for row in rows],
        "probe_seconds": [seconds / len(rows)] * len(rows),
    }
    lengths = [*(parts for _, parts in results.values()), *([1] * len(rows) for _ in per_row)]
    offsets = [torch.tensor([0, *parts]).cumsum(0) for parts in lengths]
    numbers = [torch.tensor(numbers, dtype=torch.float32) for numbers in per_row.values()]
    on_device = to_device([*offsets, *numbers], device)  # one copy for all
    values = [*(values for values, _ in results.values()), *on_device[len(offsets) :]]
    return {
        WIRE_PREFIX + name: torch.nested.nested_tensor_from_jagged(values, offsets)
        for name, values, offsets in zip([*results, *per_row], values, on_device[: len(offsets)], strict=True)
    }


class _Clock:
    """Sums the time of its ``with`` blocks.

    On an accelerator it records two device events per block, because a wait around every layer would cost more than
    the probe.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host_seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._start: Any = None

    def __enter__(self) -> None:
        if self._device.type == "cpu":
            self._start = time.perf_counter()
        else:
            self._start = get_torch_device().Event(enable_timing=True)
            self._start.record()

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cpu":
            self._host_seconds += time.perf_counter() - self._start
        else:
            end = get_torch_device().Event(enable_timing=True)
            end.record()
            self._events.append((self._start, end))

    def seconds(self) -> float:
        """Total so far, in seconds; waits for the device."""
        if self._events:
            get_torch_device().synchronize()
        return self._host_seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
