"""The counterfactual pass inside verl's training worker: other pixels, the same tokens, and nothing else touched."""

import copy
from types import SimpleNamespace

import pytest
import torch
from support.engine_rows import log_prob_pass, make_rows, mixed_rows, model_config, worker
from transformers import Qwen3VLForConditionalGeneration

from sayo_verl.errors import SayoError
from sayo_verl.hooks.capture import plan_micro_batch
from sayo_verl.hooks.counterfactual import counterfactual_micro_batch
from sayo_verl.models.families import FAMILIES
from sayo_verl.probe.statistics import INTERVENTION_KEY, Statistic, StatisticsRequest, log_probs_key
from sayo_verl.vision.control import filled_tokens
from sayo_verl.vision.grids import merged_grid
from sayo_verl.vision.intervention import KINDS, Intervention, Pixels, intervene, prompt_key
from sayo_verl.vision.masks import check_boxes

pytestmark = pytest.mark.usefixtures("process_group")
REQUEST = StatisticsRequest((Statistic("image_mass"), Statistic("image_cosine")))
STEP = 5


@pytest.fixture(scope="module")
def config(random_policy):
    return model_config(random_policy, packed=True)


@pytest.fixture(scope="module")
def rows(config):
    return make_rows(config.processor, shapes=mixed_rows(32))


@pytest.fixture(scope="module")
def packed_worker(config):
    return worker(config, dynamic=False)


def wire(intervention):
    return {**intervention.to_wire(), "coverage": 0.5, "step": STEP}


def counterfactual(built, rows, intervention):
    return log_prob_pass(built, rows, None, calculate_entropy=False, **{INTERVENTION_KEY: wire(intervention)})


def of_response(values, row):
    """Positions P-1 .. P+T-2: where verl reads the log-probs of the response."""
    return values[row["prompts"].shape[0] - 1 : -1]


def changed_rows(rows, intervention, processor):
    """The rows as the pass should see them, by the public parts."""
    out, layout = copy.deepcopy(rows), Pixels.of(processor, "grid")
    for row in out:
        image = row["multi_modal_inputs"]
        grids = image["image_grid_thw"].tolist() if "image_grid_thw" in image else []
        tiles = [merged_grid(*grid, 2, where="the test") for grid in grids]
        boxes = check_boxes(row["extra_info"]["boxes"], len(tiles), where="the test") if tiles else []
        key = prompt_key(row["prompts"], STEP)
        row["multi_modal_inputs"] = intervene(
            image,
            intervention,
            layout,
            tiles=tiles,
            region=filled_tokens(intervention, boxes, tiles, 0.5, key=key, where="the test"),
            key=key,
            where="the test",
        )
    return out


NO_IMAGE = {2, 7}
# Row 4 has no box; the boxes of row 1 cover 9 of 14 visual tokens, so it has no control region.
UNCHANGED = {**dict.fromkeys(KINDS, NO_IMAGE), "region": NO_IMAGE | {4}, "elsewhere": NO_IMAGE | {1, 4}}


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_the_log_probs_of_the_same_tokens_after_the_changed_image(
    random_policy, config, rows, packed_worker, kind
):
    intervention = Intervention(kind=kind)
    output = counterfactual(packed_worker, rows, intervention)
    assert set(output.keys()) == {log_probs_key(intervention), "metrics"}
    changed = changed_rows(rows, intervention, config.processor)
    expected = log_prob_pass(packed_worker, changed, None)["log_probs"].unbind()
    real = log_prob_pass(packed_worker, rows, None)["log_probs"].unbind()
    for n, (row, got) in enumerate(zip(rows, output[log_probs_key(intervention)].unbind(), strict=True)):
        assert torch.equal(got, of_response(expected[n], row))
        same_pixels = not row["multi_modal_inputs"] or torch.equal(
            row["multi_modal_inputs"]["pixel_values"], changed[n]["multi_modal_inputs"]["pixel_values"]
        )
        assert torch.equal(got, of_response(real[n], row)) == same_pixels, n
        assert same_pixels == (n in UNCHANGED[kind]), n

    # and by plain transformers, one row at a time
    model = Qwen3VLForConditionalGeneration.from_pretrained(random_policy, dtype=torch.float64)
    for n in (0, 1):
        ids, image = changed[n]["input_ids"][None], changed[n]["multi_modal_inputs"]
        with torch.no_grad():
            logits = (
                model(
                    input_ids=ids,
                    position_ids=changed[n]["position_ids"][:, None],
                    use_cache=False,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=image["pixel_values"].double(),
                    image_grid_thw=image["image_grid_thw"],
                )
                .logits[0, :-1]
                .log_softmax(-1)
            )
        plain = logits.gather(-1, ids[0, 1:, None])[changed[n]["prompts"].shape[0] - 1 :, 0]
        got = output[log_probs_key(intervention)].unbind()[n].double()
        print(f"{kind}, row {n}: largest difference from transformers in float64 {(got - plain).abs().max():.1e}")
        assert torch.allclose(got, plain, atol=1e-5)


