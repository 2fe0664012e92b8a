"""Memory of a job by arithmetic, against real modules and counts by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.family_models import TINY
from support.public_shapes import MODELS, write_config
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer, Qwen3VLVisionBlock

from sayo_verl.launch.memory import (
    CUDA,
    GIB,
    VLLM_ASLEEP,
    Job,
    Shapes,
    estimate,
    kv_bytes,
    kv_cache,
    layer_bytes,
    shapes_of,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {name: write_config(name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture(scope="module")
def shapes(models) -> dict[str, Shapes]:
    return {name: shapes_of(AutoConfig.from_pretrained(folder)) for name, folder in models.items()}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_hub_and_of_a_count_by_hand(models, shapes, name):
    kind, text, _, published = MODELS[name]
    s = shapes[name]
    assert s.parameters == published
    with torch.device("meta"):
        net = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(models[name]))
    vision = sum(p.numel() for p in net.model.visual.parameters())
    h, q, k, f = s.hidden, s.heads * s.head, s.kv_heads * s.head, s.ffn
    norms = 2 * h + (2 * s.head if kind == "qwen3_vl" else q + 2 * k)  # of heads, or the biases
    layer = h * (q + 2 * k) + q * h + 3 * h * f + norms
    tied = text.get("tie_word_embeddings", False)
    assert s.parameters - vision == s.layers * layer + h + s.vocab * h * (1 if tied else 2)
    assert s.block == layer
    assert s.unit == (layer if tied else s.vocab * h)
    blocks = sum(p.numel() for block in net.model.visual.blocks for p in block.parameters())
    assert s.root == h + vision - blocks + (s.vocab * h if tied else 0)
    assert (s.trained, s.unit_trained, s.vision_trained, s.patches) == (s.parameters, s.unit, True, 4)


def test_an_adapter_is_counted_as_peft_makes_it(models):
    config = AutoConfig.from_pretrained(models["Qwen3-VL-8B"])
    s = shapes_of(config, lora_rank=16, target_modules="all-linear", exclude_modules=".*visual.*")
    layer = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 12288) * 3
    assert (s.trained, s.unit_trained, s.vision_trained) == (36 * 16 * layer, 16 * layer, False)
    assert s.parameters == MODELS["Qwen3-VL-8B"][3]
    assert shapes_of(config, lora_rank=16, target_modules="all-linear").vision_trained


@pytest.mark.parametrize("family", TINY)
def test_every_family_has_shapes(family, tmp_path):
    TINY[family].build(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    s = shapes_of(model.config)
    assert s.parameters == sum(p.numel() for p in model.parameters())
    assert s.layers == TINY[family].layers
    assert s.patches == 4
    assert 0 < s.block <= s.unit < s.parameters


def saved_bytes(layer: torch.nn.Module, run: Any) -> int:
    """Bytes of distinct storages that autograd keeps, but for weights."""
    own = {p.data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        output = run()
    del output
    return sum(kept.values())


@pytest.mark.parametrize(("name", "low", "high"), [("Qwen3-VL-8B", 0.98, 1.02), ("Qwen2.5-VL-7B", 1.0, 1.15)])
def test_a_layer_keeps_what_the_arithmetic_says(models, name, low, high):
    text = AutoConfig.from_pretrained(models[name]).get_text_config()
    text.hidden_size, text.intermediate_size = text.hidden_size // 4, text.intermediate_size // 4
    text.num_attention_heads, text.num_key_value_heads = text.num_attention_heads // 4, text.num_key_value_heads // 4
    text._attn_implementation, n = "sdpa", 128
    kind = Qwen3VLTextDecoderLayer if "3-VL" in name else Qwen2_5_VLDecoderLayer
    layer = kind(text, 0).to(torch.bfloat16)
    x = torch.randn(1, n, text.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    turn = torch.randn(*([1] if "3-VL" in name else [3, 1]), n, 128, dtype=torch.bfloat16)
    kept = saved_bytes(layer, lambda: layer(x, position_embeddings=(turn, turn), attention_mask=None)) / n
    q, k = text.num_attention_heads * 128, text.num_key_value_heads * 128
    assert low < layer_bytes(text.hidden_size, q, k, text.intermediate_size) / kept < high


@pytest.mark.parametrize("name", ["Qwen3-VL-8B", "Qwen2.5-VL-7B"])
def test_a_vision_block_keeps_no_more_than_the_arithmetic_says(models, name):
    vision, n = AutoConfig.from_pretrained(models[name]).vision_config, 64
    vision._attn_implementation = "sdpa"
    block = (Qwen3VLVisionBlock if "3-VL" in name else Qwen2_5_VLVisionBlock)(vision).to(torch.bfloat16)
    x = torch.randn(n, vision.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    turn = torch.randn(n, vision.hidden_size // vision.num_heads)
    ends = torch.tensor([0, n], dtype=torch.int32)
    kept = saved_bytes(block, lambda: block(x, cu_seqlens=ends, position_embeddings=(turn, turn))) / n
    h, f = vision.hidden_size, vision.intermediate_size
    assert kept <= layer_bytes(h, h, h, f) < 2 * kept


JOB = Job(
    shards=8,
    tensor_parallel=1,
    tokens=16384,
    log_prob_tokens=16384,
    visual_tokens=16000,
    max_prompt=6500,
    max_response=110,
    max_model_len=6610,
    weight_bytes=4,
    param_offload=False,
    optimizer_offload=False,
    host_policy=False,
    lora=False,
    checkpointing=True,
    unreduced=False,
    update_logits=2,
    log_prob_logits=2,
    utilization=0.6,
    sleeps=True,
    batched_tokens=8192,
    sequences=256,
    bucket=2**31,
    card=80.0,
    probe_sets=2,
    probe_profile=False,
    probe_hidden=False,
    foreach=True,
)


def totals(s: Shapes, **changes: Any) -> dict[str, float]:
    return {name: sum(terms.values()) for name, terms in estimate(s, dataclasses.replace(JOB, **changes)).items()}


def test_the_phases_of_a_full_job_by_hand(shapes):
    s = shapes["Qwen3-VL-8B"]
    phases = estimate(s, JOB)
    share = 8_767_123_696 * 4 / 8 / GIB
    update = phases["update"]
    assert update["weights"] == pytest.approx(share)
    assert update["Adam"] == pytest.approx(2 * share)
    assert update["gradients"] == pytest.approx(share + 6 * 151936 * 4096 / GIB)
    assert update["kept activations"] == pytest.approx((16384 * 36 * 4096 + 16000 * 4 * 27 * 1152) * 2 / GIB)
    assert phases["log-probs"]["logits"] == pytest.approx(16384 * 151936 * 2 / GIB)
    assert phases["optimizer step"] == pytest.approx(
        {
            "weights": share,
            "gradients": share,
            "Adam": 2 * share,
            "a copy": share,
            "CUDA": CUDA,
            "vLLM asleep": VLLM_ASLEEP,
        }
    )
    rollout = phases["rollout"]
    assert rollout["vLLM weights"] + rollout["vLLM forward"] + rollout["KV cache"] == pytest.approx(0.6 * 80)
    assert sum(rollout.values()) == pytest.approx(0.6 * 80 + 3 * share + CUDA + VLLM_ASLEEP)
    assert phases["weight sync"]["bucket"] == pytest.approx(2 + 151936 * 4096 * 4 / GIB)


def test_what_offloading_frees_and_when(shapes):
    s = shapes["Qwen3-VL-8B"]
    plain, offloaded = totals(s), totals(s, param_offload=True, optimizer_offload=True)
    share = s.parameters * 4 / 8 / GIB
    assert plain["rollout"] - offloaded["rollout"] == pytest.approx(3 * share)
    assert plain["update"] == offloaded["update"], "verl loads everything for the update"
    held = totals(s, host_policy=True)
    assert plain["optimizer step"] - held["optimizer step"] == pytest.approx(5 * share)
    assert totals(s, sleeps=False)["update"] == pytest.approx(plain["update"] + 0.6 * 80 - VLLM_ASLEEP)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(MODELS)),
    st.fixed_dictionaries(
        {"shards": st.integers(1, 64), "tokens": st.integers(64, 32768), "checkpointing": st.booleans()}
    ),
    st.sampled_from(["tokens", "log_prob_tokens", "weight_bytes", "update_logits", "probe_sets", "bucket"]),
)
def test_more_of_anything_needs_no_less_and_more_cards_no_more(shapes, name, some, field):
    s, twice = shapes[name], {**dataclasses.asdict(JOB), **some}[field] * 2
    less, more = totals(s, **some), totals(s, **{**some, field: twice})
    assert all(more[phase] >= less[phase] > 0 for phase in less)
    assert more != less
    spread = totals(s, **{**some, "shards": 2 * some["shards"]})
    assert all(spread[phase] < less[phase] for phase in less)


def test_kv_cache_of_a_token(shapes):
    assert kv_bytes(shapes["Qwen3-VL-8B"], 1) == 147_456
    assert kv_bytes(shapes["Qwen2.5-VL-7B"], 2) == 28_672
    assert kv_bytes(shapes["Qwen2.5-VL-7B"], 8) == kv_bytes(shapes["Qwen2.5-VL-7B"], 4), "heads are copied"
    weights, forward, cache = kv_cache(shapes["Qwen3-VL-8B"], JOB)
    assert weights == pytest.approx(8_767_123_696 * 2 / GIB)
    assert weights + forward + cache == pytest.approx(48)
