"""The probe inside verl's engine at a true shape: accuracy, unchanged outputs and cost.

Shape suffixes: H query heads, T response tokens, N keys of one sequence.
"""

import contextlib
import random
import statistics
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from gpu import models
from gpu.kernels import dense, largest
from gpu.report import Stage, host_waits
from gpu.worker import build, log_prob_pass, prepare, queries_and_keys

ROUNDS = 3
GIVEN = ", log-sum-exp given"
AGAIN = "again"  # the pass without the probe a second time in each round
COMPARED = 6  # rows whose masses are compared with float64


def run(stage: Stage, argument: str) -> None:
    """``argument`` is the family, with ``lora`` for training with an adapter."""
    family, *lora = argument.split()
    prepare(stage)
    shape = models.shape_of(family, stage.tiny)
    held: dict[str, Any] = {}
    if stage.run("worker", _build, stage, shape, bool(lora), held, needs=20) is None:
        return
    bench = _Bench(stage, held["worker"])
    for name in [name for name in bench.requests if "last layer" in name]:
        stage.run(f"handshake: {name}", bench.handshake, name)
    if lora:
        stage.run("adapter for vLLM", bench.adapter)
    if stage.run("pass without probe", bench.first, None, needs=10) is None:
        return
    for name in bench.requests:
        stage.run(f"pass: {name}", bench.first, name, needs=5)
    stage.run("counterfactual pass", bench.counterfactual, needs=10)
    stage.run("times", bench.times, needs=10)
    for name in bench.ran if stage.device.type == "cuda" else ():
        stage.run(f"waits of the host: {name}", bench.waits, name, needs=8)


def _build(stage: Stage, shape: Any, lora: bool, held: dict[str, Any]) -> dict[str, Any]:
    held["worker"] = build(stage, shape, lora)
    bases = [base.__name__ for base in type(held["worker"].engine).__mro__[:3]]
    return {"shape": shape.name, "lora": lora, "engine": bases, "peak_gib": stage.peak_gib()}


