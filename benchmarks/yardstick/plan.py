"""Every run of the yardstick: starts, scores of credit, learning rates, and learning from both starts.

    starts   each kind, one per seed
    scores   each start
    rates    every method on the half-ignorant start of the first seed, with an own seed of training
    learn    every method at its best rate, and at one rate for all, from each start with the seed of the start

Everything is a file of its own and is not made again, so an interrupted plan goes on where it stopped. Processes share
nothing, and each uses one thread.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.yardstick.known import METHODS, ScoreConfig, score
from benchmarks.yardstick.loop import LoopConfig, train
from benchmarks.yardstick.span import Run, best_rates
from benchmarks.yardstick.starts import SCENES, STARTS, load_start, make_start
from benchmarks.yardstick.store import once

HALF = "half_ignorant"


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        methods: names as in ``LoopConfig``.
        seeds: of starts, and of training from them.
        rates: learning rates that are tried.
        common_rate: of the column in which all methods have one rate.
        steps: of training.
        tuning_seed: of the runs that choose rates, none of ``seeds``.
        kinds: of starts.
    """

    methods: Sequence[str] = METHODS
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    rates: Sequence[float] = (1e-4, 3e-4, 6e-4)
    common_rate: float = 3e-4
    steps: int = 60
    tuning_seed: int = 100
    kinds: Sequence[str] = tuple(STARTS)

    def tuning(self) -> Iterator[LoopConfig]:
        """Runs from one start that choose each method's rate."""
        for rate in self.rates:
            for method in self.methods:
                yield LoopConfig(method=method, rate=rate, steps=self.steps, seed=self.tuning_seed)

    def learning(self, best: dict[str, float], seed: int, kind: str) -> Iterator[LoopConfig]:
        """Runs from one start that are compared; the common rate from the half-ignorant start alone."""
        for method in self.methods:
            chosen = best[method]
            for rate in dict.fromkeys((chosen, self.common_rate) if kind == HALF else (chosen,)):
                yield LoopConfig(method=method, rate=rate, steps=self.steps, seed=seed)


def run_plan(plan: Plan, out: Path, processes: int, log: Callable[[str], None]) -> None:
    """Run what is missing of a plan in ``out``."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:

        def each(title: str, jobs: list[tuple[Any, ...]]) -> list[Any]:
            waiting = {pool.submit(*job): n for n, job in enumerate(jobs)}
            results: list[Any] = [None] * len(jobs)
            for done, future in enumerate(as_completed(waiting), 1):
                results[waiting[future]] = future.result()
                log(f"{title}: {done} of {len(jobs)}")
            return results

        asked = [(kind, seed) for kind in plan.kinds for seed in plan.seeds]
        folders = each("starts", [(start_once, out / "starts", kind, seed) for kind, seed in asked])
        starts = dict(zip(asked, folders, strict=True))
        each("scores", [(score_once, starts[at], ScoreConfig(tuple(plan.methods)), out / "scores") for at in asked])
        tuned = starts[HALF, plan.seeds[0]]
        rates = each("rates", [(train_once, tuned, config, out / "runs") for config in plan.tuning()])
        best = {method: rate for (_, method), rate in best_rates(rates).items()}
        jobs = [
            (train_once, starts[kind, seed], config, out / "runs")
            for kind, seed in asked
            for config in plan.learning(best, seed, kind)
        ]
        each("learning", jobs)


def start_once(out: Path, kind: str, seed: int) -> Path:
    """Make a start quietly."""
    return make_start(out, kind, seed, SCENES, log=_quiet)


def score_once(start: Path, config: ScoreConfig, out: Path) -> dict[str, Any]:
    """The scores of a start, stored in ``out``."""

    def make() -> dict[str, Any]:
        return score(*load_start(start), config)

    return once(out, f"{start.name}-{config.seed}", {"start": start.name, **vars(config)}, make)


def train_once(start: Path, config: LoopConfig, out: Path, log: Callable[[str], None] | None = None) -> Run:
    """One run, stored in ``out``."""

    def make() -> dict[str, Any]:
        policy, scenes = load_start(start)
        return train(policy, scenes, config, log or _quiet)

    name = f"{start.name.rsplit('-', 1)[0]}-{config.method}-{config.rate:g}-{config.seed}"
    return once(out, name, {"start": start.name, **vars(config)}, make)


def _quiet(_line: str) -> None:
    return None


def _one_thread() -> None:
    torch.set_num_threads(1)
