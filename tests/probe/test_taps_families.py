"""Taps that read too often or too rarely, families, and the log-sum-exp that a kernel returns."""

import importlib
import inspect
import itertools

import pytest
import torch
from support.flash_stand_in import flash_attention_on_cpu
from support.refusals import refusal
from support.tapped import (
    DECODERS,
    LAYERS,
    TEXT,
    WHERE,
    Reads,
    build,
    causal_weights,
    hooks,
    inputs,
    modeling,
    training_step,
)
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from sayo_verl.models.families import FAMILIES, UNSUPPORTED, Family, family_of
from sayo_verl.probe import taps
from sayo_verl.probe.taps import (
    ForwardTap,
    asked_layers,
    text_attention_layers,
    text_decoder,
)

pytestmark = pytest.mark.usefixtures("rotary_functions_stay")


# --------------------------------------------------------------------------------------------- wrong number of readings


def test_a_second_forward_is_refused():
    name = "Qwen3Model"
    model, reads = build(name), Reads()
    with refusal("P04") as caught, ForwardTap(model, [0, 2], reads.attention, reads.last_hidden), torch.no_grad():
        model(**inputs(name))
        model(**inputs(name))
    assert caught.value.got == {0: 2, 2: 2, "hidden": 2}
    assert hooks(model) == 0


def test_a_forward_within_a_forward_is_refused():
    name = "Qwen3Model"
    model, reads, nested = build(name), Reads(), []

    def again(*_: object) -> None:
        if not nested:
            nested.append(1)
            model(**inputs(name))

    handle = model.layers[1].register_forward_pre_hook(again)
    with refusal("P04") as caught, ForwardTap(model, [0, 1], reads.attention), torch.no_grad():
        model(**inputs(name))
    handle.remove()
    assert caught.value.got == {0: 2, 1: 2}


@pytest.mark.parametrize("skipped", ["layer", "model", "norm"])
def test_what_did_not_run_is_refused(skipped):
    name = "Qwen3VLTextModel"
    model, reads = build(name), Reads()
    if skipped == "layer":
        model.layers[1].forward = lambda hidden_states, *_, **__: hidden_states
    with refusal("P04") as caught, ForwardTap(model, [0, 1], reads.attention, reads.last_hidden), torch.no_grad():
        if skipped == "norm":
            model.norm = nn.Identity()
        if skipped != "model":
            model(**inputs(name))
    expected = {
        "layer": {0: 1, 1: 0, "hidden": 1},
        "model": {0: 0, 1: 0, "hidden": 0},
        "norm": {0: 1, 1: 1, "hidden": 0},
    }
    assert caught.value.got == expected[skipped]


def test_an_attention_that_rotates_by_itself_is_refused():
    """Fused kernels and replaced forwards: nothing is read, and that must not pass for a measurement."""
    name = "Qwen3Model"
    model, reads = build(name), Reads()
    own = modeling(name).apply_rotary_pos_emb
    forward = type(model.layers[0].self_attn).forward
    private = type(forward)(
        forward.__code__,
        {**forward.__globals__, "apply_rotary_pos_emb": own},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    model.layers[0].self_attn.forward = private.__get__(model.layers[0].self_attn)
    with refusal("P04") as caught, ForwardTap(model, [0, 1], reads.attention), torch.no_grad():
        model(**inputs(name))
    assert caught.value.got == {0: 0, 1: 1}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["Qwen3VLTextModel", "Qwen2_5_VLTextModel"])
