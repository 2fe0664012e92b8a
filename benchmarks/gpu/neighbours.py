"""Neighbours by attention, which ``attn_anchor`` uses: time, host waits and accuracy."""

from typing import Any

import torch

from gpu.report import Stage, host_waits
from sayo_verl.probe.neighbours import top_neighbours

SIZES = ((512, 1024), (2048, 1024), (2048, 4096))  # response tokens, visual tokens
NEIGHBOURS = 8


def run(stage: Stage) -> None:
    for T, V in ((12, 6),) if stage.tiny else SIZES:
        stage.run(f"{T} response tokens, {V} visual tokens", _one, stage, T, V)


def _one(stage: Stage, T: int, V: int) -> dict[str, Any]:
    generator = torch.Generator(stage.device).manual_seed(0)
    profile_TV = torch.rand(T, V, generator=generator, device=stage.device)
    took = stage.timed(
        f"{NEIGHBOURS} neighbours of {T:,} tokens by {V:,} visual tokens",
        lambda: top_neighbours(profile_TV, NEIGHBOURS),
    )
    stage.reset_peak()
    with host_waits(stage.device) as waits:
        _, similarity = top_neighbours(profile_TV, NEIGHBOURS)
    unit_TV = torch.nn.functional.normalize(profile_TV.double(), dim=1)
    cosine_TT = (unit_TV @ unit_TV.T).fill_diagonal_(-2)
    wanted = cosine_TT.topk(NEIGHBOURS, dim=1).values
    difference = float((similarity.double() - wanted).abs().nan_to_num(float("inf")).max())
    return {
        "ms": round(took, 3),
        "waits": waits,
        "peak_gib": stage.peak_gib(),
        "difference": difference,
        "wrong": difference > 1e-6,
    }
