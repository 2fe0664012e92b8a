"""Which layers and heads look at the boxes, chosen on half of the rows and reported on the other half; and sinks.

Criteria of LocalizationHeads (arXiv 2503.06287): attention on the image, and low spatial entropy of it. With boxes, the
share on them over chance and the share of tokens whose most attended visual token is in a box say how well that works.

Shape suffixes: R rows, L layers, H heads.
"""

from collections.abc import Sequence

import numpy as np

from sayo_verl import estimates as e
from sayo_verl.diagnose.analysis import (
    Analysis,
    Answers,
    Finding,
    Line,
    Result,
    Sets,
    in_words,
    mean_of,
    percent,
    prompts_of,
)
from sayo_verl.diagnose.answers import Answer, per_response

BEST = 5  # heads in the table
LEAST = 16  # rows with boxes: with fewer to choose and to check, chance proposes a layer too often
SETTING = "algorithm.attn.region.layers"
TITLE, REFERENCE = "Layers and heads that look at the boxes", "LocalizationHeads, arXiv 2503.06287"
COLUMNS = ("image_mass", "spatial_entropy", "region_mass", "box_hit")


def heads(sets: Sets) -> Finding:
    """Layers and heads of the first model, with a proposal that is checked on rows that did not make it."""
    label, answers = next(iter(sets.items()))
    measured = [a for a in answers if "heads/layers" in a.values]
    if not measured:
        return Finding("heads", TITLE, left_out="no response was measured by head")
    kept = [a for a in measured if a.region_tokens]
    boxes = len(kept) >= 2  # one to choose, one to show
    used = kept if boxes else measured
    numbers = used[0].values["heads/layers"].astype(int)
    values = {n: np.array([a.values[f"heads/{n}"] for a in used], float) for n in COLUMNS[: 4 if boxes else 2]}
    image_RLH, entropy_RLH = values["image_mass"], values["spatial_entropy"]
    chosen, held = slice(0, None, 2), slice(1, None, 2)  # every second row chooses, the others check
    busy_LH = image_RLH[chosen].mean(0) >= np.median(image_RLH[chosen].mean(0))
    ways = {"spatial entropy": np.where(busy_LH, -entropy_RLH[chosen].mean(0), -np.inf)}
    facts: dict[str, e.Estimate] = {}
    if boxes:
        chance_R = per_response(kept, lambda a: a.chance)
        values["lift"] = e.lift(values["region_mass"], image_RLH, chance_R[:, None, None])
        ways = {"box hit": np.where(busy_LH, values["box_hit"][chosen].mean(0), -np.inf), **ways}
        # heads taken together, as a method does
        layer_RL = e.lift(values["region_mass"].mean(-1), image_RLH.mean(-1), chance_R[:, None])
        advice, facts = _layer(layer_RL, image_RLH.mean(-1), numbers, prompts_of(kept))
        facts = facts if len(kept) >= LEAST else {}
        sentences = [
            advice
            if len(kept) >= LEAST
            else f"With {len(kept)} rows with boxes no layer can be chosen and checked; {LEAST} are needed.",
            f"The boxes cover {chance_R.mean():.1%} of the visual tokens on average, so that share of hits is chance. "
            "No method has a setting heads=: masses are means over all heads of a layer.",
        ]
    else:
        sentences = [f"With {len(kept)} rows with boxes no layer can be chosen and checked; {LEAST} are needed."]
    shown = {"box_hit": "box hit", "lift": "times chance", "spatial_entropy": "spatial entropy (nats)"}
    names = [name for name in shown if name in values]
    table = [("chosen by", "layer", "head", *(f"{shown[name]}, other half" for name in names))]
    for way, value_LH in ways.items():
        for i, h in _order(value_LH)[:BEST]:
            found = (e.mean(values[name][held, i, h], prompts_of(used[held])) for name in names)
            table.append((way, str(numbers[i]), str(h), *(v.text(2) for v in found)))
    titles = {
        "lift": "Boxes over chance",
        "box_hit": "Box hit (share of tokens)",
        "image_mass": "Attention to the image",
    }
    means = {name: np.nanmean(value, 0) for name, value in values.items()}
    return Finding(
        "heads",
        TITLE,
        tuple(f"{label}: {sentence}" if len(sets) > 1 else sentence for sentence in sentences),
        ("boxes",),
        REFERENCE,
        grids={
            titles.get(name, "Spatial entropy (nats)"): means[name] for name in reversed(means) if name != "region_mass"
        },
        header=("layer", "head", *means),
        rows=[(numbers[i], h, *(m[i, h] for m in means.values())) for i, h in np.ndindex(busy_LH.shape)],
        table=table,
        facts=facts,
    )


