"""GPU memory of a job by arithmetic, before anything is loaded: one card, phase by phase.

verl's synchronous trainer and vLLM share every card in turn (``trainer/ppo/v1/trainer_sync.py``, ``engine_workers.py:
update_weights``). vLLM is put to sleep after sampling and is woken, weights first, then its KV cache, after the update.
So five sums have to fit, one after another:

- ``log-probs``: weights, one layer gathered, the logits of a micro-batch, the probe. Adam's states stay on the card.
- ``update``: weights, gradients, Adam's states, kept activations, and the larger of logits and one layer at work.
- ``optimizer step``: weights, gradients, Adam's states and one more copy (foreach AdamW).
- ``weight sync``: weights, Adam's states, vLLM's weights and a bucket of ``update_weights_bucket_megabytes``.
- ``rollout``: weights, Adam's states, and ``gpu_memory_utilization`` x card for vLLM. vLLM refuses to start if that is not
  free. KV cache is what its weights and its largest forward leave of it.

What is known: parameter counts (the model is built on the meta device), verl 0.9.1's float32 weights
(``engine/fsdp.yaml: model_dtype``, the base of a LoRA as well), bfloat16 products and gathered layers, a reference model
that FSDP keeps on the host (``forward_only``) or that is the actor without its adapter (LoRA), and offloading, which
empties the card between phases but not during an update (``engine/base.py: BaseEngineCtx``).

What is assumed: the constants below, every micro-batch full, visual tokens in the share of ``max_prompt_length``, and no
fragmentation. Activations of a layer are counted in bytes a token (``LAYER``); kernels keep some of them for less. vLLM
measures its own forward at start; here it is a lower bound. So a sum beyond the card is refused, one beyond 90 % is marked.
"""

import importlib.util
import math
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import CONFIG_MAPPING

from sayo_verl.errors import SayoError
from sayo_verl.methods import Method
from sayo_verl.model_check import load_config, sequence_parallel

GIB = 2**30
CARD = 79.0  # GiB that a card of 80 GB shows (A100: 79.2, H100: 79.1 to 79.6)
CUDA = 1.5  # GiB of a trainer's process: CUDA context, cuBLAS workspaces, NCCL buffers
VLLM_ASLEEP = 2.0  # GiB that a sleeping vLLM keeps: context, CUDA graphs, NCCL; its allocator frees weights and cache only
TIGHT = 0.9  # of the card, from which the plan warns

Phases = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Shapes:
    """What of a model decides memory. Counts of parameters, numbers of features."""

    parameters: int  # without adapters
    trained: int
    unit: int  # largest module that FSDP gathers by itself
    block: int  # largest of those that repeat
    unit_trained: int  # most that is trained in one
    root: int  # what FSDP gathers once for the whole pass
    largest: int  # parameter
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int  # features
    ffn: int  # of the experts that a token visits together, for a mixture
    vocab: int
    positions: int
    vision_layers: int
    vision_hidden: int
    vision_ffn: int
    patches: int  # of a visual token
    vision_trained: bool


@dataclass(frozen=True)
class Job:
    """What of a configuration decides memory. Bytes, tokens, GiB."""

    shards: int  # devices that share the weights
    tensor_parallel: int
    tokens: int  # of the largest micro-batch with gradients, on one device
    log_prob_tokens: int  # of the largest without
    visual_tokens: int  # among those of either
    max_prompt: int
    max_response: int
    max_model_len: int
    weight_bytes: int
    param_offload: bool
    optimizer_offload: bool
    host_policy: bool  # FSDP2 keeps weights, gradients and Adam's states on the host
    lora: bool
    checkpointing: bool
    unreduced: bool  # gradients wait, whole, for the last micro-batch
    update_logits: int  # bytes for one logit, see ``_job``
    log_prob_logits: int
    utilization: float
    sleeps: bool
    batched_tokens: int  # of vLLM's largest forward
    sequences: int  # that vLLM decodes together
    bucket: int
    card: float  # GiB
    probe_sets: int  # sets of keys that the probe sums over, 0 without
    probe_profile: bool
    probe_hidden: bool


