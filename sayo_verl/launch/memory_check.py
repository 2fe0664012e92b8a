"""Do the lengths fit the model, and the job its cards? The arithmetic is in ``memory``."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import CONFIG_MAPPING

from sayo_verl.errors import Rule, SayoError, raise_first
from sayo_verl.launch.attention_check import flash_attn_problem
from sayo_verl.launch.machine import run_cards
from sayo_verl.launch.memory import GIB, Job, Shapes, estimate, kv_bytes, kv_cache, shapes_of
from sayo_verl.launch.memory_fix import ACTOR, TIGHT, UTILIZATION, held, ways
from sayo_verl.launch.model_check import load_config, sequence_parallel
from sayo_verl.launch.resources import elsewhere
from sayo_verl.methods import Method
from sayo_verl.models.families import FAMILIES

CARD = 79.0  # GiB that a card of 80 GB shows (A100: 79.2, H100: 79.1 to 79.6)
# Term of the arithmetic -> the settings that change it, for error messages
CHANGED_BY = {
    "weights": "model_dtype, number of GPUs",
    **dict.fromkeys(("Adam", "a copy", "gradients"), "LoRA, number of GPUs"),
    "vLLM weights": "rollout.tensor_model_parallel_size, model",
    "vLLM asleep": "rollout.free_cache_engine",
    "KV cache": "rollout.gpu_memory_utilization",
    "vLLM forward": "rollout.max_num_batched_tokens, rollout.max_num_seqs",
    "bucket": "rollout.checkpoint_engine.update_weights_bucket_megabytes",
    **dict.fromkeys(
        ("logits", "one layer", "logits or one layer", "kept activations", "probe"), "tokens of a micro-batch"
    ),
}
NAME = "memory per GPU"
# Arguments that verl passes on to vLLM, and that change its memory
CHANGES_MEMORY = {
    "kv_cache_dtype",
    "kv_cache_memory_bytes",
    "gpu_memory_utilization",
    "max_model_len",
    "quantization",
    "cpu_offload_gb",
    "mm_encoder_tp_mode",
}


def check_memory(config: DictConfig, method: Method | None, *, dry_run: bool) -> list[tuple[str, str]]:
    """Refuse a job that does not fit its cards.

    Args:
        config: the full configuration.
        method: the run's method, for the probe.
        dry_run: this may be another machine. The model may be missing, and flash-attn counts as installed; its cross
            entropy keeps no float32 logits.

    Returns:
        Lines of the plan.

    Raises:
        SayoError: L58 for lengths that contradict each other and for a KV cache that does not hold one sequence, L60
            for a phase that needs more than the card, L61 for a wrong ``sayo.gpu_memory_gib``, L62 for a number that
            verl or vLLM cannot use, L63 for an adapter that cannot be built.
    """
    hf_config = load_config(str(config.actor_rollout_ref.model.path), dry_run=dry_run)
    check_length(config, hf_config)
    if config.trainer.device != "cuda":
        return []
    _check_numbers(config)
    if reason := _not_estimated(config, hf_config):
        return [(NAME, f"not estimated: {reason}")]
    away = elsewhere(config, dry_run=dry_run)
    card, source = card_gib(config, away=away)
    model = config.actor_rollout_ref.model

    def shapes(rank: int) -> Shapes:
        return shapes_of(
            hf_config,
            lora_rank=rank,
            exclude_modules=plain(model.exclude_modules),
            target_modules=plain(model.target_modules),
        )

    s = shapes(int(model.lora_rank))
    flash = away or flash_attn_problem() is None
    j = _job(config, method, s, card=card, flash=flash)
    totals = {phase: (sum(terms.values()), terms) for phase, terms in estimate(s, j).items()}
    largest = max(totals, key=lambda phase: totals[phase][0])
    if totals[largest][0] > card:
        raise _too_large(largest, totals[largest][1], j, source, ways(s, j, shapes))
    lines = [(NAME, f"by arithmetic, in GiB of {card:.1f} ({source})")]
    for phase, (total, terms) in totals.items():
        mark = f" - TIGHT, {total / card:.0%} of the card" if total > TIGHT * card else ""
        lines.append((NAME, f"{phase} {total:.1f}: {_listed(terms)}{mark}"))
    if source == "nvidia-smi":
        lines += _held(config, totals[largest][0])
    sequences = round(_sequences(s, j, shapes))
    at_once = f"KV cache for {sequences} sequences of {j.max_model_len} tokens at once"
    lines.append((NAME, f"{at_once}; {_waves(config, j, sequences)}"))
    if (config.algorithm.use_kl_in_reward or config.actor_rollout_ref.actor.use_kl_loss) and not j.lora:
        host = s.parameters * 4 * int(config.trainer.n_gpus_per_node) / j.shards / GIB
        lines.append(("memory per node", f"reference model {host:.0f} GiB of the host's"))
    return lines


def card_gib(config: DictConfig, *, away: bool) -> tuple[float, str]:
    """(GiB of the smallest card of the run, its source: the setting, nvidia-smi, or a card of 80 GB).

    Args:
        config: the full configuration.
        away: the run uses other machines, so nvidia-smi of this one is not read.

    Raises:
        SayoError: L61.
    """
    given = config.sayo.gpu_memory_gib
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
            raise SayoError(
                "L61",
                "memory of a GPU is not a positive number",
                where="sayo.gpu_memory_gib",
                got=given,
                wanted="GiB, such as 79; null: nvidia-smi is read",
                fix="correct it",
            )
        return float(given), "sayo.gpu_memory_gib"
    try:
        found, why = [] if away else run_cards(int(config.trainer.n_gpus_per_node)), ""
    except OSError as error:
        found, why = [], f", as {error}"
    if found:
        return min(card.total or 0 for card in found) / 1024, "nvidia-smi"
    return CARD, f"assumed: a card of 80 GB{why}; sayo.gpu_memory_gib names another"


def _held(config: DictConfig, needed: float) -> list[tuple[str, str]]:
    """A warning if other processes use so much of a card now that ``needed`` GiB do not fit."""
    devices = int(config.trainer.n_gpus_per_node)
    free, card = min((((card.total or 0) - (card.used or 0)) / 1024, card.index) for card in run_cards(devices))
    warning = (
        f"WARNING: {free:.1f} GiB of card {card} are free now, and the run needs {needed:.1f}: end other processes"
    )
    return [(NAME, warning)] if needed > free else []


def check_length(config: DictConfig, hf_config: Any) -> None:
    """Refuse lengths that vLLM would cut or refuse, on any device.

    Args:
        config: the full configuration.
        hf_config: transformers' configuration of the model; None if the model is not on this machine.

    Raises:
        SayoError: L58.
    """
    data, length = config.data, config.actor_rollout_ref.rollout.max_model_len
    needed = int(data.max_prompt_length) + int(data.max_response_length)
    known = hf_config is not None and hf_config.model_type in CONFIG_MAPPING
    text = hf_config.get_text_config() if known else None
    positions = getattr(text, "max_position_embeddings", None) or math.inf
    if positions < max(needed, int(length or 0)) or int(length or needed) < needed:
        raise SayoError(
            "L58",
            "prompt and response, vLLM's max_model_len and the model's positions contradict each other",
            where="actor_rollout_ref.rollout.max_model_len",
            got=f"{length}; data.max_prompt_length + data.max_response_length = {needed}",
            wanted=f"prompt + response <= max_model_len <= {positions}",
            fix=f"set it to {needed}"
            if needed <= positions
            else "lower data.max_prompt_length or data.max_response_length",
        )


def _not_estimated(config: DictConfig, hf_config: Any) -> str | None:
    """Why the arithmetic does not apply, or None."""
    if hf_config is None:
        return "the model is not on this machine"
    if hf_config.model_type not in FAMILIES:
        return f"the shapes of {hf_config.model_type} are unknown"
    layers = set(getattr(hf_config.get_text_config(), "layer_types", None) or ()) - {"full_attention"}
    if layers:
        return f"the text model has layers of {', '.join(sorted(layers))}"
    if config.critic.enable or (config.critic.enable is None and config.algorithm.adv_estimator == "gae"):
        return "there is a critic"  # the rule of verl's need_critic, which warns for every other estimator
    actor, rollout, model = (config.actor_rollout_ref[name] for name in ("actor", "rollout", "model"))
    fsdp, optim = actor.get("fsdp_config") or {}, actor.get("optim") or {}
    reward = config.reward.reward_model
    options = set(optim.get("override_optimizer_config") or {}) - {
        "foreach",
        "fused",
        "eps",
        "lr",
        "betas",
        "weight_decay",
    }
    engine = set(rollout.engine_kwargs.get("vllm") or {}) & CHANGES_MEMORY
    for setting, value, known in (
        ("actor.strategy", actor.strategy, ("fsdp", "fsdp2")),
        ("trainer.v1.trainer_mode", config.trainer.v1.trainer_mode, ("sync", "colocate_async")),
        ("rollout.name", rollout.name, ("vllm",)),
        ("rollout.quantization", rollout.get("quantization"), (None,)),
        ("rollout.engine_kwargs.vllm", sorted(engine), ([],)),
        ("rollout.dtype", rollout.dtype, ("bfloat16", "float16", "half")),
        ("rollout.enable_sleep_mode", rollout.get("enable_sleep_mode", True), (True,)),
        ("rollout.expert_parallel_size", rollout.expert_parallel_size, (1,)),
        ("rollout.pipeline_model_parallel_size", rollout.pipeline_model_parallel_size, (1,)),
        ("actor.optim.optimizer_impl", optim.get("optimizer_impl"), ("torch.optim",)),
        ("actor.optim.optimizer", optim.get("optimizer"), ("AdamW",)),
        ("actor.optim.override_optimizer_config", sorted(options), ([],)),
        ("actor.fsdp_config.reshard_after_forward", fsdp.get("reshard_after_forward"), (True,)),
        ("model.enable_activation_offload", model.enable_activation_offload, (False,)),
        ("model.lora_adapter_path", model.get("lora_adapter_path"), (None,)),
        ("model.target_parameters", model.get("target_parameters"), (None,)),
        ("reward.reward_model.enable", bool(reward.enable and not reward.enable_resource_pool), (False,)),
    ):
        if value not in known:
            return f"{setting}={value}"
    for setting in ("max_num_seqs", "max_num_batched_tokens"):
        if rollout[setting] is None:
            return f"rollout.{setting}=null, vLLM's own number"
    return None


def _check_numbers(config: DictConfig) -> None:
    """Refuse numbers with which verl or vLLM fails once the models load.

    Raises:
        SayoError: L62.
    """

    def rule(key: str, low: float, high: float, wanted: str) -> Rule:
        where = f"actor_rollout_ref.{key}"
        value = OmegaConf.select(config, where)
        broken = isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high
        got = "null" if value is None else value
        return Rule("L62", broken, "invalid number", where=where, got=got, wanted=wanted, fix="correct it")

    raise_first(
        [
            rule("rollout.gpu_memory_utilization", 0.0, 1.0, "a share of the card, above 0 and at most 1"),
            rule("model.lora_rank", -math.inf, math.inf, "a whole number; 0: no adapter"),
        ]
    )


def _job(config: DictConfig, method: Method | None, s: Shapes, *, card: float, flash: bool) -> Job:
    actor, rollout, model = (config.actor_rollout_ref[name] for name in ("actor", "rollout", "model"))
    fsdp, n, sp = actor.fsdp_config, int(rollout.n), sequence_parallel(config)
    devices = int(config.trainer.n_gpus_per_node) * int(config.trainer.nnodes)
    length = int(config.data.max_prompt_length) + int(config.data.max_response_length)

    def tokens(dynamic: bool, budget: int | None, micro: int | None, rows: int) -> int:
        """Tokens of the largest micro-batch on one device, at most all rows. verl refuses an unset size later."""
        rows = math.ceil(rows * n * sp / devices)
        return min(int(budget or 0) if dynamic else int(micro or 1) * length // sp, rows * length // sp)

    update = tokens(
        actor.use_dynamic_bsz,
        actor.ppo_max_token_len_per_gpu,
        actor.ppo_micro_batch_size_per_gpu,
        int(actor.ppo_mini_batch_size),
    )
    infer = tokens(
        rollout.log_prob_use_dynamic_bsz,
        rollout.log_prob_max_token_len_per_gpu,
        rollout.log_prob_micro_batch_size_per_gpu,
        int(config.data.train_batch_size),
    )
    # verl: transformer_impl.py, prepare_model_outputs. bfloat16 logits; a copy for a temperature other than 1; without
    # flash-attn float32 log-softmax rows are kept; entropy with gradients keeps backward from working in place.
    # verl 0.9.0 has no such key, never reduces gradients early and copies logits at any temperature.
    older = "use_no_sync_for_gradient_accumulation" not in fsdp
    copies = 2 * (1 + (older or float(rollout.temperature) != 1.0) + (not model.use_remove_padding))
    entropy = bool(actor.calculate_entropy) or float(actor.entropy_coeff) != 0
    fused = bool(model.use_fused_kernels)
    eager_entropy = 0 if fsdp.use_torch_compile or fsdp.entropy_from_logits_with_chunking else 12
    options = actor.optim.get("override_optimizer_config") or {}
    statistics = method.needs().statistics.statistics if method else ()
    return Job(
        shards=min(int(fsdp.fsdp_size), devices) if int(fsdp.fsdp_size) > 0 else devices,
        tensor_parallel=int(rollout.tensor_model_parallel_size),
        tokens=update,
        log_prob_tokens=infer,
        visual_tokens=update * sp * int(config.data.max_prompt_length) // length,
        max_prompt=int(config.data.max_prompt_length),
        max_response=int(config.data.max_response_length),
        max_model_len=int(rollout.max_model_len or s.positions),
        weight_bytes=2 if str(fsdp.model_dtype) in ("bf16", "bfloat16", "fp16", "float16") else 4,
        param_offload=bool(fsdp.param_offload),
        optimizer_offload=bool(fsdp.optimizer_offload),
        foreach=options.get("foreach") is not False and not options.get("fused"),
        host_policy=bool(fsdp.offload_policy) and actor.strategy == "fsdp2",
        lora=int(model.lora_rank) > 0,
        checkpointing=bool(model.enable_gradient_checkpointing),
        unreduced=older or bool(fsdp.use_no_sync_for_gradient_accumulation),
        update_logits=0 if fused else copies + 4 * entropy + (0 if flash else 8),
        log_prob_logits=0 if fused else copies + eager_entropy,
        utilization=float(rollout.gpu_memory_utilization),
        sleeps=bool(rollout.free_cache_engine),
        batched_tokens=int(rollout.max_num_batched_tokens),
        sequences=int(rollout.max_num_seqs),
        bucket=int(rollout.checkpoint_engine.update_weights_bucket_megabytes) * 2**20,
        card=card,
        probe_sets=len({s.name for s in statistics if s.spec.source in ("mass", "lse")}),
        probe_profile=any(s.spec.source == "profile" for s in statistics),
        probe_hidden=any(s.spec.source == "hidden" for s in statistics),
    )


def _sequences(s: Shapes, j: Job, shapes: Callable[[int], Shapes]) -> float:
    """As ``held``.

    Raises:
        SayoError: L58 for less than one, which vLLM refuses to serve (``v1/core/kv_cache_utils.py``).
    """
    per_token, free = kv_bytes(s, j.tensor_parallel) / GIB, max(kv_cache(s, j)[2], 0.0)
    there, needed = held(s, j), j.max_prompt + j.max_response
    if there < 1:
        raise SayoError(
            "L58",
            "vLLM's KV cache does not hold one sequence of max_model_len, and vLLM would not start",
            where="actor_rollout_ref.rollout.max_model_len",
            got=f"{j.max_model_len}{', the positions of the model' * (j.max_model_len == s.positions)}: "
            f"{per_token * j.max_model_len:.1f} GiB of {free:.1f} that are left of {j.utilization} x "
            f"{j.card:.1f} by arithmetic",
            wanted=f"about {int(free / per_token)} at most",
            fix=f"set it to {needed} (prompt + response)"
            if per_token * needed <= free
            else ways(s, replace(j, max_model_len=needed), shapes),
        )
    return there


def _waves(config: DictConfig, j: Job, sequences: int) -> str:
    """How many responses of a step a vLLM engine samples, and in how many waves if all have full length."""
    devices = int(config.trainer.n_gpus_per_node) * int(config.trainer.nnodes)
    responses = int(config.data.train_batch_size) * int(config.actor_rollout_ref.rollout.n)
    share = math.ceil(responses * j.tensor_parallel / devices)
    waves = math.ceil(share / min(sequences, j.sequences))
    cards = "a card" if j.tensor_parallel == 1 else f"for {j.tensor_parallel} cards"
    return f"{share} responses {cards}: {waves} wave{'s' * (waves > 1)} at most"


def plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _listed(terms: dict[str, float]) -> str:
    """Terms in descending order, without those that round to 0; the probe is always shown."""
    shown = [(name, size) for name, size in terms.items() if size >= 0.05 or (name == "probe" and size > 0)]
    return ", ".join(f"{name} {size:.1f}" for name, size in sorted(shown, key=lambda term: -term[1]))


def _too_large(phase: str, terms: dict[str, float], j: Job, source: str, fix: str) -> SayoError:
    largest = max((term for term in terms if term in CHANGED_BY), key=lambda term: terms[term])
    if phase == "rollout":
        where = UTILIZATION
    elif CHANGED_BY[largest] == "tokens of a micro-batch":
        which = "rollout.log_prob" if phase == "log-probs" else "actor.ppo"
        where = f"actor_rollout_ref.{which}_max_token_len_per_gpu"
    else:
        where = f"{ACTOR} on {j.shards} GPU{'s' * (j.shards > 1)}"
    what = f"{phase} needs more memory than a GPU has, most of it for {largest} ({CHANGED_BY[largest]})"
    return SayoError(
        "L60",
        what,
        where=where,
        got=f"{sum(terms.values()):.1f} GiB by arithmetic: {_listed(terms)}",
        wanted=f"at most {j.card:.1f} ({source})",
        fix=fix,
    )
