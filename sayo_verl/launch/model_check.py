"""Checks of the model before a run: its family, layers and processor, and the modes verl cannot run that family in."""

import functools
import importlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, StrictDataclassError
from omegaconf import DictConfig, OmegaConf
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, PretrainedConfig
from transformers.dependency_versions_table import deps
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_kernels_available, is_torch_npu_available

from sayo_verl.errors import Rule, SayoError, did_you_mean, raise_first
from sayo_verl.methods import Method
from sayo_verl.models.families import FAMILIES, Family, family_of

WHERE = "actor_rollout_ref.model.path"
HDFS = "hdfs://"  # the only remote paths that verl copies (verl/utils/fs.py)
# Configuration, processor and tokenizer: some 20 MB of a hub model, none of its weights.
SMALL_FILES = ["*.json", "*.jinja", "*.txt"]
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
# What a run pays without flash-attn. Arithmetic for 16k packed tokens of an 8B model, not measured.
DENSE_MASK = "packed rows under a dense mask: about 3 times the time of a log-prob pass"
SLOW_LOG_PROBS = "verl takes log-probs token by token without flash-attn: 0.3 to 1 s more a micro-batch"
# Families that we do not read attention of, whose packed rows verl hands to flash-attn (verl/models/transformers).
OTHERS_THAT_CALL_FLASH_ATTN = ("qwen2_vl", "glm4v", "kimi_vl")


def is_hub_name(path: str) -> bool:
    """Whether transformers takes a model path for a name on the hub: it is "owner/name", and no such folder is here."""
    return not path.startswith(("/", ".", "~")) and path.count("/") == 1 and not Path(path).exists()


def model_folder(path: str, *, dry_run: bool) -> Path | None:
    """The folder that holds a model's configuration and, where it has them, its processor and tokenizer.

    For a hub name it is the snapshot in the hub's cache, of which small files are downloaded if they are absent. A name
    whose owner is a folder here may also be the path of a model that is not made yet: a dry run does not refuse it.

    Args:
        path: as in ``actor_rollout_ref.model.path``.
        dry_run: return None where the model is not on this machine, instead of an error.

    Returns:
        The folder; None also for a path on HDFS, which verl copies when the run starts.

    Raises:
        SayoError: L17 for a path without a model, and for a name that the hub refuses; L53 for a hub that cannot be
            reached.
    """
    if path.startswith(HDFS):
        return None
    if not is_hub_name(path):
        folder = Path(path).expanduser()
        if folder.exists():
            return folder
        if dry_run:
            return None
        raise SayoError(
            "L17",
            "there is no model at this path",
            where=WHERE,
            got=path,
            fix="correct it, or give a hub name such as Qwen/Qwen3-VL-8B-Instruct",
        )
    owner = Path(path).parent
    maybe_path = owner.is_dir()
    found = _hub_folder(path)
    if isinstance(found, Path):
        return found
    if dry_run and maybe_path:
        return None
    neither = f", and the folder {owner} here has none of this name" if maybe_path else ""
    if isinstance(found, RepositoryNotFoundError | HFValidationError):
        what = f"the hub has no such model, or does not show it to you{neither}"
        raise SayoError(
            "L17",
            what,
            where=WHERE,
            got=path,
            fix=f"correct the {'path or the ' if neither else ''}name; for a gated or private model: hf auth login",
        ) from found
    if dry_run:
        return None
    cause = found.__cause__ or found
    raise SayoError(
        "L53",
        f"the hub cannot be reached, and the model is not in its cache{neither}",
        where=WHERE,
        got=f"{path}, {type(cause).__name__}: {' '.join(str(cause).split())[:120]}",
        fix="check the network, HF_ENDPOINT and HF_HUB_OFFLINE; without a network, give the folder of a "
        f"download (hf download {path})",
    )


@functools.cache
def _hub_folder(name: str) -> Path | Exception:
    """The snapshot of a hub model, or why it cannot be had. The hub is tried once per process."""
    try:
        return Path(snapshot_download(name, allow_patterns=SMALL_FILES))
    except HFValidationError as error:
        return error
    except (OSError, httpx.HTTPError) as error:
        cached = try_to_load_from_cache(name, "config.json")  # of a snapshot that lacks some of the files
        return Path(cached).parent if isinstance(cached, str) else error


def load_config(path: str, *, dry_run: bool) -> PretrainedConfig | None:
    """The transformers configuration of a model folder or hub name; no weights and no code of the model are loaded.

    Args:
        path: as in ``actor_rollout_ref.model.path``.
        dry_run: return None where the model is not on this machine and cannot be had from the hub.

    Returns:
        The configuration. One of a model type that transformers does not know has the keys of config.json as
        attributes, and nested configurations as dictionaries.

    Raises:
        SayoError: L17 for a folder without a readable config.json, and what ``model_folder`` raises.
    """
    folder = model_folder(path, dry_run=dry_run)
    if folder is None:
        return None
    if not (folder / "config.json").is_file():
        raise SayoError(
            "L17",
            "the model folder has no config.json",
            where=WHERE,
            got=path,
            fix="point to a folder in Hugging Face format",
        )
    try:
        values = json.loads((folder / "config.json").read_text())
        if values["model_type"] in CONFIG_MAPPING:
            return AutoConfig.from_pretrained(folder)
        return PretrainedConfig.from_dict(values)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise SayoError(
            "L17",
            "the model's config.json cannot be read",
            where=WHERE,
            got=f"{path}: {error!r}"[:200],
            wanted="a configuration of transformers with a model_type",
            fix="copy config.json of the original model into the folder",
        ) from error


