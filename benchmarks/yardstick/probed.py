"""What the package's probe measures of a walking policy: the signals of a method, and attention on each cell.

Shape suffixes: N rows (n responses of each prompt), T response tokens (padded on the right), V cells of the grid.
"""

from collections.abc import Mapping, Sequence

import torch

from benchmarks.yardstick.policy import Prompts, WalkPolicy
from sayo_verl.methods.signals import Needs, Signals
from sayo_verl.probe.measure import Measurement
from sayo_verl.probe.plan import ChatTokens, RowPlan, image_tiles, plan_row
from sayo_verl.probe.statistics import Statistic, StatisticsRequest
from sayo_verl.probe.taps import ForwardTap, asked_layers
from sayo_verl.scenes.walk import Walk
from sayo_verl.vision.control import filled_tokens
from sayo_verl.vision.grids import Tile
from sayo_verl.vision.intervention import Intervention, Pixels, intervene, prompt_key

Box = tuple[float, ...]


@torch.no_grad()
def signals(
    policy: WalkPolicy,
    prompts: Prompts,
    ids_NT: torch.Tensor,
    needs: Needs,
    *,
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    uid: tuple[str, ...],
    correct: torch.Tensor,
    reports: Mapping[str, tuple[str, ...]],
    step: int = 0,
) -> Signals:
    """What a method reads: a pass with the probe's taps if it needs statistics, and one for each changed image.

    Args:
        needs: of the method.
        log_probs, entropy: of the same responses, from ``log_probs``.
        uid: N names of the prompts.
        correct: [N] in [0, 1].
        reports: fields of the reward function, N values each.
        step: of training, on which a changed image depends.
    """
    plans = _plans(policy, prompts, ids_NT, needs.statistics, [boxes(walk) for walk in prompts.walks])
    changed = {}
    for change in needs.interventions:
        pixels = _changed(policy, prompts, change, needs.statistics.coverage, step)
        changed[change] = policy.whole_rows(prompts, ids_NT, pixels)[0]
    return Signals(
        response_mask=policy.mask(ids_NT),
        entropy=entropy.detach(),
        log_probs=log_probs.detach(),
        statistics=_probed(policy, prompts, ids_NT, needs.statistics, plans),
        image_tokens=torch.tensor([float(plan.image_columns.numel()) for plan in plans]),
        region_tokens=torch.tensor([float(plan.region_tokens) for plan in plans]),
        is_padding=torch.zeros(len(ids_NT), dtype=torch.bool),
        uid=uid,
        counterfactuals=changed,
        correct=correct,
        reports=reports,
    )


@torch.no_grad()
def cell_masses(
    policy: WalkPolicy, prompts: Prompts, ids_NT: torch.Tensor, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Layer -> [N, T, V], attention on each cell of the row that samples each token; V cells, row by row."""
    cells = len(prompts.walks[0].directions)
    asked = {layer: Statistic("box_mass", (layer,), query_row="predicting", size=cells) for layer in layers}
    request = StatisticsRequest(tuple(asked.values()))
    plans = _plans(policy, prompts, ids_NT, request, [all_cells(walk.grid) for walk in prompts.walks])
    statistics = _probed(policy, prompts, ids_NT, request, plans)
    return {layer: statistics[statistic] for layer, statistic in asked.items()}


def _probed(
    policy: WalkPolicy, prompts: Prompts, ids_NT: torch.Tensor, request: StatisticsRequest, plans: Sequence[RowPlan]
) -> dict[Statistic, torch.Tensor]:
    """Statistics [N, T] or [N, T, W], 0 behind the response."""
    if not request.statistics:
        return {}
    numbers = asked_layers(policy.model, request.layers, where="the layers of a statistic")
    measurement = Measurement(request, plans, numbers, packed=False, device=torch.device("cpu"))
    attention = {numbers[k] for s in request.statistics if s.spec.source != "hidden" for k in s.layers}
    hidden = any(s.spec.source == "hidden" for s in request.statistics)
    with ForwardTap(policy.model, sorted(attention), measurement.read, measurement.read_hidden if hidden else None):
        policy.whole_rows(prompts, ids_NT, prompts.pixels)
    results, out = measurement.finish(), {}
    for statistic in request.statistics:
        parts = results[statistic.key][0].split([plan.response_length for plan in plans])
        values = torch.zeros(*ids_NT.shape, *parts[0].shape[1:])
        for row, part in enumerate(parts):
            values[row, : len(part)] = part
        out[statistic] = values
    return out


def _plans(
    policy: WalkPolicy,
    prompts: Prompts,
    ids_NT: torch.Tensor,
    request: StatisticsRequest,
    boxes_of: Sequence[Sequence[Box]],
) -> list[RowPlan]:
    n, lengths = len(ids_NT) // len(prompts.walks), policy.mask(ids_NT).sum(-1).long().tolist()
    chat = any(s.name in ("system_mass", "question_mass") for s in request.statistics)
    tokens = ChatTokens.of(policy.processor.tokenizer, policy.family) if chat else None
    n_boxes = max((s.size for s in request.statistics if s.name == "box_mass"), default=0)
    tiles = [_tiles(policy, prompts, i) for i in range(len(prompts.walks))]
    return [
        plan_row(
            torch.cat([prompts.ids[row // n], ids_NT[row, :length]]),
            length,
            image_token_id=policy.model.config.image_token_id,
            images=tiles[row // n],
            boxes=[boxes_of[row // n]],
            coverage=request.coverage,
            where=f"prompt {row // n}",
            n_boxes=n_boxes,
            chat=tokens,
        )
        for row, length in enumerate(lengths)
    ]


def _tiles(policy: WalkPolicy, prompts: Prompts, i: int) -> list[tuple[Tile, ...]]:
    return image_tiles(prompts.row(i), policy.family, policy.model.config, where=f"prompt {i}")


def _changed(policy: WalkPolicy, prompts: Prompts, change: Intervention, coverage: float, step: int) -> torch.Tensor:
    """Pixels of all prompts after an intervention."""
    layout, out = Pixels.of(policy.processor, policy.family.geometry), []
    for i, walk in enumerate(prompts.walks):
        tiles, key, where = _tiles(policy, prompts, i), prompt_key(prompts.ids[i], step), f"prompt {i}"
        filled = filled_tokens(change, [boxes(walk)], tiles, coverage, key=key, where=where)
        changed = intervene(prompts.row(i), change, layout, tiles=tiles, region=filled, key=key, where=where)
        out.append(changed["pixel_values"])
    return torch.cat(out)


def boxes(walk: Walk) -> list[Box]:
    """The boxes of a walk's cells in [0, 1], as rows have them."""
    assert walk.image is not None
    return [tuple(x / side for x, side in zip(box, walk.image.size * 2, strict=True)) for box in walk.boxes]


def all_cells(grid: int) -> list[Box]:
    """The boxes of all cells of a grid in [0, 1], row by row."""
    return [(x / grid, y / grid, (x + 1) / grid, (y + 1) / grid) for y in range(grid) for x in range(grid)]
