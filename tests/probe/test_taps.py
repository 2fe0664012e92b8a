"""Queries, keys and hidden states taken inside tiny models of every family, against what their eager attention uses.

Shape suffixes: B rows, S tokens, H query heads, G key heads, D head dimension.
"""

import copy
import importlib
import inspect
import itertools
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.flash_stand_in import flash_attention_on_cpu
from support.probe_rows import refusal
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    Qwen2_5_VLTextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLMoeTextConfig,
    Qwen3VLTextConfig,
)

from sayo_verl.errors import SayoError
from sayo_verl.models.families import FAMILIES, Family, family_of
from sayo_verl.probe import taps
from sayo_verl.probe.taps import (
    ForwardTap,
    asked_layers,
    check_full_attention,
    resolve_layers,
    text_attention_layers,
    text_decoder,
)

WHERE = "algorithm.attn.region.layers"
LAYERS = 3
SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,  # at 0.02 attention is near uniform and a wrong key goes unseen
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def rope(**sections: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **sections}


# decoder class in FAMILIES -> its configuration; head_dim is not hidden_size / heads where a family allows it
TEXT = {
    "Qwen3VLTextModel": lambda: Qwen3VLTextConfig(
        **SIZES, head_dim=16, rope_parameters=rope(mrope_section=[4, 2, 2], mrope_interleaved=True)
    ),
    "Qwen3VLMoeTextModel": lambda: Qwen3VLMoeTextConfig(
        **SIZES,
        **EXPERTS,
        head_dim=16,
        mlp_only_layers=[1],
        rope_parameters=rope(mrope_section=[4, 2, 2], mrope_interleaved=True),
    ),
    "Qwen2_5_VLTextModel": lambda: Qwen2_5_VLTextConfig(**SIZES, rope_parameters=rope(mrope_section=[2, 1, 1])),
    "Qwen3Model": lambda: Qwen3Config(**SIZES, head_dim=16, rope_parameters=rope()),
    "Qwen3MoeModel": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, rope_parameters=rope()),
}
DECODERS = sorted(TEXT)
PACKAGES = {
    "Qwen3VLTextModel": "qwen3_vl",
    "Qwen3VLMoeTextModel": "qwen3_vl_moe",
    "Qwen2_5_VLTextModel": "qwen2_5_vl",
    "Qwen3Model": "qwen3",
    "Qwen3MoeModel": "qwen3_moe",
}


def modeling(name: str) -> Any:
    return importlib.import_module(f"transformers.models.{PACKAGES[name]}.modeling_{PACKAGES[name]}")


def build(name: str, *, attention: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A random text model; also norms and biases are random, so that leaving one out shows."""
    config = TEXT[name]()
    for key, value in changes.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    config._attn_implementation = attention
    config._experts_implementation = "eager"  # grouped products have no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(modeling(name), name)(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn(parameter.shape).to(dtype)
    return model


def inputs(name: str, B: int = 2, S: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 50, (B, S), generator=generator)
    positions = torch.arange(S).expand(B, S).clone()
    if not name.startswith(("Qwen3Model", "Qwen3Moe")):  # time, height and width, as in an image
        positions = torch.stack([positions, positions // 2, positions % 3])
    return {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids), "use_cache": False}


class Reads:
    """Keeps clones of everything that a tap hands over."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}
        self.order: list[int] = []
        self.hidden: list[torch.Tensor] = []
        self.gradients: list[bool] = []

    def attention(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        self.gradients += [query.requires_grad, key.requires_grad, torch.is_grad_enabled()]
        self.order.append(layer)
        self.layers[layer] = query.clone(), key.clone(), scale

    def last_hidden(self, hidden: torch.Tensor) -> None:
        self.gradients += [hidden.requires_grad, torch.is_grad_enabled()]
        self.hidden.append(hidden.clone())


def causal_weights(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """float64 [B, H, S, S], heads one at a time."""
    B, H, S, _ = query.shape
    out = torch.zeros(B, H, S, S, dtype=torch.float64)
    for h in range(H):
        logits = query[:, h].double() @ key[:, h // (H // key.shape[1])].double().transpose(1, 2) * scale
        out[:, h] = logits.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    return out


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


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    )


def rotary_functions() -> dict[str, Any]:
    """Every function that a tap may replace, as it is now."""
    targets = {t for family in FAMILIES.values() for functions in family.attention.values() for t in functions}
    return {t: getattr(importlib.import_module(t.split(":")[0]), t.split(":")[1]) for t in sorted(targets)}


@pytest.fixture(autouse=True)
def _functions_stay_transformers_own():
    before = rotary_functions()
    assert all(f.__module__.startswith("transformers.") for f in before.values())
    yield
    assert rotary_functions() == before


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


def training_step(model: nn.Module, name: str, tap: bool) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """(output, gradients, state of the generator) of one forward and backward with dropout on."""
    model.zero_grad()
    torch.manual_seed(11)
    reads = Reads()
    if tap:
        with ForwardTap(model, range(LAYERS), reads.attention, reads.last_hidden):
            hidden = model(**inputs(name)).last_hidden_state
        assert reads.order == list(range(LAYERS))
    else:
        hidden = model(**inputs(name)).last_hidden_state
    hidden.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return hidden.detach(), gradients, torch.get_rng_state()


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
    assert caught.value.got == "no softmax attention"
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
        assert caught.value.got == "a sliding window of 4 tokens"
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
    modules, _ = text_attention_layers(build(name))
    check_full_attention(range(LAYERS), modules, where=WHERE)


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
