"""InternVL in Hugging Face format (``model_type`` ``internvl``, such as InternVL3.5), which verl 0.9.1 lacks.

``activate`` wraps one name of verl, ``hf_processor``, which every process that loads a model calls. If the model's
config.json has another ``model_type``, the wrapper calls verl's function. For ``internvl``:

- verl gets the processor of ``sayo_verl.models.internvl_model``; its own function returns None. The processor has no
  ``get_rope_index``, so verl numbers positions 0, 1, 2, ..., which is right for this family.
- The model's class gets that module's guards.
- ``qwen2_5_vl_dedup_image_tokens``, through which every prompt goes to vLLM, is replaced. verl's prompts hold all
  visual tokens of an image. vLLM expects one ``<IMG_CONTEXT>`` in place of ``<img>`` + tokens + ``</img>`` and expands
  it again. For any other prompt it adds a second image's tokens and answers a prompt that is not trained on.

The data set of ``sayo_verl.models.internvl_data`` keeps images as they are stored. verl's own data set rounds their
sides to multiples of 28, which is Qwen's grid. The launcher names ours in ``data.custom_cls``.

Not supported: videos, Ulysses sequence parallelism, fused kernels; each raises. Rollouts run on vLLM only.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

from sayo_verl.errors import Rule, SayoError, raise_first

MODEL_TYPE = "internvl"
_VLLM_SERVER = "verl.workers.rollout.vllm_rollout.vllm_async_server"


def activate() -> None:
    """Wrap ``hf_processor`` where verl looks it up. The plug-in calls this once per process."""
    import verl.workers.config.model as model_config

    stock = model_config.hf_processor

    @functools.wraps(stock)
    def hf_processor(name_or_path: str, **kwargs: Any) -> Any:
        if model_type_of(name_or_path) != MODEL_TYPE:
            return stock(name_or_path, **kwargs)
        from sayo_verl.models import internvl_model

        internvl_model.guard_model_class()
        collapse_prompts_for_vllm()
        return internvl_model.load_processor(name_or_path, **kwargs)

    model_config.hf_processor = hf_processor


def configure(config: Any, model: Any) -> bool:
    """Set the data set class of a run and refuse settings that cannot work; does nothing for other families.

    Args:
        config: the composed configuration, an OmegaConf ``DictConfig``; sets ``data.custom_cls`` unless the user did.
        model: the model's transformers configuration; None for a missing model, which preflight reports.

    Returns:
        Whether the model is of this family.

    Raises:
        SayoError: C07 for fused kernels, C08 for Ulysses sequence parallelism, C09 for a rollout without vLLM.
    """
    from omegaconf import OmegaConf, open_dict

    if model is None or model.model_type != MODEL_TYPE:
        return False
    sequence_parallel = tuple(
        f"{role}.{key}"
        for role in ("actor", "ref")
        for key in ("ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size")
    )

    def rule(code: str, key: str, wanted: Any, what: str) -> Rule:
        where = f"actor_rollout_ref.{key}"
        found = OmegaConf.select(config, where, default=wanted)  # an engine may lack a key
        what = f"{MODEL_TYPE}: {what}"
        return Rule(code, found != wanted, what, where=where, got=found, wanted=wanted, fix=f"set it to {wanted}")

    raise_first(
        [
            rule("C07", "model.use_fused_kernels", False, "verl's fused kernels drop the images of this family"),
            *(rule("C08", key, 1, "verl does not slice the inputs of this family") for key in sequence_parallel),
            rule("C09", "rollout.name", "vllm", "prompts with images are adapted for vLLM only"),
        ]
    )
    if OmegaConf.select(config, "data.custom_cls.path") is None:
        with open_dict(config):
            config.data.custom_cls = {"path": "pkg://sayo_verl.models.internvl_data", "name": "InternVLDataset"}
    return True


def model_type_of(name_or_path: str) -> str | None:
    """``model_type`` of config.json; None if it cannot be read, which verl reports."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(name_or_path)
    except OSError:
        return None
    return config.get("model_type")


def collapse_prompts_for_vllm() -> None:
    """Replace ``qwen2_5_vl_dedup_image_tokens`` for this family's processors, once per process.

    verl's server imports it by name before it loads its model. Another process may load a model before it imports the
    server. So the function is replaced in both modules.
    """
    import verl.workers.rollout.utils as rollout_utils

    from sayo_verl.models.internvl_model import InternVLProcessor

    stock = rollout_utils.qwen2_5_vl_dedup_image_tokens
    if getattr(stock, "sayo_internvl", False):
        return

    @functools.wraps(stock)
    def dedup(prompt_ids: list[int], processor: Any) -> list[int]:
        if not isinstance(processor, InternVLProcessor):
            return stock(prompt_ids, processor)
        return one_token_per_image(
            prompt_ids,
            start=processor.start_image_token_id,
            image=processor.image_token_id,
            end=processor.end_image_token_id,
            tokens_per_tile=processor.image_seq_length,
        )

    dedup.sayo_internvl = True  # type: ignore[attr-defined]
    for name in ("verl.workers.rollout.utils", _VLLM_SERVER):
        if name in sys.modules:
            sys.modules[name].qwen2_5_vl_dedup_image_tokens = dedup  # type: ignore[attr-defined]


def one_token_per_image(
    prompt_ids: Sequence[int], *, start: int, image: int, end: int, tokens_per_tile: int
) -> list[int]:
    """Replace every image's ``<img>`` + visual tokens + ``</img>`` in a prompt by one visual token.

    Args:
        prompt_ids: token ids of a prompt from the processor.
        start, image, end: ids of ``<img>``, ``<IMG_CONTEXT>`` and ``</img>``.
        tokens_per_tile: visual tokens of a tile.

    Raises:
        SayoError: C01 for visual tokens that are not whole tiles between ``<img>`` and ``</img>``.
    """
    ids, out, i = list(prompt_ids), [], 0
    while i < len(ids):
        first = i + 1 if ids[i] == start and i + 1 < len(ids) and ids[i + 1] == image else i
        if ids[first] != image:
            out.append(ids[i])
            i += 1
            continue
        last = first
        while last < len(ids) and ids[last] == image:
            last += 1
        if first == i or last == len(ids) or ids[last] != end or (last - first) % tokens_per_tile:
            raise SayoError(
                "C01",
                "the visual tokens of a prompt do not form an image",
                where=f"prompt for vLLM, position {first} of {len(ids)}",
                got=f"{last - first} visual tokens between {ids[i - 1 : i] if first == i else [ids[i]]} and "
                f"{ids[last : last + 1]}",
                wanted=f"a multiple of {tokens_per_tile} between <img> ({start}) and </img> ({end})",
                fix="check the chat template; it must write <IMG_CONTEXT> once per image and nothing around it",
            )
        out.append(image)
        i = last + 1
    return out
