"""The analyses of ``sayo diagnose``: each takes the responses of one model, and is applied to one or two.

A comparison of tokens uses R_a of single tokens, see ``sayo_verl.estimates``. A response is one entry of a
mean, whatever its length. Intervals are over prompts.

Shape suffixes: T tokens, R responses, K bins.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from sayo_verl import estimates as e
from sayo_verl.diagnose.analysis import (
    WRONG,
    Analysis,
    Answers,
    Finding,
    Line,
    Result,
    Sets,
    curves,
    in_words,
    mean_of,
    parts,
    percent,
    prompts_of,
)
from sayo_verl.diagnose.answers import COSINE, IMAGE, PREDICTING, SINK, Answer, per_response, signals_of
from sayo_verl.estimates import Estimate
from sayo_verl.methods import AnchorMethod, DualMethod, FaithfulMethod, Method, RegionMethod
from sayo_verl.methods.anchor import connectivity
from sayo_verl.methods.dual import focus_score
from sayo_verl.methods.faithful import causal_effect
from sayo_verl.metrics import every_metric
from sayo_verl.probe.statistics import log_probs_key

POSITIONS, RANKS, GROUPS, DENSITIES = 10, 5, 5, 20  # bins of positions, of ranks, of responses, of connectivity
SIZES = (1, 2, 4, 8, 16, 0)  # of the random-token test; 0: all tokens
SELECTED = RegionMethod.entropy_fraction
NO_PREFERENCE = (0.5, "no preference for the target")


def _against_accuracy(
    answers: Answers, value: Callable[[Answer], float], what: str, comparison: str, verdicts: tuple[str, str, str]
) -> Result:
    """Accuracy in fifths of a value, its rank correlation, and the comparison within a question."""
    values, accuracy = per_response(answers, value), per_response(answers, lambda a: a.accuracy)
    prompts = np.array(prompts_of(answers))
    edges = np.unique(np.quantile(values, np.arange(1, GROUPS) / GROUPS))
    of_bin = np.searchsorted(edges, values, side="right")  # equal values share a bin
    bins = [of_bin == k for k in np.unique(of_bin)]
    y = [e.mean(accuracy[kept], prompts[kept]) for kept in bins]
    by_part = {part: mean_of(own, value) for part, own in parts(answers).items()}
    rho, within = (f(values, accuracy, prompts) for f in (e.rank_correlation, e.concordance))
    pairs = (
        f"Of a right and a wrong answer to the same question, the right one {comparison} in {percent(within)} of the "
        f"pairs, where 50 % is chance: {in_words(within, 0.5, *verdicts)}."
        if not math.isnan(within.value)
        else "No question has both a right and a wrong answer, so the difficulty of questions may explain this."
    )
    listed = " and ".join(f"{estimate.text(2)} in {part}" for part, estimate in by_part.items())
    return Result(
        (f"{what} is {listed}; its rank correlation with accuracy is {rho.text(2)}.", pairs),
        (Line("", [float(values[kept].mean()) for kept in bins], y),),
        {"rank correlation": rho, "concordance within a question": within, **by_part},
    )


def _score_and_accuracy(answers: Answers) -> Result:
    verdicts = (
        "looking at the target goes with being right",
        "looking at the target goes with being wrong",
        "no sign that looking at the target goes with being right once the question is the same",
    )
    return _against_accuracy(answers, lambda a: a.score, "R_a", "looked more at the target", verdicts)


def _length(answers: Answers) -> Result:
    verdicts = (
        "longer answers are more often right",
        "longer answers are more often wrong",
        "length says nothing clear about being right",
    )
    result = _against_accuracy(answers, lambda a: a.tokens, "The number of tokens", "is longer", verdicts)
    cut = 1 - float(np.mean([a.finished for a in answers]))
    more = (f"{cut:.0%} of the responses were cut at the limit of tokens.",) if cut else ()
    return dataclasses.replace(result, sentences=result.sentences + more)


def _position(answers: Answers) -> Result:
    def of_bins(values: Callable[[Answer], np.ndarray]) -> Callable[[Answer], np.ndarray]:
        return lambda a: e.binned(values(a), np.arange(a.tokens) * POSITIONS // a.tokens, POSITIONS)

    x = [(k + 0.5) / POSITIONS for k in range(POSITIONS)]
    lines = curves(answers, of_bins(lambda a: a.scores), x) + curves(answers, of_bins(lambda a: a[IMAGE]), x, 1)

    def change(values_T: np.ndarray) -> float:
        half = len(values_T) // 2
        return float(values_T[half:].mean() - values_T[:half].mean())

    changes = {
        "R_a": mean_of(answers, lambda a: change(a.scores)),
        "the attention to the image": mean_of(answers, lambda a: change(a[IMAGE])),
    }
    sentences = tuple(
        f"From the first to the second half of a response, {name} changes by {gap.text(sign=True)}: "
        f"{in_words(gap, 0, 'it rises', 'it falls', 'no clear change')}."
        for name, gap in changes.items()
        if math.isfinite(gap.value)
    )
    return Result(sentences, lines, {f"late minus early, {name}": gap for name, gap in changes.items()})


def selected(answer: Answer) -> np.ndarray:
    """Indices of SAYO's tokens Q, those of highest entropy; ties go to earlier tokens."""
    k = max(1, math.floor(SELECTED * answer.tokens + 1e-9))
    return np.argsort(-answer.values["entropy"], kind="stable")[:k]


