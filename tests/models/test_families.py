"""The families one by one: their tiny models, the oracle, what verl cannot run, properties of the statistics."""

import importlib
import inspect
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import verl.models.transformers.qwen2_vl as verl_qwen2_vl
from support.eager_oracle import difference, eager_masses, eager_truth, load, reference_log_probs
from support.engine_rows import (
    RowShape,
    log_prob_pass,
    make_rows,
    mixed_rows,
    model_config,
    single_process_group,
    worker,
)
from support.family_models import TINY, patches_undone, require_own_forwards
from support.flash_stand_in import flash_attention_on_cpu, linear_attention_of_packed_rows
from support.refusals import refusal
from transformers import AutoConfig, AutoModelForImageTextToText, Glm4vConfig, Glm4vForConditionalGeneration
from transformers.integrations import flash_attention
from transformers.models.glm4v.modeling_glm4v import Glm4vModel, Glm4vTextAttention
from verl.models.transformers.monkey_patch import apply_monkey_patch

from sayo_verl.hooks.capture import Measurement
from sayo_verl.hooks.contract import worker_report
from sayo_verl.models.families import FAMILIES
from sayo_verl.models.qwen2_5_vl import guard_image_free
from sayo_verl.probe.statistics import WIRE_PREFIX, Statistic, StatisticsRequest

REQUEST = StatisticsRequest(
    (
        Statistic("image_mass"),
        Statistic("region_mass", layers=(0, 1), query_row="predicting"),
        Statistic("lse", per_head=True),
        Statistic("top_patch_mass", size=2),
        Statistic("patch_sums"),
        Statistic("image_cosine"),
    )
)
MEASURED = [WIRE_PREFIX + statistic.key for statistic in REQUEST.statistics]
PER_ROW = [WIRE_PREFIX + name for name in ("image_tokens", "region_tokens")]


@pytest.fixture(scope="module", autouse=True)
def _process_group():
    single_process_group()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in TINY}
    for name, folder in folders.items():
        TINY[name].build(folder)
    return folders


@pytest.fixture(scope="module")
def rows(models):
    with patches_undone():
        return {
            name: make_rows(model_config(models[name], packed=False).processor, shapes=mixed_rows(TINY[name].cell))
            for name in TINY
        }


@pytest.fixture
def engine():
    """``engine(folder, packed=..., ...)`` builds a worker; verl's patches and the flash stand-in end with the test."""
    with ExitStack() as stack:
        stack.enter_context(patches_undone())
        stack.enter_context(flash_attention_on_cpu())
        stack.enter_context(linear_attention_of_packed_rows())

        def build(
            folder: Any, *, packed: bool, micro_batch: int = 2, fused: bool = False, param_dtype: str = "fp32"
        ) -> Any:
            config = model_config(
                folder, packed=packed, fused=fused, attention="flash_attention_2" if packed else "sdpa"
            )
            return worker(config, dynamic=False, micro_batch=micro_batch, param_dtype=param_dtype)

        yield build


def report_of(built: Any, request: StatisticsRequest) -> dict[str, Any]:
    """What the launch handshake gets from the actor that holds this worker."""
    held = type("ActorRolloutRefWorker", (), {})()
    held.actor = built
    # outside of an actor Ray would start a cluster for this call, and leave it to later tests
    here = SimpleNamespace(get_node_id=lambda: "node")
    with mock.patch("ray.get_runtime_context", return_value=here):
        return worker_report(SimpleNamespace(worker_dict={"actor": held}), request.to_wire())


def unbound(output: Any, names: list[str] = MEASURED) -> dict[str, list[torch.Tensor]]:
    return {name: list(output[name].unbind()) for name in names}


