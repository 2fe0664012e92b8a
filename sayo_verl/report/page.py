"""The report of one run as one page: verdict, what was run, curves, warnings, rollouts, causal beside attention."""

import math
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib

from sayo_verl.errors import SayoError
from sayo_verl.report import catalogue as c
from sayo_verl.report import runs as r
from sayo_verl.report import verdict
from sayo_verl.report.card import load_config
from sayo_verl.report.failed import METRIC as FAILED
from sayo_verl.report.failed import failed_rollouts
from sayo_verl.report.log import why_it_failed
from sayo_verl.report.panels import WINDOW, drawn, panel_figure
from sayo_verl.report.recorded import causal_section, rollouts
from sayo_verl.report.runs import Run, load_run
from sayo_verl.report.table import first_last_cells
from sayo_verl.view.figure import style
from sayo_verl.view.page import page, table, text
from sayo_verl.view.store import RecordedStep, read_steps

PAGE_FILE = "report.html"
MOST_FILES = 4  # named of each split
# Beginning of a metric's name -> what it means for the training, for the warnings
EFFECTS = {
    "sayo/neutral_rows/": "Such rows count as in GRPO.",
    "sayo/failed_rollouts/val": "They have no score.",
    "sayo/skipped_updates": "The weights stayed as they were.",
    "sayo/left_out_rows": "They were not trained on.",
    "sayo/reward_timeouts": "Their rollouts failed.",
}
QUIET = 600.0  # seconds without a new line after which a run without a recorded end counts as stopped


def write_page(run: Run, k: int = 5, out: Path | None = None) -> Path:
    """Write the page of a run; return its path.

    Args:
        run: the run, which may still be running.
        k: steps in the means "first" and "last".
        out: the file; None: report.html in the run's folder.

    Raises:
        SayoError: R07 if the file cannot be written, R04 if run.yaml is damaged.
    """
    recorded_notes: list[str] = []
    steps = read_steps(run.path, recorded_notes)
    config = load_config(run.files[-1], run.overrides)
    viewers, data = rollouts(steps)
    body = "\n".join(
        [
            _head(run, config),
            _verdict(run, steps, k),
            _what(run, config),
            _curves(run),
            _warnings(run, config, recorded_notes),
            _numbers(run, k),
            viewers,
            causal_section(steps),
        ]
    )
    file = out or run.path / PAGE_FILE
    write_text(file, page(f"{_title(run)}: report", body, data=data, viewer=bool(data)))
    return file


def write_page_at_end(folder: Path) -> tuple[Path, str] | None:
    """Write the page when a run ends, however it ended; return its path and the sentence about failed rollouts.

    Returns:
        None for a run without a step.
    """
    try:
        run = load_run(folder)
    except SayoError as error:
        if error.code == "R03":
            return None
        raise
    return write_page(run), failed_rollouts(run, load_config(run.files[-1], run.overrides))


def write_text(file: Path, content: str) -> None:
    """Write a file as a whole, so that a reader never meets half of it.

    Raises:
        SayoError: R07.
    """
    temporary = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise SayoError(
            "R07", "a page cannot be written", where=str(file), got=error.strerror, fix="free the disk or the folder"
        ) from error


def bullets(sentences: Iterable[str]) -> str:
    """A list of sentences, which are escaped here."""
    return "<ul>" + "".join(f"<li>{text(sentence)}</li>" for sentence in sentences) + "</ul>"


# ------------------------------------------------------------------------------------------------------------- the run


def _title(run: Run) -> str:
    return run.path.resolve().name if run.run_id == r.UNKNOWN else run.run_id