class _Bench:
    """One worker, its rows and the requests of the methods."""

    def __init__(self, stage: Stage, worker: Any) -> None:
        from sayo_verl.probe.statistics import FAST_LSE, WIRE_PREFIX, Statistic, StatisticsRequest

        self.stage, self.worker, self.prefix = stage, worker, WIRE_PREFIX
        config = worker.engine.model_config.hf_config
        self.rows = models.random_rows(config, models.row_lengths(stage.tiny))
        every = tuple(range(config.get_text_config().num_hidden_layers))
        masses = ("image_mass", "region_mass")
        wanted: Mapping[str, tuple[Statistic, ...]] = {
            "attn_region, last layer": tuple(Statistic(name) for name in masses),
            "masses, all layers": tuple(Statistic(name, layers=every) for name in masses),
            "attn_dual, cosine": (Statistic("image_cosine"),),
            "attn_anchor, neighbours": tuple(Statistic(f"neighbour_{x}", size=8) for x in ("index", "similarity")),
            "heat map": (Statistic("patch_sums"), Statistic("top_patch_mass", size=8)),
        }
        own = {name: StatisticsRequest(statistics, path="fast") for name, statistics in wanted.items()}
        given = {
            f"{name}{GIVEN}": StatisticsRequest(wanted[name], path=FAST_LSE)
            for name in ("attn_region, last layer", "masses, all layers")
        }
        self.requests = {name: request.to_wire() for name, request in {**own, **given}.items()}
        self.region = {name: WIRE_PREFIX + Statistic(f"{name}_mass").key for name in ("image", "region")}
        self.plain: Any = None
        self.without: dict[str, int] | None = None  # waits of the host in a pass without the probe
        self.ran: list[str] = []  # requests whose first pass did not fail
        self.same = 0  # number of them that did not change log-probs and entropy
        self.masses: dict[str, dict[str, torch.Tensor]] = {}  # request -> statistic -> its values

    def call(self, name: str | None, **extra: Any) -> Any:
        from sayo_verl.probe.statistics import REQUEST_KEY

        request = {} if name is None else {REQUEST_KEY: self.requests[name]}
        return log_prob_pass(self.worker, self.rows, **request, **extra)

    def timed_call(self, name: str | None, **extra: Any) -> tuple[Any, float]:
        self.stage.sync()
        begin = time.monotonic()
        output = self.call(name, **extra)
        self.stage.sync()
        return output, time.monotonic() - begin

    def handshake(self, name: str) -> dict[str, Any]:
        """Run the launcher's check of a worker before training."""
        from sayo_verl.hooks.contract import worker_report

        class ActorRolloutRefWorker:  # the name that the report looks for
            actor = self.worker

        return worker_report(SimpleNamespace(worker_dict={"actor": ActorRolloutRefWorker()}), self.requests[name])

    def adapter(self) -> dict[str, Any]:
        """Names of the tensors that verl would send to vLLM under ``layered_summon``."""
        sent, _ = self.worker.engine.get_per_tensor_param(layered_summon=True, base_sync_done=True)
        names = [name for name, _ in sent]
        of_vision = sum("visual" in name for name in names)
        return {"tensors": len(names), "first": names[:2], "of_vision": of_vision, "wrong": not names or of_vision > 0}

    def first(self, name: str | None) -> dict[str, Any]:
        """Run the first pass with a request and compare its results; its time includes compilation."""
        self.stage.reset_peak()
        compares = name is not None and "last layer" in name  # copies of all layers would not fit
        reading: Any = queries_and_keys() if compares else contextlib.nullcontext([])
        with reading as captured:
            output, took = self.timed_call(name)
        facts: dict[str, Any] = {"first_s": round(took, 2), "peak_gib": self.stage.peak_gib()}
        if name is None:
            self.plain = output
            return facts | {"rows": len(self.rows), "tokens": sum(len(row["input_ids"]) for row in self.rows)}
        self.ran.append(name)
        facts["same_bits"] = {
            key: all(torch.equal(a, b) for a, b in zip(self.plain[key].unbind(), output[key].unbind(), strict=True))
            for key in ("log_probs", "entropy")
        }
        facts["wrong"] = not all(facts["same_bits"].values())
        self.same += not facts["wrong"]
        self.stage.figure(
            "requests that do not change a bit of log-probs and entropy", f"{self.same} of {len(self.ran)}"
        )
        self.masses[name] = {
            key: torch.cat(list(output[key].unbind())).nan_to_num(-1.0).cpu()
            for key in output.keys()
            if "_mass." in key
        }
        if (own := name.removesuffix(GIVEN)) != name and own in self.masses:
            pairs = zip(self.masses[name].values(), self.masses[own].values(), strict=True)
            facts["from_own_log_sum_exp"] = max(largest(a, b) for a, b in pairs)
            facts["wrong"] |= not facts["from_own_log_sum_exp"] <= 1e-4
        if compares:
            error, compared = self._error(output, captured)
            facts |= {"mass_error_against_float64": error, "rows_compared": compared}
            facts["wrong"] |= not error <= 1e-4 or compared == 0
            self.stage.figure(f"{name}: largest error of a mass against float64", f"{error:.1e} over {compared} rows")
        return facts

    def _error(self, output: Any, captured: list) -> tuple[float, int]:
        """Largest error of the masses on the model's own queries and keys. Rows are identified by their lengths."""
        from sayo_verl.probe.reference import Span

        by_length = {len(row["input_ids"]): n for n, row in enumerate(self.rows)}
        worst, compared = 0.0, 0
        for plans, query, key, scale in captured:
            start = 0
            for plan in plans:
                if compared < COMPARED:
                    S, T = plan.length, plan.response_length
                    weights_HTN, _ = dense(query, key, Span(0, start + S - T, T, S - T, 0, start, S), scale)
                    mean_TN = weights_HTN.mean(0).cpu()
                    for name, key_of in self.region.items():
                        found_T = output[key_of].unbind()[by_length[S]].cpu()
                        worst = max(worst, largest(found_T, mean_TN[:, plan.keys[name].cpu()].sum(-1)))
                    compared += 1
                start += plan.length
        return worst, compared

    def counterfactual(self) -> dict[str, Any]:
        """Run a pass with a changed image; its log-probs must be finite and different. Report its time."""
        from sayo_verl.probe.statistics import INTERVENTION_KEY, log_probs_key
        from sayo_verl.vision.intervention import Intervention

        facts: dict[str, Any] = {"wrong": False}
        for kind in ("patches", "region"):
            intervention = Intervention(kind=kind)
            change = {INTERVENTION_KEY: {**intervention.to_wire(), "coverage": 0.5, "step": 1}}
            self.call(None, calculate_entropy=False, **change)
            output, took = self.timed_call(None, calculate_entropy=False, **change)
            changed = torch.cat(list(output[log_probs_key(intervention)].unbind()))
            whole = zip(self.plain["log_probs"].unbind(), self.rows, strict=True)  # verl's, of prompt and response
            real = torch.cat([values[len(row["prompts"]) - 1 : -1] for values, row in whole])
            facts[kind] = {
                "s": round(took, 3),
                "finite": bool(changed.isfinite().all()),
                "differs": not torch.equal(changed, real),
            }
            facts["wrong"] |= not (facts[kind]["finite"] and facts[kind]["differs"])
            self.stage.figure(f"counterfactual pass without entropy, {kind}", f"{took:.3f} s")
        return facts

    def times(self) -> dict[str, Any]:
        """Time all passes in rounds, and compare with the probe's own clock."""
        names, shuffled = [None, AGAIN, *self.ran], random.Random(0)
        seconds: dict[str | None, list[float]] = {name: [] for name in names}
        own: dict[str, float] = {}
        took_round = 0.0
        for n in range(1 if self.stage.tiny else ROUNDS):
            if n and self.stage.left() < 1.1 * took_round:
                break  # keep the rounds so far
            shuffled.shuffle(names)
            begin = time.monotonic()
            for name in names:
                output, took = self.timed_call(None if name == AGAIN else name)
                seconds[name].append(took)
                if name in self.ran:
                    own[name] = sum(float(x.sum()) for x in output[self.prefix + "probe_seconds"].unbind())
            took_round = time.monotonic() - begin
        plain = statistics.median(seconds[None])
        self.stage.figure("pass of verl's engine", f"{plain:.3f} s for {len(self.rows)} rows")
        noise = [100 * (a / b - 1) for a, b in zip(seconds[AGAIN], seconds[None], strict=True)]
        self.stage.figure("the same pass again (noise)", f"{min(noise):.2f} to {max(noise):.2f} %")
        facts: dict[str, Any] = {
            "rounds": len(seconds[None]),
            "plain_s": [round(x, 4) for x in seconds[None]],
            "again_s": [round(x, 4) for x in seconds[AGAIN]],
        }
        for name in self.ran:
            ratios = [a / b for a, b in zip(seconds[name], seconds[None], strict=True)]
            more, share = 100 * (statistics.median(ratios) - 1), 100 * own[name] / plain
            facts[name] = {
                "more_percent": round(more, 3),
                "own_percent": round(share, 4),
                "s": [round(x, 4) for x in seconds[name]],
            }
            self.stage.figure(
                f"{name}: added to the pass, and by the probe's own clock", f"{more:.2f} %, {share:.3f} %"
            )
        return facts

    def waits(self, name: str) -> dict[str, Any]:
        """Count the host's waits in a call, with and without the probe."""
        if self.without is None:
            with host_waits(self.stage.device) as self.without:
                self.call(None)
        with host_waits(self.stage.device) as probed:
            self.call(name)
        plain = self.without
        added = {place: n - plain.get(place, 0) for place, n in probed.items() if n != plain.get(place, 0)}
        total, before = sum(probed.values()), sum(plain.values())
        self.stage.figure(f"waits of the host, {name}", f"{total} in a call, {before} without the probe")
        return {"plain": before, "probed": total, "added": added}
