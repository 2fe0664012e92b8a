"""Which layers and heads look at the boxes, chosen on half of the rows and reported on the other half; and sinks.

Criteria of LocalizationHeads (arXiv 2503.06287): attention on the image, and low spatial entropy of it. With boxes, the
share on them over chance and the share of tokens whose most attended visual token is in a box say how well that works.

Shape suffixes: R rows, L layers, H heads.
"""

from collections.abc import Sequence

import numpy as np

from sayo_verl.diagnose import estimates as e
from sayo_verl.diagnose.answers import Answer, per_response
from sayo_verl.diagnose.findings import TITLES, Finding, Line, Sets, in_words, percent, prompts_of

BEST = 5  # heads in the table
SETTING = "algorithm.attn.region.layers"


def _stack(answers: Sequence[Answer], name: str) -> np.ndarray:
    return per_response(answers, lambda a: a.values[f"heads/{name}"])


def _layer_lift(answers: Sequence[Answer]) -> np.ndarray:
    """Attention on the boxes over chance of each layer, heads taken together as a method does: [R, L]."""
    region, image = (_stack(answers, name).mean(-1) for name in ("region_mass", "image_mass"))
    return region / np.maximum(image, e.EPS**2) / per_response(answers, lambda a: a.chance)[:, None]


def heads(sets: Sets) -> Finding:
    """Layers and heads, with a proposal that was checked on rows that did not make it. The first model only."""
    title = TITLES["heads"]
    label, answers = next(iter(sets.items()))
    measured = [a for a in answers if "heads/image_mass" in a.values]
    numbers = measured[0].values["heads/layers"].astype(int)
    image_LH, entropy_LH = _stack(measured, "image_mass").mean(0), _stack(measured, "spatial_entropy").mean(0)
    busy_LH = image_LH >= np.median(image_LH)
    grids = {"attention mass on the image": image_LH, "spatial entropy (nats)": entropy_LH}
    header = ("layer", "head", "image_mass", "spatial_entropy", "region_mass", "lift", "box_hit")
    kept = [a for a in measured if a.region_tokens]
    if len(kept) < 4:
        rows = [(numbers[i], h, image_LH[i, h], entropy_LH[i, h], "", "", "") for i, h in np.ndindex(image_LH.shape)]
        few = [(i, h) for i, h in _order(np.where(busy_LH, -entropy_LH, -np.inf))[:BEST]]
        names = ", ".join(f"layer {numbers[i]} head {h}" for i, h in few)
        sentence = (
            f"With {len(kept)} rows with boxes, no layer can be chosen and checked. By LocalizationHeads' criteria "
            f"without boxes (attention to the image at least the median, lowest spatial entropy): {names}."
        )
        return Finding(
            "heads",
            title,
            (sentence,),
            grids=grids,
            header=header,
            rows=rows,
            needs="boxes",
            reference="LocalizationHeads, arXiv 2503.06287",
        )
    chance = per_response(kept, lambda a: a.chance)
    region_RLH, image_RLH = _stack(kept, "region_mass"), _stack(kept, "image_mass")
    lift_RLH = region_RLH / np.maximum(image_RLH, e.EPS**2) / chance[:, None, None]
    hit_RLH, entropy_RLH, layer_RL = _stack(kept, "box_hit"), _stack(kept, "spatial_entropy"), _layer_lift(kept)
    chosen, held = slice(0, None, 2), slice(1, None, 2)  # every second row chooses, the others check
    prompts = prompts_of(kept[held])

    # layers
    busy_L = image_LH.mean(-1) >= 0.5 * np.median(image_LH.mean(-1))
    best = int(np.argmax(np.where(busy_L, layer_RL[chosen].mean(0), -np.inf)))
    last = int(np.argmax(numbers))
    own, default = (e.mean(layer_RL[held, i], prompts) for i in (best, last))
    gain = e.difference(layer_RL[held, best], layer_RL[held, last], prompts)
    if best == last:
        advice = (
            f"The last layer, the default, is the best of half of the rows; keep it. On the other half: {own.text(2)}."
        )
    else:
        verdict = in_words(
            gain,
            0,
            f"set {SETTING}=[{numbers[best]}]",
            "keep the default, the last layer",
            f"no reason to change {SETTING} from the last layer",
        )
        advice = (
            f"Layer {numbers[best]} (from 0) looks most at the boxes on half of the rows. On the other half its "
            f"attention on the boxes is {own.text(2)} times chance, that of the last layer {default.text(2)}, difference "
            f"{gain.text(2, sign=True)}: {verdict}."
        )

    # heads
    table = [("chosen by", "layer", "head", "box hit, other half", "times chance, other half", "spatial entropy")]
    ways = {
        "box hit": np.where(busy_LH, hit_RLH[chosen].mean(0), -np.inf),
        "spatial entropy": np.where(busy_LH, -entropy_RLH[chosen].mean(0), -np.inf),
    }
    for way, value_LH in ways.items():
        for i, h in _order(value_LH)[:BEST]:
            values = (hit_RLH[held, i, h], lift_RLH[held, i, h], entropy_RLH[held, i, h])
            hit, times, spread = (e.mean(v, prompts) for v in values)
            table.append((way, str(numbers[i]), str(h), percent(hit), times.text(2), spread.text(2)))
    sentences = (
        f"{label}: {advice}" if len(sets) > 1 else advice,
        f"A box covers {chance.mean():.1%} of the visual tokens on average, so that share of hits is chance. No method "
        "has a setting heads=: masses are means over all heads of a layer.",
    )
    grids = {
        "attention on the boxes over chance": lift_RLH.mean(0),
        "box hit (share of tokens)": hit_RLH.mean(0),
    } | grids
    rows = [
        (
            numbers[i],
            h,
            image_LH[i, h],
            entropy_LH[i, h],
            region_RLH[:, i, h].mean(),
            lift_RLH[:, i, h].mean(),
            hit_RLH[:, i, h].mean(),
        )
        for i, h in np.ndindex(image_LH.shape)
    ]
    facts = {f"layer {numbers[best]}, held out": own, "last layer, held out": default, "difference, held out": gain}
    return Finding(
        "heads",
        title,
        sentences,
        needs="boxes",
        reference="LocalizationHeads, arXiv 2503.06287",
        grids=grids,
        header=header,
        rows=rows,
        table=table,
        facts=facts,
    )


