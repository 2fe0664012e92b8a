"""A stand-in for flash-attn in plain torch, so that what transformers and verl do around the kernel runs without a GPU.

It takes the place of the package's functions where transformers and verl keep them, and computes the same thing:
causal attention aligned to the last key, sequences apart by ``cu_seqlens``, grouped key heads. It refuses what the
stand-in does not do instead of leaving it out.

Shape suffixes: B rows, S tokens of one row or sequence, L tokens of all sequences together, H query heads, G key heads,
D head dimension.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers.modeling_flash_attention_utils as flash_utils
import verl.models.transformers.qwen2_vl as verl_qwen2_vl

_ABSENT = object()


@dataclass
class FlashCalls:
    """Shapes the stand-in was called with, so that a test can tell that a path was taken.

    Attributes:
        dense: query shapes [B, S, H, D] of calls without ``cu_seqlens``.
        varlen: (query shape [L, H, D], number of sequences, causal) of the others.
        lse: how many of them were asked for the log-sum-exp.
    """

    dense: list[tuple[int, ...]] = field(default_factory=list)
    varlen: list[tuple[tuple[int, ...], int, bool]] = field(default_factory=list)
    lse: int = 0


def _attend(
    q_SHD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, scale: float | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [S, H, D] and the log-sum-exp of the logits [H, S], float32."""
    repeats = q_SHD.shape[1] // k_SGD.shape[1]
    assert repeats * k_SGD.shape[1] == q_SHD.shape[1], "query heads are not a multiple of key heads"
    q, k, v = (x.transpose(0, 1) for x in (q_SHD, k_SGD, v_SGD))
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        late = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
        scores = scores.masked_fill(late, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.float().logsumexp(-1)


def _require_plain(dropout_p: float, window_size: tuple[int, int], softcap: float, alibi_slopes: Any) -> None:
    assert not dropout_p, "the stand-in has no dropout"
    assert tuple(window_size) == (-1, -1), "the stand-in has no sliding window"
    assert not softcap, "the stand-in has no softcap"
    assert alibi_slopes is None, "the stand-in has no alibi slopes"


@contextmanager
def flash_attention_on_cpu(*, float32_in_verl: bool = True) -> Iterator[FlashCalls]:
    """Install the stand-in and take it out again, with everything it touched.

    It touches the loaded functions of ``transformers.modeling_flash_attention_utils`` and its check that flash-attn 2
    is installed, and the names that ``verl.models.transformers.qwen2_vl`` imports from the package when it is there.

    Args:
        float32_in_verl: verl's Qwen2.5-VL attention rounds float32 queries, keys and values to bfloat16, which the
            kernel needs. The stand-in does not; True takes that rounding out, so that float32 can be compared.

    Yields:
        A record of the calls.
    """
    calls = FlashCalls()

    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        _require_plain(dropout_p, window_size, softcap, alibi_slopes)
        calls.dense.append(tuple(q.shape))
        made = [_attend(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)]
        output = torch.stack([output for output, _ in made])
        if not return_attn_probs:
            return output
        calls.lse += 1
        return output, torch.stack([lse for _, lse in made]), None

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        _require_plain(dropout_p, window_size, softcap, alibi_slopes)
        assert block_table is None, "the stand-in has no block table"
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32, "the kernel takes int32 cu_seqlens"
        ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert ends_q[0] == ends_k[0] == 0, "sequences do not begin at the first token"
        assert (ends_q[-1], ends_k[-1]) == (q.shape[0], k.shape[0]), "tokens outside of the sequences"
        assert int(cu_seqlens_q.diff().max()) <= int(max_seqlen_q), "a sequence is longer than max_seqlen_q"
        assert int(cu_seqlens_k.diff().max()) <= int(max_seqlen_k), "a sequence is longer than max_seqlen_k"
        calls.varlen.append((tuple(q.shape), len(ends_q) - 1, causal))
        parts = zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
        made = [_attend(q[a:b], k[c:d], v[c:d], softmax_scale, causal) for a, b, c, d in parts]
        output = torch.cat([output for output, _ in made])
        if not return_attn_probs:
            return output
        calls.lse += 1
        return output, torch.cat([lse for _, lse in made], 1), None

    matrix = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    names: list[tuple[Any, str, Any]] = [
        (flash_utils, "_loaded_implementation", "flash_attention_2"),
        (flash_utils, "_flash_fn", flash_attn_func),
        (flash_utils, "_flash_varlen_fn", flash_attn_varlen_func),
        (flash_utils, "_flash_with_kvcache_fn", None),
        (flash_utils, "_pad_fn", flash_utils._pad_input),
        (flash_utils, "_unpad_fn", flash_utils._unpad_input),
        (
            flash_utils,
            "_process_flash_kwargs_fn",
            flash_utils._lazy_define_process_function(flash_attn_varlen_func),
        ),
        (
            flash_utils,
            "FLASH_ATTENTION_COMPATIBILITY_MATRIX",
            {**matrix, 2: {**matrix[2], "general_availability_check": lambda: True}},
        ),
        (verl_qwen2_vl, "flash_attn_func", flash_attn_func),
        (verl_qwen2_vl, "flash_attn_varlen_func", flash_attn_varlen_func),
        (verl_qwen2_vl, "_flash_supports_window_size", True),
        (verl_qwen2_vl, "_flash_supports_deterministic", True),
        (verl_qwen2_vl, "_flash_use_top_left_mask", False),
    ]
    if float32_in_verl:
        names.append((verl_qwen2_vl, "fa_peft_integration_check", lambda q, k, v, target_dtype=None: (q, k, v)))
    # modeling_utils imports the matrix by name
    import transformers.modeling_utils as modeling_utils

    names.append((modeling_utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", names[7][2]))
    before = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in names]
    try:
        for owner, name, value in names:
            setattr(owner, name, value)
        yield calls
    finally:
        for owner, name, value in before:
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextmanager
def linear_attention_of_packed_rows() -> Iterator[None]:
    """Install a stand-in for flash-linear-attention's kernel, which takes ``cu_seqlens`` and starts each sequence anew.

    transformers' own function for a machine without the package ignores ``cu_seqlens``. A model takes the function when
    it is built.
    """
    import transformers.models.qwen3_5.modeling_qwen3_5 as dense
    import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as moe

    def chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, cu_seqlens=None
    ):
        assert initial_state is None, "the stand-in has no initial state"
        ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        assert (ends[0], ends[-1]) == (0, q.shape[1]), "tokens outside of the sequences"
        assert q.shape[0] == 1 or cu_seqlens is None, "the kernel takes one packed row"
        parts = [
            dense.torch_chunk_gated_delta_rule(
                *(x[:, a:b] for x in (q, k, v)),
                g=g[:, a:b],
                beta=beta[:, a:b],
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )[0]
            for a, b in itertools.pairwise(ends)
        ]
        return torch.cat(parts, 1), None

    before = [(module, module.chunk_gated_delta_rule) for module in (dense, moe)]
    try:
        for module in (dense, moe):
            module.chunk_gated_delta_rule = chunk_gated_delta_rule
        yield
    finally:
        for module, function in before:
            module.chunk_gated_delta_rule = function
