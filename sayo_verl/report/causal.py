"""Causal beside attention: how much each token depends on the image, against its attention to the image.

The effect of a token is its log-probability given the real image minus that given the changed image. Its dependence is
``estimates.dependence`` of the effect. If attention says where the model *needs* the image, attention and dependence
rise together. A token was sampled by the row before it, so its attention is that of this row. ``sayo diagnose`` uses
the same estimate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sayo_verl.estimates import Estimate, attention_by_effect, dependence
from sayo_verl.view.figure import COLOURS, GREY
from sayo_verl.view.seen import SeenPrompt, SeenResponse
from sayo_verl.view.store import RecordedStep

MOST_POINTS = 1200  # of a scatter, so that the page stays small
UNKNOWN_ROW = (
    "The recorded files do not say at which position the attention was read. It may be that after the token, which "
    "says nothing about why the token was chosen. So no correlation is shown. Runs of this version record the position."
)


@dataclass(frozen=True)
class Effects:
    """Tokens of one prompt at one step with both numbers.

    Attributes:
        step: updates of the policy.
        prompt: the prompt.
        responses: those with tokens that have both numbers.
        masses, effects: [T] of each of these responses, the tokens that have both.
        correlation: mean over responses of Spearman's correlation within one, with an interval over responses.
    """

    step: int
    prompt: SeenPrompt
    responses: tuple[SeenResponse, ...]
    masses: tuple[np.ndarray, ...]
    effects: tuple[np.ndarray, ...]
    correlation: Estimate

    @property
    def tokens(self) -> int:
        return sum(map(len, self.masses))


def predicting_mass(response: SeenResponse) -> np.ndarray | None:
    """[T] attention to the image of the row that sampled each token; None: nobody knows which row was read.

    Where only the row of the token as input was read, that row samples the next token, and the first token has NaN.
    """
    row, values = response.facts.get("query_row"), response.values
    if "predicting_mass" in values:
        return values["predicting_mass"]
    if row not in ("input", "predicting") or "image_mass" not in values:
        return None
    mass_T = values["image_mass"]
    return mass_T if row == "predicting" else np.concatenate([[np.nan], mass_T[:-1]]).astype(mass_T.dtype)


def is_row_unknown(step: RecordedStep) -> bool:
    """Whether effects were recorded, but not at which row the attention was read."""
    measured = [r for _, responses in step.prompts for r in responses if "effect" in r.values]
    return bool(measured) and all(predicting_mass(response) is None for response in measured)


def effects_of(step: RecordedStep, prompt: SeenPrompt, responses: Sequence[SeenResponse]) -> Effects | None:
    """None if no token has both numbers."""
    kept: list[SeenResponse] = []
    masses, effects = [], []
    for response in responses:
        mass_T = predicting_mass(response)
        if mass_T is None or "effect" not in response.values:
            continue
        both = np.isfinite(response.values["effect"]) & np.isfinite(mass_T)
        if both.any():
            masses.append(mass_T[both])
            effects.append(response.values["effect"][both])
            kept.append(response)
    if not kept:
        return None
    correlation = attention_by_effect(masses, effects, range(len(kept)))
    return Effects(step.step, prompt, tuple(kept), tuple(masses), tuple(effects), correlation)


def over_prompts(effects: Sequence[Effects]) -> Estimate:
    """The correlation within a response, mean over all responses of several prompts, with an interval over prompts."""
    masses = [mass_T for one in effects for mass_T in one.masses]
    found = [effect_T for one in effects for effect_T in one.effects]
    owner = [i for i, one in enumerate(effects) for _ in one.masses]
    return attention_by_effect(masses, found, owner)


def in_words(correlation: Estimate) -> str:
    """A sentence about a rank correlation."""
    if np.isnan(correlation.value):
        return "The rank correlation is not defined: responses are too short, or one of the two numbers is constant."
    number = f"rank correlation {correlation.text(2)}"
    if np.isnan(correlation.low):
        return f"The {number}: there are too few responses that differ, so it may be chance."
    if not correlation.excludes(0):
        return f"Attention does not clearly say where the image matters: {number}."
    way = "more" if correlation.value > 0 else "less"
    return f"Tokens that attend more to the image depend {way} on it: {number}."


def scatter(one: Effects) -> Figure:
    """Dependence against attention mass, one point per token, in one colour per response (up to seven)."""
    figure = Figure(figsize=(4.6, 3.0))
    figure.subplots_adjust(left=0.155, right=0.97, top=0.9, bottom=0.16)
    axis = figure.subplots()
    x, y = np.concatenate(one.masses), dependence(np.concatenate(one.effects))
    owner = np.repeat(np.arange(len(one.masses)), list(map(len, one.masses)))
    shown = np.arange(len(x))
    if len(shown) > MOST_POINTS:
        shown = np.random.default_rng(0).choice(shown, MOST_POINTS, replace=False)
    for i in range(len(one.responses)):
        of_response = shown[owner[shown] == i]
        axis.plot(
            x[of_response],
            y[of_response],
            linestyle="",
            marker="o",
            markersize=3,
            alpha=0.65,
            markeredgewidth=0,
            color=COLOURS[i % len(COLOURS)],
        )
    axis.axhline(0, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    some = f", {MOST_POINTS} of {len(x)} tokens" if len(shown) < len(x) else ""
    axis.set_title(f"Step {one.step}: one point per token{some}")
    axis.set_xlabel("attention to the image (probability)")
    axis.set_ylabel("dependence on the image (nats)")
    axis.tick_params(length=0)
    return figure


def through_training(effects: Sequence[Effects]) -> Figure:
    """The correlation of one prompt at each recorded step, with its interval."""
    figure = Figure(figsize=(4.6, 3.0))
    figure.subplots_adjust(left=0.155, right=0.97, top=0.9, bottom=0.16)
    axis = figure.subplots()
    steps, found = [one.step for one in effects], [one.correlation for one in effects]
    bars = [[c.value - c.low for c in found], [c.high - c.value for c in found]]
    axis.errorbar(
        steps, [c.value for c in found], yerr=np.nan_to_num(bars), color=COLOURS[0], marker="o", markersize=5, capsize=3
    )
    axis.axhline(0, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    axis.set_ylim(-1.05, 1.05)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_title("Through training")
    axis.set_xlabel("updates of the policy")
    axis.set_ylabel("rank correlation")
    axis.tick_params(length=0)
    return figure


def strip(response: SeenResponse, step: int, most: int = 80) -> Figure:
    """The two numbers along the first ``most`` tokens of a response, each in a row of bars, with the tokens' texts."""
    mass_T = predicting_mass(response)
    assert mass_T is not None
    mass, effect = mass_T[:most], response.values["effect"][:most]
    places = np.arange(len(mass))
    figure = Figure(figsize=(max(4.6, 0.17 * len(places) + 1.0), 3.0))
    width = figure.get_figwidth()
    figure.subplots_adjust(left=0.72 / width, right=1 - 0.1 / width, top=0.9, bottom=0.3, hspace=0.16)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.bar(places, np.nan_to_num(mass), color=COLOURS[0], width=0.8)
    lower.bar(places, np.nan_to_num(effect), color=COLOURS[1], width=0.8)
    lower.axhline(0, color=GREY, linewidth=0.9)
    cut = f", first {most} of {len(response.pieces)} tokens" if len(response.pieces) > most else ""
    upper.set_title(f"Step {step}, one response{cut}")
    upper.set_ylabel("attention")
    lower.set_ylabel("effect (nats)")
    texts = [piece.strip() or "·" for piece in response.pieces[:most]]
    lower.set_xticks(places, [text if len(text) < 14 else text[:12] + "…" for text in texts], rotation=90, fontsize=7)
    lower.set_xlim(-0.7, len(places) - 0.3)
    for axis in (upper, lower):
        axis.tick_params(length=0)
    return figure