def _layer(
    lift_RL: np.ndarray, image_RL: np.ndarray, numbers: np.ndarray, prompts: Sequence[int]
) -> tuple[str, dict[str, e.Estimate]]:
    """A proposal for the layers of a method, and what the other half of the rows says of it.

    A layer that looks at the image less than half as much as the median layer is no candidate.
    """
    image_L = image_RL[::2].mean(0)
    candidate_L = image_L >= 0.5 * np.median(image_L)
    best = int(np.argmax(np.where(candidate_L, np.nanmean(lift_RL[::2], 0), -np.inf)))
    last, held, other = int(np.argmax(numbers)), lift_RL[1::2], prompts[1::2]
    own, default = (e.mean(held[:, i], other) for i in (best, last))
    gain = e.difference(held[:, best], held[:, last], other)
    facts = {f"layer {numbers[best]}, held out": own, "last layer, held out": default, "difference, held out": gain}
    if best == last:
        return (
            f"The last layer, which is the default of {SETTING}, looks most at the boxes on half of the rows: keep it. "
            f"On the other half its attention to them is {own.text(2)} times chance."
        ), facts
    keep = f"no reason to change {SETTING} from the default, the last layer"
    verdict = in_words(gain, 0, f"try {SETTING}=[{numbers[best]}]", keep, keep)
    return (
        f"Layer {numbers[best]}, counted from 0, looks most at the boxes on half of the rows. On the other half its "
        f"attention to them is {own.text(2)} times chance and that of the last layer {default.text(2)}, difference "
        f"{gain.text(2, sign=True)}: {verdict}."
    ), facts


def _order(value_LH: np.ndarray) -> list[tuple[int, int]]:
    """Places [layer, head] of finite values, the highest first."""
    places = [divmod(int(n), value_LH.shape[1]) for n in np.argsort(-value_LH, axis=None, kind="stable")]
    return [place for place in places if np.isfinite(value_LH[place])]


def _sinks(answers: Answers) -> Result:
    """Attention that goes to places whatever the question is."""
    border = mean_of(answers, lambda a: _share(a, "border"))
    y = [
        mean_of(answers, lambda a: a.values["seen/sink_mass"].mean()),
        mean_of(answers, lambda a: a.values["seen/image_mass"].mean()),
        border,
        mean_of(answers, lambda a: a.values["seen/steady_share"]),
    ]
    over = mean_of(answers, lambda a: _share(a, "border") - a.values["seen/border_chance"])
    chance = per_response(answers, lambda a: a.values["seen/border_chance"]).mean()
    verdict = in_words(over, 0, "more than", "less than", "not clearly different from")
    sentence = (
        f"The first token gets {percent(y[0])} of the attention, the image {percent(y[1])}. Of the attention to the "
        f"image, {percent(border)} falls on its border, {verdict} the border's share of the visual tokens, "
        f"{chance:.0%}; "
        + (
            f"{percent(y[3])} falls on steady tokens, which get it whatever the question is."
            if y[3].value > 0
            else "there are no steady tokens, which get it whatever the question is."
        )
    )
    names = ("first token", "image", "border, of\nthe image's", "steady, of\nthe image's")
    facts = dict(zip(("first token", "image", "border", "steady"), y, strict=True))
    return Result((sentence,), (Line("", range(len(y)), y),), facts, names)


def _share(answer: Answer, name: str) -> float:
    """A mass as a share of that on the image."""
    return float(answer.values[f"seen/{name}_mass"].mean() / max(answer.values["seen/image_mass"].mean(), e.EPS))


SINKS = Analysis(
    "sinks",
    "Sinks",
    _sinks,
    (("Where attention goes", "", "share of attention", None),),
    ("a measured map",),
    "Mean of all layers and heads; the first response of each row",
)
