"""Recording of held-out rollouts (``sayo.viz_*``): what it needs, what it measures and where it writes.

The trainer (``sayo_verl.hooks.record``) and the checks before a run use these functions.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from sayo_verl.errors import Rule, SayoError, raise_first
from sayo_verl.launch.mode_check import MODE, MODES
from sayo_verl.launch.resume import metrics_file
from sayo_verl.methods import Credit, Method, Needs, Signals
from sayo_verl.methods.base import CreditKind
from sayo_verl.methods.signals import join_needs
from sayo_verl.probe.statistics import Statistic, StatisticsRequest
from sayo_verl.view.store import FOLDER
from sayo_verl.vision.intervention import Intervention

EVERY, PROMPTS, CAUSAL = "sayo.viz_every", "sayo.viz_prompts", "sayo.viz_causal"
OFF = f"{EVERY}=0 turns recording off"
TOP_PATCHES = 32  # visual tokens whose attention is kept for each response token
MOST_STEPS_NAMED = 4  # in the plan


@dataclass(frozen=True)
class Observation:
    """What is measured for the page, in the form of a method that gives no credit.

    Attributes:
        layers, query_row: as of ``Statistic``.
        intervention: of the pass with a changed image whose effect is shown; None: no such pass.
        coverage: see ``sayo_verl.vision.masks``.
    """

    layers: tuple[int, ...] = (-1,)
    query_row: str = "input"
    intervention: Intervention | None = None
    coverage: float = 0.5
    name = "viz"
    gives: frozenset[CreditKind] = frozenset()

    def statistic(self, name: str, size: int = 0) -> Statistic:
        return Statistic(name, self.layers, self.query_row, size=size)

    @property
    def top_index(self) -> Statistic:
        return self.statistic("top_patch_index", TOP_PATCHES)

    @property
    def top_mass(self) -> Statistic:
        return self.statistic("top_patch_mass", TOP_PATCHES)

    @property
    def masses(self) -> tuple[Statistic, ...]:
        return tuple(self.statistic(name) for name in ("image_mass", "region_mass", "sink_mass"))

    @property
    def predicting(self) -> Statistic:
        """Attention to the image of the row that sampled a token: the row of its effect."""
        return Statistic("image_mass", self.layers, "predicting")

    @property
    def patch_sums(self) -> Statistic:
        return self.statistic("patch_sums")

    def needs(self) -> Needs:
        statistics = (*self.masses, self.top_index, self.top_mass, self.patch_sums)
        if self.intervention is not None and self.predicting not in statistics:
            statistics = (*statistics, self.predicting)
        return Needs(
            StatisticsRequest(statistics, coverage=self.coverage),
            interventions=() if self.intervention is None else (self.intervention,),
        )

    def credit(self, signals: Signals) -> Credit:
        return Credit()


def is_recording(config: DictConfig) -> bool:
    """Whether held-out rollouts are recorded."""
    return int(config.sayo.viz_every) > 0


def observation(config: DictConfig, method: Method | None) -> Observation:
    """What is measured of recorded rollouts: attention in the method's layers and rows, with its first changed image.

    Args:
        config: the composed configuration.
        method: the run's method; None for an estimator of verl's own, for which the last layer is read.
    """
    if method is None:
        return Observation(intervention=Intervention() if config.sayo.viz_causal else None)
    needs = method.needs()
    attention = [s for s in needs.statistics.statistics if s.spec.source != "hidden"]
    like = attention[0] if attention else Statistic("image_mass")
    changed = next(iter(needs.interventions), Intervention() if config.sayo.viz_causal else None)
    return Observation(like.layers, like.query_row, changed, needs.statistics.coverage)


def recorded_needs(config: DictConfig, method: Method | None) -> Needs:
    """What the passes of recorded rollouts measure: the method's needs and ``observation``."""
    seen = observation(config, method).needs()
    needs = seen if method is None else join_needs([method.needs(), seen])
    return dataclasses.replace(
        needs, statistics=dataclasses.replace(needs.statistics, path=str(config.sayo.probe_path))
    )


