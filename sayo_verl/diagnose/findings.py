"""The analyses of ``sayo diagnose``: each takes the responses of one or two models and returns a ``Finding``.

A comparison of tokens uses R_a of single tokens, see ``sayo_verl.diagnose.estimates``. A response is one entry of a
mean, whatever its length. Intervals are over prompts.

Shape suffixes: T tokens, R responses, K bins, L layers, H heads.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sayo_verl.diagnose import estimates as e
from sayo_verl.diagnose.answers import COSINE, IMAGE, PREDICTING, SINK, Answer, per_response, signals_of
from sayo_verl.diagnose.estimates import Estimate
from sayo_verl.methods import AnchorMethod, DualMethod, FaithfulMethod, Method, RegionMethod
from sayo_verl.methods.anchor import connectivity
from sayo_verl.methods.dual import focus_score
from sayo_verl.methods.faithful import causal_effect
from sayo_verl.metrics import every_metric

Answers = Sequence[Answer]
Sets = Mapping[str, Answers]  # label of a model -> its responses
PanelText = tuple[str, str, str, tuple[float, str] | None]  # title, axes, a level with its meaning
POSITIONS, RANKS, GROUPS = 10, 5, 5  # bins of positions, of entropy or effect, of responses
SIZES = (1, 2, 4, 8, 16, 0)  # of the random-token test; 0: all tokens
SELECTED = RegionMethod.entropy_fraction


@dataclass(frozen=True)
class Line:
    """One curve of a figure, which is a column of estimates.

    Attributes:
        panel: number of its panel.
        label: of the model and its answers.
        x: K places.
        y: K estimates.
        colour, dashed: its style; the colour is a number of the page's colours.
    """

    panel: int
    label: str
    x: Sequence[float]
    y: Sequence[Estimate]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Finding:
    """One result.

    Attributes:
        name: of its files.
        title: a heading.
        sentences: the result in plain words.
        needs: what the data must have: ``boxes``, ``right answers``, both, or nothing.
        reference: the paper's figure or claim.
        panels: title, horizontal axis, vertical axis, and a level to compare with (None: none) with its meaning.
        lines: of the panels.
        bars: the values of a panel stand side by side, with the texts of the horizontal axis.
        grids: title -> [L, H] values, drawn instead of lines.
        header, rows: of the CSV file.
        table: rows that the page shows under the figure, the first is the header.
        facts: name -> estimate, for ``summary.json``.
        left_out: why there is no result; then only ``name``, ``title``, ``needs`` and ``reference`` count.
    """

    name: str
    title: str
    sentences: tuple[str, ...] = ()
    needs: str = ""
    reference: str = ""
    panels: tuple[PanelText, ...] = ()
    lines: tuple[Line, ...] = ()
    bars: tuple[str, ...] = ()
    grids: Mapping[str, np.ndarray] = field(default_factory=dict)
    header: tuple[str, ...] = ()
    rows: Sequence[Sequence[Any]] = ()
    table: Sequence[Sequence[str]] = ()
    facts: Mapping[str, Estimate] = field(default_factory=dict)
    left_out: str = ""


TITLES = {  # by the name of the analysis
    "paired": "The two models on the same questions",
    "score_and_accuracy": "Target attention and accuracy",
    "position": "Attention by position in the response",
    "entropy": "Attention by entropy of the token",
    "length": "Response length and accuracy",
    "accumulation": "Visual forgetting",
    "effect": "Causal effect beside attention (our reading of Faithful-MR1)",
    "heads": "Layers and heads that look at the boxes",
    "sinks": "Sinks",
    "anchors": "Connectivity and anchors (our reading of AT-RL)",
    "random_token_test": "Check of the estimate: random tokens",
    "methods_table": "Every method's own metrics",
}
NO_PREFERENCE = (0.5, "no preference for the target")


def prompts_of(answers: Answers) -> list[int]:
    return [answer.row for answer in answers]


def in_words(estimate: Estimate, level: float, more: str, less: str, none: str) -> str:
    """A verdict: ``more`` or ``less`` only if the interval excludes ``level``."""
    if math.isnan(estimate.low):
        return "with one question there is no interval, so this may be chance"
    return (more if estimate.low > level else less) if estimate.excludes(level) else none


def percent(estimate: Estimate) -> str:
    """An estimate of a share, in percent."""
    scaled = Estimate(*(100 * v for v in (estimate.value, estimate.low, estimate.high)), estimate.n)
    return scaled.text(0) + " %"


def parts(answers: Answers) -> dict[str, Answers]:
    """Right and wrong answers apart; all together without a ground truth."""
    known = {name: [a for a in answers if a.right is value] for name, value in (("right", True), ("wrong", False))}
    kept = {f"{name} answers": part for name, part in known.items() if part}
    return kept or {"all answers": answers}


def _named(label: str, sets: Sets) -> str:
    return f"{label}: " if len(sets) > 1 else ""


def _curves(sets: Sets, panel: int, value: Callable[[Answer], np.ndarray], x: Sequence[float]) -> list[Line]:
    """A line for each model and part: means over responses of ``value(answer)`` [K]."""
    lines = []
    for i, (label, answers) in enumerate(sets.items()):
        for j, (part, own) in enumerate(parts(answers).items()):
            values_RK = per_response(own, value)
            y = [e.mean(column_R, prompts_of(own)) for column_R in values_RK.T]
            colour = i if len(sets) > 1 else j
            lines.append(Line(panel, _named(label, sets) + part, x, y, colour, dashed=part == "wrong answers"))
    return lines


def _csv(lines: Sequence[Line], panels: Sequence[tuple[Any, ...]]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    header = ("panel", "answers", "x", "mean", "low", "high", "responses")
    rows = [
        (panels[line.panel][0], line.label, x, y.value, y.low, y.high, y.n)
        for line in lines
        for x, y in zip(line.x, line.y, strict=True)
    ]
    return header, rows


def _figure(name: str, title: str, lines: Sequence[Line], panels: Sequence[Any], **more: Any) -> Finding:
    header, rows = _csv(lines, panels)
    return Finding(name, title, panels=tuple(panels), lines=tuple(lines), header=header, rows=rows, **more)


# ----------------------------------------------------------------------------------------------------- the analyses


def paired(sets: Sets) -> Finding:
    """Two models on the same rows."""
    title = TITLES["paired"]
    values: dict[str, Callable[[Answer], float]] = {
        "accuracy": lambda a: a.accuracy,
        "R_a of single tokens": lambda a: a.score,
        "attention to the boxes over chance": lambda a: a.lift,
        "attention mass on the image": lambda a: a[IMAGE].mean(),
        "response length (tokens)": lambda a: a.tokens,
    }
    (first, mine), (second, theirs) = sets.items()
    rows_of = [{a.row for a in answers} for answers in (mine, theirs)]
    shared = sorted(rows_of[0] & rows_of[1])
    table: list[tuple[str, ...]] = [("", first, second, "difference")]
    facts: dict[str, Estimate] = {}
    for name, value in values.items():
        means = [
            np.array([np.mean([value(a) for a in answers if a.row == row]) for row in shared])
            for answers in (mine, theirs)
        ]
        gap = e.difference(*means, shared)
        if not math.isnan(gap.value):
            facts[name] = gap
            table.append((name, *(e.mean(m, shared).text() for m in means), gap.text(sign=True)))
    clear = [f"{name} {gap.text(sign=True)}" for name, gap in facts.items() if gap.excludes(0)]
    sentence = f"On the same {len(shared)} questions, {first} differs from {second} in " + (
        f"{'; '.join(clear)} ({first} minus {second})." if clear else "nothing whose interval excludes zero."
    )
    return Finding(
        "paired",
        title,
        (sentence,),
        header=table[0],
        rows=table[1:],
        table=table,
        facts=facts,
        reference="paired by row",
    )


def score_and_accuracy(sets: Sets) -> Finding:
    """Target attention against accuracy."""
    lines: list[Line] = []
    sentences: list[str] = []
    facts: dict[str, Estimate] = {}
    for i, (label, answers) in enumerate(sets.items()):
        known = [a for a in answers if a.right is not None and a.region_tokens]
        score, accuracy, prompts = (
            per_response(known, lambda a: a.score),
            per_response(known, lambda a: a.accuracy),
            prompts_of(known),
        )
        of_bin = e.rank_bins(score, GROUPS)
        bins = [of_bin == k for k in range(GROUPS) if (of_bin == k).any()]
        y = [e.mean(accuracy[kept], np.array(prompts)[kept]) for kept in bins]
        lines.append(Line(0, label, [float(score[kept].mean()) for kept in bins], y, i))
        right, wrong = (
            e.mean(
                score[accuracy >= 0.5 if r else accuracy < 0.5],
                np.array(prompts)[accuracy >= 0.5 if r else accuracy < 0.5],
            )
            for r in (True, False)
        )
        rho = e.rank_correlation(score, accuracy, prompts)
        within = e.concordance(score, accuracy, prompts)
        facts |= {
            f"{label}/accuracy": e.mean(accuracy, prompts),
            f"{label}/score": e.mean(score, prompts),
            f"{label}/score of right answers": right,
            f"{label}/score of wrong answers": wrong,
            f"{label}/rank correlation": rho,
            f"{label}/concordance within a question": within,
        }
        verdict = in_words(
            within,
            0.5,
            "looking at the target goes with being right",
            "looking at the target goes with being wrong",
            "no sign that looking at the target goes with being right, once the question is the same",
        )
        pairs = (
            f"Of a right and a wrong answer to the same question, the right one looked more at the target in "
            f"{percent(within)} of the pairs (50 % is chance): {verdict}."
            if not math.isnan(within.value)
            else "No question has both a right and a wrong answer, so difficulty cannot be taken out."
        )
        sentences.append(
            f"{_named(label, sets)}R_a is {right.text(2)} in right answers and {wrong.text(2)} in wrong ones; its rank "
            f"correlation with accuracy over all answers is {rho.text(2)}. {pairs}"
        )
    panel = ("Accuracy by target attention", "R_a of single tokens, mean of the response (fifths)", "accuracy", None)
    return _figure(
        "score_and_accuracy",
        TITLES["score_and_accuracy"],
        lines,
        [panel],
        sentences=tuple(sentences),
        facts=facts,
        needs="boxes, right answers",
        reference="SAYO, figure 2",
    )


def position(sets: Sets) -> Finding:
    """Attention by position in the response."""

    def bins_of(answer: Answer) -> np.ndarray:
        return np.arange(answer.tokens) * POSITIONS // answer.tokens

    panels: list[PanelText] = []
    lines: list[Line] = []
    sentences: list[str] = []
    facts: dict[str, Estimate] = {}
    x = [(k + 0.5) / POSITIONS for k in range(POSITIONS)]
    boxes = any(a.region_tokens for answers in sets.values() for a in answers)
    if boxes:
        panels.append(("Target attention", "position in the response (share)", "R_a of single tokens", NO_PREFERENCE))
        lines += _curves(sets, 0, lambda a: e.binned(a.scores, bins_of(a), POSITIONS), x)
    panels.append(("Attention to the image", "position in the response (share)", "attention mass", None))
    lines += _curves(sets, len(panels) - 1, lambda a: e.binned(a[IMAGE], bins_of(a), POSITIONS), x)
    for label, answers in sets.items():
        long = [a for a in answers if a.tokens > 1]
        what, value = ("R_a", lambda a: a.scores) if boxes else ("attention to the image", lambda a: a[IMAGE])
        gap = e.mean(
            [value(a)[a.tokens // 2 :].mean() - value(a)[: a.tokens // 2].mean() for a in long], prompts_of(long)
        )
        facts[f"{label}/late minus early"] = gap
        verdict = in_words(gap, 0, "it rises", "it falls", "no clear change")
        sentences.append(
            f"{_named(label, sets)}From the first to the second half of a response, {what} changes by "
            f"{gap.text(sign=True)}: {verdict}."
        )
    return _figure(
        "position",
        TITLES["position"],
        lines,
        panels,
        sentences=tuple(sentences),
        facts=facts,
        needs="boxes for the first panel",
        reference="SAYO, figure 4, left",
    )


def entropy(sets: Sets) -> Finding:
    """Attention by entropy of the token."""
    panels: list[PanelText] = []
    lines: list[Line] = []
    sentences: list[str] = []
    facts: dict[str, Estimate] = {}
    x = list(range(1, RANKS + 1))
    boxes = any(a.region_tokens for answers in sets.values() for a in answers)
    axis = "fifth of the response's tokens, by entropy (5: highest)"

    def bins_of(answer: Answer) -> np.ndarray:
        return e.rank_bins(answer.values["entropy"], RANKS)

    if boxes:
        panels.append(("Target attention", axis, "R_a of single tokens", NO_PREFERENCE))
        lines += _curves(sets, 0, lambda a: e.binned(a.scores, bins_of(a), RANKS), x)
    panels.append(("Attention to the image", axis, "attention mass", None))
    lines += _curves(sets, len(panels) - 1, lambda a: e.binned(a[IMAGE], bins_of(a), RANKS), x)
    for label, answers in sets.items() if boxes else ():
        kept = [a for a in answers if a.region_tokens]
        high = per_response(kept, lambda a: a.scores[_selected(a)].mean())
        every = per_response(kept, lambda a: a.score)
        gap = e.difference(high, every, prompts_of(kept))
        facts[f"{label}/high-entropy minus all tokens"] = gap
        verdict = in_words(
            gap,
            0,
            "uncertain tokens look more at the target",
            "uncertain tokens look less at the target",
            "no clear difference",
        )
        sentences.append(
            f"{_named(label, sets)}R_a of the {SELECTED:.0%} of tokens with the highest entropy is "
            f"{e.mean(high, prompts_of(kept)).text(2)}, that of all tokens {e.mean(every, prompts_of(kept)).text(2)}, "
            f"difference {gap.text(sign=True)}: {verdict}."
        )
    if not boxes:
        sentences.append("Without boxes only the attention to the whole image is shown.")
    return _figure(
        "entropy",
        TITLES["entropy"],
        lines,
        panels,
        sentences=tuple(sentences),
        facts=facts,
        needs="boxes for the first panel",
        reference="SAYO, figures 4, right, 6 and 7",
    )


def _selected(answer: Answer) -> np.ndarray:
    """Indices of SAYO's tokens Q, those of highest entropy; ties go to earlier tokens."""
    k = max(1, math.floor(SELECTED * answer.tokens + 1e-9))
    return np.argsort(-answer.values["entropy"], kind="stable")[:k]


