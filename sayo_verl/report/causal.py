"""Causal beside attention: the effect of a changed image on each token, against the token's attention to the image.

The effect of a token is its log-probability given the real image minus that given the changed image. If attention says
where the model *needs* the image, the two rise together. The token was predicted by the row before it, so its attention
is taken from that row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sayo_verl.estimates import Estimate, rank_correlation
from sayo_verl.view.figure import COLOURS, GREY
from sayo_verl.view.seen import SeenPrompt, SeenResponse
from sayo_verl.view.store import RecordedStep

MOST_POINTS = 1200  # of a scatter, so that the page stays small


@dataclass(frozen=True)
class Effects:
    """Tokens of one prompt at one step with both numbers.

    Attributes:
        step: updates of the policy.
        prompt: the prompt.
        responses: those with tokens that have both numbers.
        mass, effect: of all these tokens.
        owner: index of each token's response.
        correlation: Spearman's, with a bootstrap over responses.
    """

    step: int
    prompt: SeenPrompt
    responses: tuple[SeenResponse, ...]
    mass: np.ndarray
    effect: np.ndarray
    owner: np.ndarray
    correlation: Estimate


def predicting_mass(response: SeenResponse) -> np.ndarray:
    """[T] attention to the image of the row that predicted each token; NaN for the first if its row was not measured.

    Where a token's numbers are of the row in which it is the input (``query_row``), that is the row before.
    """
    mass_T = response.values["image_mass"]
    if response.facts.get("query_row") != "input":
        return mass_T
    return np.concatenate([[np.nan], mass_T[:-1]]).astype(mass_T.dtype)


def row_in_words(response: SeenResponse) -> str:
    """Which row the attention is of, as a sentence."""
    if "query_row" in response.facts:
        return "The attention is of the row that predicted the token."
    return (
        "The file does not say which row the attention is of; it may be the row after the one that predicted the token."
    )


def effects_of(step: RecordedStep, prompt: SeenPrompt, responses: Sequence[SeenResponse]) -> Effects | None:
    """None if no token has both numbers."""
    kept: list[SeenResponse] = []
    mass, effect, owner = [], [], []
    for response in responses:
        if not {"effect", "image_mass"} <= response.values.keys():
            continue
        mass_T = predicting_mass(response)
        both = np.isfinite(response.values["effect"]) & np.isfinite(mass_T)
        if both.any():
            mass.append(mass_T[both])
            effect.append(response.values["effect"][both])
            owner.append(np.full(int(both.sum()), len(kept)))
            kept.append(response)
    if not kept:
        return None
    m, e, o = (np.concatenate(part) for part in (mass, effect, owner))
    return Effects(step.step, prompt, tuple(kept), m, e, o, rank_correlation(m, e, o.tolist()))


def pooled(effects: Sequence[Effects]) -> Estimate:
    """The correlation over all tokens of several prompts, with a bootstrap over responses."""
    owner = [f"{i}.{k}" for i, one in enumerate(effects) for k in one.owner]
    return rank_correlation(
        np.concatenate([one.mass for one in effects]), np.concatenate([one.effect for one in effects]), owner
    )


def in_words(correlation: Estimate) -> str:
    """A sentence about a rank correlation."""
    if np.isnan(correlation.value):
        return "The rank correlation is not defined, because one of the two is the same for all tokens."
    number = f"rank correlation {correlation.text(2)}"
    if np.isnan(correlation.low):
        return f"The {number}: one response gives no interval."
    if not correlation.excludes(0):
        return f"Attention does not clearly say where the image matters: {number}."
    way = "more" if correlation.value > 0 else "less"
    return f"Tokens that attend more to the image depend {way} on it: {number}."


def scatter(one: Effects) -> Figure:
    """Effect against attention mass, one point per token, in one colour per response (up to seven)."""
    figure = Figure(figsize=(4.6, 3.0))
    figure.subplots_adjust(left=0.155, right=0.97, top=0.9, bottom=0.16)
    axis = figure.subplots()
    shown = np.arange(len(one.mass))
    if len(shown) > MOST_POINTS:
        shown = np.random.default_rng(0).choice(shown, MOST_POINTS, replace=False)
    for i in range(len(one.responses)):
        of_response = shown[one.owner[shown] == i]
        axis.plot(
            one.mass[of_response],
            one.effect[of_response],
            linestyle="",
            marker="o",
            markersize=3,
            alpha=0.65,
            markeredgewidth=0,
            color=COLOURS[i % len(COLOURS)],
        )
    axis.axhline(0, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    some = f", {MOST_POINTS} of {len(one.mass)} tokens" if len(shown) < len(one.mass) else ""
    axis.set_title(f"Step {one.step}: one point per token{some}")
    axis.set_xlabel("attention to the image (probability)")
    axis.set_ylabel("effect of the changed image (nats)")
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
    mass, effect = predicting_mass(response)[:most], response.values["effect"][:most]
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