def sequence_parallel(config: DictConfig) -> int:
    """Devices that share a sequence."""
    # Only the FSDP engine's configuration has both keys, and L08 is to speak before a key error does.
    actor = config.actor_rollout_ref.actor
    return max(
        int(OmegaConf.select(actor, key, default=1))
        for key in ("ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size")
    )


def attention_of(config: DictConfig) -> str:
    """The implementation of attention in the actor: what the configuration names, else verl's default."""
    name = OmegaConf.select(config, ATTENTION, default="flash_attention_2")  # verl/workers/config/model.py
    return "sdpa" if name is None else str(name)  # transformers' default


def flash_attn_problem(implementation: str = "flash_attention_2") -> str | None:
    """Why the package of a flash attention cannot be used on this machine; None where it can."""
    distribution, module = FLASH[implementation]
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return f"{distribution} is not installed"
    try:
        importlib.import_module(module)
        if implementation == "flash_attention_2":  # verl falls back without a word where this one does not import
            importlib.import_module("flash_attn.ops.triton.cross_entropy")
    except (ImportError, OSError, RuntimeError) as error:
        return f"{distribution} {found} does not import ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return None


def check_attention(config: DictConfig, model: PretrainedConfig | None, *, dry_run: bool) -> str:
    """Refuse an attention that cannot run here, for every estimator, before Ray starts.

    Args:
        config: the composed configuration.
        model: the model's configuration; None where the model is not at hand.
        dry_run: on a machine without a GPU, say what a run will need instead of refusing what this machine lacks.

    Returns:
        A line for the plan: the implementation, and what it needs or costs.

    Raises:
        SayoError: L26 for a flash attention whose package is absent or does not import, L54 for an implementation that
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
            f"verl calls flash-attn for packed rows of {model_type}, whatever attn_implementation says"
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


def _check_implementation(config: DictConfig, name: str, model: PretrainedConfig | None) -> None:
    """L54, where verl or transformers stops when it makes the model, and for transformers' kernels for generation."""
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


def check_model(config: DictConfig, method: Method, folder: Path, model: PretrainedConfig) -> str:
    """Refuse a model whose attention cannot be read, or cannot under these settings.

    Args:
        config: the composed configuration.
        method: the run's method.
        folder: of the model, in Hugging Face format.
        model: its configuration.

    Returns:
        One line for the plan.

    Raises:
        SayoError: L18 for an unknown family, L23 for another family's processor, L09, L25 and L27 for modes that
            verl cannot run it in, P03 and P11 for layers that are not there or not of full attention.
    """
    from sayo_verl.probe.taps import resolve_layers

    family = family_of(model.model_type, where=WHERE)
    _check_modes(config, family, method)
    _check_processor(folder, family)
    text = model.get_text_config()
    request = method.needs().statistics
    where = f"algorithm.attn.{method.name.removeprefix('attn_')}.layers"
    n_layers = text.num_hidden_layers
    attention = [s.layers for s in request.statistics if s.spec.source != "hidden"]
    # a statistic at a time: -1 and the last number may both be there, asked by different methods
    layers = list(dict.fromkeys(n for asked in attention for n in resolve_layers(asked, n_layers, where=where)))
    kinds = dict.fromkeys(layers, "full_attention") | {n: kind for n, kind in enumerate(_kinds(text)) if n in layers}
    if set(kinds.values()) - {"full_attention"}:
        raise SayoError(
            "P11",
            "not full-attention layers",
            where=where,
            got=kinds,
            wanted="layers of type full_attention",
            fix="name such layers",
        )
    probed = f"layer {', '.join(map(str, layers))} of {n_layers}" if layers else "the last hidden state"
    return f"{family.model_type}, probing {probed}"


def _check_modes(config: DictConfig, family: Family, method: Method) -> None:
    whole = [s.name for s in method.needs().statistics.statistics if s.name.startswith("neighbour")]
    model, strategy = config.actor_rollout_ref.model, config.actor_rollout_ref.actor.strategy
    rules = [
        Rule(
            "L09",
            sequence_parallel(config) > 1 and not family.sequence_parallel,
            "verl does not split the tokens of this family over devices, and would not say so",
            where="actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size",
            got=f"{sequence_parallel(config)}, {family.model_type}",
            fix="set it to 1",
        ),
        Rule(
            "L27",
            sequence_parallel(config) > 1 and bool(whole),
            f"{', '.join(whole)} compare whole sequences, which no device holds",
            where="actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size",
            got=f"{sequence_parallel(config)}, {family.model_type}",
            fix="set it to 1, or choose another method",
        ),
        Rule(
            "L25",
            bool(model.use_fused_kernels) and strategy not in family.fused_kernels,
            f"verl's fused kernels do not run this family under {strategy}",
            where="actor_rollout_ref.model.use_fused_kernels",
            got=f"True, {family.model_type}",
            fix="set it to False" + "".join(f", or actor_rollout_ref.actor.strategy={s}" for s in family.fused_kernels),
        ),
    ]
    raise_first(rules)


def _check_processor(folder: Path, family: Family) -> None:
    """The grid of visual tokens is the processor's: another family's would map boxes to wrong tokens."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = folder / name
        found = json.loads(file.read_text()).get("processor_class", family.processor) if file.is_file() else None
        if found not in (None, family.processor):
            raise SayoError(
                "L23",
                "the model folder holds the processor of another family",
                where=str(file),
                got=f"{found} for a {family.model_type} model",
                wanted=family.processor,
                fix="copy the processor files of the original model into the folder",
            )


def _kinds(text: Any) -> list[str]:
    """Attention type of each layer; only families that mix types say so."""
    return list(text.layer_types or []) if "layer_types" in text.to_dict() else []