def shapes_of(config: Any, model: DictConfig) -> Shapes:
    """Shapes of the model that a transformers configuration describes, as verl would build it.

    Args:
        config: of an image-text-to-text model.
        model: ``actor_rollout_ref.model``, for the adapter.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        net = AutoModelForImageTextToText.from_config(config)
        tied = bool(config.tie_word_embeddings)
        classes, names = set(net._no_split_modules), set() if tied else {"embed_tokens", "lm_head"}
        sizes = {id(p): p.numel() for p in net.parameters()}
        if rank := int(model.lora_rank):  # verl: transformer_impl.py, _build_lora_module
            chosen = {k: OmegaConf.to_container(OmegaConf.create({k: model[k]}))[k]  # type: ignore[index, call-overload]
                      for k in ("target_modules", "exclude_modules")}  # fmt: skip
            net = get_peft_model(net, LoraConfig(r=rank, **chosen))
    # verl: utils/fsdp_utils.py, _select_fsdp2_wrap_targets
    units = [module for name, module in net.named_modules()
             if type(module).__name__ in classes or name.rsplit(".", 1)[-1] in names]  # fmt: skip
    counts = [sum(sizes.get(id(p), 0) for p in unit.parameters()) for unit in units]
    trained = {name: p.numel() for name, p in net.named_parameters() if p.requires_grad}
    text, vision = config.get_text_config(), config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    experts = getattr(text, "num_experts_per_tok", None)
    return Shapes(
        parameters=sum(sizes.values()),
        trained=sum(trained.values()),
        unit=max(counts),
        block=max(n for n, unit in zip(counts, units, strict=True) if type(unit).__name__ in classes),
        unit_trained=max(sum(p.numel() for p in unit.parameters() if p.requires_grad) for unit in units),
        root=sum(sizes.values()) - sum(counts),
        largest=max(sizes.values()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head=head,
        ffn=experts * text.moe_intermediate_size if experts else text.intermediate_size,
        vocab=text.vocab_size,
        positions=text.max_position_embeddings,
        vision_layers=getattr(vision, "depth", None) or vision.num_hidden_layers,
        vision_hidden=vision.hidden_size,
        vision_ffn=vision.intermediate_size,
        # InternVL: pixel shuffle by downsample_ratio
        patches=getattr(vision, "spatial_merge_size", 0) ** 2 or round(config.downsample_ratio**-2),
        vision_trained=any(re.search(r"\bvisual\b|\bvision_tower\b", name) for name in trained),
    )


def layer_bytes(hidden: int, queries: int, keys: int, ffn: int) -> int:
    """Bytes that one decoder layer keeps for its backward, a token, under bfloat16 autocast and FlashAttention or sdpa.

    Two norms keep rows in float32 and their results, projections their inputs; queries and keys are kept around norm and
    rotation; a gated unit keeps gate, its activation, up and the product. Exact for Qwen3-VL, up to 10 % too much for
    Qwen2.5-VL, more for a vision tower without norms of queries or without a gate.
    """
    return 14 * hidden + 12 * queries + 12 * keys + 8 * ffn


def kv_bytes(s: Shapes, tensor_parallel: int) -> float:
    """Bytes of KV cache a token and card, in bfloat16; fewer heads than cards are copied."""
    return 2 * 2 * s.layers * s.kv_heads * s.head / min(tensor_parallel, s.kv_heads)


def kv_cache(s: Shapes, j: Job) -> tuple[float, float, float]:
    """GiB of vLLM's weights, of its largest forward (a lower bound) and of what is left for the KV cache."""
    weights = s.parameters * 2 / j.tensor_parallel / GIB
    decoder = j.batched_tokens * 2 * (3 * s.ffn / j.tensor_parallel + 4 * s.hidden)
    vision = j.batched_tokens * s.patches * 2 * (2 * s.vision_ffn / j.tensor_parallel + 4 * s.vision_hidden)
    forward = (max(decoder, vision) + j.sequences * s.vocab * 16) / GIB  # sampling sorts float32 logits
    return weights, forward, j.utilization * j.card - weights - forward


