"""Facts about the model families whose attention can be read, one entry each, as plain strings and flags.

A family is found by ``model_type`` of config.json and its modules by class name. FSDP, PEFT and checkpointing wrap and
rename modules, but a wrapped module keeps its class or gets a subclass of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from sayo_verl.errors import SayoError


@dataclass(frozen=True)
class Family:
    """Differences between families.

    Attributes:
        model_type: as in config.json.
        processor: class of this family's processor.
        attention: class of the text attention modules -> the functions, ``module:name``, that its forward may call to
            rotate queries and keys. Each takes them as first arguments and returns them as [B, heads, S, D]. A forward
            calls exactly one of them, once.
        decoder: classes of the text model; the output of its ``norm`` is the last hidden state.
        geometry: layout of visual tokens: ``"grid"`` (``image_grid_thw`` and a merge size) or ``"tiles"``
            (``image_tile_grid``, one thumbnail).
        delimiters: tokens around an image that are not visual tokens.
        sequence_parallel: verl slices this family's inputs under Ulysses; otherwise a run would be silently wrong.
        fused_kernels: strategies under which verl's fused kernels run this family.
        packed_needs_flash_attn: verl calls flash-attn for packed rows with any ``attn_implementation``.
        flash: the names, ``module:name``, by which the attention of packed rows calls FlashAttention's function for
            sequences of different lengths.
    """

    model_type: str
    processor: str
    attention: Mapping[str, tuple[str, ...]]
    decoder: tuple[str, ...]
    geometry: str = "grid"
    delimiters: tuple[str, ...] = ("<|vision_start|>", "<|vision_end|>")
    sequence_parallel: bool = field(default=True, kw_only=True)
    fused_kernels: tuple[str, ...] = field(default=("fsdp", "fsdp2"), kw_only=True)
    packed_needs_flash_attn: bool = field(default=False, kw_only=True)
    flash: tuple[str, ...] = field(
        default=("transformers.modeling_flash_attention_utils:_flash_varlen_fn",), kw_only=True
    )


_MODELS = "transformers.models"
_QWEN2_5_ROTARY = (
    f"{_MODELS}.qwen2_5_vl.modeling_qwen2_5_vl:apply_multimodal_rotary_pos_emb",
    # verl's replacement attention for packed rows imports the function of the older family
    f"{_MODELS}.qwen2_vl.modeling_qwen2_vl:apply_multimodal_rotary_pos_emb",
)

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "qwen3_vl",
            "Qwen3VLProcessor",
            {"Qwen3VLTextAttention": (f"{_MODELS}.qwen3_vl.modeling_qwen3_vl:apply_rotary_pos_emb",)},
            ("Qwen3VLTextModel",),
        ),
        Family(
            "qwen3_vl_moe",
            "Qwen3VLProcessor",
            {"Qwen3VLMoeTextAttention": (f"{_MODELS}.qwen3_vl_moe.modeling_qwen3_vl_moe:apply_rotary_pos_emb",)},
            ("Qwen3VLMoeTextModel",),
        ),
        Family(
            "qwen2_5_vl",
            "Qwen2_5_VLProcessor",
            {"Qwen2_5_VLAttention": _QWEN2_5_ROTARY},
            ("Qwen2_5_VLTextModel",),
            fused_kernels=("fsdp",),
            packed_needs_flash_attn=True,
            flash=(
                "verl.models.transformers.qwen2_vl:flash_attn_varlen_func",
                "transformers.modeling_flash_attention_utils:_flash_varlen_fn",
            ),
        ),
        Family(
            "qwen3_5",
            "Qwen3VLProcessor",
            {"Qwen3_5Attention": (f"{_MODELS}.qwen3_5.modeling_qwen3_5:apply_rotary_pos_emb",)},
            ("Qwen3_5TextModel",),
        ),
        Family(
            "qwen3_5_moe",
            "Qwen3VLProcessor",
            {"Qwen3_5MoeAttention": (f"{_MODELS}.qwen3_5_moe.modeling_qwen3_5_moe:apply_rotary_pos_emb",)},
            ("Qwen3_5MoeTextModel",),
        ),
        Family(
            "internvl",
            "InternVLProcessor",
            {
                "Qwen3Attention": (f"{_MODELS}.qwen3.modeling_qwen3:apply_rotary_pos_emb",),
                "Qwen3MoeAttention": (f"{_MODELS}.qwen3_moe.modeling_qwen3_moe:apply_rotary_pos_emb",),
            },
            ("Qwen3Model", "Qwen3MoeModel"),
            geometry="tiles",
            delimiters=("<img>", "</img>"),
            sequence_parallel=False,
            fused_kernels=(),
        ),
    )
}


# Families that users of verl may try -> why they are not supported; docs/probe.md says more.
UNSUPPORTED = {
    "glm4v": "verl 0.9.1 fails on each of its images with transformers 5.9, for every estimator",
    "glm4v_moe": "verl does not run its vision tower for a micro-batch without an image, so FSDP would wait forever",
    "kimi_vl": "its latent attention rotates only a part of queries and keys, and the probe reads whole ones",
    "qwen3_5_text": "it has no images",
    "qwen3_5_moe_text": "it has no images",
}


def family_of(model_type: str, *, where: str) -> Family:
    """Return the facts of a model type.

    Raises:
        SayoError: L18 for an unknown family, L75 for one that the installed transformers does not have.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in FAMILIES:
        why = UNSUPPORTED.get(model_type)
        raise SayoError(
            "L18",
            "attention capture does not support this model family" + (f": {why}" if why else ""),
            where=where,
            got=model_type,
            wanted=" or ".join(FAMILIES),
            fix="use a supported model" + ("" if why else ", or algorithm.adv_estimator=grpo"),
        )
    if model_type not in CONFIG_MAPPING:
        raise SayoError(
            "L75",
            "the installed transformers does not have this model family",
            where=where,
            got=f"{model_type}, transformers {version('transformers')}",
            wanted="transformers 5.9.0, with which this version was tested",
            fix="install the version of transformers that pyproject.toml names",
        )
    return FAMILIES[model_type]


def check_processor(name: str, family: Family, where: str) -> None:
    """Refuse the processor of another family, which would map boxes to wrong visual tokens; L23.

    Args:
        name: class of the processor.
        family: the model's.
        where: names the model or the file.
    """
    if name != family.processor:
        raise SayoError(
            "L23",
            "the model folder holds the processor of another family",
            where=where,
            got=f"{name} for a {family.model_type} model",
            wanted=family.processor,
            fix="copy the processor files of the original model into the folder",
        )
