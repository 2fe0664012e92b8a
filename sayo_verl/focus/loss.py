"""The anchoring loss: attention of the ``<Focus>`` row to the image against annotated boxes.

Our reading of the anchoring stage of Faithful-MR1 (arXiv 2605.22072), whose formula is not public. A KL between a box
mask and an anchor token's attention is also the form of GUI-AIMA (arXiv 2511.00810), the background share is that of
EASE (arXiv 2605.30912):

    a_v = mean over layers Lf and heads of softmax attention(<Focus> -> v)          over all keys up to <Focus>
    p_v = a_v / sum over V of a                                                      V: the row's visual tokens
    q_v = (1 - alpha) c_v / sum over V of c + alpha / |V|                            c_v: share of v's cell in a box
    L   = L_LM + weight * mean over rows with boxes of sum_v q_v log(q_v / p_v)

alpha in [0, 1) (ours 0.1), weight >= 0 (ours 1), Lf = {floor(2 L / 3)} of L decoder layers (ours; EASE's choice).
Several boxes: c_v is the largest share that one of them covers (ours).

A guard of ours is added to L. It lowers the probability of ``<Focus>`` and of the placeholders of images, which a
policy must not write, to e^-20 at the response's tokens. It is 0 below that.

Queries and keys are those of the model's own forward, taken where the probe takes them. They keep their graph here,
so the loss reaches the projections, all layers below and the embedding of ``<Focus>``. All is computed from
logarithms: p is exact even if the image gets almost no attention. Of the attention matrix one row is computed: [H, S]
float32.

Gradient checkpointing runs a layer again, without the tap. So nothing may be *saved for backward* inside the layer: the
reader keeps references and takes rows by plain integers, and all products are computed after the forward.

Shape suffixes: B rows of the batch, R rows with boxes, S tokens, H query heads, G key heads, D head dimension, V visual
tokens of one row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sayo_verl.errors import SayoError
from sayo_verl.probe.taps import ForwardTap, text_attention_layers
from sayo_verl.vision.grids import Tile
from sayo_verl.vision.masks import box_masks, check_boxes, token_coverage

IGNORE = -100  # the label that a language-model loss skips
FORBIDDEN_LOG_PROB = -20.0  # one in 5e8 tokens
FORBIDDEN_WEIGHT = 0.01


@dataclass(frozen=True)
class FocusBatch:
    """What the loss needs of a batch, in addition to the model's inputs.

    Attributes:
        at: position of ``<Focus>`` in each row, as integers.
        has_target: whether a row has boxes.
        visible: bool [B, S], the row's own tokens up to and including ``<Focus>``.
        image: bool [B, S], its visual tokens.
        target: float32 [B, S], q at the visual tokens of rows with boxes, 0 elsewhere.
        region: bool [B, S], visual tokens at least half inside a box; for figures only.
    """

    at: tuple[int, ...]
    has_target: tuple[bool, ...]
    visible: torch.Tensor
    image: torch.Tensor
    target: torch.Tensor
    region: torch.Tensor

    def to(self, device: torch.device | str) -> "FocusBatch":
        tensors = (t.to(device) for t in (self.visible, self.image, self.target, self.region))
        return FocusBatch(self.at, self.has_target, *tensors)


def target_distribution(
    boxes: Sequence[Sequence[Sequence[float]]], images: Sequence[Sequence[Tile]], alpha: float, *, where: str
) -> np.ndarray:
    """q of a row.

    Args:
        boxes: for each image its boxes ``[x0, y0, x1, y1]`` in [0, 1]; at least one in all.
        images: for each image the grids it became.
        alpha: share that all visual tokens get in equal parts, in [0, 1).
        where: names the row in errors.

    Returns:
        float64 [V] over the visual tokens of all images in token order; its sum is 1.

    Raises:
        SayoError: F05 for alpha out of range, F06 for a row without a box, and what ``check_boxes`` and ``box_masks``
            raise for a malformed box or grid.
    """
    if not 0 <= alpha < 1:
        raise SayoError(
            "F05",
            "alpha is out of range",
            where=where,
            got=alpha,
            wanted="0 <= alpha < 1",
            fix="set --alpha within [0, 1)",
        )
    if not any(check_boxes(boxes, len(images), where=where)):
        raise SayoError(
            "F06",
            "a row without a box has no target",
            where=where,
            got=boxes,
            wanted="at least one box",
            fix="train such a row with the language-model loss alone",
        )
    shares = []
    for image_boxes, tiles in zip(boxes, images, strict=True):
        masks = box_masks(image_boxes, tiles, where=where)
        covered = np.array([token_coverage(box, tiles) for box in image_boxes]).reshape(masks.shape)
        thin = covered.sum(1) == 0  # thinner than rounding: as the probe sees it
        shares.append(np.where(thin[:, None], masks, covered).max(0, initial=0.0))
    coverage = np.concatenate(shares)
    return (1 - alpha) * coverage / coverage.sum() + alpha / coverage.size


def focus_log_attention(
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    scales: Sequence[float],
    visible: torch.Tensor,
    image: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and the attention on the whole image, of some rows.

    Args:
        queries: per layer [R, H, D], the query of ``<Focus>``, after rotary embedding.
        keys: per layer [R, G, S, D]; those outside of ``visible`` are never read.
        scales: per layer the factor on the logits.
        visible: bool [R, S], the keys that ``<Focus>`` attends to.
        image: bool [R, S], the visual tokens, all visible; at least one in each row.

    Returns:
        float32 [R, S] log p, 0 outside of the image, and float32 [R], log of the sum of a over the image.
    """
    per_layer = []
    with torch.autocast(visible.device.type, enabled=False):
        for query_RHD, key_RGSD, scale in zip(queries, keys, scales, strict=True):
            R, H, D = query_RHD.shape
            G = key_RGSD.shape[1]
            seen_RGSD = torch.where(visible[:, None, :, None], key_RGSD, 0.0).float()
            logits_RGhS = query_RHD.float().view(R, G, H // G, D) @ seen_RGSD.transpose(2, 3) * scale
            logits_RHS = logits_RGhS.reshape(R, H, -1).masked_fill(~visible[:, None], float("-inf"))
            per_layer.append(logits_RHS.log_softmax(-1).masked_fill(~image[:, None], 0.0))
        all_heads = torch.cat(per_layer, 1)
        log_a_RS = all_heads.logsumexp(1) - np.log(all_heads.shape[1])
        log_mass_R = log_a_RS.masked_fill(~image, float("-inf")).logsumexp(-1)
    return torch.where(image, log_a_RS - log_mass_R[:, None], 0.0), log_mass_R


def anchor_divergence(log_p: torch.Tensor, target: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """KL(q || p) of each row: float32 [R], in nats, at least 0.

    Args:
        log_p: [R, S] of ``focus_log_attention``.
        target: [R, S], q.
        image: bool [R, S].
    """
    q = torch.where(image, target, 0.0)
    return (torch.special.xlogy(q, q) - q * torch.where(image, log_p, 0.0)).sum(-1)


def forbidden_excess(logits: torch.Tensor, labels: torch.Tensor, forbidden: Sequence[int]) -> torch.Tensor:
    """By how much, in nats, the log-probability of writing a forbidden token exceeds ``FORBIDDEN_LOG_PROB``.

    Args:
        logits: [B, S, W] over W words, for the next token.
        labels: long [B, S]; ``IGNORE`` at tokens that are not trained.
        forbidden: ids of the tokens, taken together.

    Returns:
        float32 [], mean over the labelled tokens; 0 when there are none.
    """
    predicted_NW = logits[:, :-1][labels[:, 1:] != IGNORE].float()
    log_p_N = predicted_NW[:, list(forbidden)].logsumexp(-1) - predicted_NW.logsumexp(-1)
    return (log_p_N - FORBIDDEN_LOG_PROB).clamp(min=0).sum() / max(log_p_N.numel(), 1)


class _GradientTap(ForwardTap):
    """``ForwardTap`` whose tensors keep their graph."""

    def _listening(self, original: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
        def rotate(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            query, key = original(*args, **kwargs)
            if self._current is not None:
                self._reads[self._current] += 1
                self._read(self._current, query, key, float(self._modules[self._current].scaling))  # type: ignore[arg-type]
            return query, key

        return rotate


def default_layers(model: nn.Module) -> tuple[int, ...]:
    """floor(2 L / 3) of L decoder layers, counted from 0; the nearest later one that has full attention."""
    attention, n_layers = text_attention_layers(model)
    return (min((n for n in attention if n >= 2 * n_layers // 3), default=max(attention)),)


def forward_with_focus(
    model: nn.Module, inputs: Mapping[str, Any], focus: FocusBatch, layers: Sequence[int]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """One forward of the model, and the ``<Focus>`` row's figures of the rows with boxes.

    Args:
        model: wrapped or not.
        inputs: the model's, padded to S on either side; ``use_cache=False`` is added.
        focus: of the same rows.
        layers: numbers from 0.

    Returns:
        The model's output, and float32 ``divergence`` [R] (KL), ``log_p`` [R, S] and ``log_image_mass`` [R].

    Raises:
        SayoError: F07 when gradients are on and a layer's queries have none, F08 when the batch is not the padded one
            that ``focus`` describes, P02, P04 and P11 for a model or layer that cannot be read.
    """
    chosen = [b for b, has in enumerate(focus.has_target) if has]
    S = focus.visible.shape[1]
    read: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}
    grad_enabled = torch.is_grad_enabled()

    def keep(layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        if key.shape[0] != len(focus.at) or key.shape[2] != S:
            raise SayoError(
                "F08",
                "the model's batch does not match the batch of the loss",
                where=f"decoder layer {layer}",
                got=f"keys {tuple(key.shape)}",
                wanted=f"{len(focus.at)} rows of {S} tokens",
                fix="pass padded rows, without packing or sequence parallelism",
            )
        if grad_enabled and not query.requires_grad:
            raise SayoError(
                "F07",
                "the attention of <Focus> has no gradient",
                where=f"decoder layer {layer}",
                got="a query without graph",
                wanted="a query with graph",
                fix="use gradient checkpointing with use_reentrant=False and train the layers below, or "
                "the embedding of <Focus>",
            )
        # select and stack save nothing for backward; indexing by a tensor would
        row = torch.stack([query[b, :, focus.at[b]] for b in chosen]) if chosen else query.new_zeros(0)
        read[layer] = row, key, scale

    with _GradientTap(model, list(layers), keep):
        output = model(**inputs, use_cache=False)
    if not chosen:
        none_R, none_RS = (focus.target.new_zeros(shape) for shape in ((0,), (0, S)))
        return output, {"divergence": none_R, "log_p": none_RS, "log_image_mass": none_R}
    queries = [read[layer][0] for layer in layers]
    keys = [read[layer][1] if len(chosen) == len(focus.at) else read[layer][1][chosen] for layer in layers]
    visible, image = focus.visible[chosen], focus.image[chosen]
    log_p, log_mass = focus_log_attention(queries, keys, [read[layer][2] for layer in layers], visible, image)
    divergence = anchor_divergence(log_p, focus.target[chosen], image)
    return output, {"divergence": divergence, "log_p": log_p, "log_image_mass": log_mass}