def assert_rows_equal(a: list[torch.Tensor], b: list[torch.Tensor], atol: float) -> float:
    """Largest difference; NaN where the other has NaN."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol, equal_nan=True)
        worst = max(worst, (x - y).nan_to_num().abs().max().item())
    return worst


# ---- the models and the oracle


@pytest.mark.parametrize("name", [name for name in TINY if not TINY[name].tiles])
def test_a_tiny_model_is_what_its_family_is(models, rows, name):
    config = AutoConfig.from_pretrained(models[name])
    assert config.model_type == name
    assert name in FAMILIES
    text = config.get_text_config()
    assert text.num_hidden_layers == TINY[name].layers
    assert text.num_attention_heads > text.num_key_value_heads, "grouped key heads"
    grids = [row["multi_modal_inputs"].get("image_grid_thw", torch.empty(0, 3)).tolist() for row in rows[name]]
    shapes = mixed_rows(TINY[name].cell)
    assert [len(grid) for grid in grids] == [len(shape.images) for shape in shapes] == [1, 2, 0, 2, 1, 3, 1, 0]
    for grid, shape in zip(grids, shapes, strict=True):
        cells = [(height // TINY[name].cell, width // TINY[name].cell) for width, height in shape.images]
        assert [(h / 2, w / 2) for _, h, w in grid] == cells, "a cell is not as many pixels as the table says"
    assert len({row["input_ids"].shape[0] for row in rows[name]}) == len(rows[name]), "rows of different lengths"


def test_the_group_of_qwen2_5_is_not_a_power_of_two_and_its_vision_has_windows(models):
    config = AutoConfig.from_pretrained(models["qwen2_5_vl"])
    assert config.text_config.num_attention_heads // config.text_config.num_key_value_heads == 3
    cells = config.vision_config.window_size // config.vision_config.patch_size // 2
    assert cells == 2, "the 3 x 3 image of a row spans several windows"
    assert list(config.vision_config.fullatt_block_indexes) == [1]


@pytest.mark.parametrize("name", TINY)
def test_the_oracle_is_causal_attention(models, rows, name):
    linear = TINY[name].linear
    full = [layer for layer in range(TINY[name].layers) if layer not in linear]
    for truth, row in zip(eager_truth(models[name], rows[name]), rows[name], strict=True):
        assert truth.attention[list(linear)].isnan().all()
        assert (truth.attention[full].sum(-1) - 1).abs().max() < 1e-6
        assert truth.attention[full].triu(1).abs().max() == 0, "a token attends to later ones"
        assert set(truth.keys["region"].tolist()) <= set(truth.keys["image"].tolist())
        sets = [set(truth.keys[k].tolist()) for k in ("image", "system", "question", "response")]
        assert sum(map(len, sets)) == len(set().union(*sets)), "sets of keys overlap"
        assert len(truth.keys["response"]) == row["responses"].shape[0]
    masses = eager_masses(models[name], rows[name], layers=[-1])
    assert all((region <= image + 1e-12).all() for image, region in masses)
    for (image, _), row in zip(masses, rows[name], strict=True):
        assert (image > 0.01).all() if row["multi_modal_inputs"] else (image == 0).all()


@pytest.mark.parametrize("name", TINY)
def test_verls_patches_are_taken_back_and_the_oracle_refuses_them(models, name):
    flash = importlib.import_module("transformers.integrations.flash_attention")
    before = flash._flash_attention_forward
    with patches_undone():
        model_config(models[name], packed=True)  # calls the adapters
        model = AutoModelForImageTextToText.from_pretrained(models[name])
        apply_monkey_patch(model, use_remove_padding=True, ulysses_sp_size=1)
        with pytest.raises(AssertionError, match="replaced forwards are still in place"):
            load(models[name], torch.float32)
        patched = flash._flash_attention_forward
    require_own_forwards(model)
    assert flash._flash_attention_forward is before
    assert patched.__module__ == "verl.models.transformers.monkey_patch"


# ---- the flash-attn stand-in


def test_the_flash_stand_in_is_attention_and_leaves_nothing_behind():
    import transformers.modeling_flash_attention_utils as flash_utils

    owners = (flash_utils, verl_qwen2_vl, importlib.import_module("transformers.modeling_utils"))
    before = [{name: id(value) for name, value in vars(owner).items()} for owner in owners]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, heads, 8, generator=generator) for heads in (6, 2, 2))
    with flash_attention_on_cpu() as calls:
        (dense, varlen, *_), _ = flash_utils.lazy_import_flash_attention("flash_attention_2")
        ends = torch.tensor([0, 4, 9], dtype=torch.int32)
        packed = varlen(q[0], k[0], v[0], ends, ends, 5, 5, causal=True)
        for a, b in ((0, 4), (4, 9)):
            want = torch.nn.functional.scaled_dot_product_attention(
                *(x[:, a:b].transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
            ).transpose(1, 2)
            torch.testing.assert_close(packed[None, a:b], want)
            torch.testing.assert_close(dense(*(x[:, a:b] for x in (q, k, v)), causal=True), want)
        # fewer queries than keys: the last query sees the last key
        torch.testing.assert_close(dense(q[:, -2:], k, v, causal=True), dense(q, k, v, causal=True)[:, -2:])
        with pytest.raises(AssertionError, match="sliding window"):
            dense(q, k, v, window_size=(3, 3))
        with pytest.raises(AssertionError, match="longer than max_seqlen_q"):
            varlen(q[0], k[0], v[0], ends, ends, 4, 5)
        assert (len(calls.dense), len(calls.varlen)) == (4, 1)
    assert [{name: id(value) for name, value in vars(owner).items()} for owner in owners] == before


# ---- what verl 0.9.1 cannot run: each is pinned, so that a new verl shows that a refusal is no longer needed


def test_packed_qwen2_5_needs_flash_attention_whatever_is_configured(models, rows):
    """verl/models/transformers/qwen2_vl.py:331 names what is imported only when flash-attn is installed."""
    with patches_undone():
        built = worker(model_config(models["qwen2_5_vl"], packed=True, attention="sdpa"), dynamic=False)
        with pytest.raises(NameError, match="name '_flash_use_top_left_mask' is not defined"):
            log_prob_pass(built, rows["qwen2_5_vl"], None)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_packed_linear_attention_without_its_package_is_wrong_in_verl(models, rows, name):
    """verl passes cu_seqlens to transformers' own kernel, which takes any keyword and ignores it (C10)."""
    expected = reference_log_probs(models[name], rows[name])
    worst = {}
    for packed in (True, False):
        with patches_undone():
            built = worker(model_config(models[name], packed=packed), dynamic=False, micro_batch=4)
            found = unbound(log_prob_pass(built, rows[name], None), ["log_probs"])["log_probs"]
        pairs = zip(found, expected, strict=True)
        worst[packed] = max((got[:-1] - want).abs().max().item() for got, (want, _) in pairs)
        if packed:
            with refusal("C10", "from one sequence into the next"):
                report_of(built, REQUEST)
        else:
            assert report_of(built, REQUEST)["layers"] == [0, 1, 3]
    print(
        f"{name} without flash-linear-attention: log-probs off by {worst[True]:.2f} packed, {worst[False]:.1e} padded"
    )
    assert worst[True] > 0.01
    assert worst[False] < 1e-4


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_the_handshake_refuses_linear_attention_by_number(models, engine, name):
    built = engine(models[name], packed=True)
    with refusal("P11", "layer 2 is not a full-attention layer") as caught:
        report_of(built, StatisticsRequest((Statistic("image_mass"), Statistic("region_mass", layers=(2, 0)))))
    assert caught.value.wanted == "one of [0, 1, 3]"
    assert report_of(built, REQUEST)["layers"] == [0, 1, 3]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_images_of_glm4v_crash_verl(packed):
    """verl/models/transformers/glm4v.py takes the tower's output object for its tokens; the family is not supported."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    text = {**sizes, "vocab_size": 100, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 48}
    config = Glm4vConfig(text_config={**text, "rope_parameters": rope, "pad_token_id": 0}, vision_config=vision)
    config.image_token_id = 90
    ids = torch.tensor([[1, 90, 90, 90, 90, 5]])
    with ExitStack() as stack:
        for owner in (Glm4vModel, Glm4vForConditionalGeneration, Glm4vTextAttention, flash_attention):
            for name in {"forward", "_flash_attention_forward"} & vars(owner).keys():
                stack.enter_context(mock.patch.object(owner, name, vars(owner)[name]))  # put back what verl replaces
        model = Glm4vForConditionalGeneration(config)
        apply_monkey_patch(model, use_remove_padding=packed, ulysses_sp_size=1)
        pixels = {"pixel_values": torch.zeros(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        with pytest.raises(AttributeError, match="'BaseModelOutputWithPooling' object has no attribute 'shape'"):
            model(input_ids=ids, position_ids=torch.arange(6).expand(4, 1, 6), use_cache=False, **pixels)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_qwen2_5_gives_eagers_mask_to_flash_attention(models, rows, attention):
    """A micro-batch of one row: flash-attn takes the dense mask for one of padding. With sdpa there is no mask."""
    expected = reference_log_probs(models["qwen2_5_vl"], rows["qwen2_5_vl"])
    with patches_undone(), flash_attention_on_cpu():
        config = model_config(models["qwen2_5_vl"], packed=True, attention=attention)
        built = worker(config, dynamic=False, micro_batch=1)
        if attention == "eager":
            with pytest.raises(IndexError, match="out of bounds"):
                log_prob_pass(built, rows["qwen2_5_vl"], None)
            return
        found = unbound(log_prob_pass(built, rows["qwen2_5_vl"], None), ["log_probs"])["log_probs"]
    for got, (want, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(got[:-1], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_fused_kernels_of_qwen2_5_need_fsdp1(models, rows, engine, packed):
    """verl/models/transformers/qwen2_vl.py:517 hands lm_head's DTensor to a product; Qwen3-VL gathers it first."""
    built = engine(models["qwen2_5_vl"], packed=packed, fused=True)
    with pytest.raises(RuntimeError, match=r"aten\.mm\.default got mixed torch\.Tensor and DTensor"):
        log_prob_pass(built, rows["qwen2_5_vl"], None)


