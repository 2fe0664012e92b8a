"""What a run's numbers say, in sentences: whether it got better, where the policy looked, what to be careful with."""

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from sayo_verl.metrics import Panel
from sayo_verl.report import catalogue as c
from sayo_verl.report.runs import Run, Series
from sayo_verl.view.seen import SeenPrompt, SeenResponse
from sayo_verl.view.store import RecordedStep

IMAGE_MASS, REGION_MASS = "sayo/image_mass/mean", "sayo/region_mass/mean"
CLEAR = 2.0  # a change counts as clear from this many standard errors on


@dataclass(frozen=True)
class Change:
    """Means of the first and the last ``window`` training steps, and the standard error of their difference.

    The error comes from the spread of the steps within the two windows; NaN for windows of one step.
    """

    first: float
    last: float
    window: int
    error: float

    @classmethod
    def of(cls, series: Series, k: int) -> "Change | None":
        """None with fewer than two points, or with a NaN in a window."""
        values = np.array([value for _, value in series])
        window = min(k, len(values) // 2)
        if not window or not np.isfinite([*values[:window], *values[-window:]]).all():
            return None
        ends = values[:window], values[-window:]
        error = math.sqrt(sum(end.var(ddof=1) / window for end in ends)) if window > 1 else math.nan
        return cls(float(ends[0].mean()), float(ends[1].mean()), window, error)

    def text(self, decimals: int = 3) -> str:
        """Such as ``rose from 0.41 to 0.66``."""
        first, last = f"{self.first:.{decimals}f}", f"{self.last:.{decimals}f}"
        gap = self.last - self.first
        if first == last:
            return f"stayed at {last}"
        if math.isnan(self.error):
            return f"went from {first} to {last} (single steps, so the noise is unknown)"
        if abs(gap) < CLEAR * self.error:
            return f"shows no clear change: {first}, then {last} (standard error {self.error:.{decimals}f})"
        return f"{'rose' if gap > 0 else 'fell'} from {first} to {last}"


def outcome(run: Run, k: int) -> list[str]:
    """Sentences about task reward, accuracy and validation accuracy."""
    said = []
    if (steps := sum(step > 0 for step in run.steps)) < 2 * k:
        said.append(f"Cannot be told: {steps} training steps are too few ({2 * k} are needed).")
    for metric, name in ((c.SCORE, "Task reward"), (c.ACCURACY, "Accuracy on training prompts")):
        if change := Change.of(run.training(metric.name), k):
            said.append(f"{name} {change.text()}.")
    for source, series in run.validation_accuracy().items():
        (start, before), (end, after) = series[0], series[-1]
        if start == end:
            said.append(f"Validation accuracy on {source} is {after:.3f} at step {end}; it was measured once.")
        else:
            said.append(
                f"Validation accuracy on {source} was {before:.3f} at step {start} and {after:.3f} at step {end}."
            )
    if not said:
        said.append("Cannot be told: no reward was logged.")
    return said


def attention(run: Run, k: int) -> list[str]:
    """Sentences about the attention metrics of the run's method."""
    said = []
    image, region = (Change.of(run.training(name), k) for name in (IMAGE_MASS, REGION_MASS))
    if image:
        of_region = (
            f"; on the target, {share(region.first)} at first and {share(region.last)} at last" if region else ""
        )
        said.append(
            f"Response tokens put {share(image.first)} of their attention on the image at first and "
            f"{share(image.last)} at last{of_region}."
        )
    for panel in own_panels(run):
        for metric in panel.metrics[:2]:
            if metric.name != IMAGE_MASS and (change := Change.of(run.training(metric.name), k)):
                name = metric.text[0].upper() + metric.text[1:] + (f" ({metric.unit})" if metric.unit else "")
                note = f" {metric.note}" if metric.note else ""
                said.append(f"{name} {change.text()}{_guide(panel)}.{plain(note).replace('`', '')}")
    return said


def own_panels(run: Run) -> list[Panel]:
    """Panels of the run's own method, or methods, that it measured."""
    sections = c.sections_of(run.methods)
    shown = [panel for s in sections if s.estimator for panel in s.panels]
    return [panel for panel in shown if any(run.training(metric.name) for metric in panel.every)]


def looked(steps: Sequence[RecordedStep]) -> list[str]:
    """Sentences about the recorded rollouts: share of the attention that fell on the boxes, against chance."""
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    when = f"at step {last.step}" if first is last else f"at step {first.step} and {{}} at step {last.step}"
    ends = [[(p, r) for p, responses in step.prompts for r in responses] for step in (first, last)]
    boxed = [[(p, r) for p, r in end if p.region_tokens and "region_mass" in r.values] for end in ends]
    if not all(boxed):
        images = [_mean([float(np.nanmean(r.values["image_mass"])) for _, r in end if _has(r)]) for end in ends]
        if any(math.isnan(mass) for mass in images):
            return []
        image = f"In the recorded rollouts, {share(images[0])} of the attention fell on the image {when}."
        return [image.format(share(images[1])), "The recorded prompts have no boxes."]
    regions = [_mean([region_share(r) for _, r in end]) for end in boxed]
    chance = _mean([p.chance for p, _ in boxed[1]])
    said = [
        f"In the recorded rollouts, {share(regions[0])} of the attention to the image fell on the boxes {when}; "
        f"looking everywhere alike would give {share(chance)}.".format(share(regions[1]))
    ]
    outcomes = {
        name: [region_share(r) for _, r in boxed[1] if is_right(r) is right]
        for name, right in (("right", True), ("wrong", False))
    }
    if all(outcomes.values()):
        right, wrong = (f"{share(_mean(o))} ({len(o)} answers)" for o in outcomes.values())
        said.append(
            f"At step {last.step}, that share was {right} where the answer was right, {wrong} where it was wrong."
        )
    return said


def region_share(response: SeenResponse) -> float:
    """Share of a response's attention to the image that fell on the boxes; NaN without any."""
    if not {"region_mass", "image_mass"} <= response.values.keys():
        return math.nan
    region, image = (float(np.nansum(response.values[name])) for name in ("region_mass", "image_mass"))
    return region / image if image > 0 else math.nan


def share(value: float) -> str:
    """``"4.1 %"``."""
    return "NaN" if math.isnan(value) else f"{100 * value:.{1 if value < 0.2 else 0}f} %"


def plain(title: str) -> str:
    """A title of a panel without mathematical markup."""
    return re.sub(r"\$", "", title)


def accuracy_of(responses: Sequence[SeenResponse]) -> float:
    """Share of right answers; NaN if nobody knows."""
    return _mean([float(r.facts["accuracy"]) for r in responses if "accuracy" in r.facts])


def is_right(response: SeenResponse) -> bool | None:
    """Whether the answer is right; None if nobody knows."""
    accuracy = float(response.facts.get("accuracy", math.nan))
    return None if math.isnan(accuracy) else accuracy >= 0.5


def prompt_key(prompt: SeenPrompt) -> Hashable:
    """What makes two recorded prompts of different steps or runs the same: also pictures, grids and boxes."""
    images = tuple((hash(i.picture.tobytes()), i.picture.size, i.tiles, i.boxes) for i in prompt.images)
    return prompt.where, prompt.question, images


def _has(response: SeenResponse) -> bool:
    return "image_mass" in response.values


def _mean(values: Sequence[float]) -> float:
    kept = [value for value in values if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan


def windows(run: Run, k: int) -> str:
    """What the numbers are, as a sentence."""
    window = min(k, sum(step > 0 for step in run.steps) // 2)
    if window < 2:
        return "The numbers are those of the first and of the last training step."
    return f"Numbers are means of the first and the last {window} steps."


def _guide(panel: Panel) -> str:
    if panel.guide is None:
        return ""
    level, meaning = panel.guide
    return f"; {level:g} means {meaning}"