def run_folder(config: DictConfig) -> Path | None:
    """The folder of the run's metrics, in which the rollouts are written too; None if nobody named one."""
    file = metrics_file(config) if os.environ.get("VERL_FILE_LOGGER_PATH") else None
    return None if file is None else file.parent


def recorded_steps(config: DictConfig) -> str:
    """``"0, 10, 20 and 30 steps"``: the policies that are recorded."""
    every, total = int(config.sayo.viz_every), config.trainer.total_training_steps
    if total is None:
        return f"0, {every}, {2 * every}, ... steps, and at the end"
    steps = [str(step) for step in (*range(0, int(total), every), int(total))]
    if len(steps) > MOST_STEPS_NAMED:
        steps = [*steps[:2], "...", steps[-1]]
    return f"{', '.join(steps[:-1])} and {steps[-1]} steps"


def check_record(config: DictConfig, method: Method | None) -> str:
    """Check the settings of recording.

    Args:
        config: the composed configuration.
        method: the run's method; None for an estimator of verl's own.

    Returns:
        A line for the plan.

    Raises:
        SayoError: L90 for an invalid value, L91 without a folder of the run, L92 for settings under which nothing can
            be recorded.
    """
    sayo = config.sayo
    raise_first(
        Rule("L90", int(sayo[key]) < least, f"{key} is too small", where=f"sayo.{key}", got=sayo[key], wanted=wanted,
             fix=f"set it to {wanted}")
        for key, least, wanted in (("viz_every", 0, "0 (off) or a number of steps"), ("viz_prompts", 1, "1 or more"))
    )  # fmt: skip
    if not is_recording(config):
        return f"nothing; {EVERY}=10 records {sayo.viz_prompts} held-out prompts"
    folder = run_folder(config)
    if folder is None:
        raise SayoError(
            "L91",
            "rollouts are recorded in the folder of the run, and there is none",
            where=EVERY,
            got=f"{sayo.viz_every}, without sayo.out, or without file in trainer.logger",
            fix=f"set sayo.out (OUT=... for our scripts) and keep file in trainer.logger; {OFF}",
        )
    mode = str(config.trainer.v1.trainer_mode)
    raise_first(
        [
            Rule(
                "L92",
                bool(config.trainer.val_only),
                "rollouts are recorded in training, and trainer.val_only trains no step",
                where=EVERY,
                got=sayo.viz_every,
                fix=f"set trainer.val_only=False; {OFF}",
            ),
            Rule(
                "L92",
                mode not in MODES,
                "rollouts are recorded by sayo-verl's trainers, and another plug-in has this one",
                where=MODE,
                got=mode,
                wanted=" or ".join(MODES),
                fix=f"choose one of them; {OFF}",
            ),
        ]
    )
    needs, rollout, data = recorded_needs(config, method), config.actor_rollout_ref.rollout, config.data
    rows = int(sayo.viz_prompts) * int(rollout.n)
    trained = int(data.train_batch_size) * int(rollout.n)
    changed = len(needs.interventions)
    share = 100 * rows * (1 + changed) / trained
    passes = f"{1 + changed} log-prob passes, {changed} with a changed image," if changed else "a log-prob pass"
    return (
        f"{sayo.viz_prompts} held-out prompts x {rollout.n} rollouts of the policy after {recorded_steps(config)}, "
        f"in {folder / FOLDER}; each time {passes} of {rows} rows, about {share:.0f} % of "
        f"one training log-prob pass ({trained} rows)"
    )


def refuse_recording(error: SayoError) -> SayoError:
    """L92: the settings of a run of verl's own estimator do not allow the measurement that recording needs."""
    return SayoError(
        "L92",
        "rollouts cannot be recorded under these settings",
        where=EVERY,
        got=str(error),
        fix=f"correct that setting; {OFF}",
    )


def check_images(config: DictConfig, with_images: int, rows: int) -> None:
    """Refuse recording without a held-out row that has an image; L93."""
    if is_recording(config) and rows and not with_images:
        raise SayoError(
            "L93",
            "no held-out row has an image, so there is nothing to show",
            where="data.val_files",
            got=f"{rows} rows without an image",
            wanted="a row with an image",
            fix=f"name other rows; {OFF}",
        )