def random_token_test(sets: Sets) -> Finding:
    """The estimate, shown on this set."""
    lines: list[Line] = []
    sentences: list[str] = []
    facts: dict[str, Estimate] = {}
    for i, (label, answers) in enumerate(sets.items()):
        with_boxes = [a for a in answers if a.region_tokens]
        length = float(np.median([a.tokens for a in with_boxes]))
        sizes = [k for k in SIZES if k <= length]
        kept = [a for a in with_boxes if a.tokens >= max(sizes)]
        found = e.random_tokens([a.densities for a in kept], sizes)
        for j, (name, text) in enumerate((("pooled", "pooled (the paper's R_a)"), ("single", "single tokens (ours)"))):
            y = [e.mean(column, prompts_of(kept)) for column in found[name].T]
            lines.append(
                Line(0, _named(label, sets) + text, range(len(sizes)), y, 2 * i + 1 - j, dashed=name == "pooled")
            )
            for k, estimate in zip(sizes, y, strict=True):
                facts[f"{label}/{name}/{k or 'all'}"] = estimate
        first, last = (lines[-2].y[k].value for k in (0, -1))
        own = [estimate.value for estimate in lines[-1].y]
        sentences.append(
            f"{_named(label, sets)}Of the same {len(kept)} responses, the pooled R_a rises from {first:.3f} for one "
            f"random token to {last:.3f} for all; R_a of single tokens stays within {max(own) - min(own):.3f}. So this "
            "page compares single tokens."
        )
        names = tuple(str(k or "all") for k in sizes)
    panel = ("R_a of random tokens", "tokens drawn from each response", "R_a", NO_PREFERENCE)
    return _figure(
        "random_token_test",
        TITLES["random_token_test"],
        lines,
        [panel],
        sentences=tuple(sentences),
        facts=facts,
        bars=names,
        needs="boxes",
        reference="ours",
    )


