"""Changes that make a job fit its cards. Each is tried with the arithmetic of ``memory`` before it is named."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

from sayo_verl.launch.memory import GIB, Job, Shapes, estimate, kv_bytes, kv_cache

TIGHT = 0.9  # share of the card above which the plan warns; above 1 the job is refused
ACTOR, UTILIZATION = "actor_rollout_ref.actor", "actor_rollout_ref.rollout.gpu_memory_utilization"


def held(s: Shapes, j: Job) -> float:
    """Sequences of ``max_model_len`` that the KV cache holds."""
    return max(kv_cache(s, j)[2], 0.0) * GIB / (kv_bytes(s, j.tensor_parallel) * j.max_model_len)


def utilization(s: Shapes, j: Job) -> float | None:
    """A ``gpu_memory_utilization`` with which the job fits: its own, or one that leaves a tenth of the card free.

    None if neither lets every phase fit and the KV cache hold one sequence.
    """
    rollout = sum(estimate(s, j)["rollout"].values())
    for share in (j.utilization, math.floor(100 * (TIGHT - rollout / j.card + j.utilization)) / 100):
        changed = replace(j, utilization=share)
        fits = all(sum(terms.values()) <= j.card for terms in estimate(s, changed).values())
        if fits and share > 0 and held(s, changed) >= 1:
            return share
    return None


def ways(s: Shapes, j: Job, shapes: Callable[[int], Shapes]) -> str:
    """The smallest combinations of changes that make the job fit by this arithmetic.

    Args:
        s: shapes of the model.
        j: a job that does not fit.
        shapes: makes the shapes of the model with an adapter of a rank.
    """

    def set_utilization(share: float) -> str:
        return f"{UTILIZATION}={share}"

    share = utilization(s, j)
    if share is not None:
        return set_utilization(share)
    row = j.max_prompt + j.max_response
    halves = [max(row, max(j.tokens, j.log_prob_tokens) >> n) for n in range(1, 8)]
    tokens = next((n for n in halves if utilization(s, _shorter(j, n)) is not None), row)
    fsdp = f"{ACTOR}.fsdp_config"
    options: list[tuple[str, Callable[[Shapes, Job], tuple[Shapes, Job]]]] = [
        (
            f"{ACTOR}.ppo_max_token_len_per_gpu={tokens} "
            f"actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu={tokens} (or smaller micro-batches; from "
            f"{max(j.tokens, j.log_prob_tokens)} tokens)",
            lambda s, j: (s, _shorter(j, tokens)),
        ),
        (
            f"{fsdp}.param_offload=True {fsdp}.optimizer_offload=True (off the card for sampling)",
            lambda s, j: (s, replace(j, param_offload=True, optimizer_offload=True)),
        ),
        (
            f"{fsdp}.model_dtype=bf16 (weights are updated in bfloat16 too)",
            lambda s, j: (s, replace(j, weight_bytes=2)),
        ),
        (
            "a LoRA: actor_rollout_ref.model.lora_rank=16",
            lambda s, j: (s if j.lora else shapes(16), replace(j, lora=True)),
        ),
        (
            f"{ACTOR}.strategy=fsdp2 {fsdp}.offload_policy=True (weights and optimizer on the host)",
            lambda s, j: (s, replace(j, host_policy=j.host_policy or not j.lora)),
        ),
    ]
    found: list[str] = []
    for n in range(1, 4):
        for chosen in itertools.combinations(options, n):
            changed = (s, j)
            for _, change in chosen:
                changed = change(*changed)
            if (share := utilization(*changed)) is not None:
                names = [name for name, _ in chosen] + [set_utilization(share)] * (share != j.utilization)
                found.append(" and ".join(names))
        if found:
            break
    for factor, parallel in itertools.product((2, 4, 8, 16), (1, 2, 4, 8)):
        wider = replace(j, shards=factor * j.shards, tensor_parallel=parallel * j.tensor_parallel)
        if parallel <= factor and (share := utilization(s, wider)) is not None:
            engine = f" with actor_rollout_ref.rollout.tensor_model_parallel_size={wider.tensor_parallel}" * (
                parallel > 1
            )
            other = "" if share == j.utilization else f" and {set_utilization(share)}"
            found.append(f"{wider.shards} GPUs (NGPUS_PER_NODE, NNODES){engine}{other}")
            break
    return "; or ".join(found) or "a smaller model"


def _shorter(j: Job, tokens: int) -> Job:
    return replace(
        j,
        tokens=min(j.tokens, tokens),
        log_prob_tokens=min(j.log_prob_tokens, tokens),
        visual_tokens=j.visual_tokens * min(j.tokens, tokens) // j.tokens,
    )