def _order(value_LH: np.ndarray) -> list[tuple[int, int]]:
    """Places [layer, head] of finite values, the highest first."""
    places = [divmod(int(n), value_LH.shape[1]) for n in np.argsort(-value_LH, axis=None, kind="stable")]
    return [place for place in places if np.isfinite(value_LH[place])]


def sinks(sets: Sets) -> Finding:
    """Attention that goes to places whatever the question is."""
    lines: list[Line] = []
    sentences: list[str] = []
    facts: dict[str, e.Estimate] = {}
    for i, (label, answers) in enumerate(sets.items()):
        seen = [a for a in answers if "seen/sink_mass" in a.values]
        mass = {
            name: per_response(seen, lambda a, n=name: a.values[f"seen/{n}_mass"].mean())
            for name in ("sink", "image", "border")
        }
        steady = per_response(seen, lambda a: a.values["seen/steady_share"])
        border_chance = per_response(seen, lambda a: a.values["seen/border_chance"])
        prompts = prompts_of(seen)
        y = [
            e.mean(mass["sink"], prompts),
            e.mean(mass["image"], prompts),
            e.mean(mass["border"] / np.maximum(mass["image"], e.EPS), prompts),
            e.mean(steady, prompts),
        ]
        lines.append(Line(0, label, range(len(y)), y, i))
        facts |= {f"{label}/{name}": v for name, v in zip(("first token", "image", "border", "steady"), y, strict=True)}
        over = e.mean(mass["border"] / np.maximum(mass["image"], e.EPS) - border_chance, prompts)
        verdict = in_words(over, 0, "more than its share of the visual tokens", "less than its share", "as its share")
        sentences.append(
            f"{label + ': ' if len(sets) > 1 else ''}The first token gets {percent(y[0])} of the attention, the image "
            f"{percent(y[1])}. Of the attention to the image, {percent(y[2])} falls on its border, {verdict} "
            f"({border_chance.mean():.0%}), and {percent(y[3])} on steady tokens."
        )
    names = ("first token", "image", "border,\nof the image's", "steady tokens,\nof the image's")
    panel = ("Where attention goes", "", "share of attention", None)
    rows = [
        (line.label, name.replace("\n", " "), v.value, v.low, v.high)
        for line in lines
        for name, v in zip(names, line.y, strict=True)
    ]
    return Finding(
        "sinks",
        TITLES["sinks"],
        tuple(sentences),
        reference="mean of all layers and heads; first response of a row",
        needs="nothing",
        panels=(panel,),
        lines=tuple(lines),
        bars=names,
        header=("model", "place", "share", "low", "high"),
        rows=rows,
        facts=facts,
    )