def _entropy(answers: Answers) -> Result:
    def of_bins(values: Callable[[Answer], np.ndarray]) -> Callable[[Answer], np.ndarray]:
        return lambda a: e.binned(values(a), e.rank_bins(a.values["entropy"], RANKS), RANKS)

    x = range(1, RANKS + 1)
    lines = curves(answers, of_bins(lambda a: a.scores), x) + curves(answers, of_bins(lambda a: a[IMAGE]), x, 1)
    high, every = mean_of(answers, lambda a: a.scores[selected(a)].mean()), mean_of(answers, lambda a: a.score)
    gap = mean_of(answers, lambda a: a.scores[selected(a)].mean() - a.score)
    verdict = in_words(
        gap, 0, "uncertain tokens look more at the target", "uncertain tokens look less at it", "no clear difference"
    )
    sentence = (
        f"R_a of the {SELECTED:.0%} of tokens with the highest entropy is {high.text(2)}, that of all tokens "
        f"{every.text(2)}, difference {gap.text(sign=True)}: {verdict}. Both are means over single tokens."
        if math.isfinite(gap.value)
        else "Without boxes only the attention to the whole image is shown."
    )
    return Result((sentence,), lines, {"high-entropy minus all tokens": gap})


def _random_tokens(answers: Answers) -> Result:
    """The estimate, shown on this set: change of both scores against one random token."""
    longest = float(np.median([a.tokens for a in answers]))
    sizes = [k for k in SIZES if k <= longest]
    kept = [a for a in answers if a.tokens >= max(sizes)]
    found = e.random_tokens([a.densities for a in kept], sizes)
    names = {"single": "single tokens (ours)", "pooled": "pooled (the paper's R_a)"}
    lines: list[Line] = []
    facts: dict[str, Estimate] = {}
    for name, text in names.items():
        change = [e.mean(column - found[name][:, 0], prompts_of(kept)) for column in found[name].T]
        lines.append(Line(text, range(len(sizes)), change, dashed=name == "pooled"))
        facts |= {
            f"{name}/{k or 'all'}": e.mean(v, prompts_of(kept)) for k, v in zip(sizes, found[name].T, strict=True)
        }
    one, every = facts["pooled/1"], facts["pooled/all"]
    sentence = (
        f"Of the same {len(kept)} responses, the pooled R_a rises from {one.value:.3f} for one random token to "
        f"{every.value:.3f} for all tokens, although they are the same tokens. R_a of single tokens changes by "
        f"{lines[0].y[-1].text(sign=True)}. The pooled number depends on how many "
        "tokens are pooled, so this page takes R_a of each token alone and averages it."
    )
    return Result((sentence,), tuple(lines), facts, tuple(str(k or "all") for k in sizes))


SCORES = {
    "hidden-state cosine": DualMethod(),
    "attention to the image": DualMethod(score="image_mass", score_offset="none"),
}


def late_and_early(answer: Answer, method: DualMethod) -> tuple[float, float]:
    """Means of VGPO's score rho over the second and the first half of a response, as ``DualMethod.credit`` cuts it."""
    score = torch.from_numpy(answer[COSINE if method.score == "cosine" else IMAGE])[None]
    rho = focus_score(score, torch.ones(1, answer.tokens, dtype=torch.bool), [[0]], method.score_offset)[0]
    late = 2 * torch.arange(1, answer.tokens + 1) > answer.tokens
    return float(rho[late].mean()), float(rho[~late].mean())


