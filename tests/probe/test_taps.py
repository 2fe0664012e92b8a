"""Queries, keys and hidden states taken inside tiny models of every family, against what their eager attention uses.

Shape suffixes: B rows, S tokens, H query heads, G key heads, D head dimension.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
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
    rotary_functions,
    training_step,
)
from torch import nn

from sayo_verl.errors import SayoError
from sayo_verl.probe import taps
from sayo_verl.probe.taps import (
    ForwardTap,
    asked_layers,
    attention_kinds,
    check_full_attention,
    resolve_layers,
    text_attention_layers,
    text_decoder,
)

pytestmark = pytest.mark.usefixtures("rotary_functions_stay")


@contextmanager
def listening_to_eager(name: str):
    """What the family's eager attention is called with: layer -> (query, key, scale)."""
    module, heard = modeling(name), {}
    original = module.eager_attention_forward

    def listening(attention, query, key, *args, scaling, **kwargs):
        heard[attention.layer_idx] = query.clone(), key.clone(), scaling
        return original(attention, query, key, *args, scaling=scaling, **kwargs)

    module.eager_attention_forward = listening
    try:
        yield heard
    finally:
        module.eager_attention_forward = original


# -------------------------------------------------------------------------------------------------- what is handed over


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tapped_queries_and_keys_give_the_models_eager_attention(name, dtype):
    model, reads = build(name, dtype=dtype), Reads()
    with torch.no_grad(), listening_to_eager(name) as heard, ForwardTap(model, range(LAYERS), reads.attention):
        out = model(**inputs(name), output_attentions=True)
    assert reads.order == list(range(LAYERS))
    # transformers takes the softmax in float32 also in a float64 model: its weights agree less than its logits
    largest, logits = [], []
    for layer in range(LAYERS):
        (query, key, scale), (heard_query, heard_key, heard_scale) = reads.layers[layer], heard[layer]
        assert query.shape == (2, 6, 9, query.shape[-1])
        assert key.shape == (2, 2, 9, query.shape[-1])
        assert query.dtype == key.dtype == dtype
        assert scale == heard_scale
        logits.append((causal_weights(query, key, scale) - causal_weights(heard_query, heard_key, scale)).abs().max())
        largest.append((causal_weights(query, key, scale) - out.attentions[layer].double()).abs().max())
        assert torch.equal(query, heard_query)
        assert torch.equal(key, heard_key)
    print(
        f"{name} {dtype}: from eager's own queries and keys {max(logits):.1e}, from eager's weights largest "
        f"{max(largest):.1e}, mean {sum(largest) / LAYERS:.1e}"
    )
    assert max(logits) < 1e-9
    assert max(largest) < (1e-5 if dtype == torch.float32 else 1e-6)
    spread = out.attentions[0][0, :, -1].std(-1).max()
    assert spread > 0.02, "attention of the tiny model is not near uniform"


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_last_hidden_state_is_the_models(name, attention):
    model, reads = build(name, attention=attention), Reads()
    with torch.no_grad(), ForwardTap(model, [], reads.attention, reads.last_hidden):
        out = model(**inputs(name))
    assert len(reads.hidden) == 1
    assert torch.equal(reads.hidden[0], out.last_hidden_state)
    assert reads.order == []


@pytest.mark.parametrize("name", DECODERS)
def test_only_asked_layers_are_read_and_the_kernel_does_not_matter(name):
    eager, sdpa = Reads(), Reads()
    for attention, reads in (("eager", eager), ("sdpa", sdpa)):
        with torch.no_grad():
            model = build(name, attention=attention)
            with ForwardTap(model, [2, 0], reads.attention):
                model(**inputs(name))
        assert reads.order == [0, 2], "in the order of the forward pass"
        assert reads.hidden == []
    for layer in (0, 2):
        for a, b in zip(eager.layers[layer][:2], sdpa.layers[layer][:2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_readers_get_no_graph_and_may_not_build_one():
    name = "Qwen3VLTextModel"
    model, reads = build(name).train(), Reads()
    with ForwardTap(model, [0, 1], reads.attention, reads.last_hidden):
        assert model(**inputs(name)).last_hidden_state.requires_grad
    assert reads.gradients
    assert not any(reads.gradients)


def test_lora_is_in_what_is_read():
    peft = pytest.importorskip("peft")
    name = "Qwen3VLTextModel"
    plain, adapted = Reads(), Reads()
    model = build(name)
    with torch.no_grad(), ForwardTap(model, [1], plain.attention):
        model(**inputs(name))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"])).eval()
    with torch.no_grad():
        for n, parameter in wrapped.named_parameters():
            if "lora_B" in n:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(n)))
        with ForwardTap(wrapped, [1], adapted.attention):
            out = wrapped(**inputs(name), output_attentions=True)
    error = (causal_weights(*adapted.layers[1]) - out.attentions[1].double()).abs().max().item()
    moved = (causal_weights(*adapted.layers[1]) - causal_weights(*plain.layers[1])).abs().max().item()
    print(f"with an adapter: {error:.1e} from eager, {moved:.1e} from the base model")
    assert error < 1e-5
    assert moved > 1e-2


