"""Sections of a run's page about recorded rollouts: their viewers, and causal beside attention."""

import math
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import matplotlib

from sayo_verl.report import causal, verdict
from sayo_verl.report.panels import drawn
from sayo_verl.view.figure import inline, style
from sayo_verl.view.page import table, text
from sayo_verl.view.seen import SeenPrompt, SeenResponse
from sayo_verl.view.store import RecordedStep
from sayo_verl.view.viewer import mount

MAPS_BUDGET = 6_000_000  # bytes of pictures and maps of all viewers together
RECORDS = (
    "<code>sayo.viz_every=10</code> records them every 10 steps, <code>sayo.viz_prompts</code> says how many prompts."
)
ROWS = {  # which row of attention was recorded
    "input": "The attention of a token is that of the row in which the token is the input.",
    "predicting": "The attention of a token is that of the row whose output the token was sampled from.",
}


def by_prompt(steps: Sequence[RecordedStep]) -> list[tuple[SeenPrompt, list[tuple[RecordedStep, Any]]]]:
    """Each recorded prompt with its steps and responses, in the order of the last step."""
    found: dict[Hashable, tuple[SeenPrompt, list[tuple[RecordedStep, Any]]]] = {}
    for step in steps:
        for prompt, responses in step.prompts:
            found.setdefault(verdict.prompt_key(prompt), (prompt, []))[1].append((step, responses))
    return list(found.values())


def rollouts(steps: Sequence[RecordedStep]) -> tuple[str, dict[str, Any]]:
    title = "<h2>Rollouts of fixed held-out prompts</h2>"
    if not steps:
        return f"{title}<p>No rollouts were recorded. {RECORDS}</p>", {}
    prompts, body, data = by_prompt(steps), title, dict[str, Any]()
    body += (
        f"<p>{len(prompts)} prompts at {len(steps)} points of the training. The slider, or the arrow keys on it, moves "
        f"through the training. Cards are in the order of their advantage. {_seconds(steps)}</p>"
    )
    rows = {str(r.facts["query_row"]) for s in steps for _, rs in s.prompts for r in rs if "query_row" in r.facts}
    body += "".join(f"<p>{ROWS[row]}</p>" for row in sorted(rows & ROWS.keys()))
    for i, (prompt, of_steps) in enumerate(prompts):
        states: dict[str, Sequence[SeenResponse]] = {
            f"step {step.step}": sorted(responses, key=_advantage, reverse=True) for step, responses in of_steps
        }
        rates = [verdict.accuracy_of(responses) for responses in states.values()]
        named = zip(states, rates, strict=True)
        right = ", ".join(f"{100 * rate:.0f} % at {name}" for name, rate in named if rate == rate)
        shown, islands = mount(
            f"rollouts-{i}", prompt, states, budget=MAPS_BUDGET // len(prompts), more_maps="sayo.viz_prompts"
        )
        body += f"<h3>Prompt {i + 1} of {len(prompts)}</h3>"
        body += f"<p>Right answers: {right}.</p>" if right else ""
        last, responses = of_steps[-1]
        body += f"<p>{said}</p>" if (said := credited(responses, last.step)) else ""
        body += shown
        data |= islands
    return body, data


def _advantage(response: SeenResponse) -> float:
    """For an order; an unknown advantage comes last."""
    value = float(response.facts.get("advantage", math.nan))
    return value if math.isfinite(value) else -math.inf


def credited(responses: Sequence[SeenResponse], step: int) -> str:
    """What the method credited, in words; empty if advantages or accuracies were not recorded."""
    known = [(verdict.is_right(r), _advantage(r)) for r in responses]
    right, wrong = ([v for is_right, v in known if is_right is side and math.isfinite(v)] for side in (True, False))
    parts = []
    if wrong:
        parts.append(f"{sum(v > 0 for v in wrong)} of {len(wrong)} wrong answers have a positive advantage")
    if right:
        parts.append(f"{sum(v < 0 for v in right)} of {len(right)} right answers have a negative advantage")
    return f"At step {step}, {' and '.join(parts)}." if parts else ""


def _seconds(steps: Sequence[RecordedStep]) -> str:
    """What the recording cost, as a sentence; empty if nobody knows. The first one includes the start of workers."""
    seconds = [step.seconds for step in steps if math.isfinite(step.seconds)]
    if not seconds:
        return ""
    if len(seconds) == 1:
        return f"Recording took {seconds[0]:.1f} seconds."
    rest = sum(seconds[1:]) / (len(seconds) - 1)
    return f"Recording took {seconds[0]:.1f} seconds the first time and {rest:.1f} seconds on average after that."


def causal_section(steps: Sequence[RecordedStep]) -> str:
    title = "<h2>Causal beside attention</h2>"
    explain = (
        "<p>The effect of a token is its log-probability given the image minus that given a changed image, in nats. "
        "Its dependence on the image is how far that is from 0: exp(-effect) - 1 + effect, an estimate of the "
        "divergence. In a policy that looks where it needs to look, attention to the image and dependence "
        "rise together. The attention to compare is that of the position whose output the token was sampled from.</p>"
    )
    if not steps:
        return f"{title}{explain}<p>Nothing was recorded. {RECORDS}</p>"
    if all(map(causal.is_row_unknown, steps)):
        return f"{title}{explain}<p>{causal.UNKNOWN_ROW}</p>"
    parts = []
    for i, (prompt, of_steps) in enumerate(by_prompt(steps)):
        found = [causal.effects_of(step, prompt, responses) for step, responses in of_steps]
        effects = [one for one in found if one]
        if not effects:
            continue
        last = effects[-1]
        with matplotlib.rc_context(style()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser has other fonts
            figures = [(causal.scatter(last), "Dependence on the image against attention to the image, per token")]
            if len(effects) > 1:
                figures.append((causal.through_training(effects), "Rank correlation at each recorded step"))
            along = inline(causal.strip(last.responses[0], last.step), "Attention and effect along the tokens")
            pair = drawn(figures)
        parts.append(
            f"<h3>Prompt {i + 1}: {text(prompt.question)}</h3>"
            f"<p>Step {last.step}, {last.tokens} tokens of {len(last.responses)} responses. "
            f"{text(causal.in_words(last.correlation))}</p>{pair}{along}"
        )
    if not parts:
        return (
            f"{title}{explain}<p>The recorded rollouts have no effect of a changed image. "
            "<code>sayo.viz_causal=true</code> measures it, with one more pass.</p>"
        )
    note = (
        '<p class="note">Spearman\'s rank correlation of the tokens within a response, mean over responses. Its 95 % '
        "interval is over responses (in the table of all prompts: over prompts), because tokens of one response depend "
        "on each other. <code>sayo diagnose</code> uses the same estimate; its layers may be others.</p>"
    )
    return title + explain + _all_prompts(steps) + "".join(parts) + note


def _all_prompts(steps: Sequence[RecordedStep]) -> str:
    rows = []
    for step in steps:
        found = [causal.effects_of(step, prompt, responses) for prompt, responses in step.prompts]
        effects = [one for one in found if one]
        if effects:
            tokens, responses = sum(one.tokens for one in effects), sum(len(one.responses) for one in effects)
            rows.append([step.step, tokens, responses, len(effects), causal.over_prompts(effects).text(2)])
    return table(["step", "tokens", "responses", "prompts", "rank correlation within a response"], rows)
