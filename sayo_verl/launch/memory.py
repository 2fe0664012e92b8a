"""GPU memory of a job by arithmetic: what one card holds in each phase of a step.

verl's synchronous trainer and vLLM share every card in turn (``trainer/ppo/v1/trainer_sync.py``; ``engine_workers.py:
update_weights``). vLLM is put to sleep after sampling and woken after the update, first its weights, then its KV cache.
So five sums must fit:

- ``log-probs``: weights, one layer gathered, the logits of a micro-batch, the probe. Adam's states stay on the card.
- ``update``: weights, gradients, Adam's states, kept activations, and the larger of logits and one layer at work.
- ``optimizer step``: weights, gradients, Adam's states and one more copy of what is trained (foreach AdamW).
- ``weight sync``: weights, Adam's states, vLLM's weights and a bucket of ``update_weights_bucket_megabytes``.
- ``rollout``: weights, Adam's states, and ``gpu_memory_utilization`` x card for vLLM, which does not start if that is
  not free. Its KV cache is the rest after its weights and its largest forward.

Known: parameter counts (the model is built on the meta device); verl 0.9.1's float32 weights (``engine/fsdp.yaml:
model_dtype``), those below a LoRA as well; bfloat16 products and gathered layers; a reference model that FSDP keeps on
the host (``forward_only``), or that is the actor without its adapter; and offloading, which empties the card between
phases but not during an update (``engine/base.py: BaseEngineCtx``).

Assumed: the constants below, full micro-batches, visual tokens in the share of ``max_prompt_length``, no fragmentation.
vLLM measures its largest forward at start; here it is a lower bound.
"""

import re
from dataclasses import dataclass
from typing import Any

from sayo_verl.errors import SayoError

GIB = 2**30
CUDA = 1.5  # GiB of a trainer's process: CUDA context, cuBLAS workspaces, NCCL buffers
VLLM_ASLEEP = 2.0  # GiB that a sleeping vLLM keeps: context, CUDA graphs, NCCL; it frees weights and cache only


@dataclass(frozen=True)
class Shapes:
    """What decides memory in a model: counts of parameters, numbers of features."""

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
    """What decides memory in a configuration: bytes, tokens, GiB."""

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
    foreach: bool  # AdamW works on all parameters at once, through a copy
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


def shapes_of(config: Any, *, lora_rank: int = 0, **lora: Any) -> Shapes:
    """Shapes of the model that a transformers configuration describes, as verl would build it.

    Args:
        config: of a model whose type is in ``FAMILIES``; others lay out their configuration in other ways.
        lora_rank: of the adapter; 0: none, all weights are trained.
        lora: ``target_modules`` and ``exclude_modules`` of the adapter.

    Raises:
        SayoError: L63 for an adapter that PEFT does not build.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        net: Any = AutoModelForImageTextToText.from_config(config)
        classes = set(net._no_split_modules)
        sizes = {id(p): p.numel() for p in net.parameters()}
        if lora_rank > 0:  # verl: transformer_impl.py, _build_lora_module
            try:
                net = get_peft_model(net, LoraConfig(r=lora_rank, **lora))
            except (ValueError, re.error) as error:
                said = " ".join(str(error).split())[:160]
                raise SayoError(
                    "L63",
                    "PEFT cannot add this adapter to the model",
                    where="actor_rollout_ref.model.target_modules",
                    got=f"{lora}: {said}",
                    wanted="names of modules of the model, or a regular expression",
                    fix="set it to all-linear, and exclude_modules to null or .*visual.*",
                ) from error
    names = set() if config.tie_word_embeddings else {"embed_tokens", "lm_head"}
    # verl: utils/fsdp_utils.py, _select_fsdp2_wrap_targets
    units = [
        module
        for name, module in net.named_modules()
        if type(module).__name__ in classes or name.rsplit(".", 1)[-1] in names
    ]
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

    Two norms keep rows in float32 and their results, projections their inputs. Queries and keys are kept around norm
    and rotation. A gated unit keeps gate, its activation, up and the product. Exact for Qwen3-VL, 10 % too much for
    Qwen2.5-VL, more for vision towers, which lack norms of queries or a gate.
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
    # vLLM samples all rows at once, in float32: logits, log-probs, probabilities and noise (topk_topp_sampler.py)
    forward = (max(decoder, vision) + j.sequences * s.vocab * 16) / GIB
    return weights, forward, j.utilization * j.card - weights - forward


def estimate(s: Shapes, j: Job) -> dict[str, dict[str, float]]:
    """GiB per card of each term of each phase; the terms of a phase add up."""
    trained = s.trained * j.weight_bytes / j.shards
    weights = 0 if j.host_policy else s.parameters * j.weight_bytes / j.shards
    weights += 0 if j.host_policy or not j.lora else trained
    adam = 0 if j.host_policy else 2 * trained
    # a layer's whole gradient, and its float32 copy on the way to the other devices
    unit_gradient = 6 * s.unit_trained
    gradients = 0 if j.host_policy else trained
    whole = 4 * s.trained if j.unreduced and j.shards > 1 else unit_gradient
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
    probe += 4.0 * 5 * j.max_response * j.max_prompt if j.probe_profile else 0  # with its mean and ranked parts
    probe += 4.0 * j.log_prob_tokens * s.hidden if j.probe_hidden else 0
    own, forward, cache = (value * GIB for value in kv_cache(s, j))
    asleep = VLLM_ASLEEP * GIB if j.sleeps else own + forward + cache
    resident = {
        "weights": 0 if j.param_offload else weights,
        "Adam": 0 if j.optimizer_offload else adam,
        "CUDA": CUDA * GIB,
    }
    training = {"weights": weights, "gradients": gradients, "Adam": adam, "CUDA": CUDA * GIB, "vLLM asleep": asleep}
    phases = {
        "log-probs": {
            **resident,
            "weights": weights,
            "gathered layers": gathered,
            "vLLM asleep": asleep,
            "logits": j.log_prob_tokens * s.vocab * j.log_prob_logits,
            "one layer": j.log_prob_tokens * 2 * (3 * s.ffn + 4 * s.hidden + s.heads * s.head),
            "probe": probe,
        },
        "update": {
            **training,
            "gradients": gradients + whole,
            "gathered layers": gathered,
            "kept activations": kept,
            "logits or one layer": max(logits, work),
        },
        "optimizer step": {**training, "a copy": trained if j.foreach and not j.host_policy else 0},
        "weight sync": {
            **resident,
            "weights": weights,
            "vLLM asleep": asleep,
            "vLLM weights": own if j.sleeps else 0,
            "bucket": j.bucket + (0 if j.lora else s.largest * j.weight_bytes),
        },
        "rollout": {
            **resident,
            "vLLM weights": own,
            "vLLM forward": forward,
            "KV cache": cache,
            "CUDA": (CUDA + VLLM_ASLEEP) * GIB,
        },
    }
    return {name: {term: size / GIB for term, size in terms.items()} for name, terms in phases.items()}
