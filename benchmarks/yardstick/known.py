"""Rollouts of a walking policy with what methods read of them and what is true of them.

Shape suffixes: N rows (n responses of each prompt), T response tokens (padded on the right), V cells of the grid.
"""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.yardstick import scores
from benchmarks.yardstick.credit import Known, credit_of, of_credit, of_values, token_statistics
from benchmarks.yardstick.loop import LoopConfig, Rollouts, measured, method_of, roll_out
from benchmarks.yardstick.policy import WalkPolicy
from benchmarks.yardstick.probed import cell_masses
from benchmarks.yardstick.scores import Truth
from sayo_verl.estimates import MOST_DEPENDENCE, Estimate
from sayo_verl.methods import Needs
from sayo_verl.methods.faithful import causal_effect, causal_weights
from sayo_verl.probe.statistics import QUERY_ROWS, Statistic, StatisticsRequest
from sayo_verl.scenes.walk import WalkConfig
from sayo_verl.scenes.walk_truth import Truth as WalkTruth
from sayo_verl.vision.intervention import Intervention

METHODS = (
    *("grpo", "region", "dual", "anchor", "faithful", "sensitivity", "evidence"),
    *("surprise", "sharpen", "oracle", "oracle_plus"),
)
Scores = dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class ScoreConfig:
    """What is scored.

    Attributes:
        methods: names as in ``LoopConfig``.
        prompts, responses: rollouts, at temperature 1.
        seed: of scenes and sampling.
    """

    methods: Sequence[str] = METHODS
    prompts: int = 64
    responses: int = 8
    seed: int = 0


@torch.no_grad()
def score(policy: WalkPolicy, scenes: WalkConfig, config: ScoreConfig) -> dict[str, Any]:
    """Score methods and statistics on the same rollouts.

    Returns:
        ``methods``, ``statistics`` and ``looks`` (attention by layer): name -> score -> value, low and high.
        ``example``: marks of one wrong response, and its advantages by method. ``rates``: what the rollouts are like.
    """
    rollouts, known = walked(policy, scenes, config.prompts, config.responses, config.seed)
    truth = truth_of(rollouts.truths, rollouts)
    methods: Scores = {}
    example, shown = example_row(rollouts, truth), {}
    for name in config.methods:
        method = method_of(LoopConfig(method=name))
        seen = known(method.needs() if method else Needs(StatisticsRequest(())))
        credit, advantage_NT = credit_of(method, seen)
        methods[name] = of_credit(credit, advantage_NT, seen)
        if example is not None:
            shown[name] = advantage_NT[example, truth.mask[example]].round(6).tolist()
    asked = [Statistic("image_mass", (layer,), query_row=row) for row in QUERY_ROWS for layer in layers_of(policy)]
    asked += [Statistic("image_cosine", query_row=row) for row in QUERY_ROWS]
    seen = known(Needs(StatisticsRequest(tuple(asked)), interventions=(Intervention(),)))
    values = token_statistics(seen.signals)
    return {
        "methods": _plain(methods),
        "statistics": _plain({name: of_values(value_NT, truth) for name, value_NT in values.items()}),
        "looks": _plain(looks(seen)),
        "example": None if example is None else {"marks": rollouts.truths[example].marks, "credit": shown},
        "rates": {
            "reward": float(rollouts.reward.mean()),
            "right looks": float(np.nanmean(truth.right_looks)),
            "perceptual tokens": float((truth.mask & truth.perceptual).sum() / truth.mask.sum()),
            "lucky answers": float(np.mean([each.lucky for each in rollouts.truths])),
            "tokens with 90 % of the dependence": scores.carriers(values["dependence on the image"], truth, 0.9).value,
            "tokens": float(truth.mask.sum(1).mean()),
            "late / early of even attention": even_late_over_early(rollouts, truth),
        },
    }


def walked(
    policy: WalkPolicy, scenes: WalkConfig, prompts: int, responses: int, seed: int
) -> tuple[Rollouts, Callable[[Needs], Known]]:
    """Rollouts at temperature 1, and a function that measures on them what is asked for."""
    rng, generator = random.Random(f"score/{seed}"), torch.Generator().manual_seed(seed)
    rollouts = roll_out(policy, scenes, LoopConfig(prompts=prompts, responses=responses), rng, generator)
    log_probs_NT, entropy_NT = policy.log_probs(rollouts.prompts, rollouts.ids)
    truth = truth_of(rollouts.truths, rollouts)
    own = own_region(policy, rollouts, layers_of(policy))

    def known(needs: Needs) -> Known:
        signals = measured(policy, needs, rollouts, log_probs_NT, entropy_NT)
        signals.check()
        return Known(signals, truth, rollouts.reward, own)

    return rollouts, known


