"""What the stored results say about claims: of the papers, and of defaults of this package.

A claim is a sentence with measured numbers and a rule. It holds here if every interval is wholly on the side that the
claim needs, it fails if every interval is wholly on the other side, and else it is open. "in part": some numbers were
not run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.yardstick import learning
from benchmarks.yardstick.learning import Run
from benchmarks.yardstick.plan import HALF, KNOWING, Plan
from sayo_verl.estimates import Estimate, mean

Scored = Sequence[Mapping[str, Any]]
DEPENDENCE, COSINE, OWN_ROW = "dependence on the image", "image_cosine", ", row of the token"


@dataclass(frozen=True)
class Claim:
    """A sentence, whose it is, and its numbers by name.

    Attributes:
        needs: ``above`` or ``below`` ``level``; empty: numbers without a verdict.
    """

    text: str
    of: str
    numbers: Mapping[str, Estimate]
    needs: str = ""
    level: float = 0.0

    @property
    def verdict(self) -> str:
        """What the numbers say."""
        found = [each for each in self.numbers.values() if not math.isnan(each.value)]
        if not found:
            return "not run"
        if not self.needs:
            return "no verdict"
        above = [each.low > self.level for each in found]
        below = [each.high < self.level for each in found]
        for_it, against = (above, below) if self.needs == "above" else (below, above)
        verdict = "holds" if all(for_it) else "fails" if all(against) else "open"
        return verdict if len(found) == len(self.numbers) else f"{verdict}, in part"


def claims(runs: Sequence[Run], scored: Scored, plan: Plan) -> list[Claim]:
    """All claims with their numbers; those on learning at the one rate that all methods have."""
    half, knowing = (of_kind(scored, kind) for kind in (HALF, KNOWING))
    layers = sorted({name for each in half for name in each["looks"]})
    kinds = {"half-ignorant": half, "knowing": knowing}

    def learned(method: str, kind: str = HALF) -> Estimate:
        return learning.gain(*(learning.by_seed(runs, kind, m, plan.common_rate) for m in (method, "grpo")))

    def learned_from_each(method: str) -> dict[str, Estimate]:
        return {name: learned(method, kind) for name, kind in (("half-ignorant", HALF), ("knowing", KNOWING))}

    return [
        Claim(
            "Attention on the image decays along a response",
            "VGPO, and others",
            {layer: across(half, "looks", layer, "late / early") for layer in layers},
            "below",
            1.0,
        ),
        Claim(
            "It decays more than even attention on all tokens so far: late / early over that of even attention",
            "VGPO, and others",
            {layer: beyond_even(half, layer) for layer in layers},
            "below",
            1.0,
        ),
        Claim(
            "VGPO lifts late attention: late / early at the end of training, more than with GRPO",
            "VGPO",
            {layer: late_lift(runs, "dual", plan.common_rate, layer) for layer in layers},
            "above",
        ),
        Claim(
            "A small share of the tokens, about 15 %, carries the image: tokens with 90 % of the dependence",
            "AT-RL, VPPO",
            {name: across_rates(found, "tokens with 90 % of the dependence") for name, found in kinds.items()},
        ),
        Claim(
            "Training without the anchors hurts: gain over GRPO of the other 85 % of the tokens alone",
            "AT-RL",
            {"all layers": learned("anchor_rest")},
            "below",
        ),
        Claim(
            "The anchors alone suffice: gain over GRPO of the top 15 % of the tokens alone",
            "AT-RL",
            {"all layers": learned("anchor_top")},
            "above",
        ),
        Claim(
            "Blame by the surprise of a token, -log p, without the image: gain over GRPO",
            "a control",
            learned_from_each("surprise"),
            "above",
        ),
        Claim(
            "Sharpening without a reward: gain over GRPO",
            "a control",
            learned_from_each("sharpen"),
            "above",
        ),
        Claim(  # nearly all right answers are luck, from half-ignorant starts still more than from knowing ones
            "Attention where it causally matters predicts the right answer, from knowing starts",
            "Faithful-MR1",
            {layer: across(knowing, "looks", layer, "causal, right answers") for layer in layers},
            "above",
        ),
        Claim(
            "Attention where it causally matters predicts right looks",
            "Faithful-MR1",
            {
                f"{name}, {layer}": across(found, "looks", layer, "causal, right looks")
                for name, found in kinds.items()
                for layer in layers
            },
            "above",
        ),
        Claim(
            "Tokens of high entropy are those that look: separation",
            "SAYO",
            {name: across(found, "statistics", "entropy", "separation") for name, found in kinds.items()},
            "above",
        ),
        Claim(
            "The cosine of hidden states marks tokens that need the image, in the row of the released code: separation",
            "VGPO",
            {name: across(found, "statistics", COSINE + OWN_ROW, "separation") for name, found in kinds.items()},
            "above",
        ),
        Claim(
            "The same cosine marks them in the row that sampled the token",
            "ours",
            {name: across(found, "statistics", COSINE, "separation") for name, found in kinds.items()},
            "above",
        ),
        Claim(
            "Dependence on the image marks the tokens that need it: separation",
            "VPPO",
            {name: across(found, "statistics", DEPENDENCE, "separation") for name, found in kinds.items()},
            "above",
        ),
        Claim(
            "Dependence on the image marks the errors: the first error against other perceptual tokens",
            "no paper",
            {name: across(found, "statistics", DEPENDENCE, "error") for name, found in kinds.items()},
            "above",
        ),
        Claim(
            "The last layer is as good as any: separation by image mass of the row that sampled the token",
            "our defaults",
            {layer: across(half, "statistics", f"image_mass, {layer}", "separation") for layer in layers},
        ),
        Claim(
            "The layer that attends most to the own region of a look is the one that separates best: share of starts",
            "our `sayo diagnose`",
            {name: same_layer(found) for name, found in kinds.items()},
        ),
        Claim(
            "The row of the token itself is as good: separation by its image mass",
            "our defaults",
            {layer: across(half, "statistics", f"image_mass, {layer}{OWN_ROW}", "separation") for layer in layers},
        ),
    ]


def claim_lines(found: Sequence[Claim]) -> list[str]:
    """The claims as a Markdown table."""
    lines = ["| claim | of | measured here | holds if | verdict |", "|---|---|---|---|---|"]
    for claim in found:
        numbers = "; ".join(f"{name} {_number(each)}" for name, each in claim.numbers.items())
        needs = f"{claim.needs} {claim.level:g}" if claim.needs else "-"
        lines.append(f"| {claim.text} | {claim.of} | {numbers or '-'} | {needs} | {claim.verdict} |")
    return lines


def _number(estimate: Estimate) -> str:
    return "not run" if math.isnan(estimate.value) else estimate.text(2, sign=True)


def of_kind(scored: Scored, kind: str) -> Scored:
    """Scores of a kind of start."""
    return [each for each in scored if str(each["start"]).startswith(f"{kind}-")]


def across(found: Scored, part: str, name: str, score: str) -> Estimate:
    """Mean of a score over starts, with an interval over starts."""
    values = [each[part].get(name, {}).get(score, [None])[0] for each in found]
    kept = [value for value in values if value is not None]
    return mean(kept, range(len(kept))) if kept else Estimate(math.nan)


def same_layer(found: Scored) -> Estimate:
    """Share of starts whose layer with the highest attention on the own region also has the best separation."""
    same = []
    for each in found:
        by_layer = {
            name: (looks["share"][0], each["statistics"][f"image_mass, {name}"]["separation"][0])
            for name, looks in each["looks"].items()
        }
        best = [max(by_layer, key=lambda name: by_layer[name][k]) for k in (0, 1)]
        same.append(float(best[0] == best[1]))
    return Estimate(fmean(same)) if same else Estimate(math.nan)


def beyond_even(found: Scored, layer: str) -> Estimate:
    """Late over early attention on the image, over that of even attention."""
    even = [each["rates"].get("late / early of even attention", math.nan) for each in found]
    values = [each["looks"][layer]["late / early"][0] / level for each, level in zip(found, even, strict=True)]
    return mean(values, range(len(values))) if values else Estimate(math.nan)


def across_rates(found: Scored, rate: str) -> Estimate:
    """Mean of a rate of the rollouts over starts."""
    return mean([each["rates"][rate] for each in found], range(len(found))) if found else Estimate(math.nan)


def late_lift(runs: Sequence[Run], method: str, rate: float, layer: str) -> Estimate:
    """Late over early attention at the end of training, minus that of GRPO, paired by seed."""
    own, grpo = (learning.by_seed(runs, HALF, m, rate) for m in (method, "grpo"))
    seeds = sorted(own.keys() & grpo.keys())
    ends = [[group[s]["looks"][layer]["late / early"][0] for group in (own, grpo)] for s in seeds]
    return mean([mine - theirs for mine, theirs in ends], seeds) if seeds else Estimate(math.nan)
