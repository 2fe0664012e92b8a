# Triton's compiler supports neither starred nor annotated tuples.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""The Triton kernels of ``sayo_verl.probe.fast``, which imports them on its first call because Triton may be missing.

Both are flash attention without values. They use only language features that Triton's interpreter supports. Reductions
name their combining function, because ``tl.sum`` and ``tl.max`` cannot be interpreted in a process that imported Triton
before TRITON_INTERPRET was set. The file is long because each argument has its own line.

Shape suffixes: M lanes of a tile (rows x query heads of one key head), N keys or columns of a tile, R rows of a tile,
D head dimension (padded to a power of two), K sets.
"""

import triton
import triton.language as tl
from triton.language.standard import _elementwise_max, _sum_combine

# query batch, query start, rows, position, key batch, key start, first row of the output, first stretch, stretches,
# first tile of keys
TILE_FIELDS = tl.constexpr(10)
KEY_TILE_FIELDS = tl.constexpr(3)  # key batch, first key, keys
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _products(query_MD, key_ND, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """float32 [M, N]. WIDEN is for Triton's interpreter, which multiplies the bits of bfloat16 as integers."""
    if WIDEN:
        query_MD = query_MD.to(tl.float32)
        key_ND = key_ND.to(tl.float32)
    return tl.dot(query_MD, tl.trans(key_ND), input_precision=PRECISION)


@triton.jit
def _tile_of_keys(
    key, n, last, key_stride_s, key_stride_d, D: tl.constexpr, D_PAD: tl.constexpr, BOUNDED: tl.constexpr
):
    """Keys n as [N, D]. If BOUNDED, keys from ``last`` on are zeros."""
    d = tl.arange(0, D_PAD)
    at_ND = key + n.to(tl.int64)[:, None] * key_stride_s + d[None, :] * key_stride_d
    if BOUNDED:
        key_ND = tl.load(at_ND, mask=(n[:, None] < last) & (d[None, :] < D), other=0.0)
    else:
        key_ND = tl.load(at_ND, mask=d[None, :] < D, other=0.0)
    return key_ND


@triton.jit
def _add_to_sets(masses_K, p_MN, share_M, sets_at_N, exists_N, whole, mixed, N_SETS: tl.constexpr):
    """Add a tile's sums to the sums of the sets.

    If all keys of a tile belong to a set, as in nearly all of an image, ``share_M`` is the set's sum. Only for a set
    with some of the keys are keys selected.
    """
    shared_K = ()
    for k in tl.static_range(N_SETS):
        shared_K = shared_K + (masses_K[k] + share_M * ((whole >> k) & 1),)
    masses_K = shared_K
    if mixed > 0:
        sets_N = tl.load(sets_at_N, mask=exists_N, other=0)
        selected_K = ()
        for k in tl.static_range(N_SETS):
            sum_M = masses_K[k]
            if (mixed >> k) & 1 > 0:
                member_N = (sets_N >> k) & 1
                sum_M += tl.reduce(tl.where(member_N[None, :] != 0, p_MN, 0.0), 1, _sum_combine)
            selected_K = selected_K + (sum_M,)
        masses_K = selected_K
    return masses_K