def looks(known: Known) -> Scores:
    """Where the policy looks, by layer: ``image_mass`` of each layer at the row that sampled a token is read.

    ``causal``: attention on the image, weighted by the dependence of tokens on it, against the share of right looks
    and against right answers.
    """
    signals, truth, found = known.signals, known.truth, {}
    mask_NT = signals.response_mask.bool()
    changed_NT = signals.counterfactual(Intervention())
    omega_NT = causal_weights(causal_effect(signals.log_probs, changed_NT, mask_NT, MOST_DEPENDENCE), mask_NT)
    for layer, own_NT in known.own_region.items():
        mass_NT = signals[Statistic("image_mass", (layer,), query_row="predicting")]
        causal_N = (omega_NT * mass_NT).sum(-1).double().numpy()
        found[f"layer {layer}"] = {
            "share": scores.own_share(own_NT, truth),
            "seeing": scores.seeing(own_NT, truth),
            "late / early": scores.late_over_early(mass_NT.double().numpy(), truth),
            "causal, right looks": scores.trajectory(causal_N, truth),
            "causal, right answers": scores.answers(causal_N, truth),
        }
    return found


def even_late_over_early(rollouts: Rollouts, truth: Truth) -> float:
    """``late / early`` of attention that is the same on all tokens so far: the image's share falls as a text grows."""
    before_T = rollouts.prompts.ids.shape[1] + np.arange(truth.mask.shape[1])  # tokens that the sampling row sees
    return scores.late_over_early(np.broadcast_to(1.0 / before_T, truth.mask.shape), truth).value


@torch.no_grad()
def looks_of(policy: WalkPolicy, scenes: WalkConfig, prompts: int = 32) -> dict[str, Any]:
    """``looks`` of fresh rollouts, as JSON."""
    _, known = walked(policy, scenes, prompts, 8, 0)
    masses = tuple(Statistic("image_mass", (layer,), query_row="predicting") for layer in layers_of(policy))
    return _plain(looks(known(Needs(StatisticsRequest(masses), interventions=(Intervention(),)))))


def layers_of(policy: WalkPolicy) -> list[int]:
    """The numbers of all decoder layers."""
    return list(range(policy.model.config.get_text_config().num_hidden_layers))


def as_table(found: Mapping[str, Any]) -> str:
    """The scores as Markdown: a table of methods, of statistics, and of layers, each value with its interval."""
    lines = [", ".join(f"{name} {value:.3f}" for name, value in found["rates"].items())]
    for part in ("methods", "statistics", "looks"):
        names = list(dict.fromkeys(name for each in found[part].values() for name in each))
        lines += ["", "| " + " | ".join([part, *names]) + " |", "|" + "---|" * (len(names) + 1)]
        for title, each in found[part].items():
            cells = [_cell(each.get(name)) for name in names]
            lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines)


def _cell(value: Sequence[float | None] | None) -> str:
    """Value and interval; "-" for a score that does not apply."""
    if value is None:
        return "-"
    return Estimate(*(math.nan if part is None else part for part in value)).text(2, sign=True)


def example_row(rollouts: Rollouts, truth: Truth) -> int | None:
    """A wrong response to show: the first whose group has contrast and whose first error, a look, is in its middle."""
    T, n = truth.mask.shape[1], len(rollouts.reward) // len(rollouts.prompts.walks)
    contrast = rollouts.reward.view(-1, n).std(1).repeat_interleave(n) > 0
    for row, at in enumerate(truth.first_error.tolist()):
        middle = 0.3 * T < at < 0.6 * T
        if middle and truth.perceptual[row, at] and contrast[row] and not truth.correct[row]:
            return row
    return None


def truth_of(truths: Sequence[WalkTruth], rollouts: Rollouts) -> Truth:
    """The truth of tokens, of which each is a word or the end token.

    The end token is not perceptual. It is wrong where the response should have gone on.
    """
    mask_NT = rollouts.mask.bool().numpy()
    perceptual_NT, right_NT = np.zeros_like(mask_NT), np.zeros_like(mask_NT)
    for row, truth in enumerate(truths):
        words, tokens = len(truth.right), int(mask_NT[row].sum())
        assert tokens in (words, words + 1), f"row {row}: {words} words, {tokens} tokens"
        perceptual_NT[row, :words], right_NT[row, :words] = truth.perceptual, truth.right
        if tokens > words:
            right_NT[row, words] = truth.readable or truth.first_error < words
    correct_N = rollouts.reward.numpy() > 0.5
    return Truth(mask_NT, perceptual_NT, right_NT, correct_N, rollouts.uid)


def own_region(policy: WalkPolicy, rollouts: Rollouts, layers: Sequence[int]) -> dict[int, np.ndarray]:
    """Layer -> [N, T], share of the attention on the image that is on the cell a token depends on; 0 elsewhere."""
    out = {}
    for layer, masses in cell_masses(policy, rollouts.prompts, rollouts.ids, layers).items():
        mass_NTV = masses.double().numpy()
        share_NT = np.zeros(mass_NTV.shape[:2])
        for row, truth in enumerate(rollouts.truths):
            at = [t for t, seen in enumerate(truth.perceptual) if seen]
            cells = [truth.region[t] for t in at]
            total = mass_NTV[row, at].sum(-1)
            share_NT[row, at] = mass_NTV[row, at, cells] / np.where(total > 0, total, 1.0)
        out[layer] = share_NT
    return out


def _plain(found: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    """As JSON: [value, low, high] of each score, ``null`` where there is none."""
    finite = {
        name: {score: [estimate.value, estimate.low, estimate.high] for score, estimate in each.items()}
        for name, each in found.items()
    }
    return json.loads(json.dumps(finite).replace("NaN", "null"))