def test_gradient_checkpointing_reads_once_when_the_backward_is_outside(name, reentrant):
    """The tap belongs around the forward alone: what the backward recomputes is then not seen, and changes nothing."""
    model = build(name, attention="sdpa", attention_dropout=0.2).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    expected_hooks = hooks(model)
    plain, tapped = (training_step(model, name, tap) for tap in (False, True))
    assert torch.equal(tapped[0], plain[0])
    assert len(tapped[1]) == len(plain[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(tapped[1], plain[1], strict=True))
    assert hooks(model) == expected_hooks


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_with_the_backward_inside_is_refused(reentrant):
    name = "Qwen3VLTextModel"
    model, reads = build(name).train(), Reads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with refusal("P04") as caught, ForwardTap(model, [0, 2], reads.attention):
        model(**inputs(name)).last_hidden_state.square().mean().backward()
    assert caught.value.got == {0: 2, 2: 2}
    assert "checkpointing" in caught.value.fix


def test_gradient_checkpointing_in_eval_mode_reads_once():
    """verl leaves checkpointing enabled and puts the model into eval mode for the log-prob pass."""
    name = "Qwen3VLTextModel"
    model, reads = build(name), Reads()
    model.gradient_checkpointing_enable()
    assert not model.training
    with torch.no_grad(), ForwardTap(model, range(LAYERS), reads.attention, reads.last_hidden):
        model(**inputs(name))
    assert reads.order == list(range(LAYERS))


# ------------------------------------------------------------------------------------------------------- unknown models


def test_a_model_of_no_known_family_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    for tried in (
        text_decoder,
        text_attention_layers,
        lambda m: asked_layers(m, [-1], where=WHERE),
        lambda m: ForwardTap(m, [], Reads().attention),
    ):
        with refusal("P02", "0 text models") as caught:
            tried(model)
        assert caught.value.where == "Sequential"
        assert all(model_type in caught.value.fix for model_type in FAMILIES)


def test_two_text_models_are_refused():
    with refusal("P02", "2 text models"):
        text_decoder(nn.ModuleList([build("Qwen3Model"), build("Qwen3VLTextModel")]))


def test_a_text_model_with_unknown_attention_is_refused():
    model = build("Qwen3Model")
    for layer in model.layers:
        layer.self_attn = nn.Identity()
    with refusal("P02", "0 text attention modules"):
        text_attention_layers(model)


def test_two_modules_of_one_layer_are_refused():
    model = build("Qwen3Model")
    model.layers[1].self_attn.layer_idx = 0
    with refusal("P02", "3 text attention modules for 2 layers"):
        text_attention_layers(model)


def test_an_unknown_model_type_is_refused():
    for model_type in FAMILIES:
        assert family_of(model_type, where="config.json").model_type == model_type
    with refusal("L18", "does not support this model family") as caught:
        family_of("qwen9_vl", where="config.json of the policy")
    assert caught.value.where == "config.json of the policy"
    assert caught.value.got == "qwen9_vl"
    assert all(model_type in caught.value.wanted for model_type in FAMILIES)
    assert not UNSUPPORTED.keys() & FAMILIES.keys()
    for model_type, why in UNSUPPORTED.items():
        with refusal("L18", why):
            family_of(model_type, where="config.json")


# -------------------------------------------------------------------------------- what families.py says of transformers


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_families_are_transformers(family: Family):
    assert family.model_type in CONFIG_MAPPING
    config_class = CONFIG_MAPPING[family.model_type]
    assert config_class in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, "verl loads it by AutoModelForImageTextToText"
    assert family.geometry in ("grid", "tiles")
    if family.geometry == "grid":
        assert config_class.sub_configs["vision_config"]().spatial_merge_size >= 1
    else:
        assert round(config_class().image_seq_length ** 0.5) ** 2 == config_class().image_seq_length
    assert isinstance(config_class().image_token_id, int)
    assert len(family.delimiters) == 2


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_named_functions_exist_and_the_named_attention_calls_them(family: Family):
    for class_name, targets in family.attention.items():
        assert targets
        for i, target in enumerate(targets):
            module_name, function_name = target.split(":")
            module = importlib.import_module(module_name)
            function = getattr(module, function_name)
            parameters = list(inspect.signature(function).parameters)
            assert parameters[:2] == ["q", "k"], f"{target} takes queries and keys first"
            if i == 0:
                attention = getattr(module, class_name)
                assert issubclass(attention, nn.Module)
                # by its own global name, which is what a tap replaces
                assert f"{function_name}(" in inspect.getsource(attention.forward)
                assert attention.forward.__globals__ is vars(module)
                calls = [n for n in attention.forward.__code__.co_names if "rotary" in n and n in vars(module)]
                assert calls == [function_name], "no second rotation"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_named_decoders_exist_with_layers_and_a_norm(family: Family):
    for name in family.decoder:
        model = build(name)
        assert type(model).__name__ == name
        assert isinstance(model.norm, nn.Module)
        assert len(model.layers) == LAYERS
        attention = type(model.layers[0].self_attn).__name__
        assert attention in family.attention
        assert hasattr(model.layers[0].self_attn, "scaling")
        assert hasattr(model.layers[0].self_attn, "layer_idx")


def test_the_second_function_of_qwen2_5_is_the_one_that_verls_attention_calls():
    from verl.models.transformers import qwen2_vl

    (_, older) = FAMILIES["qwen2_5_vl"].attention["Qwen2_5_VLAttention"]
    module_name, function_name = older.split(":")
    source = inspect.getsource(qwen2_vl.qwen2_vl_attn_forward)
    assert f"from {module_name} import {function_name}" in source, "imported at the call, so that a tap replaces it"
    assert f"= {function_name}(" in source


def test_no_name_belongs_to_two_families_or_to_vision():
    attention = [name for family in FAMILIES.values() for name in family.attention]
    decoders = [name for family in FAMILIES.values() for name in family.decoder]
    assert len(set(attention)) == len(attention)
    assert len(set(decoders)) == len(decoders)
    assert sorted(decoders) == DECODERS, "every decoder is tested above"
    assert not [name for name in (*attention, *decoders) if "Vision" in name]
    assert set(attention) == set(taps.ROTARY)
    assert set(decoders) == taps.DECODERS
    for model_type, family in FAMILIES.items():
        assert family.model_type == model_type


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen2_5_vl"])
def test_attention_of_the_vision_tower_is_not_taken_for_the_texts(model_type):
    from transformers import AutoModelForImageTextToText

    config = CONFIG_MAPPING[model_type]
    (decoder,) = FAMILIES[model_type].decoder
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48}
    extra = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16} if model_type == "qwen3_vl" else {}
    whole = config(text_config=TEXT[decoder]().to_dict(), vision_config={**vision, **extra})
    model = AutoModelForImageTextToText.from_config(whole).eval()
    modules, n_layers = text_attention_layers(model)
    assert n_layers == LAYERS
    assert {type(m).__name__ for m in modules.values()} == set(FAMILIES[model_type].attention)
    assert text_decoder(model) is model.model.language_model