def test_fsdp1_needs_an_accelerator(models, engine):
    """On CPU; tests/support/engine_rows.py takes out what it asks of the device."""
    with pytest.raises(ValueError, match="CPU parameters or buffers when `sync_module_states=True`"):
        worker(model_config(models["qwen3_vl"], packed=False), dynamic=False, strategy="fsdp")


def test_sequence_parallelism_needs_packed_rows(models):
    with pytest.raises(ValueError, match="you must enable `use_remove_padding`"):
        worker(model_config(models["qwen3_vl"], packed=False), dynamic=False, sequence_parallel=2)


def test_packed_qwen2_5_cannot_run_in_float32(models, rows):
    """verl/models/transformers/qwen2_vl.py:210 rounds float32 to bfloat16 for the kernel and hands the result to a
    float32 product; under autocast, as verl trains, it goes on. Which is why the stand-in takes the rounding out."""
    with patches_undone(), flash_attention_on_cpu(float32_in_verl=False):
        built = worker(model_config(models["qwen2_5_vl"], packed=True, attention="flash_attention_2"), dynamic=False)
        with pytest.raises(RuntimeError, match="same dtype, but got: c10::BFloat16 != float"):
            log_prob_pass(built, rows["qwen2_5_vl"], None)


# ---- micro-batches of Qwen2.5-VL without an image


