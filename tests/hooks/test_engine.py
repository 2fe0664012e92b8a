"""The engine mixin inside verl's real training worker (FSDP2, one CPU process), against float64 eager attention."""

import numpy as np
import pytest
import torch
from support.engine_rows import QUESTION, ROWS, log_prob_pass, make_rows, model_config, single_process_group, worker
from support.family_models import patches_undone
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl

from sayo_verl.errors import SayoError
from sayo_verl.probe.statistics import CATALOGUE, SIZED, Statistic, StatisticsRequest
from sayo_verl.vision.grids import merged_grid
from sayo_verl.vision.masks import region_mask


def request(**options):
    return StatisticsRequest((Statistic("image_mass", **options), Statistic("region_mass", **options))).to_wire()


def names(**options):
    return tuple("sayo_" + Statistic(name, **options).key for name in ("image_mass", "region_mass"))


REQUEST, NAMES = request(), names()
INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@pytest.fixture(scope="module", autouse=True)
def _process_group():
    single_process_group()
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _transformers_as_it_was():
    """verl replaces forwards of transformers' classes for the whole process; other tests want transformers' own."""
    before = modeling_qwen3_vl.Qwen3VLModel.forward
    with patches_undone():
        yield
        assert modeling_qwen3_vl.Qwen3VLModel.forward is not before, "verl no longer patches them"


@pytest.fixture(scope="module")
def rows(random_policy):
    return make_rows(model_config(random_policy, packed=True).processor)


@pytest.fixture(scope="module")
def packed_worker(random_policy):
    return worker(model_config(random_policy, packed=True), dynamic=False)


