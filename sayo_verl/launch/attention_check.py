"""The attention of a run before it is loaded: can transformers and verl run it here, and what does it need or cost?"""

import importlib
from importlib.metadata import PackageNotFoundError, version

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig
from transformers.dependency_versions_table import deps
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_kernels_available, is_torch_npu_available

from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.models import qwen3_5
from sayo_verl.models.families import FAMILIES, family_of

ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"
# attn_implementation -> the distribution and the module that transformers takes it from (its import_utils.py)
FLASH = {
    "flash_attention_2": ("flash-attn", "flash_attn"),
    "flash_attention_3": ("flash-attn-3", "flash_attn_interface"),
    "flash_attention_4": ("flash-attn-4", "flash_attn.cute"),
}
# verl's own pin; built against the torch that is installed, hence without isolation and not from a wheel for CUDA 12
INSTALL_FLASH_ATTN = "FLASH_ATTENTION_FORCE_BUILD=TRUE pip install --no-build-isolation flash-attn==2.8.3"
INSTALL_KERNELS = f"pip install '{deps['kernels']}'"
# The cost of a run without flash-attn: arithmetic for 16k packed tokens of an 8B model, not measured.
DENSE_MASK = "packed rows under a dense mask: about 3 times the time of a log-prob pass"
SLOW_LOG_PROBS = "verl takes log-probs token by token without flash-attn: 0.3 to 1 s more a micro-batch"
# Families whose attention we do not read, and whose packed rows verl hands to flash-attn (verl/models/transformers).
OTHERS_THAT_CALL_FLASH_ATTN = ("qwen2_vl", "glm4v", "kimi_vl")


def attention_of(config: DictConfig) -> str:
    """The implementation of attention in the actor: what the configuration names, else verl's default."""
    name = OmegaConf.select(config, ATTENTION, default="flash_attention_2")  # verl/workers/config/model.py
    return "sdpa" if name is None else str(name)  # transformers' default


def flash_attn_problem(implementation: str = "flash_attention_2") -> str | None:
    """Why the package of a flash attention cannot be used on this machine; None if it can."""
    distribution, module = FLASH[implementation]
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return f"{distribution} is not installed"
    try:
        importlib.import_module(module)
        if implementation == "flash_attention_2":  # verl falls back silently if this one does not import
            importlib.import_module("flash_attn.ops.triton.cross_entropy")
    except (ImportError, OSError, RuntimeError) as error:
        return f"{distribution} {found} does not import ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return None


def check_attention(config: DictConfig, model: PretrainedConfig | None, *, dry_run: bool) -> str:
    """Refuse an attention that cannot run here, for every estimator, before Ray starts.

    Args:
        config: the composed configuration.
        model: the model's configuration; None if the model is not on this machine.
        dry_run: on a machine without a GPU, report what a run will need instead of refusing what is missing here.

    Returns:
        A line for the plan: the implementation, and what it needs or costs.

    Raises:
        SayoError: L26 for a flash attention whose package is missing or does not import, L54 for an implementation that
            transformers does not have or cannot get, or that does not run this family, and for a dictionary.
    """
    name, chosen = attention_of(config), config.actor_rollout_ref.model
    if config.actor_rollout_ref.actor.strategy not in ("fsdp", "fsdp2"):
        return f"not checked: {config.actor_rollout_ref.actor.strategy} brings its own"
    _check_implementation(config, name, model)
    if is_torch_npu_available():  # transformers has flash attention of its own there
        return name
    model_type = getattr(model, "model_type", "the model")
    packed, family = bool(chosen.use_remove_padding), FAMILIES.get(model_type)
    direct = packed and (family.packed_needs_flash_attn if family else model_type in OTHERS_THAT_CALL_FLASH_ATTN)
    if direct and name == "eager":
        what = f"for packed rows of {model_type} verl hands eager's mask to flash-attn, as one of padding"
        raise SayoError(
            "L54", what, where=ATTENTION, got=name, wanted="flash_attention_2", fix="leave it out for flash_attention_2"
        )
    needed = "flash_attention_2" if direct else name
    problem = flash_attn_problem(needed) if needed in FLASH else None
    at_once = chosen.use_fused_kernels or config.trainer.device == "cpu" or not flash_attn_problem()
    slow = "" if at_once else f"; {SLOW_LOG_PROBS}"
    if problem and is_kernels_available() and not direct:
        return f"{name}, {problem}: transformers takes its kernel from the hub{slow}"
    if problem:
        fix = INSTALL_FLASH_ATTN if needed == "flash_attention_2" else f"install {FLASH[needed][0]}"
        if dry_run and not torch.cuda.is_available():
            return f"{name}, needs {FLASH[needed][0]} on the machine of the run ({problem} here): {fix}"
        if direct:
            fix += (
                f", or actor_rollout_ref.model.use_remove_padding=False with ++{ATTENTION}=sdpa, where padding is "
                f"computed too{slow}"
            )
        elif model is not None:
            fix += f", or ++{ATTENTION}=sdpa ({DENSE_MASK if packed else 'slower'}{slow})"
        what = (
            f"verl calls flash-attn for packed rows of {model_type}, whatever attn_implementation is"
            if direct
            else f"{name} comes from a package"
        )
        raise SayoError(
            "L26",
            what,
            where=f"{ATTENTION} (default: flash_attention_2)",
            got=f"{name}, {problem}",
            wanted=f"{FLASH[needed][0]} that imports",
            fix=fix,
        )
    if needed in FLASH:
        return f"{name}, {FLASH[needed][0]} {version(FLASH[needed][0])}{slow}"
    dense = packed and config.trainer.device != "cpu" and name in ("sdpa", "eager")
    return name + (f", {DENSE_MASK}" if dense else "") + slow


