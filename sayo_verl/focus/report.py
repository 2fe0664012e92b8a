"""Where ``<Focus>`` looks before and after the anchoring stage, on rows that were not trained on.

Shape suffixes: B rows, R rows with boxes, S tokens, V visual tokens of one row, N response tokens of all rows.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.table import Table

from sayo_verl.data.messages import images_of
from sayo_verl.focus.files import check_boxes
from sayo_verl.focus.loss import IGNORE, forward_with_focus
from sayo_verl.focus.rows import FOCUS_KEY, AnchorRows, FocusCollator
from sayo_verl.focus.trainer import FocusConfig, focus_layers, load_with_focus

EPS = 1e-8

LABELS = {
    "region_share": "share of image attention in boxes",
    "region_density": "density in boxes / in image",
    "target_attention": "R_a (0.5: no preference)",
    "anchor_loss": "L_anchor (nats)",
    "image_mass": "attention mass on the image",
    "lm_loss": "L_LM (nats per token)",
    "focus_probability": "p(writes <Focus>), largest",
    "placeholder_probability": "p(writes placeholder), largest",
    "accuracy": "accuracy, sampled",
    "format": "format, sampled",
}


@dataclass(frozen=True)
class AttentionMap:
    """The attention in one row: p over the visual tokens [V], and their grid (rows, columns)."""

    p: torch.Tensor
    grid: tuple[int, int]


@torch.no_grad()
def measure(
    model: Any, processor: Any, rows: Sequence[dict[str, Any]], config: FocusConfig, *, batch_size: int = 32
) -> tuple[dict[str, float], list[AttentionMap | None]]:
    """Figures over rows, and where ``<Focus>`` looks in each (None for a row without boxes or of several images).

    ``lm_loss`` is left out if a row has no ``response``: its text is not a policy's.

    Returns:
        Means over rows with boxes of ``region_share`` (p in the boxes), ``region_density`` (mean p of their tokens over
        mean p), ``target_attention`` ((1 + tanh(log density)) / 2), ``anchor_loss`` and ``image_mass``; over response
        tokens of ``lm_loss``, and the largest ``focus_probability`` and ``placeholder_probability``; ``rows`` and
        ``rows_with_boxes``.
    """
    collate = FocusCollator(processor, model.config, alpha=config.alpha)
    layers = focus_layers(model, config.layers)
    model.eval()
    per_row: dict[str, list[torch.Tensor]] = {}
    per_token: dict[str, list[torch.Tensor]] = {}
    maps: list[AttentionMap | None] = []
    for start in range(0, len(rows), batch_size):
        chosen = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        batch = collate(chosen)
        focus = batch.pop(FOCUS_KEY).to(model.device)
        labels_BS = batch.pop("labels").to(model.device)
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        output, figures = forward_with_focus(model, inputs, focus, layers)
        boxed = [b for b, has in enumerate(focus.has_target) if has]
        image_RS, region_RS = focus.image[boxed], focus.region[boxed]
        p_RS = torch.where(image_RS, figures["log_p"].exp(), 0.0)
        share_R = torch.where(region_RS, p_RS, 0.0).sum(-1)
        density_R = share_R / region_RS.sum(-1).clamp(min=1) * image_RS.sum(-1)
        row_figures = {
            "region_share": share_R,
            "region_density": density_R,
            "anchor_loss": figures["divergence"],
            "target_attention": (1 + torch.tanh(torch.log(density_R + EPS))) / 2,
            "image_mass": figures["log_image_mass"].exp(),
        }
        answered = labels_BS[:, 1:] != IGNORE
        log_q_ND = output.logits[:, :-1][answered].float().log_softmax(-1)
        token_figures = {
            "lm_loss": -log_q_ND.gather(1, labels_BS[:, 1:][answered][:, None])[:, 0],
            "focus_probability": log_q_ND[:, collate.focus].exp(),
            "placeholder_probability": log_q_ND[:, model.config.image_token_id].exp(),
        }
        for held, new in ((per_row, row_figures), (per_token, token_figures)):
            for name, values in new.items():
                held.setdefault(name, []).append(values.cpu())
        merge = int(model.config.vision_config.spatial_merge_size)
        n_images = [len(row["images"] or []) for row in chosen]
        grids = iter(batch["image_grid_thw"].tolist() if sum(n_images) else [])
        for b, count in enumerate(n_images):
            own = [next(grids) for _ in range(count)]
            if count != 1 or b not in boxed:
                maps.append(None)
                continue
            r = boxed.index(b)
            maps.append(AttentionMap(p_RS[r, image_RS[r]].cpu(), (own[0][1] // merge, own[0][2] // merge)))
    result = {name: float(torch.cat(values).mean()) for name, values in per_row.items()}
    result |= {
        name: float(torch.cat(values).max() if name.endswith("probability") else torch.cat(values).mean())
        for name, values in per_token.items()
    }
    if not all(row.get("response") for row in rows):
        del result["lm_loss"]
    boxed_rows = int(torch.cat(per_row["anchor_loss"]).numel())
    return result | {"rows": len(rows), "rows_with_boxes": boxed_rows}, maps


def compare(
    base: Path | str,
    after: Path | str,
    file: Path | str,
    config: FocusConfig,
    *,
    max_rows: int | None = None,
    picture: Path | None = None,
    answers: bool = False,
    n_pictures: int = 4,
    max_new_tokens: int = 24,
) -> dict[str, dict[str, float]]:
    """Figures of the base model with an untrained ``<Focus>`` and of the folder that the stage wrote.

    Args:
        base, after: model folders.
        file: parquet of held-out rows.
        config: its ``alpha``, ``layers``, ``dtype`` and ``attention`` are used.
        max_rows: the first ones only.
        picture: file for heat maps of some rows; None: no picture.
        answers: also sample an answer per row (``sayo_verl.tiny.evaluate``: the tiny policy only).
        n_pictures: rows in the picture.
        max_new_tokens: of the answers.

    Returns:
        ``base`` (answers of the model without the token; may be empty), ``before`` and ``after``.

    Raises:
        SayoError: F22 for a picture of rows without boxes.
    """
    if picture is not None:
        check_boxes([file])
    rows = AnchorRows([file], max_rows=max_rows)
    held = [rows[i] for i in range(len(rows))]
    result: dict[str, dict[str, float]] = {"base": {}}
    maps = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in (("before", base), ("after", after)):
            model, processor, _ = load_with_focus(folder, config)
            if torch.cuda.is_available():
                model.to("cuda")
            result[name], maps[name] = measure(model, processor, held, config)
            if answers and name == "before":
                model.save_pretrained(scratch)
                processor.save_pretrained(scratch)
        if answers:
            from sayo_verl.tiny.evaluate import evaluate

            for name, folder in (("base", base), ("before", scratch), ("after", after)):
                figures = evaluate(folder, file, max_rows=max_rows, max_new_tokens=max_new_tokens)
                result[name] |= {"accuracy": figures["accuracy"]["mean"], "format": figures["format"]["mean"]}
    if picture is not None:
        draw(held, maps["before"], maps["after"], picture, n=n_pictures)
    return result


def comparison_table(result: dict[str, dict[str, float]]) -> Table:
    """The figures side by side."""
    after = result["after"]
    table = Table(
        title=f"held-out rows: {after['rows']:.0f}, with boxes {after['rows_with_boxes']:.0f}", title_justify="left"
    )
    table.add_column("")
    titles = {"base": "no token", "before": "untrained", "after": "anchored"}
    shown = [name for name in titles if result[name]]
    for name in shown:
        table.add_column(titles[name], justify="right")
    for key, label in LABELS.items():
        if key in after:
            cells = [result[name].get(key, math.nan) for name in shown]
            table.add_row(label, *("" if math.isnan(cell) else _number(cell) for cell in cells))
    return table


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def draw(
    rows: Sequence[dict[str, Any]],
    before: Sequence[AttentionMap | None],
    after: Sequence[AttentionMap | None],
    file: Path,
    *,
    n: int,
) -> Path:
    """PNG: per row the image with its boxes, and p of ``<Focus>`` over it before and after, on one colour scale."""
    chosen = [i for i, look in enumerate(after) if look is not None and before[i] is not None][:n]
    figure = Figure(figsize=(7.2, 2.45 * len(chosen) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(chosen), 3, squeeze=False)
    for line, i in enumerate(chosen):
        image = images_of(rows[i])[0]
        width, height = image.size
        maps = [before[i], after[i]]
        top = max(float(look.p.max()) for look in maps if look is not None)
        for column, title in enumerate(("image and box", "before", "after anchoring")):
            ax = axes[line][column]
            grey = image.convert("L").convert("RGB") if column else image
            ax.imshow(grey, extent=(0, width, height, 0))
            look = maps[column - 1] if column else None
            if look is not None:
                heat = ax.imshow(
                    look.p.view(look.grid),
                    extent=(0, width, height, 0),
                    cmap="inferno",
                    alpha=0.7,
                    vmin=0,
                    vmax=top,
                    interpolation="nearest",
                )
            for x0, y0, x1, y1 in rows[i]["extra_info"]["boxes"][0]:
                ax.add_patch(
                    Rectangle(
                        (x0 * width, y0 * height),
                        (x1 - x0) * width,
                        (y1 - y0) * height,
                        fill=False,
                        edgecolor="#00b3ff",
                        linewidth=1.8,
                    )
                )
            ax.set_xticks([])
            ax.set_yticks([])
            if line == 0:
                ax.set_title(title, fontsize=9)
        axes[line][0].set_xlabel(_question(rows[i]), fontsize=8)
        figure.colorbar(heat, ax=axes[line][2], shrink=0.8).ax.tick_params(labelsize=7)
    figure.suptitle("attention of <Focus> within the image (p, sums to 1)", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    return file


def _question(row: dict[str, Any]) -> str:
    text = row["prompt"][-1]["content"].replace("<image>", "").strip()
    return text if len(text) <= 44 else text[:41] + "..."
