"""Every run of the yardstick: starts, scores of credit, learning rates, and learning from both starts.

    starts   each kind, one per seed
    scores   each start
    rates    every method on half-ignorant starts of the first seeds, with an own seed of training
    learn    every method and variant at one rate for all, from each start with the seed of the start; from
             half-ignorant starts every method also at its best rate

Everything is a file of its own and is not made again, so an interrupted plan goes on where it stopped. Processes share
nothing, and each uses one thread.
"""

import inspect
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.yardstick.known import METHODS, ScoreConfig, looks_of, score
from benchmarks.yardstick.learning import Run, chosen_rates
from benchmarks.yardstick.loop import VARIANTS, LoopConfig, method_of, train
from benchmarks.yardstick.starts import SCENES, STARTS, load_start, make_start
from benchmarks.yardstick.store import once
from sayo_verl.launch.settings import load_methods
from sayo_verl.methods import own_methods
from sayo_verl.tiny.prepared import content_hash

HALF, KNOWING = "half_ignorant", "knowing"


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        methods: names as in ``LoopConfig``.
        variants: names in ``VARIANTS``; those whose method is left out are left out, too.
        untrained: what is scored and not trained. The credit of ``evidence`` is that of GRPO on these scenes, bit for
            bit; the variants are left out to save time, not because their scores are those of their method.
        seeds: of starts, and of training from them.
        rates: learning rates that are tried; none: all methods have the common one alone.
        common_rate: of the column in which all methods have one rate; of variants; and of knowing starts.
        steps: of training.
        tuning_seed: of the runs that choose rates, none of ``seeds``.
        tuning_starts: how many half-ignorant starts these runs have, of the first seeds.
        kinds: of starts.
        modules: files of methods of your own.
    """

    methods: Sequence[str] = METHODS
    variants: Sequence[str] = tuple(VARIANTS)
    untrained: Sequence[str] = (
        "evidence",
        "region_predicting",
        "region_all",
        "anchor_all",
        "anchor_input",
        "faithful_all",
    )
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    rates: Sequence[float] = (3e-5, 1e-4, 3e-4)
    common_rate: float = 1e-4
    steps: int = 60
    tuning_seed: int = 100
    tuning_starts: int = 2
    kinds: Sequence[str] = tuple(STARTS)
    modules: Sequence[str] = ()

    def compared(self) -> tuple[str, ...]:
        """Methods and variants."""
        return (*self.methods, *(name for name in self.variants if VARIANTS[name][0] in self.methods))

    @property
    def trained(self) -> tuple[str, ...]:
        """Methods that are trained."""
        return tuple(name for name in self.methods if name not in self.untrained)

    @property
    def trained_variants(self) -> tuple[str, ...]:
        """Variants that are trained."""
        return tuple(name for name in self.compared() if name in VARIANTS and name not in self.untrained)

    def tuning(self) -> Iterator[tuple[int, LoopConfig]]:
        """Seeds of half-ignorant starts, and runs from them that choose each method's rate."""
        if HALF not in self.kinds:
            return
        for seed in self.seeds[: self.tuning_starts]:
            for rate in self.rates:
                for method in self.trained:
                    yield seed, LoopConfig(method=method, rate=rate, steps=self.steps, seed=self.tuning_seed)

    def learning(self, best: dict[str, float], seed: int, kind: str) -> Iterator[LoopConfig]:
        """Runs from one start that are compared; variants and the best rates from a half-ignorant start alone."""
        names = (*self.trained, *self.trained_variants) if kind == HALF else self.trained
        for method in names:
            own = [best[method]] if kind == HALF and method in best else []
            for rate in dict.fromkeys((self.common_rate, *own)):
                yield LoopConfig(method=method, rate=rate, steps=self.steps, seed=seed)


def run_plan(plan: Plan, out: Path, processes: int, log: Callable[[str], None]) -> None:
    """Run what is missing of a plan in ``out``."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawned, initializer=_prepare, initargs=(tuple(plan.modules),)) as pool:

        def each(title: str, jobs: list[tuple[Any, ...]]) -> list[Any]:
            waiting = {pool.submit(*job): n for n, job in enumerate(jobs)}
            results: list[Any] = [None] * len(jobs)
            log(f"{title}: 0 of {len(jobs)}, {processes} at once")
            try:
                for done, future in enumerate(as_completed(waiting), 1):
                    results[waiting[future]] = future.result()
                    log(f"{title}: {done} of {len(jobs)}")
            finally:
                for future in waiting:  # after a failure: the pool would else work through all of them
                    future.cancel()
            return results

        asked = [(kind, seed) for kind in plan.kinds for seed in plan.seeds]
        folders = each("starts", [(start_once, out / "starts", kind, seed) for kind, seed in asked])
        starts = dict(zip(asked, folders, strict=True))
        each("scores", [(score_once, starts[at], ScoreConfig(plan.compared()), out / "scores") for at in asked])
        tuning = [(train_once, starts[HALF, seed], config, out / "runs") for seed, config in plan.tuning()]
        best = chosen_rates(each("rates", tuning), plan.tuning_seed)
        runs = [(starts[at], config) for at in asked for config in plan.learning(best, at[1], at[0])]
        # what is compared first comes first, so that a plan that is stopped can be shown
        runs.sort(key=lambda run: (run[1].rate != plan.common_rate, run[1].method in VARIANTS))
        each("learning", [(train_once, start, config, out / "runs") for start, config in runs])


def start_once(out: Path, kind: str, seed: int) -> Path:
    """Make a start quietly."""
    return make_start(out, kind, seed, SCENES, log=_quiet)


def score_once(start: Path, config: ScoreConfig, out: Path) -> dict[str, Any]:
    """The scores of a start, stored in ``out``."""

    def make() -> dict[str, Any]:
        return score(*load_start(start), config)

    used = _used([LoopConfig(method=name) for name in config.methods])
    settings = {"start": start.name, **vars(config), "used": used}
    return once(out, f"{start.name}-{config.seed}", settings, make)


def train_once(start: Path, config: LoopConfig, out: Path, log: Callable[[str], None] | None = None) -> Run:
    """One run, and where its policy looks at the end; stored in ``out``."""

    def make() -> dict[str, Any]:
        policy, scenes = load_start(start)
        found = train(policy, scenes, config, log or _quiet)
        return {**found, "looks": looks_of(policy, scenes)}

    name = f"{start.name.rsplit('-', 1)[0]}-{config.method}-{config.rate:g}-{config.seed}"
    return once(out, name, {"start": start.name, **vars(config), "used": _used([config])}, make)


def _used(configs: Sequence[LoopConfig]) -> dict[str, Any]:
    """Method -> all its settings, and a hash of its file if it is not part of the package.

    They are part of what names a result, so a method whose defaults or whose own file changed is run again.
    """
    used: dict[str, Any] = {}
    for config in configs:
        method = method_of(config)
        if method is None:
            continue
        used[config.method] = asdict(method)  # type: ignore[call-overload]
        file = inspect.getsourcefile(type(method))
        if type(method).name in own_methods() and file:
            used[config.method]["code"] = content_hash(Path(file).read_text())
    return used


def _quiet(_line: str) -> None:
    return None


def _prepare(modules: Sequence[str]) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # a bar of each small file would hide the progress of the plan
    load_methods(modules)
