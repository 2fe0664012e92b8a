"""The loss of the <Focus> stage against transformers' eager attention in float64, and its target.

Shape suffixes: B rows, R rows with boxes, S tokens, H heads, V visual tokens.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.family_models import TINY
from support.focus_rows import FAMILIES, batch_of, load, mixed_rows, side

from sayo_verl.errors import SayoError
from sayo_verl.focus.loss import (
    IGNORE,
    anchor_divergence,
    focus_log_attention,
    forbidden_excess,
    forward_with_focus,
    target_distribution,
)
from sayo_verl.vision.grids import Tile, merged_grid

GRID = (merged_grid(1, 6, 8, 2, where="test"),)


quick = settings(derandomize=True, deadline=None, max_examples=60)


def naive_loss(model: Any, batch: dict[str, Any], focus: Any, layers: tuple[int, ...]) -> torch.Tensor:
    """L of the docstring, from whole attention matrices; one row at a time, without logarithms of sums."""
    output = model(**batch, use_cache=False, output_attentions=True)
    full = [n for n, layer in enumerate(model.model.language_model.layers) if hasattr(layer, "self_attn")]
    attentions, kls = dict(zip(full, output.attentions, strict=True)), []
    for b, has in enumerate(focus.has_target):
        if not has:
            continue
        columns = focus.image[b].nonzero().flatten()
        a_V = torch.stack([attentions[layer][b, :, focus.at[b], columns] for layer in layers]).mean((0, 1))
        p_V, q_V = a_V / a_V.sum(), focus.target[b, columns].to(a_V.dtype)
        kls.append((q_V * (q_V / p_V).log()).sum())
    return output.loss + torch.stack(kls).mean()


def our_loss(model: Any, batch: dict[str, Any], focus: Any, layers: tuple[int, ...]) -> torch.Tensor:
    output, figures = forward_with_focus(model, batch, focus, layers)
    return output.loss + figures["divergence"].mean()


def gradients(model: Any, loss: torch.Tensor, layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    decoder = model.model.language_model
    out = {f"{n}{i}": getattr(decoder.layers[i].self_attn, n).weight.grad for i in layers for n in ("q_proj", "k_proj")}
    out["below"] = decoder.layers[0].self_attn.v_proj.weight.grad
    out["embedding"] = model.get_input_embeddings().weight.grad[-1]
    return {name: grad.detach().double().clone() for name, grad in out.items()}


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("side", "layers"), [("right", (2,)), ("left", (0, 2))])
def test_loss_and_gradient_are_those_of_eager_attention_in_float64(folders, family, side, layers):
    layers = tuple(TINY[family].layers - 1 if layer == 2 else layer for layer in layers)  # the last
    model, processor = load(folders[family])
    batch, focus = batch_of(model, processor, mixed_rows(), side)
    assert focus.has_target == (True, False, True, True, True, False)
    loss = our_loss(model, batch, focus, layers)
    ours = gradients(model, loss, layers)
    exact, _ = load(folders[family], torch.float64, "eager")
    # padded on the right whatever ours is: in float64 transformers' softmax gives NaN for padding on the left
    batch, focus = batch_of(exact, processor, mixed_rows())
    batch["pixel_values"] = batch["pixel_values"].double()
    truth = naive_loss(exact, batch, focus, layers)
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), abs=1e-5)
    for name, grad in gradients(exact, truth, layers).items():
        scale = grad.abs().max()
        assert scale > 1e-4, f"{name} gets no gradient: the comparison is empty"
        torch.testing.assert_close(ours[name], grad, atol=2e-4 * float(scale), rtol=0, msg=name)


def test_gradient_by_finite_differences(folders):
    model, processor = load(folders["qwen3_vl"])
    batch, focus = batch_of(model, processor, mixed_rows()[:1])
    weight = model.model.language_model.layers[2].self_attn.q_proj.weight

    def divergence() -> torch.Tensor:
        return forward_with_focus(model, batch, focus, (2,))[1]["divergence"].sum()

    divergence().backward()
    place = np.unravel_index(int(weight.grad.abs().argmax()), weight.shape)
    slope, step, values = float(weight.grad[place]), 1e-2, []
    with torch.no_grad():
        for sign in (1, -1):
            weight[place] += sign * step
            values.append(float(divergence()))
            weight[place] -= sign * step
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_gradient_checkpointing_changes_nothing(folders, family):
    model, processor = load(folders[family])
    model.train()
    batch, focus = batch_of(model, processor, mixed_rows())
    plain = gradients(model, our_loss(model, batch, focus, (1,)), (1,))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, grad in gradients(model, our_loss(model, batch, focus, (1,)), (1,)).items():
        torch.testing.assert_close(grad, plain[name], atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_is_refused(folders):
    model, processor = load(folders["qwen3_vl"])
    model.train()
    model.enable_input_require_grads()
    batch, focus = batch_of(model, processor, mixed_rows()[:1])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(SayoError, match="F07"):
        our_loss(model, batch, focus, (1,))


def test_rows_without_boxes_train_the_language_model_alone(folders):
    model, processor = load(folders["qwen3_vl"])
    rows = mixed_rows()
    batch, focus = batch_of(model, processor, [rows[1], rows[5]])
    output, figures = forward_with_focus(model, batch, focus, (2,))
    assert focus.has_target == (False, False)
    assert figures["divergence"].shape == (0,)
    plain = model(**batch)
    torch.testing.assert_close(output.loss, plain.loss, rtol=0, atol=0)


def test_other_rows_and_padding_do_not_matter(folders):
    model, processor = load(folders["qwen3_vl"])
    rows = mixed_rows()
    together, focus = batch_of(model, processor, rows)
    alone, alone_focus = batch_of(model, processor, rows[:1])
    poisoned = dict(together)
    padding = together["attention_mask"] == 0
    assert padding[0].any()
    poisoned["input_ids"] = torch.where(padding, 5, together["input_ids"])
    with torch.no_grad():
        values = [
            forward_with_focus(model, b, f, (2,))[1]["divergence"][0]
            for b, f in ((alone, alone_focus), (together, focus), (poisoned, focus))
        ]
    torch.testing.assert_close(torch.stack(values), values[0].expand(3), rtol=0, atol=1e-5)


def test_keys_outside_of_the_row_are_never_read():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 8, generator=generator, requires_grad=True)
    clean = torch.randn(2, 2, 10, 8, generator=generator)
    visible = torch.zeros(2, 10, dtype=torch.bool)
    visible[0, :7] = visible[1, 3:9] = True
    image = torch.zeros_like(visible)
    image[0, 1:4] = image[1, 4:6] = True
    target = torch.where(image, 1.0 / image.sum(1, keepdim=True), float("nan"))
    results = []
    for fill in (0.0, float("nan")):
        key = torch.where(visible[:, None, :, None], clean, fill).requires_grad_()
        log_p, mass = focus_log_attention([query], [key], [0.35], visible, image)
        kl = anchor_divergence(log_p, target, image)
        grads = torch.autograd.grad(kl.sum(), (query, key))
        assert all(bool(torch.isfinite(x).all()) for x in (log_p, mass, kl, *grads))
        results.append((log_p, mass, kl, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert bool((results[0][0] != 0).sum() == image.sum())


def test_an_image_that_gets_next_to_no_attention_still_has_an_exact_loss():
    query = torch.zeros(1, 1, 4)
    query[..., 0] = 400.0
    key = torch.zeros(1, 1, 4, 4)
    key[0, 0, 0, 0] = 1.0  # a sink 400 nats above the rest
    key[0, 0, 2, 1], query[..., 1] = 1.0, 1.0
    visible = torch.ones(1, 4, dtype=torch.bool)
    image = torch.tensor([[False, True, True, False]])
    log_p, mass = focus_log_attention([query], [key], [1.0], visible, image)
    truth = torch.tensor([0.0, 1.0]).log_softmax(0)
    torch.testing.assert_close(log_p[0, 1:3], truth)
    assert float(mass) == pytest.approx(-400 + float(torch.tensor([0.0, 1.0]).logsumexp(0)), abs=1e-3)


def test_a_batch_that_is_not_the_prepared_one_is_refused(folders):
    model, processor = load(folders["qwen3_vl"])
    rows = mixed_rows()
    batch, _ = batch_of(model, processor, rows)
    _, focus = batch_of(model, processor, rows[:2])
    with pytest.raises(SayoError, match="F08"):
        forward_with_focus(model, batch, focus, (2,))


def test_forbidden_excess():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0] = torch.tensor([0.0, -50.0, -50.0, 0.0])
    labels = torch.tensor([[IGNORE, 0, IGNORE]])
    assert float(forbidden_excess(logits, labels, (1, 2))) == 0
    logits[0, 0, 1] = 0.0
    assert float(forbidden_excess(logits, labels, (1, 2))) == pytest.approx(20 - np.log(3), abs=1e-5)
    assert float(forbidden_excess(logits, torch.full((1, 3), IGNORE), (1, 2))) == 0


# ---------------------------------------------------------------------------------------------------------- the target


corner = st.floats(0, 0.95, allow_nan=False)


box = st.tuples(corner, corner, side, side).map(
    lambda b: [b[0], b[1], min(1.0, b[0] + b[2] * 0.999), min(1.0, b[1] + b[3] * 0.999)]
)


@quick
@given(st.lists(box, min_size=1, max_size=3), st.floats(0, 0.99))
def test_target_sums_to_one_and_keeps_its_background(boxes, alpha):
    q_V = target_distribution([[], boxes], [GRID[0], GRID[0]], alpha, where="test")
    assert q_V.shape == (24,)
    assert q_V.sum() == pytest.approx(1, abs=1e-12)
    assert (q_V >= alpha / 24 - 1e-15).all()
    np.testing.assert_allclose(q_V[:12], alpha / 24, atol=1e-15)  # the first image has no box


def test_target_by_hand():
    tiles = (Tile(2, 2),)
    q = target_distribution([[[0.0, 0.0, 0.75, 0.5]]], [tiles], 0.1, where="test")
    np.testing.assert_allclose(q, [0.9 * 2 / 3 + 0.025, 0.9 / 3 + 0.025, 0.025, 0.025])
    two = target_distribution([[[0.0, 0.0, 0.75, 0.5], [0.0, 0.0, 0.5, 0.25]]], [tiles], 0.1, where="test")
    np.testing.assert_allclose(two, q)  # a box within another adds nothing
    thin = target_distribution([[[0.6, 0.6, np.nextafter(0.6, 1), 0.7]]], [tiles], 0.0, where="test")
    np.testing.assert_allclose(thin, [0, 0, 0, 1])


@pytest.mark.parametrize(
    ("boxes", "alpha", "code"),
    [
        ([[[0, 0, 1, 1]]], 1.0, "F05"),
        ([[[0, 0, 1, 1]]], float("nan"), "F05"),
        ([[]], 0.1, "F06"),
        ([[[0, 0, 1, 1]], []], 0.1, "D05"),
        ([[[0.5, 0, 0.2, 1]]], 0.1, "V02"),
    ],
)
def test_malformed_targets_are_refused(boxes, alpha, code):
    with pytest.raises(SayoError, match=code):
        target_distribution(boxes, [GRID[0]], alpha, where="test")
