"""What to measure in one micro-batch, and the reader that measures it.

A plan is made from token ids, image grids and boxes before the forward pass; the reader is called with queries and keys
inside it (``sayo_verl.probe.taps``) and reduces them at once.

Shape suffixes: N rows of the micro-batch, S tokens of one row, P prompt tokens, T response tokens, V visual tokens,
K marked sets (image, region), L tokens of all rows together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sayo_verl.errors import SayoError
from sayo_verl.probe.reference import attention_mass
from sayo_verl.vision.masks import region_mask

QUERY_ROWS = {"input": 0, "predicting": -1}  # offset of the query row from the position of y_t


@dataclass(frozen=True)
class RowPlan:
    """One sequence: how long it is and which of its keys are image and region."""

    length: int
    response_length: int
    marked: torch.Tensor  # bool [K=2, S]: image, region
    image_tokens: int
    region_tokens: int


def plan_row(
    input_ids: torch.Tensor,
    response_length: int,
    *,
    image_token_id: int,
    grids: Sequence[Sequence[int]],
    merge_size: int,
    boxes: Sequence[Sequence[Sequence[float]]],
    coverage: float,
    where: str,
) -> RowPlan:
    """Find a row's visual tokens and which of them lie in its boxes.

    Args:
        input_ids: [S] prompt and response. Only placeholders in the prompt count: a policy can sample the token too.
        response_length: T.
        image_token_id: the placeholder.
        grids: (t, h, w) in patches for each image, as the processor returned them.
        merge_size: patches merged per side, so an image has h/merge x w/merge visual tokens.
        boxes: for each image its boxes ``[x0, y0, x1, y1]`` in [0, 1]; may be empty.
        coverage: see ``region_mask``.
        where: names the row in errors.

    Raises:
        SayoError: P05 when placeholders and grids disagree, P06 when there is not one box list per image, P07 for a
            grid that is not a still image's, V01-V04 for bad boxes.
    """
    S = input_ids.shape[0]
    is_image = (input_ids == image_token_id) & (torch.arange(S, device=input_ids.device) < S - response_length)
    columns_V = is_image.nonzero().flatten()
    cells = []
    for t, h, w in grids:
        if t != 1 or h % merge_size or w % merge_size:
            raise SayoError(
                "P07",
                "an image grid is not that of a still image",
                where=where,
                got=f"(t, h, w) = ({t}, {h}, {w}), merge size {merge_size}",
                wanted="t = 1, h and w multiples of the merge size",
                fix="remove videos from the data; only images are supported",
            )
        cells.append((h // merge_size, w // merge_size))
    if sum(r * c for r, c in cells) != columns_V.numel():
        raise SayoError(
            "P05",
            "the prompt's image placeholders do not fit the image grids",
            where=where,
            got=f"{columns_V.numel()} placeholders",
            wanted=f"{sum(r * c for r, c in cells)} (grids {[tuple(g) for g in grids]}, merge size {merge_size})",
            fix="the prompt was cut or a second processor resized the image; raise data.max_prompt_length",
        )
    marked = torch.zeros(2, S, dtype=torch.bool, device=input_ids.device)
    marked[0] = is_image
    region_tokens = 0
    if cells and any(len(b) for b in boxes):
        if len(boxes) != len(cells):
            raise SayoError(
                "P06",
                "the row does not have one list of boxes per image",
                where=where,
                got=f"{len(boxes)} lists for {len(cells)} images",
                wanted="extra_info.boxes[image][box] = [x0, y0, x1, y1]",
                fix="nest the boxes by image, with an empty list for an image without one",
            )
        inside = [
            torch.from_numpy(region_mask(b, r, c, coverage, where=where))
            for b, (r, c) in zip(boxes, cells, strict=True)
        ]
        region_V = torch.cat(inside).to(input_ids.device)
        marked[1, columns_V[region_V]] = True
        region_tokens = int(region_V.sum())
    return RowPlan(S, response_length, marked, columns_V.numel(), region_tokens)


class MassReader:
    """Accumulates image and region mass over layers. Call it as a ``QueryKeyTap`` reader.

    Args:
        rows: plans in micro-batch order.
        n_layers: how many layers will be read; the result is their mean.
        query_row: key of ``QUERY_ROWS``.
        packed: the model sees the rows one behind another ([1, heads, L, D]), not right-padded ([N, heads, S, D]).
        device: where the queries will be.
    """

    def __init__(
        self, rows: Sequence[RowPlan], *, n_layers: int, query_row: str, packed: bool, device: torch.device
    ) -> None:
        if query_row not in QUERY_ROWS:
            raise SayoError("P08", "unknown query row", where="MassReader", got=query_row, wanted=sorted(QUERY_ROWS),
                            fix="name one of them")  # fmt: skip
        self._rows, self._n_layers, self._packed = rows, n_layers, packed
        self._shift = QUERY_ROWS[query_row]
        total = sum(row.length for row in rows)
        # NaN marks positions that describe no response token, see sayo_verl.probe.statistics
        self.mass_KL = torch.full((2, total), float("nan"), dtype=torch.float32, device=device)
        self._layers_read = 0

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        start = 0
        for n, row in enumerate(self._rows):
            batch, offset = (0, start) if self._packed else (n, 0)
            first = row.length - row.response_length + self._shift
            positions = torch.arange(first, first + row.response_length, device=query.device)
            mass_KT = attention_mass(
                query[batch, :, offset + first : offset + first + row.response_length].transpose(0, 1),
                key[batch, :, offset : offset + row.length].transpose(0, 1),
                positions,
                row.marked,
                scale=scale,
            )
            # the value of y_t lies where verl's response_from_nested looks for token t: one before its position
            wire = start + row.length - row.response_length - 1
            slot = self.mass_KL[:, wire : wire + row.response_length]
            # only the first layer overwrites NaN: one that a layer measured has to stay
            share_KT = mass_KT / self._n_layers
            slot.copy_(slot + share_KT if self._layers_read else share_KT)
            start += row.length
        self._layers_read += 1