def test_wrapped_and_subclassed_modules_are_found():
    """FSDP2 gives a module a subclass of its class; other wrappers put modules around it."""
    name = "Qwen3VLTextModel"
    model, reads = build(name), Reads()
    for module in [model, *model.modules()]:
        if type(module).__module__.startswith("transformers"):
            cls = type(module)
            module.__class__ = type(f"FSDP{cls.__name__}", (cls,), {})
    wrapped = nn.ModuleDict({"module": nn.Sequential(model)})
    assert text_decoder(wrapped) is model
    with torch.no_grad(), listening_to_eager(name) as heard, ForwardTap(wrapped, [2], reads.attention):
        model(**inputs(name))
    for read, used in zip(reads.layers[2][:2], heard[2][:2], strict=True):
        assert torch.equal(read, used)


# ----------------------------------------------------------------------------------------------------- non-interference


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outputs_gradients_and_random_numbers_are_those_without_a_tap(name, attention):
    model = build(name, attention=attention, attention_dropout=0.2).train()
    with torch.no_grad():
        one, two = (model(**inputs(name)).last_hidden_state for _ in range(2))
        assert not torch.equal(one, two), "dropout is on"
    plain, tapped, after = (training_step(model, name, tap) for tap in (False, True, False))
    for found in (tapped, after):
        assert torch.equal(found[0], plain[0])
        assert len(found[1]) == len(plain[1]) > 10
        assert all(torch.equal(a, b) for a, b in zip(found[1], plain[1], strict=True))
        assert torch.equal(found[2], plain[2])
    assert sum(g.abs().sum() for g in plain[1]) > 0


@pytest.mark.parametrize("name", DECODERS)
def test_evaluation_is_bitwise_that_without_a_tap(name):
    model, reads = build(name, attention="sdpa"), Reads()
    state = torch.get_rng_state()
    with torch.no_grad():
        plain = model(**inputs(name)).last_hidden_state
        with ForwardTap(model, range(LAYERS), reads.attention, reads.last_hidden):
            tapped = model(**inputs(name)).last_hidden_state
    assert torch.equal(plain, tapped)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_touched_before_entering_and_after_leaving():
    name = "Qwen3VLTextModel"
    model, before = build(name), rotary_functions()
    parameters = copy.deepcopy(model.state_dict())
    tap = ForwardTap(model, [0, 1], Reads().attention, Reads().last_hidden)
    assert hooks(model) == 0
    assert rotary_functions() == before
    with tap, torch.no_grad():
        assert hooks(model) == 2 * 2 + 1
        changed = [t for t, f in rotary_functions().items() if f is not before[t]]
        assert changed == ["transformers.models.qwen3_vl.modeling_qwen3_vl:apply_rotary_pos_emb"]
        model(**inputs(name))
    assert hooks(model) == 0
    assert rotary_functions() == before
    assert all(torch.equal(v, parameters[k]) for k, v in model.state_dict().items())


def test_both_functions_of_qwen2_5_are_listened_to_and_given_back():
    """verl's attention for packed rows calls the older family's function."""
    name = "Qwen2_5_VLTextModel"
    model, before = build(name), rotary_functions()
    with ForwardTap(model, [0], Reads().attention), torch.no_grad():
        changed = [t for t, f in rotary_functions().items() if f is not before[t]]
        assert [t.split(":")[0].rsplit(".", 1)[1] for t in changed] == ["modeling_qwen2_5_vl", "modeling_qwen2_vl"]
        model(**inputs(name))
    assert rotary_functions() == before


@pytest.mark.parametrize("where", ["in the layer", "in the reader", "in the hidden reader", "around the model"])
def test_everything_is_given_back_when_something_raises(where):
    name = "Qwen3VLTextModel"
    model, before, reads = build(name), rotary_functions(), Reads()

    def fail(*_: object) -> None:
        raise ValueError("out of memory")

    attention = fail if where == "in the reader" else reads.attention
    hidden = fail if where == "in the hidden reader" else reads.last_hidden
    if where == "in the layer":
        model.layers[1].self_attn.o_proj.forward = fail
    tap = ForwardTap(model, [0, 1], attention, hidden)
    # and not P04, which would hide it
    with pytest.raises(ValueError, match="out of memory"), tap, torch.no_grad():  # noqa: PT012
        model(**inputs(name))
        fail()
    assert hooks(model) == 0
    assert rotary_functions() == before


def test_nothing_stays_behind_when_a_function_is_not_there(monkeypatch):
    """Another transformers may have renamed it: the tap must not stay half open."""
    name = "Qwen2_5_VLTextModel"
    model, before = build(name), rotary_functions()
    first, _ = taps.ROTARY["Qwen2_5_VLAttention"]
    gone = {**taps.ROTARY, "Qwen2_5_VLAttention": (first, first.replace("apply_multimodal", "apply_another"))}
    monkeypatch.setattr(taps, "ROTARY", gone)
    with pytest.raises(SayoError, match=r"SAYO-P26: .*apply_another.*fix: install the version of transformers"):
        ForwardTap(model, [0, 1], Reads().attention, Reads().last_hidden)
    assert rotary_functions() == before
    assert hooks(model) == 0