def eager_masses(policy, rows, layers, query_row="input"):
    """[(image mass, region mass) of each response token] from HF eager attention in float64, one row at a time."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(policy, dtype=torch.float64, attn_implementation="eager")
    attentions = {}
    # verl replaces the model's forward in this process and drops `attentions`; the modules still return their weights
    for module in model.model.language_model.layers:
        module.self_attn.register_forward_hook(lambda m, _a, out: attentions.__setitem__(m.layer_idx, out[1]))
    out = []
    for row in rows:
        images = {k: v for k, v in row["multi_modal_inputs"].items() if k in INPUTS}
        for pixels in ("pixel_values", "pixel_values_videos"):
            if pixels in images:
                images[pixels] = images[pixels].double()
        ids = row["input_ids"][None]
        with torch.no_grad():
            model(
                input_ids=ids,
                position_ids=row["position_ids"][:, None],
                use_cache=False,
                attention_mask=torch.ones_like(ids),
                **images,
            )
        mean_SS = torch.stack([attentions[layer % 2][0].mean(0) for layer in layers]).mean(0)
        prompt, length = row["prompts"].shape[0], ids.shape[1]
        first = prompt if query_row == "input" else prompt - 1
        rows_TS = mean_SS[first : first + length - prompt]
        visual = torch.isin(row["input_ids"], torch.tensor([model.config.image_token_id, model.config.video_token_id]))
        image = visual.nonzero().flatten()
        region = image[:0]
        if "image_grid_thw" in images:
            _, h, w = row["multi_modal_inputs"]["image_grid_thw"][0].tolist()
            tiles = merged_grid(1, h, w, 2, where="the test")
            region = image[torch.from_numpy(region_mask(row["extra_info"]["boxes"][0], tiles))]
        out.append((rows_TS[:, image].sum(-1), rows_TS[:, region].sum(-1)))
    return out


def largest_error(output, rows, expected, **options):
    errors = [
        (got.double() - want[k]).abs().max().item()
        for k, name in enumerate(names(**options))
        for got, want in zip(output[name].unbind(), expected, strict=True)
    ]
    return max(errors)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_statistics_equal_float64_eager_attention(random_policy, rows, packed, dynamic):
    built = worker(model_config(random_policy, packed=packed), dynamic=dynamic)
    output = log_prob_pass(built, rows, REQUEST)
    error = largest_error(output, rows, eager_masses(random_policy, rows, layers=[-1]))
    print(f"largest error against float64 eager, packed={packed}, dynamic={dynamic}: {error:.2e}")
    assert error < 1e-5
    assert output["sayo_image_tokens"].unbind()[0].item() == 9
    counts = [int(x) for x in torch.cat(list(output["sayo_region_tokens"].unbind()))]
    assert counts[2] == 0, "a row without boxes has no region"
    assert counts[3] == 0, "a row without an image has no region, whatever boxes it carries"
    assert counts[4] == 1, "a box smaller than a cell keeps one token"
    assert counts[5] == 6, "a box of the whole image covers every token"


def test_several_layers_and_the_predicting_row(random_policy, rows, packed_worker):
    options = {"layers": (0, -1), "query_row": "predicting"}
    output = log_prob_pass(packed_worker, rows, request(**options))
    expected = eager_masses(random_policy, rows, layers=[0, 1], query_row="predicting")
    assert largest_error(output, rows, expected, **options) < 1e-5


def test_the_two_row_conventions_differ_by_one_row(rows, packed_worker):
    """The attention row of y_t as input is the row that predicts y_(t+1): a hand-checkable shift."""
    by_input = log_prob_pass(packed_worker, rows, REQUEST)
    predicting = log_prob_pass(packed_worker, rows, request(query_row="predicting"))
    shifted = predicting[names(query_row="predicting")[0]].unbind()
    for a, b in zip(by_input[NAMES[0]].unbind(), shifted, strict=True):
        torch.testing.assert_close(a[:-1], b[1:], rtol=0, atol=0)
        assert a.numel() == b.numel()


def test_micro_batches_and_order_do_not_matter(random_policy, rows, packed_worker):
    together = log_prob_pass(packed_worker, rows, REQUEST)
    order = [4, 0, 5, 3, 1, 2]
    permuted = log_prob_pass(packed_worker, [rows[i] for i in order], REQUEST)
    for name in (*NAMES, "sayo_region_tokens"):
        for place, i in enumerate(order):
            torch.testing.assert_close(
                permuted[name].unbind()[place], together[name].unbind()[i], rtol=0, atol=1e-6, equal_nan=True
            )


def test_without_a_request_the_engine_is_verls_own(rows, packed_worker):
    plain = log_prob_pass(packed_worker, rows, None)
    probed = log_prob_pass(packed_worker, rows, REQUEST)
    assert not [key for key in plain.keys() if key.startswith("sayo_")]
    for name in ("log_probs", "entropy"):
        for a, b in zip(plain[name].unbind(), probed[name].unbind(), strict=True):
            assert torch.equal(a, b), f"the probe changed {name}"
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks)
        for m in packed_worker.engine.module.modules()
        if type(m).__name__.endswith(("TextAttention", "TextRMSNorm"))
    )
    assert hooks == 0, "hooks outlived the pass"


def test_statistics_carry_no_graph(rows, packed_worker):
    output = log_prob_pass(packed_worker, rows, REQUEST)
    for values, row in zip(output[NAMES[0]].unbind(), rows, strict=True):
        assert not values.requires_grad
        assert values.shape == row["responses"].shape
        assert torch.isfinite(values).all()


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_every_statistic_travels_through_verls_batching(random_policy, rows, dynamic):
    """verl concatenates micro-batches and restores their order for values of every width."""
    built = worker(model_config(random_policy, packed=True), dynamic=dynamic)
    asked = [Statistic(name, size=3 if name in SIZED else 0) for name in CATALOGUE]
    asked += [Statistic("image_mass", per_head=True), Statistic("lse", query_row="predicting")]
    output = log_prob_pass(built, rows, StatisticsRequest(tuple(asked)).to_wire())
    alone = [log_prob_pass(built, [row, row], StatisticsRequest(tuple(asked)).to_wire()) for row in rows]
    for statistic in asked:
        key = "sayo_" + statistic.key
        for n, (values, row) in enumerate(zip(output[key].unbind(), rows, strict=True)):
            expected, _ = alone[n][key].unbind()
            assert values.shape == expected.shape
            if "neighbour" not in key and "index" not in key:  # of values equal but for rounding any may come first
                torch.testing.assert_close(values, expected, rtol=0, atol=1e-5, equal_nan=True)
            if statistic.name == "patch_sums":
                tokens = int(output["sayo_image_tokens"].unbind()[n])
                assert values.shape[0] == max(tokens, 1)
                assert bool(values.isnan().all()) == (tokens == 0)
                continue
            assert values.shape[0] == row["responses"].shape[0]
            assert torch.isfinite(values).all()
            assert values.min() >= statistic.spec.low - 1e-6
            assert values.max() <= statistic.spec.high + 1e-5


@pytest.mark.parametrize("name", ["attn_region", "attn_dual", "attn_anchor", "attn_faithful", "attn_mix [region,dual]"])
def test_a_worker_sends_what_a_method_declares_and_no_more(rows, packed_worker, repo, monkeypatch, name):
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    from cost.wire import methods
    from wire_bytes import measure

    for row in measure(packed_worker, rows, methods()[name]):
        assert row["bytes"] == row["declared"], row


def test_lora_weights_are_seen_and_the_reference_pass_carries_no_statistics(random_policy, rows):
    config = model_config(random_policy, packed=True, lora_rank=4)
    built = worker(config, dynamic=False)
    before = log_prob_pass(built, rows, REQUEST)
    with torch.no_grad():
        for name, parameter in built.engine.module.named_parameters():
            if "lora_B" in name and "language_model" in name:
                generator = torch.Generator().manual_seed(len(name))
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                local.copy_(torch.randn(local.shape, generator=generator) * 0.2)
    after = log_prob_pass(built, rows, REQUEST)
    assert (after[NAMES[0]].unbind()[0] - before[NAMES[0]].unbind()[0]).nan_to_num().abs().max() > 1e-4
    reference = log_prob_pass(built, rows, None, no_lora_adapter=True)
    assert not [key for key in reference.keys() if key.startswith("sayo_")]


def test_equal_lengths_pass(random_policy, packed_worker):
    """verl issue 7899: a batch of equally long mRoPE rows."""
    shapes = [ROWS[0]] * 4
    rows = make_rows(model_config(random_policy, packed=True).processor, shapes=shapes)
    output = log_prob_pass(packed_worker, rows, REQUEST)
    assert largest_error(output, rows, eager_masses(random_policy, rows, layers=[-1])) < 1e-5


def video_row(processor, n_frames, width, height, response_length):
    """A row with a video, from the model's own processor, with the fields of ``make_rows``."""
    (row,) = make_rows(processor, shapes=[(64, 64, response_length, [])])
    rng = np.random.default_rng(n_frames)
    frames = rng.integers(0, 255, (n_frames, height, width, 3), dtype=np.uint8)
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], videos=[frames], return_tensors="pt", do_sample_frames=False)
    prompt = inputs["input_ids"][0]
    ids = torch.cat([prompt, row["responses"]])
    types = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, response_length, dtype=torch.long)], 1)
    positions, _ = processor.get_rope_index(
        input_ids=ids[None],
        attention_mask=torch.ones_like(ids)[None],
        mm_token_type_ids=types,
        video_grid_thw=inputs["video_grid_thw"],
    )
    text_positions = torch.arange(len(ids))[None]
    return row | {
        "prompts": prompt,
        "input_ids": ids,
        "position_ids": torch.cat([text_positions, positions[:, 0]]),
        "multi_modal_inputs": {k: inputs[k] for k in ("pixel_values_videos", "video_grid_thw")},
        "extra_info": {"index": n_frames},
    }


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_videos_are_visual_tokens_like_images(random_policy, rows, packed):
    config = model_config(random_policy, packed=packed)
    mixed = [video_row(config.processor, 4, 96, 64, 6), rows[0], video_row(config.processor, 2, 64, 64, 3), rows[3]]
    output = log_prob_pass(worker(config, dynamic=False), mixed, REQUEST)
    error = largest_error(output, mixed, eager_masses(random_policy, mixed, layers=[-1]))
    print(f"largest error against float64 eager, videos among images, packed={packed}: {error:.2e}")
    assert error < 1e-5
    assert torch.cat(list(output["sayo_image_tokens"].unbind())).tolist() == [2 * 2 * 3, 9, 1 * 2 * 2, 0]