def _head(run: Run, config: dict[str, Any]) -> str:
    known = dict(described(run, config))
    model_and_data = [known[name] for name in ("model", "training data") if name in known]
    total = f" of {run.total_steps}" if run.total_steps else ""
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    state, kind = state_of(run)
    resumed = f", {run.resumed()}" if run.resumed() else ""
    return (
        f"<h1>{text(_title(run))}</h1><p><b>{text(c.estimator_of(run))}</b></p>"
        + (f"<p>{text(' on '.join(model_and_data))}</p>" if model_and_data else "")
        + f'<p>Step {run.steps[-1]}{total}{resumed}. <span class="{kind}">{text(state)}</span></p>'
        f'<p class="meta">This page was written at {now}. '
        "<code>sayo report</code> writes it again, also while the run goes on.</p>"
    )


def state_of(run: Run) -> tuple[str, str]:
    """How the run ended, or that it goes on: a sentence, and the class of its style."""
    done = run.total_steps is not None and run.steps[-1] >= run.total_steps
    if run.ended:
        when, error = run.ended.get("time", "an unknown time"), run.ended.get("error", "")
        if error:
            return f"Failed at {when}: {error}", "warn"
        return (f"Finished at {when}.", "ok") if done else (f"Ended early, without an error, at {when}.", "warn")
    if done:
        return "Finished.", "ok"
    files = [file for file in [*run.files, run.path / r.LOG_FILE] if file.exists()]
    written = max(file.stat().st_mtime for file in files)
    quiet = time.time() - written
    stamp = datetime.fromtimestamp(written).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    longest = max((value for _, value in run.training("timing_s/step") if math.isfinite(value)), default=0.0)
    if quiet < max(QUIET, 3 * longest):
        return f"No end is recorded, and the last line is from {stamp}: probably still running.", "meta"
    return f"No end is recorded, and the last line is from {stamp}: killed, or it hangs.", "warn"


def _what(run: Run, config: dict[str, Any]) -> str:
    rows = [(name, f"<span>{text(value)}</span>") for name, value in described(run, config)]
    rows.append(("started", text(run.started)))
    if run.resumed():
        files = ", ".join(file.name for file in run.files)
        rows.append(("attempts", text(f"{run.resumed()}: dashed vertical lines in the curves. Metrics: {files}")))
    if run.versions:
        rows.append(("versions", text(", ".join(f"{name} {version}" for name, version in run.versions.items()))))
    overrides = "\n".join(map(str, run.overrides))
    command = f"<details><summary>Overrides of the command line</summary><pre>{text(overrides)}</pre></details>"
    missing = "" if config else '<p class="note">Model, data and settings were not recorded: no run.yaml.</p>'
    return f"<h2>What was run</h2>{missing}{table([], rows)}{command if overrides else ''}"