def estimate(s: Shapes, j: Job) -> Phases:
    """GiB per card of each term of each phase; the terms of a phase add up."""
    trained = s.trained * j.weight_bytes / j.shards
    weights = 0 if j.host_policy else s.parameters * j.weight_bytes / j.shards
    weights += 0 if j.host_policy or not j.lora else trained
    adam = 0 if j.host_policy else 2 * trained
    # a layer's whole gradient, and its float32 copy on the way to the other devices
    unit_gradient = 6 * s.unit_trained
    gradients = (0 if j.host_policy else trained) + (4 * s.trained if j.unreduced and j.shards > 1 else unit_gradient)
    gathered = 2 * (s.root + s.unit + s.block)  # the next is fetched early
    layer = layer_bytes(s.hidden, s.heads * s.head, s.kv_heads * s.head, s.ffn)
    patches = j.visual_tokens * s.patches
    block = layer_bytes(s.vision_hidden, s.vision_hidden, s.vision_hidden, s.vision_ffn)
    if j.checkpointing:
        kept = 2 * j.tokens * s.layers * s.hidden
        kept += 2 * patches * s.vision_layers * s.vision_hidden if s.vision_trained else 0
        work = j.tokens * (layer + 6 * s.ffn)  # with gradients of the gated unit
    else:
        kept = j.tokens * s.layers * layer + (patches * s.vision_layers * block if s.vision_trained else 0)
        work = j.tokens * 6 * s.ffn
    logits = j.tokens * s.vocab * j.update_logits
    probe = 4.0 * j.log_prob_tokens * (s.heads * (j.probe_sets + 1) if j.probe_sets else 0)
    probe += 4.0 * 5 * j.max_response * j.max_prompt if j.probe_profile else 0  # a profile and copies in float64
    probe += 4.0 * j.log_prob_tokens * s.hidden if j.probe_hidden else 0
    own, forward, cache = (value * GIB for value in kv_cache(s, j))
    asleep = VLLM_ASLEEP * GIB if j.sleeps else own + forward + cache
    resident = {
        "weights": 0 if j.param_offload else weights,
        "Adam": 0 if j.optimizer_offload else adam,
        "CUDA": CUDA * GIB,
    }
    training = {"weights": weights, "gradients": gradients, "Adam": adam, "CUDA": CUDA * GIB, "vLLM asleep": asleep}
    phases: Phases = {
        "log-probs": {**resident, "weights": weights, "gathered layers": gathered, "vLLM asleep": asleep,
                      "logits": j.log_prob_tokens * s.vocab * j.log_prob_logits,
                      "one layer": j.log_prob_tokens * 2 * (3 * s.ffn + 4 * s.hidden + s.heads * s.head),
                      "probe": probe},
        "update": {**training, "gathered layers": gathered, "kept activations": kept,
                   "logits or one layer": max(logits, work)},
        "optimizer step": {**training, "a copy": trained if not j.host_policy else 0},
        "weight sync": {**resident, "weights": weights, "vLLM asleep": asleep, "vLLM weights": own if j.sleeps else 0,
                        "bucket": j.bucket + (0 if j.lora else s.largest * j.weight_bytes)},
        "rollout": {**resident, "vLLM weights": own, "vLLM forward": forward, "KV cache": cache,
                    "CUDA": (CUDA + VLLM_ASLEEP) * GIB},
    }  # fmt: skip
    return {name: {term: size / GIB for term, size in terms.items()} for name, terms in phases.items()}


def card_gib(config: DictConfig) -> tuple[float, str]:
    """GiB of the smallest card, and where the number is from: the setting, nvidia-smi, or a card of 80 GB."""
    if config.sayo.gpu_memory_gib is not None:
        return float(config.sayo.gpu_memory_gib), "sayo.gpu_memory_gib"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
        sizes = [int(line) for line in done.stdout.split("\n") if line.strip().isdigit()]
        if done.returncode == 0 and sizes:
            return min(sizes) / 1024, "nvidia-smi"
    return CARD, "a card of 80 GB, assumed; sayo.gpu_memory_gib says another"