def _accumulation(answers: Answers) -> Result:
    lines: list[Line] = []
    sentences: list[str] = []
    facts: dict[str, Estimate] = {}
    for part, own in parts(answers).items():
        y = []
        for name, method in SCORES.items():
            late, early = np.array([late_and_early(a, method) for a in own]).T
            y.append(e.ratio(late, early, prompts_of(own)))
            facts[f"{part}/{name}"] = y[-1]
        lines.append(Line(part, range(len(y)), y, dashed=part == WRONG))
        fade = in_words(y[1], 1, "attention to the image grows", "attention to the image fades", "no clear change")
        sentences.append(
            f"In {part}, late over early is {y[0].text(2)} for VGPO's cosine and {y[1].text(2)} for the attention "
            f"to the image: {fade}."
        )
    return Result(tuple(sentences), tuple(lines), facts, tuple(SCORES))


def _anchors(answers: Answers) -> Result:
    def density(a: Answer) -> np.ndarray:
        return connectivity(*(torch.from_numpy(a[s]) for s in (IMAGE, SINK))).numpy()

    def top_share(a: Answer) -> float:
        d_T, k = density(a), max(1, math.floor(AnchorMethod.anchor_share * a.tokens + 1e-9))
        return float(np.sort(d_T)[-k:].sum() / max(d_T.sum(), e.EPS))

    x = [(k + 0.5) / DENSITIES for k in range(DENSITIES)]
    lines = curves(answers, lambda a: np.histogram(density(a), DENSITIES, (0, 1))[0] / a.tokens, x)
    facts = {part: mean_of(own, lambda a: density(a).mean()) for part, own in parts(answers).items()}
    facts["share of the most connected tokens"] = top = mean_of(answers, top_share)
    listed = " and ".join(f"{facts[part].text(2)} in {part}" for part in parts(answers))
    sentence = (
        f"Mean connectivity is {listed}. The {AnchorMethod.anchor_share:.0%} of a response's tokens with the highest "
        f"connectivity have {percent(top)} of the sum over all its tokens."
    )
    return Result((sentence,), lines, facts)


def _effect(answers: Answers) -> Result:
    def k_of(a: Answer) -> np.ndarray:
        names = ("log_probs", log_probs_key(FaithfulMethod().counterfactual))
        real, changed = (torch.from_numpy(a.values[name])[None] for name in names)
        every = torch.ones_like(real, dtype=torch.bool)
        return causal_effect(real, changed, every, FaithfulMethod.k_max)[0].numpy()

    lines = curves(answers, lambda a: e.binned(a[PREDICTING], e.rank_bins(k_of(a), RANKS), RANKS), range(1, RANKS + 1))
    rho, k = mean_of(answers, lambda a: e.spearman(k_of(a), a[PREDICTING])), mean_of(answers, lambda a: k_of(a).mean())
    verdict = in_words(
        rho,
        0,
        "the model looks at the image where the image matters",
        "the model looks at the image where it does not matter",
        "no sign that the model looks at the image where it matters",
    )
    sentence = (
        f"How much a token depends on the image, found by changing the image, and its attention to the image have a "
        f"rank correlation of {rho.text(2)} within a response: {verdict}. The mean effect of the change is {k.text(2)} "
        "nats per token."
    )
    return Result((sentence,), lines, {"rank correlation": rho, "effect": k})


_FIFTH = "fifth of the response's tokens, by {} (5: {})"
ANALYSES = (
    Analysis(
        "score_and_accuracy",
        "Target attention and accuracy",
        _score_and_accuracy,
        (("Accuracy by target attention", "R_a, mean of the response's tokens (fifths)", "accuracy", None),),
        ("boxes", "a ground truth"),
        "SAYO, figure 2",
    ),
    Analysis(
        "position",
        "Attention by position in the response",
        _position,
        (
            ("Target attention", "position in the response (share)", "R_a of single tokens", NO_PREFERENCE),
            ("Attention to the image", "position in the response (share)", "share of attention", None),
        ),
        ("several tokens",),
        "SAYO, figure 4, left",
    ),
    Analysis(
        "entropy",
        "Attention by entropy of the token",
        _entropy,
        (
            ("Target attention", _FIFTH.format("entropy", "highest"), "R_a of single tokens", NO_PREFERENCE),
            ("Attention to the image", _FIFTH.format("entropy", "highest"), "share of attention", None),
        ),
        ("several tokens",),
        "SAYO, figures 4 (right), 6 and 7",
    ),
    Analysis(
        "length",
        "Response length and accuracy",
        _length,
        (("Accuracy by response length", "tokens of the response (fifths)", "accuracy", None),),
        ("a ground truth",),
        "SAYO, figure 8",
    ),
    Analysis(
        "accumulation",
        "Visual forgetting: late against early",
        _accumulation,
        (("Late over early visual score", "", "second half / first half", (1.0, "late as early")),),
        ("several tokens",),
        "VGPO reports 0.680 in right and 0.532 in wrong answers; its measure is not public, this is our reading",
    ),
    Analysis(
        "effect",
        "Causal effect beside attention (our reading of Faithful-MR1)",
        _effect,
        (("Attention by causal effect", _FIFTH.format("effect", "largest"), "share of attention on the image", None),),
        ("several tokens",),
        f"The changed image: {FaithfulMethod().counterfactual.kind}, share {FaithfulMethod().counterfactual.share}",
    ),
    Analysis(
        "anchors",
        "Connectivity and anchors (our reading of AT-RL)",
        _anchors,
        (("Connectivity of tokens", "connectivity d: attention to the image, sink left out", "share of tokens", None),),
        (),
        "AT-RL's formulas are not public; the clusters are in the table of methods",
    ),
    Analysis(
        "random_tokens",
        "Check of the estimate: random tokens",
        _random_tokens,
        (("R_a of k random tokens minus that of one", "k, tokens drawn from each response", "change of R_a", None),),
        ("boxes", "several tokens"),
    ),
)


