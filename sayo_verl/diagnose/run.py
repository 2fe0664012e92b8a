"""A whole diagnosis: responses of one or two models, every analysis that the data allow, the files."""

import math
from collections.abc import Sequence
from pathlib import Path

from sayo_verl.diagnose import findings as f
from sayo_verl.diagnose import layers
from sayo_verl.diagnose.answers import IMAGE, Answer, usable_methods
from sayo_verl.diagnose.collect import collect, rows_of, writable
from sayo_verl.diagnose.config import Asked
from sayo_verl.diagnose.page import Example, write_files
from sayo_verl.estimates import FEWEST
from sayo_verl.look.observe import LONGEST, Observer

ORDER: tuple[str, ...] = (
    "paired",
    "score_and_accuracy",
    "position",
    "entropy",
    "length",
    "accumulation",
    "effect",
    "heads",
    "sinks",
)
ORDER += ("anchors", "random_tokens", "methods")


def diagnose(models: Sequence[str], asked: Asked, out: Path) -> Path:
    """Collect the responses of one or two models and write all files; errors as ``collect`` has them.

    Returns:
        The page.
    """
    asked.files()  # a wrong path is named before a model is opened
    labels = labels_of(models)
    sets: dict[str, list[Answer]] = {}
    examples: list[Example] = []
    for label, model, folder in zip(labels, models, ("model", "against"), strict=False):
        observer = Observer(model)  # its weights are loaded when they are first needed
        sets[label] = collect(observer, asked, out / folder)
        examples = examples or examples_of(observer, sets[label], asked)
    findings = analyse(sets)
    title = f"Where {labels[0]} looks" + (f", against {labels[1]}" if len(labels) > 1 else "")
    settings = {"models": list(models), **vars(asked), "data": str(asked.data)}
    with writable(out):
        return write_files(
            out, title, what_was_run(sets, asked), headline(sets, findings), findings, examples, settings
        )


def labels_of(models: Sequence[str]) -> list[str]:
    """Short names, different from each other."""
    names = [Path(model).name for model in models]
    return names if len(set(names)) == len(names) else [f"{name} ({n + 1})" for n, name in enumerate(names)]


def analyse(sets: f.Sets) -> list[f.Finding]:
    """Every analysis, in the order of the page; what the data do not allow says why."""
    findings = {a.name: a(sets) for a in (*f.ANALYSES, layers.SINKS)}
    own = (f.paired(sets), layers.heads(sets), f.methods_table(sets, *usable_methods()))
    findings |= {finding.name: finding for finding in own}
    return [findings[name] for name in ORDER]


def what_was_run(sets: f.Sets, asked: Asked) -> list[str]:
    """Sentences on the data and the sampling."""
    sentences = []
    for label, answers in sets.items():
        rows = {a.row for a in answers}
        no_box = len({a.row for a in answers if not a.region_tokens})
        sentences.append(
            f"{label}: {len(answers)} responses to {len(rows)} questions"
            + (f", {no_box} of them without boxes" if no_box else "")
            + "."
        )
    total = sum(1 for _ in rows_of(asked))
    without = total - len({a.row for answers in sets.values() for a in answers})
    how = "greedy" if asked.temperature == 0 else f"temperature {asked.temperature:g}"
    longest = asked.max_new_tokens or f"{LONGEST} (or what the model's context leaves)"
    sentences.append(
        f"Data: {asked.data}, {asked.samples} responses each, {how}, at most {longest} tokens, seed {asked.seed}."
    )
    if without:
        sentences.append(f"{without} rows have no image or no response and are left out.")
    if any(len({a.row for a in answers}) < FEWEST for answers in sets.values()):
        sentences.append(f"There are fewer than {FEWEST} questions, so there are no intervals.")
    sentences.append(
        "Attention is that of the last layer, mean of its heads, unless a figure says otherwise. R_a is SAYO's target "
        "attention score: 0.5 is no preference for the boxes, 1 is the boxes alone."
    )
    return sentences


def headline(sets: f.Sets, findings: Sequence[f.Finding]) -> list[str]:
    """The three sentences that matter: how right and where it looks; then what differs, helps, or has an effect."""
    label, answers = next(iter(sets.items()))
    accuracy, lift = f.mean_of(answers, lambda a: a.accuracy), f.mean_of(answers, lambda a: a.lift)
    right = "" if math.isnan(accuracy.value) else f"gives {f.percent(accuracy)} right answers and "
    where = (
        f"{label} {right}puts {f.percent(f.mean_of(answers, lambda a: a[IMAGE].mean()))} of its attention on the image"
    )
    if not math.isnan(lift.value):
        where += f"; the boxes get {lift.text(1)} times what chance would give them"
    says: dict[str, str] = {}
    for finding in findings:
        own = [sentence for sentence in finding.sentences if sentence.startswith(f"{label}: ")]
        says |= {finding.name: one for one in (own or finding.sentences)[-1:]}  # noqa: B035 (at most one)
    rest = [says[name] for name in ("paired", "score_and_accuracy", "effect", "position") if name in says]
    return [where + ".", *rest[:2]]


def examples_of(observer: Observer, answers: Sequence[Answer], asked: Asked) -> list[Example]:
    """Responses with the highest and the lowest target attention, among right and wrong ones."""
    scored = [a for a in answers if a.region_tokens and a.right is not None]
    chosen: dict[tuple[int, int], tuple[str, Answer]] = {}
    for right, kind in ((True, "Right"), (False, "Wrong")):
        ranked = sorted((a for a in scored if a.right is right), key=lambda a: a.score)
        for a, which in ((ranked[-1], "highest"), (ranked[0], "lowest")) if ranked else ():
            chosen.setdefault(
                (a.row, a.sample), (f"{kind}, {which} target attention: R_a {a.score:.2f} in the last layer", a)
            )
    if not chosen:
        return []
    rows = {row.number: row for row in rows_of(asked) if row.number in {number for number, _ in chosen}}
    found = []
    for title, a in chosen.values():
        row = rows[a.row]
        prompt = observer.prompt(row.values, row.where)
        facts = {"accuracy": a.accuracy}
        found.append(
            (f"{title} ({row.where})", prompt.seen, observer.observe(prompt, a.ids, maps=("mean",), facts=facts))
        )
    return found
