"""How many rollouts of a run failed, as one sentence beside its result."""

import math
from typing import Any

from sayo_verl.report.runs import Run

METRIC = "sayo/failed_rollouts"
MOST_STEPS = 8  # whose shares are listed
# Settings under which a step samples more rollouts than its batch has, in a number that is not recorded
MORE = ("algorithm.filter_groups.enable", "trainer.v1.sampler.sync_refill_failed_groups")


def failed_rollouts(run: Run, config: dict[str, Any]) -> str:
    """``"10 of 32 rollouts failed (31 %) and were left out of their groups."``; also the shares of the last steps if
    they rose: the mean of the second half of the run is above that of the first. Empty if none failed.

    Args:
        run: with ``sayo/failed_rollouts`` of its steps.
        config: its recorded settings, dotted key -> value. Without the size of a batch there is no share.
    """
    failed = [value for _, value in run.training(METRIC) if math.isfinite(value)]
    total = sum(failed)
    if not total:
        return ""
    sizes = [str(config.get(key, "")) for key in ("data.train_batch_size", "actor_rollout_ref.rollout.n")]
    if not all(map(str.isdigit, sizes)) or any(str(config.get(key)).lower() == "true" for key in MORE):
        steps = f"{len(failed)} step{'s' * (len(failed) > 1)}"
        return f"{total:g} rollouts failed in {steps} and were left out of their groups."
    of_step = int(sizes[0]) * int(sizes[1])
    said = f"{total:g} of {of_step * len(failed)} rollouts failed ({total / of_step / len(failed):.0%})"
    said = f"{said.replace('%', ' %')} and were left out of their groups."
    half = len(failed) // 2
    if not half or sum(failed[-half:]) <= sum(failed[:half]):
        return said
    shares = ", ".join(f"{100 * value / of_step:.0f}" for value in failed[-MOST_STEPS:])
    which = "each step" if len(failed) <= MOST_STEPS else f"each of the last {MOST_STEPS} steps"
    return f"{said} The share rose; in {which}, in %: {shares}."
