"""Thought attention, forward, in one kernel: a pass over the prefix tiles, then the tile's own slots, one
online softmax.

Legend: B rows, N blocks, Lq queries, Lk own keys, T prefix keys, H key-value heads, G query heads of each, D
width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qstar_kernels.operands import Operands
from qstar_kernels.triton_common import (
    LN2,
    LOG2E,
    NOTHING_SEEN,
    Launch,
    attend_prefix,
    capped,
    chip_of,
    key_tiles,
    launch,
    load_own,
    load_queries,
    own_range,
    program_rows,
    row_offsets,
    store_tile,
    with_prefix,
)
from qstar_kernels.triton_tiles import Chip, ceil_div, forward_tile


@triton.jit
def score(
    b_q, b_k, b_v,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_M, keys] of rows b_q and keys b_k, before any mask and times EXPONENT in log2."""
    s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=HIGH)
    return capped(s, SCALE, SOFTCAP)


@triton.jit
def add_values(
    s, b_k, b_v, m_seen, sums,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax takes in scores s [BLOCK_M, keys] and values b_v [keys, BLOCK_D]."""
    EXPONENT: tl.constexpr = (SCALE if SOFTCAP is None else SOFTCAP) * LOG2E
    acc, total, top = sums
    if m_seen is not None:
        s = tl.where(m_seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * EXPONENT)
    p = tl.exp2(s * EXPONENT - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(b_v.dtype), b_v, acc * decay[:, None], input_precision=PRECISION, out_dtype=HIGH)
    return acc, total, new_top


@triton.jit(do_not_specialize=["N", "T", "Lq", "Lk"])
def thought_forward(
    q, k, v, k_prefix, v_prefix, prefix_start, prefix_end, sinks, out, lse,
    s_q_batch, s_q_token, s_q_head,
    s_k_batch, s_k_block, s_k_slot, s_k_head,
    s_v_batch, s_v_block, s_v_slot, s_v_head,
    s_kp_batch, s_kp_key, s_kp_head,
    s_vp_batch, s_vp_key, s_vp_head,
    N, T, Lq, Lk,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OWN: tl.constexpr,
    TILE_ROWS: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    i_tile, i_batch, i_head, i_row, m_row, i_block, i_slot, lower, upper = program_rows(
        prefix_start, prefix_end, N, T, Lq, Lk, H, G, WINDOW, BLOCK_M, TILE_ROWS
    )
    b_q, i_query_head = load_queries(
        q, i_row, m_row, i_batch, i_head, s_q_batch, s_q_token, s_q_head, G, D, BLOCK_D
    )
    own_first, own_last = own_range(i_tile, N, Lq, Lk, G, CAUSAL, TILE_ROWS)
    acc = tl.zeros([BLOCK_M, BLOCK_D], HIGH)
    if sinks is not None:
        top = tl.load(sinks + i_query_head).to(HIGH) * LOG2E
        total = tl.full([BLOCK_M], 1.0, HIGH)
    else:
        top = tl.full([BLOCK_M], NOTHING_SEEN, HIGH)
        total = tl.zeros([BLOCK_M], HIGH)
    sums = (acc, total, top)
    for o_own in tl.range(own_first, own_last, BLOCK_OWN, num_stages=1):
        b_k, b_v, m_seen = load_own(
            k, v, o_own + tl.arange(0, BLOCK_OWN), own_last, i_block, i_slot, i_batch, i_head,
            s_k_batch, s_k_block, s_k_slot, s_k_head, s_v_batch, s_v_block, s_v_slot, s_v_head, Lk,
            D, BLOCK_D, CAUSAL, WINDOW,
        )  # fmt: skip
        s = score(b_q, b_k, b_v, SCALE, SOFTCAP, HIGH, PRECISION)
        sums = add_values(s, b_k, b_v, m_seen, sums, SCALE, SOFTCAP, HIGH, PRECISION)
    acc, total, top = attend_prefix(
        score, add_values, b_q, sums, key_tiles(lower, upper, m_row, BLOCK_N),
        k_prefix, v_prefix, i_batch, i_head,
        lower, upper, T, s_kp_batch, s_kp_key, s_kp_head, s_vp_batch, s_vp_key, s_vp_head,
        SCALE, SOFTCAP, D, BLOCK_N, BLOCK_D, HIGH, PRECISION, TMA,
    )  # fmt: skip

    o_row = row_offsets(i_row, i_query_head, i_batch, N, Lq, H, G)  # here, not at the load: fewer registers
    total = tl.where(m_row, total, 1.0)
    store_tile(out, o_row, D, m_row, acc / total[:, None], D, BLOCK_D)
    tl.store(lse + o_row, (top + tl.log2(total)) * LN2, mask=m_row)


def forward_launch(operands: Operands, out: Tensor, lse: Tensor, chip: Chip | None = None) -> Launch:
    """Make the call that fills out [B, N, Lq, Hq, D] and lse [B, N, Lq, Hq], both contiguous."""
    x, chip = operands, chip or chip_of(operands.q)
    tile = forward_tile(D=x.D, itemsize=x.q.element_size(), G=x.G, Lq=x.Lq, Lk=x.Lk, T=x.T, N=x.N, chip=chip)
    return launch(
        thought_forward, (ceil_div(x.N * x.Lq * x.G, tile.TILE_ROWS), x.B * x.Hkv), tile,
        **with_prefix(operands, tile, chip), out=out, lse=lse,
    )  # fmt: skip
