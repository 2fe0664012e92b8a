"""Write the files that are made from the code: docs/settings.md, docs/metrics.md and sayo_verl/report/methods.json.

python docs/generate.py           write them
python docs/generate.py --check   name those that are out of date, and write nothing
"""

import dataclasses
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sayo_verl.methods import METHODS, own_methods
from sayo_verl.methods import PREFIX as METHOD_PREFIX
from sayo_verl.methods.group import SPREAD_FLOOR
from sayo_verl.metrics import Metric, Panel, declaration, named

ROOT = Path(__file__).resolve().parent.parent
MADE = "<!-- made by `python docs/generate.py`: edit the classes in sayo_verl/methods instead -->"
SOURCE = re.compile(r"\[(?:P|C|N|A|ours|precedent)\b[^\]]*\]")
TYPES = {bool: "true or false", float: "a number", int: "a whole number", str: "a name", tuple[int, ...]: "a list"}

# Recorded rollouts: key below sayo -> meaning
RECORDING = (
    "A few held-out prompts are rolled out, probed and saved for `sayo report` ([docs/rollouts.md](rollouts.md))."
)
VIZ = {
    "viz_every": "record every so many steps, and the last policy; 0: off. The tiny job records every 10 steps.",
    "viz_prompts": "how many: the first held-out rows with an image (and a box, for methods that need boxes). Each "
    "has `rollout.n` rollouts.",
    "viz_causal": "one more log-prob pass of these rollouts with a changed image, also if the method has none",
}

# ------------------------------------------------------------------------------------------------------------- settings


def field_docs(cls: type) -> dict[str, str]:
    """Field -> what the ``Attributes`` of the class and of its bases say of it, on one line."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = re.search(r"Attributes:\n(.*?)(?:\n\n|\Z)", inspect.cleandoc(base.__doc__ or ""), re.S)
        for names, text in re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", section[1] if section else "", re.M):
            texts |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return texts


def settings_rows(instance: Any, prefix: str = "") -> Iterable[list[str]]:
    """A row for each setting: name, default, range, meaning, source; nested settings follow their own row's place."""
    docs, rules, hints = field_docs(type(instance)), instance.rules(), typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value, text = getattr(instance, field.name), docs[field.name].replace("``", "`")
        if dataclasses.is_dataclass(value):
            yield from settings_rows(value, f"{prefix}{field.name}.")
            continue
        default = f"`{json.dumps(value) if not isinstance(value, str) else value}`"
        wanted = rules[field.name][1] if field.name in rules else TYPES[hints[field.name]]
        source = " ".join(SOURCE.findall(text))
        meaning = " ".join(SOURCE.sub("", text).split())
        yield [f"`{prefix}{field.name}`", default, wanted, meaning, source]


def settings_page() -> str:
    defaults = OmegaConf.load(ROOT / "sayo_verl" / "config" / "sayo_trainer.yaml")
    selected = defaults.algorithm.adv_estimator
    lines = [
        "# Settings of the methods",
        "",
        MADE,
        "",
        "A method's class in `sayo_verl/methods` holds its defaults, which are the vetted values. Hydra composes",
        "`algorithm.attn` from the classes, so every key below can be overridden without a `+`, such as",
        "`algorithm.attn.region.weight=0.5`. A file of `configs/method` holds only what differs from its class.",
        "",
        "Sources: [P] the paper, [C] its released code, [N] third-party notes on the paper, [A] its abstract,",
        "[precedent] a convention of other published work, [ours] a choice of this project. The equations stand in the",
        "[recipes](../recipe/README.md).",
        "",
        "## All methods",
        "",
        *table(
            ["key", "default", "meaning"],
            [
                [
                    "`algorithm.adv_estimator`",
                    f"`{selected}`",
                    "the method: a name below, `attn_mix`, or an estimator of verl",
                ],
                [
                    "`algorithm.attn.mix`",
                    "`[]`",
                    "methods that act together under `attn_mix`, such as `[region, dual]`",
                ],
                [
                    "`algorithm.attn.spread_floor`",
                    f"`{SPREAD_FLOOR}`",
                    "a group whose rewards spread over no more than this, relative to the largest of them or 1, gets "
                    "advantage 0; `null` keeps verl's arithmetic [ours]",
                ],
            ],
        ),
    ]
    lines += ["", "## Rollouts through training", "", RECORDING, ""]
    lines += table(
        ["key", "default", "meaning"],
        [[f"`sayo.{key}`", f"`{json.dumps(defaults.sayo[key])}`", text] for key, text in VIZ.items()],
    )
    for name, cls in shipped().items():
        method, reference = name.removeprefix(METHOD_PREFIX), ", ".join(cls.reference)
        lines += ["", f"## `{name}`: {reference}", "", f"Keys below `algorithm.attn.{method}`.", ""]
        lines += table(["key", "default", "range", "meaning", "source"], settings_rows(cls()))
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------------------- metrics


def metrics_page() -> str:
    from sayo_verl.report.catalogue import ANY_METHOD, COMMON  # reads methods.json, which this file writes

    lines = [
        "# Metrics",
        "",
        MADE,
        "",
        "What a run logs in every training step beside verl's own metrics, and which of verl's the report shows.",
        "verl's trackers and `metrics.jsonl` have all of them. Those that start with `sayo/` are logged for attention",
        "methods, not for verl's own estimators. `Shown as` names the panel of `sayo report`. `table` is its table.",
        "`sayo watch` shows those with a live name. A metric is absent in a step that has nothing to average.",
        "",
        "## Every run",
        "",
        *metrics_table(COMMON.entries),
    ]
    for name, cls in shipped().items():
        lines += ["", f"## `{name}`: {', '.join(cls.reference)}", "", *metrics_table(named(cls.metrics))]
    lines += ["", "## Every method", "", *metrics_table(ANY_METHOD.entries)]
    return "\n".join(lines) + "\n"


def metrics_table(entries: Iterable[Panel | Metric]) -> list[str]:
    rows = []
    for entry in entries:
        panel = entry.title if isinstance(entry, Panel) else "table" if entry.shown else "not shown"
        for metric in entry.every if isinstance(entry, Panel) else (entry,):
            text = f"{metric.label}. {metric.note}" if metric.note else metric.label
            rows.append([f"`{metric.name}`", text, bounds(metric), re.sub(r"\$", "", panel), metric.live])
    return table(["metric", "meaning", "range", "shown as", "live"], rows)


def bounds(metric: Metric) -> str:
    if metric.low is None:
        return "any"
    return f"{metric.low:g} to {metric.high:g}" if metric.high is not None else f"{metric.low:g} or more"


def methods_json() -> str:
    """Declarations of the methods of the package, for the report."""
    return json.dumps({name: declaration(cls) for name, cls in shipped().items()}, indent=1) + "\n"


# ---------------------------------------------------------------------------------------------------------------- files


def shipped() -> dict[str, Any]:
    """The methods of the package, without those that a test or a user registered."""
    return {name: cls for name, cls in METHODS.items() if name not in own_methods()}


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *escaped)]


# methods.json first: the page of metrics reads it.
FILES = {
    "sayo_verl/report/methods.json": methods_json,
    "docs/settings.md": settings_page,
    "docs/metrics.md": metrics_page,
}


def main(arguments: list[str]) -> int:
    stale = []
    for name, make in FILES.items():
        file, text = ROOT / name, make()
        if not file.exists() or file.read_text() != text:
            stale.append(name)
            if "--check" not in arguments:
                file.write_text(text)
    print("\n".join(stale) if stale else "everything is up to date")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