def test_boxes_of_a_row_with_a_video_stop_the_pass(random_policy, packed_worker):
    row = video_row(model_config(random_policy, packed=True).processor, 4, 96, 64, 6)
    row["extra_info"] = {"index": 1, "boxes": [[[0.1, 0.1, 0.9, 0.4]]]}
    with pytest.raises(SayoError, match=r"SAYO-D66: .*boxes.*index 1.*fix: "):
        log_prob_pass(packed_worker, [row, row], REQUEST)


@pytest.mark.parametrize(
    ("break_row", "code"),
    [
        (lambda row: row["extra_info"].update(boxes=[[[0.5, 0.1, 0.2, 0.4]]]), "V02"),
        (lambda row: row["extra_info"].update(boxes=[[[0.5, 0.1, 0.9, 0.4]], []]), "D05"),
        (lambda row: row["multi_modal_inputs"].update(video_grid_thw=torch.tensor([[2, 4, 4]])), "P05"),
    ],
    ids=["x1<x0", "boxes-not-per-image", "video without placeholders"],
)
def test_bad_rows_stop_the_pass(random_policy, packed_worker, break_row, code):
    rows = make_rows(model_config(random_policy, packed=True).processor, shapes=[ROWS[0], ROWS[1]])
    break_row(rows[1])
    with pytest.raises(SayoError, match=f"SAYO-{code}: .*index 1.*fix: "):
        log_prob_pass(packed_worker, rows, REQUEST)


def test_a_layer_that_does_not_exist_stops_the_pass(rows, packed_worker):
    with pytest.raises(SayoError, match=r"SAYO-P03: the model has 2 decoder layers"):
        log_prob_pass(packed_worker, rows, request(layers=(5,)))