def test_null_boxes_are_no_boxes(rows, packed_worker):
    """verl's data set makes them where it joins rows with boxes and rows without."""
    none, null = copy.deepcopy(rows), copy.deepcopy(rows)
    for a, b in zip(none, null, strict=True):
        a["extra_info"]["boxes"], b["extra_info"]["boxes"] = [], None
    request = StatisticsRequest((Statistic("region_mass"),)).to_wire()
    for run in (
        lambda r: log_prob_pass(packed_worker, r, request),
        lambda r: counterfactual(packed_worker, r, Intervention(kind="region")),
    ):
        one, other = run(none), run(null)
        for name in one.keys() - {"metrics", "sayo_probe_seconds"}:
            for a, b in zip(one[name].unbind(), other[name].unbind(), strict=True):
                assert torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)), name


def test_the_first_pass_is_bitwise_what_it_is_without_a_second(rows, packed_worker):
    before = log_prob_pass(packed_worker, rows, REQUEST.to_wire())
    given = copy.deepcopy(rows)
    counterfactual(packed_worker, rows, Intervention())
    after = log_prob_pass(packed_worker, rows, REQUEST.to_wire())
    for name in ("log_probs", "entropy", *("sayo_" + s.key for s in REQUEST.statistics)):
        for a, b in zip(before[name].unbind(), after[name].unbind(), strict=True):
            assert torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)), name
    for row, kept in zip(rows, given, strict=True):
        if row["multi_modal_inputs"]:
            assert torch.equal(row["multi_modal_inputs"]["pixel_values"], kept["multi_modal_inputs"]["pixel_values"])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_micro_batches_and_order_do_not_matter(random_policy, rows, packed_worker, packed, dynamic):
    reference = counterfactual(packed_worker, rows, Intervention())[log_probs_key(Intervention())].unbind()
    order = [4, 0, 7, 3, 1, 2, 6, 5]
    built = worker(model_config(random_policy, packed=packed), dynamic=dynamic, micro_batch=4, token_budget=150)
    output = counterfactual(built, [rows[i] for i in order], Intervention())[log_probs_key(Intervention())].unbind()
    largest = max((output[place] - reference[i]).abs().max().item() for place, i in enumerate(order))
    print(f"largest difference, packed={packed}, dynamic={dynamic}: {largest:.1e}")
    assert largest < 1e-5


def test_rollouts_of_a_prompt_share_the_mask_and_steps_do_not(config, rows):
    layout, image = Pixels.of(config.processor, "grid"), rows[0]["multi_modal_inputs"]
    tiles = [merged_grid(*image["image_grid_thw"][0].tolist(), 2, where="the test")]

    def pixels(step):
        key = prompt_key(rows[0]["prompts"], step)
        changed = intervene(image, Intervention(), layout, tiles=tiles, region=None, key=key, where="the test")
        return changed["pixel_values"]

    assert torch.equal(pixels(1), pixels(1))
    assert not torch.equal(pixels(1), pixels(2))


FIELDS = dict.fromkeys(("input_ids", "response_mask", "multi_modal_inputs", "extra_info"))


@pytest.mark.parametrize("absent", FIELDS)
def test_a_pass_without_a_field_that_it_reads_is_refused(absent):
    batch = {name: None for name in FIELDS if name != absent}
    with pytest.raises(SayoError, match=f"SAYO-P10: .*no field '{absent}'"):
        counterfactual_micro_batch(batch, SimpleNamespace(), FAMILIES["qwen3_vl"], wire(Intervention()))
    with pytest.raises(SayoError, match=f"SAYO-P10: .*no field '{absent}'"):
        plan_micro_batch(batch, SimpleNamespace(), FAMILIES["qwen3_vl"], REQUEST)


def test_a_model_without_an_image_processor_is_refused():
    with pytest.raises(SayoError, match="SAYO-P28: the model has no image processor"):
        counterfactual_micro_batch(FIELDS, SimpleNamespace(processor=None), FAMILIES["qwen3_vl"], wire(Intervention()))