def length(sets: Sets) -> Finding:
    """Length against accuracy."""
    lines: list[Line] = []
    sentences: list[str] = []
    facts: dict[str, Estimate] = {}
    for i, (label, answers) in enumerate(sets.items()):
        known = [a for a in answers if a.right is not None]
        tokens, accuracy = per_response(known, lambda a: a.tokens), per_response(known, lambda a: a.accuracy)
        prompts = np.array(prompts_of(known))
        of_bin = e.rank_bins(tokens, GROUPS)
        bins = [of_bin == k for k in range(GROUPS) if (of_bin == k).any()]
        x = [float(tokens[kept].mean()) for kept in bins]
        lines.append(Line(0, label, x, [e.mean(accuracy[kept], prompts[kept]) for kept in bins], i))
        rho, within = (f(tokens, accuracy, prompts) for f in (e.rank_correlation, e.concordance))
        cut = 1 - float(np.mean([a.finished for a in answers]))
        facts |= {f"{label}/rank correlation": rho, f"{label}/concordance within a question": within}
        facts[f"{label}/tokens"] = e.mean(tokens, prompts)
        verdict = in_words(
            within,
            0.5,
            "longer answers are more often right",
            "longer answers are more often wrong",
            "length says nothing clear about being right",
        )
        sentences.append(
            f"{_named(label, sets)}Responses have {e.mean(tokens, prompts).text(1)} tokens"
            + (f"; {cut:.0%} were cut at the limit" if cut else "")
            + f". The rank correlation of length and accuracy is {rho.text(2)}; of a right and a wrong answer to the "
            f"same question, the right one is longer in {percent(within)} of the pairs: {verdict}."
        )
    panel = ("Accuracy by response length", "tokens of the response (fifths)", "accuracy", None)
    return _figure(
        "length",
        TITLES["length"],
        lines,
        [panel],
        sentences=tuple(sentences),
        facts=facts,
        needs="right answers",
        reference="SAYO, figure 8",
    )