def paired(sets: Sets) -> Finding:
    """Two models on the same rows; differences of means per row."""
    title = "The two models on the same questions"
    if len(sets) < 2:
        return Finding("paired", title, left_out="there is no second model; name one with --against")
    values: dict[str, Callable[[Answer], float]] = {
        "accuracy": lambda a: a.accuracy,
        "R_a of single tokens": lambda a: a.score,
        "attention to the boxes over chance": lambda a: a.lift,
        "share of attention on the image": lambda a: a[IMAGE].mean(),
        "response length (tokens)": lambda a: a.tokens,
    }
    (first, mine), (second, theirs) = sets.items()
    shared = sorted({a.row for a in mine} & {a.row for a in theirs})
    table: list[tuple[str, ...]] = [("", first, second, "difference")]
    facts: dict[str, Estimate] = {}
    for name, value in values.items():
        one, two = (
            np.array([np.mean([value(a) for a in answers if a.row == row]) for row in shared])
            for answers in (mine, theirs)
        )
        gap = e.difference(one, two, shared)
        if math.isfinite(gap.value):
            facts[name] = gap
            table.append((name, e.mean(one, shared).text(), e.mean(two, shared).text(), gap.text(sign=True)))
    clear = [f"{name} {gap.text(sign=True)}" for name, gap in facts.items() if gap.excludes(0)]
    sentence = f"On the same {len(shared)} questions, {first} minus {second}: " + (
        f"{'; '.join(clear)}." if clear else "no difference whose interval excludes zero."
    )
    own: dict[str, Any] = {"header": table[0], "rows": table[1:], "table": table, "facts": facts}
    return Finding("paired", title, (sentence,), reference="Paired by row", **own)


def methods_table(sets: Sets, methods: Mapping[str, Method], left_out: Mapping[str, str]) -> Finding:
    """The metrics that each registered method gives on each prompt's responses, as in training."""
    table: list[tuple[str, ...]] = [("method", "metric", *sets)]
    rows: list[tuple[object, ...]] = []
    facts: dict[str, Estimate] = {}
    for name, method in methods.items():
        needs, found = method.needs(), dict[str, dict[str, Estimate]]()
        for label, answers in sets.items():
            groups: dict[int, list[Answer]] = {}
            for answer in answers:
                if answer.right is not None or not needs.correctness:
                    groups.setdefault(answer.row, []).append(answer)
            logged = {r: method.credit(signals_of(g, needs)).metrics for r, g in groups.items()}
            for metric in dict.fromkeys(key for metrics in logged.values() for key in metrics):
                own = {row: metrics[metric] for row, metrics in logged.items() if metric in metrics}
                found.setdefault(metric, {})[label] = e.mean(list(own.values()), list(own))
        texts = {metric.name: metric.label for metric in every_metric(getattr(method, "metrics", ()))}
        source = getattr(method, "reference", (name,))[0]
        for metric, values in found.items():
            if not metric.endswith("_seconds"):
                facts |= {f"{label}/{name}/{metric}": estimate for label, estimate in values.items()}
                rows += [(name, metric, label, v.value, v.low, v.high) for label, v in values.items()]
                cells = (values[label].text() if label in values else "not measured" for label in sets)
                table.append((source, texts.get(metric, metric), *cells))
    sentences = ["What each method would log for these responses, with its default settings: means over questions."]
    sentences += [f"{name} is left out: {why}." for name, why in left_out.items()]
    header = ("method", "metric", "model", "mean", "low", "high")
    return Finding(
        "methods", "Every method's own metrics", tuple(sentences), table=table, facts=facts, rows=rows, header=header
    )
