"""The cases of ``probe_cost.py`` with fewer rounds and variants, written to the file behind the page."""

import statistics
from typing import Any

from cost.cases import Case, measure_case, measure_scaling
from cost.cells import ratios
from cost.shapes import REAL_LENGTHS, Lengths
from cost.workload import TextStack, Workload, cosine_request, masses_request, profile_request, some_layers

from gpu.models import shape_of
from gpu.report import Stage, host_waits
from gpu.stand_ins import flash_attention

MAX_TOKENS = 16384  # of a pass: verl's own for log-probs


def run(stage: Stage, family: str) -> None:
    """Measure every case of one model, longest first, and for the first family the growth of the kernels."""
    stage.stood_in["weights"] = "random"
    if (what := flash_attention(stage.tiny)) and not stage.tiny:
        stage.stood_in["flash-attn"] = what
    shape = shape_of(family, stage.tiny)
    made: list[TextStack] = []
    if stage.run("model", _make, stage, shape, made, needs=20) is None:
        return
    for n, lengths in enumerate((Lengths(2, (3, 3), 2, 7),) if stage.tiny else REAL_LENGTHS[::-1]):
        case = Case(
            "card",
            shape,
            lengths,
            2 if stage.tiny else 0,
            ("fast", "reference"),
            (),
            extras=n == 0,
            rounds=1 if stage.tiny else 4,
            slow_rounds=1,
            brief=True,
        )
        stage.run(case.key, _case, stage, case, made[0], needs=5 if stage.tiny else 15)
    if family == "qwen3_vl":
        stage.run("growth of the kernels", _growth, stage, shape, needs=5 if stage.tiny else 20)


def _make(stage: Stage, shape: Any, made: list[TextStack]) -> dict[str, Any]:
    made.append(TextStack(shape, stage.device, stage.dtype))
    stage.sync()
    return {"layers": shape.layers, "peak_gib": stage.peak_gib()}


def _case(stage: Stage, case: Case, stack: TextStack) -> dict[str, Any]:
    measure_case(case, stack, stage.numbers, MAX_TOKENS, "both", print)
    entry = stage.numbers.read()["cases"][case.key]
    plain = statistics.median(entry["times"]["pass"]["seconds"])
    work = Workload(stack, case.lengths, entry["sequences"])
    layers = case.shape.layers
    requests = {
        "probe, 1 layer": masses_request(some_layers(layers, 1), "fast"),
        f"probe, {layers} layers": masses_request(some_layers(layers, layers), "fast"),
        "profile": profile_request("fast"),
        "cosine": cosine_request("fast"),
    }
    waits = {}
    with host_waits(stage.device) as places:
        work.plain()
    waits["plain pass"] = places
    for name, request in requests.items():
        with host_waits(stage.device) as places:
            work.probed(request)
        waits[name] = places
    if stage.device.type == "cuda":
        counts = ", ".join(f"{name} {sum(places.values())}" for name, places in waits.items())
        stage.figure(f"waits of the host, {case.key.removeprefix('card: ')}", counts)
    shares = {
        name: round(100 * statistics.median(found), 3)
        for name in entry["times"]
        if name != "pass" and (found := ratios(entry, name))
    }
    return {
        "sequences": entry["sequences"],
        "pass_ms": round(1000 * plain, 2),
        "percent_of_pass": shares,
        "failed": {name: t["failed"][:80] for name, t in entry["times"].items() if "failed" in t},
        "peak_bytes": entry["memory"],
        "agreement": entry["agreement"],
        "waits": waits if stage.device.type == "cuda" else "not counted on a CPU",
    }


def _growth(stage: Stage, shape: Any) -> dict[str, Any]:
    measure_scaling("card", shape, stage.device, stage.dtype, stage.numbers, stage.tiny, "both", print)
    return {}