# ------------------------------------------------------------------------------------------------------ log-sum-exp


class LseReads:
    def __init__(self) -> None:
        self.found: dict[int, tuple[torch.Tensor, ...]] = {}

    def attention(self, layer, query, key, scale, lse):
        self.found[layer] = query.clone(), key.clone(), lse.clone(), scale


def packed_inputs(name: str) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Two sequences in one row; transformers finds the second by its position 0."""
    ends = [0, 4, 9]
    given = inputs(name, B=1)
    starts = torch.cat([torch.arange(4), torch.arange(5)])[None]
    given["position_ids"] = starts.expand_as(given["position_ids"]).clone()
    if given["position_ids"].ndim == 3:  # the text positions come first when there are four rows
        given["position_ids"] = torch.cat([starts[None], given["position_ids"]])
    return given | {"attention_mask": None}, ends


@pytest.mark.parametrize("name", DECODERS)
def test_the_log_sum_exp_is_that_of_the_queries_and_keys_that_were_read(name):
    with flash_attention_on_cpu() as calls:
        model, (given, ends), reads = build(name, attention="flash_attention_2"), packed_inputs(name), LseReads()
        with torch.no_grad():
            plain = model(**given).last_hidden_state
            with ForwardTap(model, [0, 2], reads.attention, with_lse=True):
                probed = model(**given).last_hidden_state
        assert calls.lse == 2
        assert torch.equal(plain, probed)
        assert sorted(reads.found) == [0, 2]
        for query, key, lse, scale in reads.found.values():
            for a, b in itertools.pairwise(ends):
                weights = causal_weights(query[:, :, a:b], key[:, :, a:b], scale)
                logits = query[0, :, a:b].double() @ key[0].repeat_interleave(3, 0)[:, a:b].double().transpose(1, 2)
                recovered = (logits * scale - lse[:, a:b, None].double()).exp()
                seen = weights[0] > 0
                torch.testing.assert_close(recovered[seen], weights[0][seen], atol=1e-6, rtol=1e-5)
        assert calls.lse == 2  # the functions are their own again
        with torch.no_grad():
            model(**given)
        assert calls.lse == 2


def test_a_kernel_without_a_log_sum_exp_is_refused():
    for attention in ("eager", "sdpa"):
        model = build("Qwen3VLTextModel", attention=attention)
        tap = ForwardTap(model, [0, 1], LseReads().attention, with_lse=True)
        with refusal("P31", "no log-sum-exp"), torch.no_grad(), tap:
            model(**inputs("Qwen3VLTextModel"))


@pytest.mark.parametrize("broken", ["other tokens", "other type"])
def test_a_log_sum_exp_of_other_tokens_or_rounded_queries_is_refused(broken):
    tap = ForwardTap(build("Qwen3VLTextModel"), [1], LseReads().attention, with_lse=True)
    query, key = torch.zeros(1, 6, 9, 16), torch.zeros(1, 2, 9, 16)
    tokens = 8 if broken == "other tokens" else 9
    attend = tap._with_its_lse(lambda q, return_attn_probs: ("output", torch.zeros(6, tokens), None))
    with refusal("P31", "no log-sum-exp"), tap:
        tap._current, tap._pending = 1, (query, key, 1.0)
        seen = query[0].transpose(0, 1)
        assert attend(seen.bfloat16() if broken == "other type" else seen) == "output"