def check_linear_attention(config: DictConfig, model: PretrainedConfig | None, *, dry_run: bool) -> str | None:
    """Refuse packed rows of Qwen3.5 that verl would compute wrong here, for every estimator.

    Args:
        config: the composed configuration.
        model: the model's configuration; None if the model is not on this machine.
        dry_run: on a machine without a GPU, report what a run will need instead of refusing what is missing here.

    Returns:
        A line for the plan; None for a model without layers of linear attention.

    Raises:
        SayoError: C10; C11 for a rollout on a CPU in another type than bfloat16; L75 for a transformers without this
            family.
    """
    if model is None or model.model_type not in qwen3_5.MODEL_TYPES:
        return None
    family_of(model.model_type, where="actor_rollout_ref.model.path")
    rollout, on_cpu = config.actor_rollout_ref.rollout, config.trainer.device == "cpu"
    if on_cpu and rollout.name == "vllm" and rollout.dtype != "bfloat16":
        raise SayoError(
            "C11",
            "vLLM's linear attention for CPUs takes bfloat16 only",
            where="actor_rollout_ref.rollout.dtype",
            got=rollout.dtype,
            wanted="bfloat16",
            fix="set it to bfloat16",
        )
    packed, found = bool(config.actor_rollout_ref.model.use_remove_padding), qwen3_5.installed()
    here = torch.cuda.is_available() or on_cpu  # else only the package can be looked for
    if packed and not found and not here and dry_run:
        return f"packed rows need {qwen3_5.PACKAGE} on the machine of the run: {qwen3_5.INSTALL}"
    if packed and (here or not found):
        qwen3_5.check_packed_kernel(qwen3_5.kernel_of(model.model_type))
    slow = f"padded rows in plain torch, slowly; {qwen3_5.PACKAGE} makes them faster on GPUs"
    return f"{qwen3_5.PACKAGE} {found}" if found else slow


def _check_implementation(config: DictConfig, name: str, model: PretrainedConfig | None) -> None:
    """L54 for an attention with which verl or transformers cannot make the model, or that is for generation only."""
    if OmegaConf.is_dict(OmegaConf.select(config, ATTENTION)):
        # transformers takes it, but verl then writes override_config into the configuration (update_model_config)
        raise SayoError(
            "L54",
            "verl fails on an attention for each part of a model: it takes the dictionary for a "
            "part of the configuration",
            where=ATTENTION,
            got=name,
            wanted="one name for all parts",
            fix="name one, such as sdpa",
        )
    if name.count("/") == 1:
        if is_kernels_available():
            return
        raise SayoError(
            "L54",
            "this attention is a kernel of the hub, and the package kernels is not installed (or too old)",
            where=ATTENTION,
            got=name,
            wanted=deps["kernels"],
            fix=f"{INSTALL_KERNELS}, or leave it out for flash_attention_2",
        )
    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)]
    what = f"transformers has no such attention for training{did_you_mean(name, known)}"
    if name in known:
        cls = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(model), None) if name == "flex_attention" else None
        if cls is None or cls._supports_flex_attn:
            return
        known.remove(name)
        what = f"{cls.__name__} of transformers does not run with this attention"
    raise SayoError(
        "L54",
        what,
        where=ATTENTION,
        got=name,
        wanted=", ".join(known),
        fix="name another, or leave it out for flash_attention_2",
    )