def check_memory(config: DictConfig, method: Method | None, *, dry_run: bool) -> list[tuple[str, str]]:
    """Lines of the plan, and a refusal of what cannot fit.

    Args:
        config: the full configuration.
        method: the run's method, for the probe.
        dry_run: this may be another machine: the model may be absent, and flash-attn, whose cross entropy keeps no
            float32 logits, counts as installed.

    Raises:
        SayoError: L58 for a ``max_model_len`` that is shorter than prompt and response, longer than the model's positions
            or longer than the KV cache; L60 for a phase that needs more than the card.
    """
    hf_config = load_config(str(config.actor_rollout_ref.model.path), dry_run=dry_run)
    check_length(config, hf_config)
    if config.trainer.device != "cuda":
        return []
    name = "memory per GPU"
    if reason := _not_estimated(config, hf_config):
        return [(name, f"not estimated: {reason}")]
    card, source = card_gib(config)
    s = shapes_of(hf_config, config.actor_rollout_ref.model)
    flash = dry_run or importlib.util.find_spec("flash_attn") is not None
    j = _job(config, method, s, card=card, flash=flash)
    lines = [(name, f"by arithmetic, in GiB of {card:.1f} ({source})")]
    for phase, terms in estimate(s, j).items():
        total = sum(terms.values())
        if total > card:
            raise _too_large(phase, terms, j, source)
        mark = f" - TIGHT, {total / card:.0%} of the card" if total > TIGHT * card else ""
        lines.append((name, f"{phase} {total:.1f}: {_terms(terms)}{mark}"))
    free, per_sequence = kv_cache(s, j)[2], kv_bytes(s, j.tensor_parallel) * j.max_model_len / GIB
    if per_sequence > free:
        raise SayoError("L58", "one sequence of max_model_len does not fit into vLLM's KV cache, and it would not start",
                        where="actor_rollout_ref.rollout.max_model_len",
                        got=f"{config.actor_rollout_ref.rollout.max_model_len or f'null, so {s.positions}'}: "
                        f"{per_sequence:.1f} GiB of {max(free, 0):.1f} that are left by arithmetic "
                        f"({j.utilization} x {card:.1f} less weights and a forward)",
                        wanted=f"at most about {max(int(free / per_sequence * j.max_model_len), 0)}",
                        fix=f"set it to {j.max_prompt + j.max_response} (prompt + response)" if
                        per_sequence * (j.max_prompt + j.max_response) <= free * j.max_model_len else
                        "raise rollout.gpu_memory_utilization or rollout.tensor_model_parallel_size")  # fmt: skip
    lines.append((name, f"KV cache: {free / per_sequence:.0f} sequences of {j.max_model_len} tokens at once"))
    if (config.algorithm.use_kl_in_reward or config.actor_rollout_ref.actor.use_kl_loss) and not j.lora:
        lines.append(("memory per node", f"reference model {s.parameters * 4 / GIB:.0f} GiB of the host's"))
    return lines


def check_length(config: DictConfig, hf_config: Any) -> None:
    """Refuse lengths that vLLM would cut or refuse, on any device.

    Args:
        config: the full configuration.
        hf_config: transformers' configuration of the model; None where it is not at hand.

    Raises:
        SayoError: L58.
    """
    data, length = config.data, config.actor_rollout_ref.rollout.max_model_len
    needed = int(data.max_prompt_length) + int(data.max_response_length)
    known = hf_config is not None and hf_config.model_type in CONFIG_MAPPING
    positions = hf_config.get_text_config().max_position_embeddings if known else math.inf
    if positions < max(needed, int(length or 0)) or int(length or needed) < needed:
        raise SayoError("L58", "prompt and response, vLLM's max_model_len and the model's positions do not go together",
                        where="actor_rollout_ref.rollout.max_model_len",
                        got=f"{length}; data.max_prompt_length + data.max_response_length = {needed}",
                        wanted=f"{needed} or more, up to {positions}, the model's positions",
                        fix=f"set it to {needed}" if needed <= positions else
                        "lower data.max_prompt_length or data.max_response_length")  # fmt: skip


def _not_estimated(config: DictConfig, hf_config: Any) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if hf_config is None:
        return "the model's configuration is not at hand"
    if hf_config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return f"{hf_config.model_type} is no image-text-to-text model of transformers"
    if config.actor_rollout_ref.actor.strategy not in ("fsdp", "fsdp2"):
        return f"actor.strategy={config.actor_rollout_ref.actor.strategy}"
    return None