def described(run: Run, config: dict[str, Any]) -> list[tuple[str, str]]:
    """What identifies a run, as far as it was recorded: name and value."""

    def size(file: str) -> str:
        return f"{file} ({run.data[file]:,} bytes)" if file in run.data else file

    def files(key: str) -> str:
        value = config.get(key)
        named = [str(file) for file in (value if isinstance(value, list) else [value] if value else [])]
        more = f" and {len(named) - MOST_FILES} more" if len(named) > MOST_FILES else ""
        return ", ".join(map(size, named[:MOST_FILES])) + more

    method = run.estimator.removeprefix("attn_")
    own = {key.removeprefix(f"algorithm.attn.{method}."): config[key] for key in config if _of(key, method)}
    reward = [config.get(f"reward.custom_reward_function.{key}") for key in ("path", "name")]
    prompts, responses = config.get("data.train_batch_size"), config.get("actor_rollout_ref.rollout.n")
    found = [
        ("model", config.get("actor_rollout_ref.model.path")),
        ("training data", files("data.train_files")),
        ("held-out data", files("data.val_files")),
        ("reward function", " ".join(str(part) for part in reward if part)),
        ("settings of the method", ", ".join(f"{name}={value}" for name, value in own.items())),
        ("batch", f"{prompts} prompts x {responses} responses" if prompts and responses else ""),
        ("learning rate", config.get("actor_rollout_ref.actor.optim.lr")),
        ("seed", config.get("data.seed")),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def _of(key: str, method: str) -> bool:
    return key.startswith(f"algorithm.attn.{method}.")


# --------------------------------------------------------------------------------------------------------- what it says


def _verdict(run: Run, steps: Sequence[RecordedStep], k: int) -> str:
    looked = [*verdict.looked(steps), *verdict.attention(run, k)]
    if not looked:
        looked = ["No attention metric was logged, and no rollouts were recorded."]
    return (
        f"<h2>Did it get better?</h2>{bullets(verdict.outcome(run, k))}<h2>Where did the policy look?</h2>"
        f'{bullets(looked)}<p class="note">{text(verdict.windows(run, k))} A change counts as clear from '
        f"{verdict.CLEAR:g} standard errors on, from the spread of single steps. One run cannot "
        "show that attention caused it: <code>sayo compare</code> shows "
        "runs beside a baseline.</p>"
    )


def _curves(run: Run) -> str:
    panels = c.panels_of([run])
    own = {panel.title for panel in verdict.own_panels(run)}
    parts = []
    for title, chosen in (
        ("Curves", [panel for panel in panels if panel in c.COMMON.panels]),
        (f"Curves of the method: {c.estimator_of(run)}", [panel for panel in panels if panel.title in own]),
        ("Other curves", [p for p in panels if p not in c.COMMON.panels and p.title not in own]),
    ):
        if chosen:
            with matplotlib.rc_context(style()):
                figures = [(panel_figure(p, {"": [run]}), f"{verdict.plain(p.title)} by training step") for p in chosen]
                parts.append(f"<h2>{text(title)}</h2>" + drawn(figures))
    seams = f" Dashed vertical lines: {run.resumed()}." if run.seams else ""
    parts[0] += (
        f'<p class="note">Faint: each step. Bold: mean of the last {WINDOW} steps. Dots: validation. The total reward '
        f"has the method's own terms; the task reward can be compared across methods.{seams}</p>"
    )
    return "".join(parts)


def _warnings(run: Run, config: dict[str, Any], recorded: Sequence[str]) -> str:
    found = list(run.notes)
    found += [said] if (said := failed_rollouts(run, config)) else []
    for metric in c.ANY_METHOD.metrics:
        if metric.name == FAILED:
            continue
        series = [value for _, value in run.training(metric.name) if math.isfinite(value)]
        if metric.unless_zero and (total := sum(series)):
            effect = next(effect for name, effect in EFFECTS.items() if metric.name.startswith(name))
            found.append(f"{metric.label}: {total:g} in {len(series)} steps. {effect}")
    stale = [value for _, value in run.training("sayo/staleness/max") if math.isfinite(value)]
    if stale and max(stale) > 0:
        found.append(f"Rollouts were up to {max(stale):g} versions of the weights old.")
    found += recorded
    body = bullets(found) if found else "<p>None.</p>"
    state, _ = state_of(run)
    if not state.startswith("Finished") and (cause := why_it_failed(run.path / r.LOG_FILE, lines=0)):
        body += f"<p>Errors in {text(r.LOG_FILE)}:</p><pre>{text(chr(10).join(cause))}</pre>"
    return f"<h2>Warnings</h2>{body}"


def _numbers(run: Run, k: int) -> str:
    header, rows = first_last_cells(run, k)
    seconds = [value for _, value in run.training("timing_s/step")[1:] if math.isfinite(value)]
    cost = (
        f"A step took {sorted(seconds)[len(seconds) // 2]:.1f} seconds (median, without the first). " if seconds else ""
    )
    cells = [[text(cell) for cell in row] for row in rows]
    return (
        f"<details><summary>All numbers and counters: first and last steps</summary><p>{cost}The table has the probe's "
        f"share, passes with a changed image and neutral rows if they were logged.</p>{table(header, cells)}</details>"
    )