def test_a_rotation_outside_of_the_asked_layers_is_never_read():
    """Also after a layer failed half-way and the failure was caught: the next call is not that layer's."""
    name = "Qwen3VLTextModel"
    model, reads, module = build(name), Reads(), modeling(name)
    q, k, angle = torch.randn(1, 6, 4, 16), torch.randn(1, 2, 4, 16), torch.rand(1, 4, 16)
    own = module.apply_rotary_pos_emb(q, k, angle, angle)
    broken = model.layers[0].self_attn.o_proj

    def fail(*_: object) -> None:
        raise ValueError("first try")

    with refusal("P04") as caught, ForwardTap(model, [0], reads.attention), torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(module.apply_rotary_pos_emb(q, k, angle, angle), own, strict=True))
        assert reads.order == []
        broken.forward = fail
        with pytest.raises(ValueError, match="first try"):
            model(**inputs(name))
        assert reads.order == [0]
        module.apply_rotary_pos_emb(q, k, angle, angle)
        assert reads.order == [0], "the failed layer is over"
        del broken.forward
        model(**inputs(name))
    assert caught.value.got == {0: 2}, "a forward that is tried again is two readings"


# --------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("asked", "given"), [((-1,), (35,)), ((0, -1), (0, 35)), ((35, 3), (35, 3)), ((-36,), (0,))], ids=str
)
def test_layer_numbers(asked, given):
    assert resolve_layers(asked, 36, where=WHERE) == given


@pytest.mark.parametrize("asked", [(36,), (-37,), (), (-1, 35), (3, 3)], ids=str)
def test_layers_that_do_not_exist_are_refused(asked):
    with refusal("P03", "36 decoder layers") as caught:
        resolve_layers(asked, 36, where=WHERE)
    assert caught.value.where == WHERE
    assert "-36..35" in str(caught.value)


@pytest.mark.parametrize("name", DECODERS)
def test_asked_layers_of_a_model(name):
    model = build(name)
    modules, n_layers = text_attention_layers(model)
    assert n_layers == LAYERS
    assert sorted(modules) == list(range(LAYERS))
    assert all(modules[n] is model.layers[n].self_attn for n in modules)
    # as named, from either end; two names may mean one layer, in statistics of two methods
    assert asked_layers(model, [-1, 0, 2], where=WHERE) == {-1: 2, 0: 0, 2: 2}
    assert asked_layers(model, [], where=WHERE) == {}
    for missing in (LAYERS, -LAYERS - 1):
        with refusal("P03", f"{LAYERS} decoder layers") as caught:
            asked_layers(model, [0, missing], where=WHERE)
        assert caught.value.where == WHERE
        assert caught.value.got == [missing]


def test_a_layer_without_attention_is_refused():
    """Hybrid models have layers with linear attention: they are counted, and cannot be read."""
    model = build("Qwen3VLTextModel")
    model.layers[1].self_attn = nn.Identity()
    assert text_attention_layers(model)[1] == LAYERS
    with refusal("P11", "layer 1 is not a full-attention layer") as caught:
        asked_layers(model, [-1, 1], where=WHERE)
    assert caught.value.got == {1: "no softmax attention"}
    assert caught.value.wanted == "one of [0, 2]"
    with refusal("P11", "layer 1"):
        ForwardTap(model, [0, 1], Reads().attention)
    with refusal("P11", "layer 7"):
        ForwardTap(model, [7], Reads().attention)


@pytest.mark.parametrize(
    ("name", "full"), [("Qwen2_5_VLTextModel", [0]), ("Qwen3Model", [0]), ("Qwen3MoeModel", [])], ids=str
)
def test_a_sliding_window_is_refused_by_name(name, full, monkeypatch):
    """Its rows do not attend to the whole sequence, so their softmax is another one."""
    config = TEXT[name]()
    switched_on = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None}
    window = type(config)(**{**config.to_dict(), **switched_on})
    monkeypatch.setitem(TEXT, name, lambda: window)
    model = build(name)
    for tried in (lambda: asked_layers(model, [-1], where=WHERE), lambda: ForwardTap(model, [2], Reads().attention)):
        with refusal("P11", "layer 2 is not a full-attention layer") as caught:
            tried()
        assert caught.value.got == {2: "a sliding window of 4 tokens"}
        assert caught.value.wanted == f"one of {full}"
    if full:
        assert asked_layers(model, full, where=WHERE) == {0: 0}
        reads = Reads()
        with torch.no_grad(), ForwardTap(model, full, reads.attention):
            out = model(**inputs(name), output_attentions=True)
        assert (causal_weights(*reads.layers[0]) - out.attentions[0].double()).abs().max() < 1e-5
        assert (out.attentions[2][:, :, -1, :5] == 0).all(), "the window is really on in the others"


@pytest.mark.parametrize("name", DECODERS)
def test_no_window_without_the_switch(name):
    """Configurations carry sliding_window=4096 also where it is not used."""
    modules, n_layers = text_attention_layers(build(name))
    check_full_attention(range(LAYERS), attention_kinds(modules, n_layers), where=WHERE)