def _job(config: DictConfig, method: Method | None, s: Shapes, *, card: float, flash: bool) -> Job:
    actor, rollout, model = (config.actor_rollout_ref[name] for name in ("actor", "rollout", "model"))
    fsdp, n, sp = actor.fsdp_config, int(rollout.n), sequence_parallel(config)
    devices = int(config.trainer.n_gpus_per_node) * int(config.trainer.nnodes)
    length = int(config.data.max_prompt_length) + int(config.data.max_response_length)

    def tokens(dynamic: bool, budget: int | None, micro: int | None, rows: int) -> int:
        """Of the largest micro-batch, by device; never more than there are rows for."""
        rows = math.ceil(rows * n * sp / devices)
        return min(int(budget or 0) if dynamic else (micro or rows) * length // sp, max(rows * length // sp, 1))

    update = tokens(actor.use_dynamic_bsz, actor.ppo_max_token_len_per_gpu, actor.ppo_micro_batch_size_per_gpu,
                    int(actor.ppo_mini_batch_size))  # fmt: skip
    infer = tokens(rollout.log_prob_use_dynamic_bsz, rollout.log_prob_max_token_len_per_gpu,
                   rollout.log_prob_micro_batch_size_per_gpu, int(config.data.train_batch_size))  # fmt: skip
    # verl: transformer_impl.py, prepare_model_outputs. bfloat16 logits; a copy for a temperature other than 1; without
    # flash-attn float32 log-softmax rows are kept; entropy with gradients keeps backward from working in place.
    copies = 2 * (1 + (float(rollout.temperature) != 1.0) + (not model.use_remove_padding))
    entropy = bool(actor.calculate_entropy) or float(actor.entropy_coeff) != 0
    fused = bool(model.use_fused_kernels)
    eager_entropy = 0 if fsdp.use_torch_compile or fsdp.entropy_from_logits_with_chunking else 12
    statistics = method.needs().statistics.statistics if method else ()
    return Job(
        shards=int(fsdp.fsdp_size) if int(fsdp.fsdp_size) > 0 else devices,
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
        host_policy=bool(fsdp.offload_policy) and actor.strategy == "fsdp2",
        lora=int(model.lora_rank) > 0,
        checkpointing=bool(model.enable_gradient_checkpointing),
        unreduced=bool(fsdp.use_no_sync_for_gradient_accumulation),
        update_logits=0 if fused else copies + 4 * entropy + (0 if flash else 8),
        log_prob_logits=0 if fused else copies + eager_entropy,
        utilization=float(rollout.gpu_memory_utilization),
        sleeps=bool(rollout.free_cache_engine),
        batched_tokens=int(rollout.max_num_batched_tokens),
        sequences=int(rollout.max_num_seqs),
        bucket=int(rollout.checkpoint_engine.update_weights_bucket_megabytes) * 2**20,
        card=card,
        probe_sets=len({s.name for s in statistics if s.fact.source in ("mass", "lse")}),
        probe_profile=any(s.fact.source == "profile" for s in statistics),
        probe_hidden=any(s.fact.source == "hidden" for s in statistics),
    )


def _terms(terms: dict[str, float]) -> str:
    return ", ".join(f"{name} {size:.1f}" for name, size in sorted(terms.items(), key=lambda t: -t[1]) if size >= 0.05)


def _too_large(phase: str, terms: dict[str, float], j: Job, source: str) -> SayoError:
    largest = max(terms, key=lambda term: terms[term])
    actor = "actor_rollout_ref.actor"
    if phase == "rollout":
        others = sum(terms.values()) - j.utilization * j.card
        where = "actor_rollout_ref.rollout.gpu_memory_utilization"
        fix = f"set it to {max(math.floor((j.card - others) / j.card * 100), 0) / 100} or less"
    elif largest in ("logits", "one layer", "logits or one layer", "kept activations"):
        which = "rollout.log_prob" if phase == "log-probs" else "actor.ppo"
        where = f"actor_rollout_ref.{which}_max_token_len_per_gpu"
        fix = f"lower it from {j.log_prob_tokens if phase == 'log-probs' else j.tokens} tokens a micro-batch"
    else:
        where = f"{actor}, {j.shards} GPUs"
        fix = ("use more GPUs or a smaller model" if j.lora else "train a LoRA (actor_rollout_ref.model.lora_rank), use more "
               f"GPUs, or keep weights and optimizer on the host ({actor}.strategy=fsdp2 {actor}.fsdp_config."
               "offload_policy=True)")  # fmt: skip
    return SayoError("L60", f"the {phase} phase needs more memory than a GPU has, most of it for {largest}", where=where,
                     got=f"{sum(terms.values()):.1f} GiB by arithmetic: {_terms(terms)}",
                     wanted=f"at most {j.card:.1f} ({source})", fix=fix)  # fmt: skip
