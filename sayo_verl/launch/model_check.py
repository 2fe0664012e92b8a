"""Checks of the model before a run: its family, layers and processor, and the modes verl cannot run that family in."""

import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from omegaconf import DictConfig, OmegaConf
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from sayo_verl.errors import Rule, SayoError, raise_first
from sayo_verl.methods import Method
from sayo_verl.models import location
from sayo_verl.models.families import Family, check_processor, family_of

WHERE = "actor_rollout_ref.model.path"
HDFS = "hdfs://"  # the only remote paths that verl copies (verl/utils/fs.py)


def model_folder(path: str, *, dry_run: bool) -> Path | None:
    """``sayo_verl.models.location.model_folder``; None also for a path on HDFS, which verl copies at the start."""
    return None if path.startswith(HDFS) else location.model_folder(path, where=WHERE, dry_run=dry_run)


def load_config(path: str, *, dry_run: bool) -> PretrainedConfig | None:
    """The transformers configuration of a model folder or hub name; no weights and no code of the model are loaded.

    Args:
        path: as in ``actor_rollout_ref.model.path``.
        dry_run: return None if the model is neither on this machine nor reachable on the hub.

    Returns:
        The configuration. One of a model type that transformers does not know has the keys of config.json as
        attributes, and nested configurations as dictionaries.

    Raises:
        SayoError: L17 for a folder without a readable config.json, and what ``model_folder`` raises.
    """
    folder = model_folder(path, dry_run=dry_run)
    if folder is None:
        return None
    location.check_config_file(folder, path, where=WHERE)
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
    # Only the FSDP engine's configuration has both keys; for another engine L08 must come before a key error.
    actor = config.actor_rollout_ref.actor
    return max(
        int(OmegaConf.select(actor, key, default=1))
        for key in ("ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size")
    )


def check_model(config: DictConfig, method: Method, folder: Path, model: PretrainedConfig) -> str:
    """Refuse a model whose attention cannot be read under these settings.

    Args:
        config: the composed configuration.
        method: the run's method.
        folder: of the model, in Hugging Face format.
        model: the configuration of transformers.

    Returns:
        One line for the plan.

    Raises:
        SayoError: L18 for an unknown family, L23 for another family's processor, L09, L25 and L27 for modes that
            verl cannot run it in, P03 for layers that do not exist, P11 for layers without full attention.
    """
    from sayo_verl.probe.taps import check_full_attention, configured_kinds, describe_layers, resolve_layers

    family = family_of(model.model_type, where=WHERE)
    _check_modes(config, family, method)
    _check_processor(folder, family)
    text = model.get_text_config()
    request = method.needs().statistics
    where = f"algorithm.attn.{method.name.removeprefix('attn_')}.layers"
    n_layers = text.num_hidden_layers
    attention = [s.layers for s in request.statistics if s.spec.source != "hidden"]
    # one statistic at a time: methods may name the last layer by -1 and by its number
    layers = list(dict.fromkeys(n for asked in attention for n in resolve_layers(asked, n_layers, where=where)))
    check_full_attention(layers, configured_kinds(text), where=where)
    probed = describe_layers(layers, n_layers) if layers else "the last hidden state"
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
    """The processor makes the grid of visual tokens: that of another family would map boxes to wrong tokens."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = folder / name
        found = json.loads(file.read_text()).get("processor_class", family.processor) if file.is_file() else None
        check_processor(found or family.processor, family, str(file))
