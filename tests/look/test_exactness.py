"""What `observe` measures is what transformers' eager attention in float64 has, for every family.

Shape suffixes: L layers, H query heads, T response tokens, W words, V visual tokens.
"""

import itertools

import numpy as np
import pytest
import torch
from support.engine_rows import RowShape
from support.family_models import TINY
from support.looked import response_of, row_of, truth_of

from sayo_verl.probe.statistics import Statistic, StatisticsRequest
from sayo_verl.vision.intervention import Intervention

NEAR = 2e-5  # float32 against float64


def two_images(cell: int) -> RowShape:
    """Two pictures, with boxes in both."""
    boxes = [[[0.0, 0.0, 0.5, 1.0]], [[0.5, 0.0, 1.0, 1.0], [0.3, 0.3, 0.35, 0.35]]]
    return RowShape(((2 * cell, 3 * cell), (4 * cell, 2 * cell)), 9, boxes)


@pytest.mark.parametrize("query_row", ["input", "predicting"])
@pytest.mark.parametrize("name", TINY)
def test_masses_maps_and_the_head_table_are_those_of_eager_attention(
    name, query_row, observer_of, unpacked, monkeypatch
):
    observer = observer_of(name)
    monkeypatch.setattr(observer, "query_row", query_row)
    prompt, ids = observer.prompt(row_of(two_images(TINY[name].cell)), "a row"), response_of(9)
    last = observer.layers[-1]
    seen = observer.observe(prompt, ids, maps=["mean", f"L{last}", f"L{last}H3"], heads=True)
    truth = truth_of(observer, prompt, ids)
    assert observer.layers == tuple(n for n in range(TINY[name].layers) if n not in TINY[name].linear)
    p_LHTV = truth.attention[list(observer.layers)][:, :, truth.rows_of(query_row)]
    image_V, inside_V = truth.keys["image"], torch.isin(truth.keys["image"], truth.keys["region"])
    border_V = torch.from_numpy(prompt.seen.border)
    sets = {"image_mass": image_V, "region_mass": image_V[inside_V], "sink_mass": torch.tensor([0])}
    sets["border_mass"] = image_V[border_V]
    assert prompt.seen.region.tolist() == inside_V.tolist()
    for key, columns in sets.items():
        near(seen.values[key], p_LHTV[..., columns].sum(-1).mean((0, 1)))
    p_LHTV = p_LHTV[..., image_V]

    def words(p_TV):
        return torch.stack([p_TV[first:end].mean(0) for first, end in seen.words])

    by_name = {m.name: m for m in seen.maps}
    assert list(by_name)[:3] == ["mean", f"L{last}", f"L{last}H3"]
    near(unpacked(by_name["mean"].words), words(p_LHTV.mean((0, 1))))
    near(unpacked(by_name[f"L{last}"].words), words(p_LHTV[-1].mean(0)))
    near(unpacked(by_name[f"L{last}H3"].words), words(p_LHTV[-1, 3]))
    near(unpacked(by_name["mean"].total)[0], p_LHTV.mean((0, 1, 2)))
    for i, layer in enumerate(observer.layers):
        near(unpacked(by_name[f"L{layer}"].total)[0], p_LHTV[i].mean((0, 1)))
        for head in range(p_LHTV.shape[1]):
            near(unpacked(by_name[f"L{layer}H{head}"].total)[0], p_LHTV[i, head].mean(0))
    near(seen.heads.values["image_mass"], p_LHTV.sum(-1).mean(-1))
    near(seen.heads.values["region_mass"], p_LHTV[..., inside_V].sum(-1).mean(-1))
    near(seen.heads.values["box_hit"], inside_V[p_LHTV.argmax(-1)].double().mean(-1))
    share_LHTV = p_LHTV / p_LHTV.sum(-1, keepdim=True)
    near(seen.heads.values["spatial_entropy"], torch.special.entr(share_LHTV).sum(-1).mean(-1), 2e-4)