@pytest.fixture
def verls_own_embeds(monkeypatch):
    """As verl has it, although loading such a model puts the guard in place; put back afterwards."""
    monkeypatch.setattr("sayo_verl.models.qwen2_5_vl.guard_image_free", lambda: None)
    monkeypatch.setattr(verl_qwen2_vl, "_get_input_embeds", inspect.unwrap(verl_qwen2_vl._get_input_embeds))


def test_loading_such_a_model_puts_the_guard_in_place(models, monkeypatch):
    monkeypatch.setattr(verl_qwen2_vl, "_get_input_embeds", inspect.unwrap(verl_qwen2_vl._get_input_embeds))
    model_config(models["qwen3_vl"], packed=True)
    assert not hasattr(verl_qwen2_vl._get_input_embeds, "sayo_guarded")
    model_config(models["qwen2_5_vl"], packed=True)
    assert verl_qwen2_vl._get_input_embeds.sayo_guarded


@pytest.mark.usefixtures("verls_own_embeds")
def test_an_image_free_micro_batch_crashes_verls_qwen2_5(models, rows, engine):
    built = engine(models["qwen2_5_vl"], packed=True, micro_batch=1)
    with pytest.raises(AttributeError, match="'BaseModelOutputWithPooling' object has no attribute 'mean'"):
        log_prob_pass(built, rows["qwen2_5_vl"], None)