def late_and_early(answer: Answer, method: DualMethod) -> tuple[float, float]:
    """Means of VGPO's score rho over the second and the first half of a response, as ``DualMethod.credit`` cuts it."""
    score = torch.from_numpy(answer[COSINE if method.score == "cosine" else IMAGE])[None]
    mask = torch.ones(1, answer.tokens, dtype=torch.bool)
    rho = focus_score(score, mask, [[0]], method.score_offset)[0]
    late = 2 * torch.arange(1, answer.tokens + 1) > answer.tokens
    return float(rho[late].mean()), float(rho[~late].mean())


def accumulation(sets: Sets) -> Finding:
    """VGPO's late over early visual score."""
    scores = {
        "hidden-state cosine": DualMethod(),
        "attention to the image": DualMethod(score="image_mass", score_offset="none"),
    }
    lines: list[Line] = []
    sentences: list[str] = []
    facts: dict[str, Estimate] = {}
    for i, (label, answers) in enumerate(sets.items()):
        for j, (part, own) in enumerate(parts([a for a in answers if a.tokens > 1]).items()):
            y = []
            for name, method in scores.items():
                late, early = per_response(own, lambda a, m=method: late_and_early(a, m)).T
                y.append(e.ratio(late, early, prompts_of(own)))
                facts[f"{label}/{part}/{name}"] = y[-1]
            colour = i if len(sets) > 1 else j
            lines.append(Line(0, _named(label, sets) + part, range(len(y)), y, colour, dashed=part == "wrong answers"))
    for line in lines:
        fade = in_words(line.y[1], 1, "attention to the image grows", "attention to the image fades", "no clear change")
        sentences.append(
            f"{line.label[:1].upper() + line.label[1:]}: late over early is {line.y[0].text(2)} for VGPO's cosine and "
            f"{line.y[1].text(2)} for the attention mass: {fade}."
        )
    panel = ("Late over early visual score", "", "second half / first half", (1.0, "late as early"))
    return _figure(
        "accumulation",
        TITLES["accumulation"],
        lines,
        [panel],
        sentences=tuple(sentences),
        facts=facts,
        bars=tuple(scores),
        needs="nothing",
        reference="VGPO: 0.680 in right and 0.532 in wrong answers; its measure is not public, this is our reading",
    )


