"""The micro-batch of a counterfactual pass: the same prompts and responses with other pixels.

The engine mixin uses it for a call with an intervention. Only ``pixel_values`` change, in a copy. Placeholders, grids
and position ids stay, so every response token keeps its position.
"""

from collections.abc import Mapping
from typing import Any

from tensordict import NonTensorData, TensorDict
from verl.utils import tensordict_utils as tu

from sayo_verl.errors import SayoError
from sayo_verl.models.families import Family
from sayo_verl.probe.plan import image_tiles, video_tokens
from sayo_verl.vision.control import filled_tokens
from sayo_verl.vision.intervention import Intervention, Pixels, intervene, prompt_key
from sayo_verl.vision.masks import check_boxes


def counterfactual_micro_batch(
    micro_batch: TensorDict, model_config: Any, family: Family, wire: Mapping[str, Any]
) -> TensorDict:
    """Copy a micro-batch and change every row's image as ``wire`` says.

    Args:
        micro_batch: verl's argument of ``forward_step``; not changed.
        model_config: verl's, with ``hf_config`` and ``processor``.
        family: the model's.
        wire: fields of ``Intervention``, and ``step``, the training step, so that masks differ between steps.

    Raises:
        SayoError: P10 for a missing field, P28 for a model without an image processor, and the errors of
            ``image_tiles``, ``filled_tokens`` and ``intervene``.
    """
    for field in ("input_ids", "response_mask", "multi_modal_inputs", "extra_info"):
        if field not in micro_batch.keys():
            raise SayoError(
                "P10",
                f"the counterfactual pass has no field {field!r}",
                where="forward_step",
                got=sorted(micro_batch.keys()),
                fix="train on rows with an image",
            )
    if model_config.processor is None:
        raise SayoError(
            "P28",
            "the model has no image processor, so its pixels cannot be changed",
            where="actor_rollout_ref.model.path",
            fix="add the processor's files",
        )
    intervention = Intervention.from_wire(wire)
    pixels = Pixels.of(model_config.processor, family.geometry)
    changed = []
    rows = zip(
        micro_batch["input_ids"].unbind(),
        micro_batch["response_mask"].unbind(),
        plain_rows(micro_batch["multi_modal_inputs"]),
        plain_rows(micro_batch["extra_info"]),
        strict=True,
    )
    for n, (ids_S, mask_T, image, info) in enumerate(rows):
        where = f"row {n} of the micro-batch (extra_info.index {info.get('index', 'absent')})"
        if video_tokens(image, family, model_config.hf_config, where=where):
            raise SayoError(
                "P07",
                "a row of a counterfactual pass has a video",
                where=where,
                fix="remove videos, or choose a method without counterfactual images",
            )
        tiles = image_tiles(image, family, model_config.hf_config, where=where)
        boxes = check_boxes(info.get("boxes"), len(tiles), where=where) if tiles else []
        key = prompt_key(ids_S[: ids_S.shape[0] - mask_T.shape[0]], int(wire["step"]))
        region = filled_tokens(intervention, boxes, tiles, float(wire["coverage"]), key=key, where=where)
        changed.append(intervene(image, intervention, pixels, tiles=tiles, region=region, key=key, where=where))
    copy = micro_batch.copy()
    tu.assign_non_tensor_stack(copy, "multi_modal_inputs", changed)
    return copy


def plain_rows(stack: Any) -> list[dict]:
    """Per-row dicts of a non-tensor field; tensordict returns them bare or wrapped."""
    return [row.data if isinstance(row, NonTensorData) else row for row in stack]