@pytest.mark.parametrize("name", TINY)
def test_log_probs_and_entropy_are_those_of_the_whole_logits(name, observer_of, monkeypatch):
    observer = observer_of(name)
    prompt, ids = observer.prompt(row_of(two_images(TINY[name].cell)), "a row"), response_of(9)
    monkeypatch.setattr("sayo_verl.look.measure.LOGITS", 1)  # one token at a time
    measured = observer.measure(prompt, ids, StatisticsRequest((Statistic("image_mass"),)))
    types = {k: v for k, v in prompt.inputs.items() if k != "mm_token_type_ids"}
    if "mm_token_type_ids" in prompt.inputs:
        types["mm_token_type_ids"] = torch.nn.functional.pad(prompt.inputs["mm_token_type_ids"], (0, 9))
    with torch.no_grad():
        logits = observer.model(input_ids=torch.cat([prompt.ids, torch.tensor(ids)])[None], **types).logits
    log_p_TN = logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
    near(measured.log_probs, log_p_TN.gather(-1, torch.tensor(ids)[:, None])[:, 0], 1e-4)
    near(measured.entropy, -(log_p_TN.exp() * log_p_TN).sum(-1), 1e-4)
    assert measured.image_tokens == prompt.seen.tokens


@pytest.mark.parametrize("name", TINY)
def test_answers_are_greedy_continuations_of_the_prompts_own_ids(name, observer_of):
    observer = observer_of(name)
    shapes = [two_images(TINY[name].cell), RowShape(((3 * TINY[name].cell,) * 2,), 0, [[]])]
    prompts = [observer.prompt(row_of(shape, i), f"row {i}") for i, shape in enumerate(shapes)]
    for prompt, ids in zip(prompts, observer.answer(prompts, max_new_tokens=4), strict=True):
        hidden = observer._hidden(prompt, torch.cat([prompt.ids, torch.tensor(ids)]))[len(prompt.ids) - 1 : -1]
        logits = observer.model.get_output_embeddings()(hidden)
        logits[:, list(observer.placeholders)] = float("-inf")
        best, own = logits.max(-1).values, logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        near(own.detach(), best.detach(), 1e-3)  # the batch is padded, so a tie may be decided otherwise


def test_a_changed_image_changes_log_probs_and_nothing_else(observer_of):
    observer = observer_of("qwen3_vl")
    prompt, ids = (
        observer.prompt(row_of(RowShape(((128, 128), (64, 64)), 0, [[[0.0, 0.0, 0.5, 0.5]], []])), "a row"),
        response_of(9),
    )
    request = StatisticsRequest((Statistic("region_mass", layers=(0, 1)), Statistic("patch_sums")))
    plain = observer.measure(prompt, ids, request)
    region, grey, control = Intervention("region"), Intervention("grey"), Intervention("elsewhere", draw=2)
    changed = observer.measure(prompt, ids, request, interventions=(region, grey, control))
    assert plain.counterfactuals == {}
    assert torch.equal(plain.log_probs, changed.log_probs)
    passes = [changed.counterfactuals[i] for i in (region, grey, control)]
    for one, other in itertools.combinations((changed.log_probs, *passes), 2):
        assert (one - other).abs().max() > 1e-5
    alone = observer.measure(prompt, ids, request, interventions=(control,))
    assert torch.equal(alone.counterfactuals[control], passes[2]), "a pass does not depend on others"


def test_without_boxes_a_change_of_boxes_takes_no_pass(observer_of, monkeypatch):
    observer = observer_of("qwen3_vl")
    prompt, ids = observer.prompt(row_of(RowShape(((96, 96),), 0, [[]])), "a row"), response_of(9)
    region, control = Intervention("region"), Intervention("elsewhere")
    monkeypatch.setattr(observer, "_changed", None)
    measured = observer.measure(prompt, ids, StatisticsRequest(()), interventions=(region, control))
    for intervention in (region, control):
        assert torch.equal(measured.counterfactuals[intervention], measured.log_probs)


def near(got, wanted, within: float = NEAR) -> None:
    got, wanted = (torch.as_tensor(np.asarray(x)).double() for x in (got, wanted))
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() < within
