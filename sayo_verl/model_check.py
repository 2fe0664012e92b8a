"""Checks of the model before a run: its family, layers and processor, and the modes verl cannot run that family in."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sayo_verl.errors import SayoError
from sayo_verl.families import Family, family_of
from sayo_verl.methods import Method


def sequence_parallel(config: DictConfig) -> int:
    """Devices that share a sequence."""
    # Only the FSDP engine's configuration has both keys, and L08 is to speak before a key error does.
    actor = config.actor_rollout_ref.actor
    return max(
        int(OmegaConf.select(actor, key, default=1))
        for key in ("ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size")
    )


def check_model(config: DictConfig, method: Method, folder: Path, model_type: str) -> str:
    """Refuse a model whose attention cannot be read, or cannot under these settings.

    Args:
        config: the composed configuration.
        method: the run's method.
        folder: of the model, in Hugging Face format.
        model_type: of its config.json.

    Returns:
        One line for the plan.

    Raises:
        SayoError: L18 for an unknown family, L23 for another family's processor, L09, L25 and L26 for modes that verl
            cannot run it in, P03 and P11 for layers that are not there or not of full attention.
    """
    from transformers import AutoConfig

    from sayo_verl.probe.taps import resolve_layers

    family = family_of(model_type, where="actor_rollout_ref.model.path")
    _check_modes(config, family, method)
    _check_processor(folder, family)
    text = AutoConfig.from_pretrained(folder).get_text_config()
    request = method.needs().statistics
    where = f"algorithm.attn.{method.name.removeprefix('attn_')}.layers"
    n_layers = text.num_hidden_layers
    attention = [s.layers for s in request.statistics if s.fact.source != "hidden"]
    # a statistic at a time: -1 and the last number may both be there, asked by different methods
    layers = list(dict.fromkeys(n for asked in attention for n in resolve_layers(asked, n_layers, where=where)))
    kinds = dict.fromkeys(layers, "full_attention") | {n: kind for n, kind in enumerate(_kinds(text)) if n in layers}
    if set(kinds.values()) - {"full_attention"}:
        raise SayoError("P11", "not full-attention layers", where=where, got=kinds,
                        wanted="layers of type full_attention", fix="name such layers")  # fmt: skip
    probed = f"layer {', '.join(map(str, layers))} of {n_layers}" if layers else "the last hidden state"
    return f"{family.model_type}, probing {probed}"


def _check_modes(config: DictConfig, family: Family, method: Method) -> None:
    whole = [s.name for s in method.needs().statistics.statistics if s.name.startswith("neighbour")]
    model, strategy = config.actor_rollout_ref.model, config.actor_rollout_ref.actor.strategy
    flash = importlib.util.find_spec("flash_attn") is not None
    rules = [
        ("L09", sequence_parallel(config) > 1 and not family.sequence_parallel,
         "verl does not split the tokens of this family over devices, and would not say so",
         "actor.fsdp_config.ulysses_sequence_parallel_size", sequence_parallel(config), "set it to 1"),
        ("L27", sequence_parallel(config) > 1 and bool(whole),
         f"{', '.join(whole)} compare whole sequences, which no device holds", "actor.fsdp_config."
         "ulysses_sequence_parallel_size", sequence_parallel(config), "set it to 1, or choose another method"),
        ("L25", bool(model.use_fused_kernels) and strategy not in family.fused_kernels,
         f"verl's fused kernels do not run this family under {strategy}", "model.use_fused_kernels", True,
         "set it to False" + "".join(f", or actor_rollout_ref.actor.strategy={s}" for s in family.fused_kernels)),
        ("L26", bool(model.use_remove_padding) and family.packed_needs_flash_attn and not flash
         and not config.sayo.dry_run,
         "verl calls flash-attn for packed rows of this family, whatever attn_implementation says, and it is not "
         "installed", "model.use_remove_padding", True, "pip install flash-attn, or set it to False"),
    ]  # fmt: skip
    for code, broken, what, key, got, fix in rules:
        if broken:
            raise SayoError(code, what, where=f"actor_rollout_ref.{key}", got=f"{got}, {family.model_type}", fix=fix)


def _check_processor(folder: Path, family: Family) -> None:
    """The grid of visual tokens is the processor's: another family's would map boxes to wrong tokens."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = folder / name
        found = json.loads(file.read_text()).get("processor_class", family.processor) if file.is_file() else None
        if found not in (None, family.processor):
            raise SayoError("L23", "the model folder holds the processor of another family", where=str(file),
                            got=f"{found} for a {family.model_type} model", wanted=family.processor,
                            fix="copy the processor files of the original model into the folder")  # fmt: skip


def _kinds(text: Any) -> list[str]:
    """Attention type of each layer; only families that mix types say so."""
    return list(text.layer_types or []) if "layer_types" in text.to_dict() else []