@triton.jit
def members_kernel(sets, key_tiles, members, sets_stride_b, sets_stride_s, N_SETS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Find for each tile of keys, as bits, the sets with all of its keys and the sets with some. Grid (tiles,)."""
    tile = key_tiles + tl.program_id(0) * KEY_TILE_FIELDS
    n = tl.arange(0, BLOCK_N)
    exists_N = n < tl.load(tile + 2)
    at_N = sets + tl.load(tile).to(tl.int64) * sets_stride_b + (tl.load(tile + 1) + n).to(tl.int64) * sets_stride_s
    sets_N = tl.load(at_N, mask=exists_N, other=0)
    whole, mixed = 0, 0
    for k in tl.static_range(N_SETS):
        member_N = (sets_N >> k) & 1
        some = tl.reduce(member_N, 0, _elementwise_max)
        none = tl.reduce(tl.where(exists_N, 1 - member_N, 0), 0, _elementwise_max)
        whole = whole | ((some & (1 - none)) << k)
        mixed = mixed | ((some & none) << k)
    tl.store(members + 2 * tl.program_id(0), whole)
    tl.store(members + 2 * tl.program_id(0) + 1, mixed)


@triton.jit
def _visit_keys(
    max_M,
    sum_M,
    masses_K,
    query_MD,
    position_M,
    key,
    sets,
    members,
    first,
    last,
    key_stride_s,
    key_stride_d,
    sets_stride_s,
    scale_log2,
    N_SETS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Online softmax over keys first .. last - 1, tile by tile. Only DIAGONAL compares positions and bounds."""
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        wide_n = n.to(tl.int64)
        key_ND = _tile_of_keys(key, n, last, key_stride_s, key_stride_d, D, D_PAD, DIAGONAL)
        logits_MN = _products(query_MD, key_ND, PRECISION, WIDEN)
        if DIAGONAL:
            logits_MN = tl.where(n[None, :] <= position_M[:, None], logits_MN, float("-inf"))
        # every lane sees key 0, which lies in the first tile, so the maximum is finite from then on
        new_max_M = tl.maximum(max_M, tl.reduce(logits_MN, 1, _elementwise_max) * scale_log2)
        # one multiply-add per logit scales and shifts it before the exponential
        p_MN = tl.exp2(logits_MN * scale_log2 - new_max_M[:, None])
        shrink_M = tl.exp2(max_M - new_max_M)
        share_M = tl.reduce(p_MN, 1, _sum_combine)
        sum_M = sum_M * shrink_M + share_M
        shrunk_K = ()
        for k in tl.static_range(N_SETS):
            shrunk_K = shrunk_K + (masses_K[k] * shrink_M,)
        masses_K = shrunk_K
        whole = tl.load(members + 2 * (start // BLOCK_N))
        mixed = tl.load(members + 2 * (start // BLOCK_N) + 1)
        masses_K = _add_to_sets(masses_K, p_MN, share_M, sets + wide_n * sets_stride_s, n < last, whole, mixed, N_SETS)
        max_M = new_max_M
    return max_M, sum_M, masses_K


@triton.jit
def _visit_marked_keys(
    masses_K,
    query_MD,
    lse_M,
    position_M,
    key,
    sets,
    members,
    first,
    last,
    key_stride_s,
    key_stride_d,
    sets_stride_s,
    scale_log2,
    N_SETS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Like ``_visit_keys`` with a given log-sum-exp (to base 2): computes only a sum per set."""
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        wide_n = n.to(tl.int64)
        key_ND = _tile_of_keys(key, n, last, key_stride_s, key_stride_d, D, D_PAD, DIAGONAL)
        p_MN = tl.exp2(_products(query_MD, key_ND, PRECISION, WIDEN) * scale_log2 - lse_M[:, None])
        if DIAGONAL:  # a later key is not part of the log-sum-exp, so its term may have any value
            p_MN = tl.where(n[None, :] <= position_M[:, None], p_MN, 0.0)
        whole = tl.load(members + 2 * (start // BLOCK_N))
        mixed = tl.load(members + 2 * (start // BLOCK_N) + 1)
        share_M = tl.full([BLOCK_M], 0.0, tl.float32)
        if whole > 0:
            share_M = tl.reduce(p_MN, 1, _sum_combine)
        masses_K = _add_to_sets(masses_K, p_MN, share_M, sets + wide_n * sets_stride_s, n < last, whole, mixed, N_SETS)
    return masses_K


@triton.jit(do_not_specialize=["n_rows"])
def masses_kernel(
    query,
    key,
    sets,
    members,
    tiles,
    marked,
    mass,
    lse,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    key_stride_d,
    sets_stride_b,
    sets_stride_s,
    n_rows,
    scale_log2,
    LSE_GIVEN: tl.constexpr,
    GROUP: tl.constexpr,
    N_SETS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of query rows x one key head; grid (tiles, G). Lane m is query head m % GROUP of row m // GROUP.

    With LSE_GIVEN, ``lse`` is read and only the keys in ``marked`` are visited. Otherwise ``lse`` is written.
    """
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    query_batch = tl.load(tile).to(tl.int64)
    query_start = tl.load(tile + 1).to(tl.int64)
    rows = tl.load(tile + 2)
    position = tl.load(tile + 3)
    key_batch = tl.load(tile + 4).to(tl.int64)
    key_start = tl.load(tile + 5).to(tl.int64)
    out_start = tl.load(tile + 6).to(tl.int64)
    key_head = tl.program_id(1)

    m = tl.arange(0, BLOCK_M)
    row_M = m // GROUP
    head_M = key_head * GROUP + m % GROUP
    real_M = row_M < rows
    d = tl.arange(0, D_PAD)
    at_MD = (
        query
        + query_batch * query_stride_b
        + ((query_start + row_M) * query_stride_s + head_M.to(tl.int64) * query_stride_h)[:, None]
        + d[None, :] * query_stride_d
    )
    query_MD = tl.load(at_MD, mask=real_M[:, None] & (d[None, :] < D), other=0.0)
    key += key_batch * key_stride_b + key_head.to(tl.int64) * key_stride_h + key_start * key_stride_s
    sets += key_batch * sets_stride_b + key_start * sets_stride_s
    members += 2 * tl.load(tile + 9)

    n_heads = tl.num_programs(1) * GROUP
    out_M = (out_start + row_M) * n_heads + head_M
    masses_K = ()
    for _ in tl.static_range(N_SETS):
        masses_K = masses_K + (tl.full([BLOCK_M], 0.0, tl.float32),)
    # Every row of the tile sees every key before `seen_by_all`. Lanes without a row (zero queries) are never stored.
    seen_by_all = (position + 1) // BLOCK_N * BLOCK_N
    if LSE_GIVEN:
        lse_M = tl.load(lse + out_M, mask=real_M, other=0.0) * LOG2_E
        first_stretch = tl.load(tile + 7)
        for stretch in range(first_stretch, first_stretch + tl.load(tile + 8)):
            first = tl.load(marked + 2 * stretch)  # a multiple of BLOCK_N, as `seen_by_all` is
            last = tl.minimum(tl.load(marked + 2 * stretch + 1), position + rows)
            masses_K = _visit_marked_keys(
                masses_K, query_MD, lse_M, position + row_M, key, sets, members, first, tl.minimum(last, seen_by_all),
                key_stride_s, key_stride_d, sets_stride_s, scale_log2, N_SETS, D, D_PAD, BLOCK_M, BLOCK_N, PRECISION,
                WIDEN, False,
            )  # fmt: skip
            masses_K = _visit_marked_keys(
                masses_K, query_MD, lse_M, position + row_M, key, sets, members, tl.maximum(first, seen_by_all), last,
                key_stride_s, key_stride_d, sets_stride_s, scale_log2, N_SETS, D, D_PAD, BLOCK_M, BLOCK_N, PRECISION,
                WIDEN, True,
            )  # fmt: skip
        for k in tl.static_range(N_SETS):
            tl.store(mass + k * n_rows.to(tl.int64) * n_heads + out_M, masses_K[k], mask=real_M)
    else:
        max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sum_M = tl.full([BLOCK_M], 0.0, tl.float32)
        max_M, sum_M, masses_K = _visit_keys(
            max_M, sum_M, masses_K, query_MD, position + row_M, key, sets, members, 0, seen_by_all,
            key_stride_s, key_stride_d, sets_stride_s, scale_log2, N_SETS, D, D_PAD, BLOCK_N, PRECISION, WIDEN, False,
        )  # fmt: skip
        max_M, sum_M, masses_K = _visit_keys(
            max_M, sum_M, masses_K, query_MD, position + row_M, key, sets, members, seen_by_all, position + rows,
            key_stride_s, key_stride_d, sets_stride_s, scale_log2, N_SETS, D, D_PAD, BLOCK_N, PRECISION, WIDEN, True,
        )  # fmt: skip
        tl.store(lse + out_M, (max_M + tl.log2(sum_M)) * LN_2, mask=real_M)
        for k in tl.static_range(N_SETS):
            tl.store(mass + k * n_rows.to(tl.int64) * n_heads + out_M, masses_K[k] / sum_M, mask=real_M)


@triton.jit(do_not_specialize=["n_rows", "n_columns", "n_keys", "position"])
def profile_kernel(
    query,
    key,
    lse,
    columns,
    profile,
    query_stride_h,
    query_stride_s,
    query_stride_d,
    key_stride_h,
    key_stride_s,
    key_stride_d,
    lse_stride_s,
    lse_stride_h,
    columns_stride,
    n_rows,
    n_columns,
    n_keys,
    position,
    scale_log2,
    N_KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of rows x one tile of columns; grid (row tiles, column tiles). Heads are summed in registers."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    real_R = r < n_rows
    column_N = tl.load(columns + c.to(tl.int64) * columns_stride, mask=c < n_columns, other=0)
    exists_N = (column_N >= 0) & (column_N < n_keys)
    query_at_RD = query + r.to(tl.int64)[:, None] * query_stride_s + d[None, :] * query_stride_d
    key_at_ND = key + column_N[:, None] * key_stride_s + d[None, :] * key_stride_d
    lse_at_R = lse + r.to(tl.int64) * lse_stride_s
    query_mask_RD = real_R[:, None] & (d[None, :] < D)
    key_mask_ND = exists_N[:, None] & (d[None, :] < D)
    total_RN = tl.full([BLOCK_R, BLOCK_N], 0.0, tl.float32)
    wide = tl.full([], 1, tl.int64)
    for key_head in range(N_KEY_HEADS):
        key_ND = tl.load(key_at_ND + wide * key_head * key_stride_h, mask=key_mask_ND, other=0.0)
        for j in range(GROUP):
            head = wide * key_head * GROUP + j
            query_RD = tl.load(query_at_RD + head * query_stride_h, mask=query_mask_RD, other=0.0)
            lse_R = tl.load(lse_at_R + head * lse_stride_h, mask=real_R, other=0.0).to(tl.float32)
            logits_RN = _products(query_RD, key_ND, PRECISION, WIDEN) * scale_log2
            total_RN += tl.exp2(logits_RN - (lse_R * LOG2_E)[:, None])
    # A later key is not part of the log-sum-exp, so its term may have any value. A key that does not exist gives NaN.
    seen_RN = column_N[None, :] <= position + r[:, None]
    share_RN = tl.where(seen_RN, total_RN / (N_KEY_HEADS * GROUP), 0.0)
    share_RN = tl.where(exists_N[None, :], share_RN, float("nan"))
    out_at_RN = profile + r.to(tl.int64)[:, None] * n_columns + c[None, :]
    tl.store(out_at_RN, share_RN, mask=real_R[:, None] & (c[None, :] < n_columns))


INTERPRETED = not isinstance(masses_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET was set at import