@pytest.mark.usefixtures("verls_own_embeds")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_guard_repairs_it_and_changes_no_number(models, rows, engine, packed):
    name = "qwen2_5_vl"
    expected, truth = reference_log_probs(models[name], rows[name]), eager_truth(models[name], rows[name])
    with_image = [row for row in rows[name] if row["multi_modal_inputs"]]
    built = engine(models[name], packed=packed, micro_batch=1)
    before = unbound(log_prob_pass(built, with_image, None), ["log_probs"])["log_probs"]
    guard_image_free()
    after = unbound(log_prob_pass(built, with_image, None), ["log_probs"])["log_probs"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "rows with an image changed"
    guarded = unbound(log_prob_pass(built, rows[name], REQUEST.to_wire()), ["log_probs", *MEASURED])
    for got, (want, _) in zip(guarded["log_probs"], expected, strict=True):
        torch.testing.assert_close(got[:-1], want, rtol=0, atol=1e-4)
    for statistic in REQUEST.statistics:
        for got, row, want in zip(guarded[WIRE_PREFIX + statistic.key], rows[name], truth, strict=True):
            assert difference(statistic, got, row, want).max() < 1e-5


@pytest.mark.usefixtures("verls_own_embeds")
def test_the_guard_gives_the_vision_tower_a_gradient_of_zero(models, rows):
    """FSDP waits for a gradient of every parameter on every rank; text gradients are those of transformers."""
    name = "qwen2_5_vl"
    (row, *_) = [row for row in rows[name] if not row["multi_modal_inputs"]]
    inputs = {
        "input_ids": row["input_ids"][None],
        "position_ids": row["position_ids"][:, None],
        "attention_mask": torch.ones_like(row["input_ids"])[None],
        "use_cache": False,
    }

    def gradients(patched: bool) -> dict[str, torch.Tensor | None]:
        with patches_undone() if patched else nullcontext():
            model = AutoModelForImageTextToText.from_pretrained(models[name], attn_implementation="eager")
            if patched:
                apply_monkey_patch(model, use_remove_padding=False, ulysses_sp_size=1)
            model(**inputs).logits.logsumexp(-1).sum().backward()
            return {key: parameter.grad for key, parameter in model.named_parameters()}

    guard_image_free()
    guarded, own = gradients(True), gradients(False)
    for key, gradient in guarded.items():
        assert gradient is not None, f"{key} has no gradient"
        if ".visual." in key:
            assert own[key] is None
            assert not gradient.any()
        else:
            torch.testing.assert_close(gradient, own[key], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("verls_own_embeds")
def test_the_guard_is_inert_for_other_families(models, rows, engine):
    name = "qwen3_vl"
    built = engine(models[name], packed=True, micro_batch=1)
    before = unbound(log_prob_pass(built, rows[name], REQUEST.to_wire()))
    guard_image_free()
    after = unbound(log_prob_pass(built, rows[name], REQUEST.to_wire()))
    for key in MEASURED:
        assert_rows_equal(before[key], after[key], atol=0.0)


def test_the_guard_leaves_a_transformers_that_returns_tensors_alone():
    """Older transformers return the visual tokens themselves."""
    tower = SimpleNamespace(calls=[])

    def visual(pixels: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        tower.calls.append((tuple(pixels.shape), grid_thw.tolist()))
        return torch.full((4, 8), 3.0)

    vision = SimpleNamespace(in_channels=3, temporal_patch_size=2, patch_size=14, spatial_merge_size=2)
    embedding = torch.nn.Embedding(5, 8)
    model = SimpleNamespace(
        visual=visual, config=SimpleNamespace(vision_config=vision), get_input_embeddings=lambda: embedding
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verl_qwen2_vl, "_get_input_embeds", inspect.unwrap(verl_qwen2_vl._get_input_embeds))
        guard_image_free()
        ids = torch.tensor([[0, 4, 2]])
        embeds, mask = verl_qwen2_vl._get_input_embeds(model, ids, torch.ones_like(ids))
    assert torch.equal(embeds, embedding(ids))
    assert torch.equal(mask, torch.ones_like(ids))
    assert tower.calls == [((16, 1176), [[1, 4, 4]])]


# ---- properties of the statistics, for every family


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_probe_is_exact_for_bfloat16_under_autocast(models, rows, engine, name, packed, monkeypatch):
    """verl trains in bfloat16; the probe must add no error of its own to the queries and keys that it reads."""
    truth = eager_truth(models[name], rows[name])
    built = engine(models[name], packed=packed, micro_batch=1, param_dtype="bf16")
    request = StatisticsRequest((Statistic("image_mass", per_head=True), Statistic("lse", per_head=True)))
    original, seen = Measurement.read, []

    def read(self: Any, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        seen.append((query.clone(), key.clone(), scale))
        original(self, layer, query, key, scale)

    monkeypatch.setattr(Measurement, "read", read)
    output = log_prob_pass(built, rows[name], request.to_wire())
    assert len(seen) == len(rows[name]), "one row is one micro-batch, of which one layer is read"
    worst = 0.0
    for n, (query, key, scale) in enumerate(seen):
        assert query.dtype == key.dtype == torch.bfloat16
        keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = (query.double() @ keys.transpose(2, 3) * scale)[0]
        logits.masked_fill_(torch.ones_like(logits[0], dtype=torch.bool).triu(1), float("-inf"))
        lse_TH = logits.logsumexp(-1).T[truth[n].rows_of("input")]
        mass_TH = logits.softmax(-1)[..., truth[n].keys["image"]].sum(-1).T[truth[n].rows_of("input")]
        for statistic, want in zip(request.statistics, (mass_TH, lse_TH), strict=True):
            got = output[WIRE_PREFIX + statistic.key].unbind()[n]
            worst = max(worst, (got.double() - want).abs().max().item())
    print(f"{name}, packed={packed}, bfloat16: largest error against float64 of the same queries and keys {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_batch_of_one_equals_a_batch_of_n_in_any_order(models, rows, engine, name, packed):
    built = engine(models[name], packed=packed)
    together = log_prob_pass(built, rows[name], REQUEST.to_wire())
    order = [5, 0, 7, 3, 1, 6, 2, 4]
    permuted = log_prob_pass(built, [rows[name][i] for i in order], REQUEST.to_wire())
    alone = [log_prob_pass(built, [row], REQUEST.to_wire(), micro_batch_size_per_gpu=1) for row in rows[name]]
    worst = 0.0
    for key in (*MEASURED, *PER_ROW):
        whole = list(together[key].unbind())
        worst = max(worst, assert_rows_equal(list(permuted[key].unbind()), [whole[i] for i in order], atol=1e-5))
        worst = max(worst, assert_rows_equal([out[key].unbind()[0] for out in alone], whole, atol=1e-5))
    print(f"{name}, packed={packed}: order and batch move statistics by up to {worst:.1e}")
    image_token = built.engine.model_config.hf_config.image_token_id
    wanted = [int((row["prompts"] == image_token).sum()) for row in rows[name]]
    assert [int(x) for x in together[PER_ROW[0]].unbind()] == wanted


@pytest.mark.parametrize("name", TINY)
def test_padding_is_never_read(models, rows, engine, name, monkeypatch):
    """Right of every row's end: another token there moves nothing, and NaN queries and keys there are never touched."""
    built = engine(models[name], packed=False)
    clean = unbound(log_prob_pass(built, rows[name], REQUEST.to_wire()))
    other = unbound(log_prob_pass(built, rows[name], REQUEST.to_wire(), pad_token_id=77))
    poisoned = []

    class Poisoned(Measurement):
        def __init__(self, request: Any, rows: Any, *args: Any, **kwargs: Any) -> None:
            self.lengths = [row.length for row in rows]
            super().__init__(request, rows, *args, **kwargs)

        def read(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
            query, key = query.clone(), key.clone()
            for n, length in enumerate(self.lengths):
                query[n, :, length:] = key[n, :, length:] = float("nan")
            poisoned.append(int(torch.isnan(key).sum()))
            super().read(layer, query, key, scale)

    monkeypatch.setattr("sayo_verl.hooks.capture.Measurement", Poisoned)
    poison = unbound(log_prob_pass(built, rows[name], REQUEST.to_wire()))
    assert sum(poisoned) > 0, "no micro-batch had padding"
    for key in MEASURED:
        assert_rows_equal(clean[key], other[key], atol=0.0)
        assert_rows_equal(clean[key], poison[key], atol=0.0)


@pytest.mark.parametrize("name", TINY)
def test_equally_long_rows(models, engine, name):
    """verl issue 7899: mRoPE positions of a batch whose rows are all equally long."""
    cell = TINY[name].cell
    shapes = [RowShape(((2 * cell, 2 * cell),), 4, [[[0.0, 0.0, 0.5, 0.5]]])] * 4
    with patches_undone():
        rows = make_rows(model_config(models[name], packed=True).processor, shapes=shapes)
    expected = eager_masses(models[name], rows, layers=[-1])
    output = log_prob_pass(engine(models[name], packed=True), rows, REQUEST.to_wire())
    for got, (want, _) in zip(output[MEASURED[0]].unbind(), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_boxes_belong_to_their_image(models, engine, name):
    """Two images of one row that are pixel for pixel the same: a box moved to the other image moves the mass."""
    cell = TINY[name].cell
    size, box = (2 * cell, 2 * cell), [0.0, 0.0, 1.0, 1.0]
    processor = model_config(models[name], packed=True).processor
    rows = [
        make_rows(processor, shapes=[RowShape((size, size), 5, boxes)], seed=4)[0]
        for boxes in ([[box], []], [[], [box]], [[box], [box]])
    ]
    tokens = int((rows[0]["prompts"] == processor.image_token_id).sum())
    output = log_prob_pass(engine(models[name], packed=True), rows, REQUEST.to_wire(), micro_batch_size_per_gpu=3)
    first, second, both = (values.nan_to_num() for values in output[MEASURED[1]].unbind())
    assert [int(x) for x in output[PER_ROW[1]].unbind()] == [tokens // 2, tokens // 2, tokens]
    torch.testing.assert_close(first + second, both, rtol=0, atol=1e-6)
    assert (first - second).abs().max() > 1e-3