def anchors(sets: Sets) -> Finding:
    """AT-RL's connectivity, our reading."""
    sentences: list[str] = []
    facts: dict[str, Estimate] = {}
    K = 20
    centres = [(k + 0.5) / K for k in range(K)]

    def d_of(answer: Answer) -> np.ndarray:
        return connectivity(*(torch.from_numpy(answer[s]) for s in (IMAGE, SINK))).numpy()

    lines = _curves(sets, 0, lambda a: np.histogram(d_of(a), K, (0, 1))[0] / a.tokens, centres)
    for label, answers in sets.items():
        means = {
            part: e.mean(per_response(own, lambda a: d_of(a).mean()), prompts_of(own))
            for part, own in parts(answers).items()
        }
        facts |= {f"{label}/connectivity/{part}": estimate for part, estimate in means.items()}
        share = f"{AnchorMethod.anchor_share:.0%}"
        top = per_response(answers, lambda a: _top_share(d_of(a), AnchorMethod.anchor_share))
        facts[f"{label}/share of connectivity of the top {share}"] = e.mean(top, prompts_of(answers))
        sentences.append(
            f"{_named(label, sets)}Mean connectivity is "
            + " and ".join(f"{estimate.text()} in {part}" for part, estimate in means.items())
            + f". The {share} of tokens that look most hold {percent(e.mean(top, prompts_of(answers)))} of it."
        )
    panel = (
        "Connectivity of tokens",
        "connectivity d: attention to the image, without the sink",
        "share of tokens",
        None,
    )
    return _figure(
        "anchors",
        TITLES["anchors"],
        lines,
        [panel],
        sentences=tuple(sentences),
        facts=facts,
        needs="nothing",
        reference="AT-RL's formulas are not public; clusters are in the table of methods below",
    )


def _top_share(values: np.ndarray, share: float) -> float:
    k = max(1, math.floor(share * len(values) + 1e-9))
    return float(np.sort(values)[-k:].sum() / max(values.sum(), e.EPS))


def effect(sets: Sets) -> Finding:
    """Causal effect of the changed image against attention, per token."""
    method, lines, sentences, facts = FaithfulMethod(), [], [], {}

    def k_of(answer: Answer) -> np.ndarray:
        real, changed = (torch.from_numpy(answer.values[n])[None] for n in ("log_probs", "counterfactual_log_probs"))
        return causal_effect(real, changed, torch.ones_like(real, dtype=torch.bool), method.k_max)[0].numpy()

    lines = _curves(sets, 0, lambda a: e.binned(a[PREDICTING], e.rank_bins(k_of(a), RANKS), RANKS), range(1, RANKS + 1))
    for label, answers in sets.items():
        rho = e.mean(per_response(answers, lambda a: e.spearman(k_of(a), a[PREDICTING])), prompts_of(answers))
        k = e.mean(per_response(answers, lambda a: k_of(a).mean()), prompts_of(answers))
        facts |= {f"{label}/rank correlation": rho, f"{label}/effect": k}
        verdict = in_words(
            rho,
            0,
            "the model looks where the image matters",
            "the model looks elsewhere than where the image matters",
            "no sign that the model looks where the image matters",
        )
        sentences.append(
            f"{_named(label, sets)}Within a response, the rank correlation of a token's effect with its attention to "
            f"the image is {rho.text(2)}: {verdict}. The mean effect is {k.text()} nats per token."
        )
    panel = (
        "Attention by causal effect",
        "fifth of the response's tokens, by effect (5: largest)",
        "attention mass on the image",
        None,
    )
    return _figure(
        "effect",
        TITLES["effect"],
        lines,
        [panel],
        sentences=tuple(sentences),
        facts=facts,
        needs="nothing",
        reference=f"changed image: {method.counterfactual.kind}, share {method.counterfactual.share}",
    )


def methods_table(sets: Sets, methods: Mapping[str, Method], left_out: Mapping[str, str]) -> Finding:
    """The metrics that each registered method gives on each prompt's responses, as in training."""
    table: list[tuple[str, ...]] = [("method", "metric", *sets)]
    rows: list[tuple[object, ...]] = []
    facts: dict[str, Estimate] = {}
    for name, method in methods.items():
        found: dict[str, dict[str, Estimate]] = {}
        for label, answers in sets.items():
            known = [a for a in answers if a.right is not None] if method.needs().correctness else answers
            groups: dict[int, list[Answer]] = {}
            for answer in known:
                groups.setdefault(answer.row, []).append(answer)
            logged = {
                row: method.credit(signals_of(group, method.needs().statistics.statistics)).metrics
                for row, group in groups.items()
            }
            for metric in dict.fromkeys(key for metrics in logged.values() for key in metrics):
                own = {row: metrics[metric] for row, metrics in logged.items() if metric in metrics}
                found.setdefault(metric, {})[label] = e.mean(list(own.values()), list(own))
        texts = {metric.name: metric.label for metric in every_metric(getattr(method, "metrics", ()))}
        for metric, values in found.items():
            if metric.endswith("_seconds"):
                continue
            facts |= {f"{label}/{name}/{metric}": estimate for label, estimate in values.items()}
            cells = [values[label].text() if label in values else "not measured" for label in sets]
            source = getattr(method, "reference", (name,))[0]
            table.append((source, texts.get(metric, metric), *cells))
            rows += [(name, metric, label, v.value, v.low, v.high) for label, v in values.items()]
    sentences = ["What each method would log for these responses, with its default settings: means over questions."]
    sentences += [f"{name} is left out: {why}." for name, why in left_out.items()]
    return Finding(
        "methods_table",
        TITLES["methods_table"],
        tuple(sentences),
        table=table,
        facts=facts,
        rows=rows,
        header=("method", "metric", "model", "mean", "low", "high"),
        reference="docs/metrics.md",
    )
