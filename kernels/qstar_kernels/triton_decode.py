"""Thought attention with one query a block (Lq = 1), as in the sampling loop.

The prefix part shares its keys between neighbouring blocks and stays a matrix product. The own part does
not: as a block-diagonal product it would be nearly all zeros, so each row takes its own slots one by one.
Where few blocks would leave the chip idle, programs share the prefix, and a second kernel merges them by
their lse. Legend as in triton_forward.
"""

from __future__ import annotations

from dataclasses import replace

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
    high_of,
    key_tiles,
    launch,
    load_queries,
    load_tile,
    row_offsets,
    row_ranges,
    store_tile,
    with_prefix,
)
from qstar_kernels.triton_forward import add_values, score
from qstar_kernels.triton_tiles import Chip, ceil_div, decode_tile, delta_tile


@triton.jit(do_not_specialize=["N", "T", "Lk"])
def thought_decode(
    q, k, v, k_prefix, v_prefix, prefix_start, prefix_end, sinks, out, lse,
    s_q_batch, s_q_token, s_q_head,
    s_k_batch, s_k_block, s_k_slot, s_k_head,
    s_v_batch, s_v_block, s_v_slot, s_v_head,
    s_kp_batch, s_kp_key, s_kp_head,
    s_vp_batch, s_vp_key, s_vp_head,
    s_split,
    N, T, Lk,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    i_tile, i_split = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    i_batch, i_head = tl.program_id(1) // H, tl.program_id(1) % H
    EXPONENT: tl.constexpr = (SCALE if SOFTCAP is None else SOFTCAP) * LOG2E

    i_row = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = i_row < N * G
    i_block, _, lower, upper = row_ranges(
        i_row, m_row, prefix_start, prefix_end, i_batch, N, T, 1, Lk, G, WINDOW
    )
    b_q, i_query_head = load_queries(
        q, i_row, m_row, i_batch, i_head, s_q_batch, s_q_token, s_q_head, G, D, BLOCK_D
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], HIGH)
    top = tl.full([BLOCK_M], NOTHING_SEEN, HIGH)
    total = tl.zeros([BLOCK_M], HIGH)
    own_first = 0
    if WINDOW is not None:
        own_first = tl.maximum(Lk - WINDOW, 0)
    own_last = Lk
    if SPLIT > 1:
        own_last = tl.where(i_split == 0, Lk, own_first)
    if sinks is not None:
        with_sink = m_row & (i_split == 0)
        top = tl.where(with_sink, tl.load(sinks + i_query_head).to(HIGH) * LOG2E, top)
        total = tl.where(with_sink, 1.0, total)
    p_k = k + i_batch.to(tl.int64) * s_k_batch + i_head.to(tl.int64) * s_k_head
    p_v = v + i_batch.to(tl.int64) * s_v_batch + i_head.to(tl.int64) * s_v_head
    for i_own in tl.range(own_first, own_last, num_stages=1):
        i_key_slot = tl.full([BLOCK_M], 0, tl.int64) + i_own
        o_k = i_block.to(tl.int64) * s_k_block + i_key_slot * s_k_slot
        o_v = i_block.to(tl.int64) * s_v_block + i_key_slot * s_v_slot
        b_k = load_tile(p_k, o_k, 1, m_row, D, BLOCK_D).to(HIGH)  # [BLOCK_M, D]: each row its block's slot
        b_v = load_tile(p_v, o_v, 1, m_row, D, BLOCK_D).to(HIGH)
        s = capped(tl.sum(b_q.to(HIGH) * b_k, 1), SCALE, SOFTCAP) * EXPONENT
        new_top = tl.maximum(top, s)
        p, decay = tl.exp2(s - new_top), tl.exp2(top - new_top)
        total, top = total * decay + p, new_top
        acc = acc * decay[:, None] + p[:, None] * b_v

    first, whole, whole_end, last = key_tiles(lower, upper, m_row, BLOCK_N)
    if SPLIT > 1:
        share = (last - first + SPLIT - 1) // SPLIT
        first, last = first + i_split * share, tl.minimum(first + (i_split + 1) * share, last)
        whole = tl.minimum(tl.maximum(whole, first), tl.maximum(last, first))
        whole_end = tl.minimum(tl.maximum(whole_end, whole), tl.maximum(last, whole))
    acc, total, top = attend_prefix(
        score, add_values, b_q, (acc, total, top), (first, whole, whole_end, last),
        k_prefix, v_prefix, i_batch, i_head,
        lower, upper, T, s_kp_batch, s_kp_key, s_kp_head, s_vp_batch, s_vp_key, s_vp_head,
        SCALE, SOFTCAP, D, BLOCK_N, BLOCK_D, HIGH, PRECISION, TMA,
    )  # fmt: skip

    row_lse = tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf"))
    total = tl.where(total > 0, total, 1.0)  # a share of the prefix may hold no key of a row
    o_row = row_offsets(i_row, i_query_head, i_batch, N, 1, H, G)
    o_split = i_split.to(tl.int64) * s_split
    store_tile(out + o_split * D, o_row, D, m_row, acc / total[:, None], D, BLOCK_D)
    tl.store(lse + o_split + o_row, row_lse, mask=m_row)


@triton.jit
def thought_merge(
    partial_out, partial_lse, out, lse, ROWS,
    SPLIT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Adds SPLIT parts of each row's softmax, weighted by their lse; the first part is never empty."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = i_row < ROWS
    acc = load_tile(partial_out, i_row, D, m_row, D, BLOCK_D)  # [BLOCK_M, D]
    top = tl.load(partial_lse + i_row, mask=m_row, other=0.0) * LOG2E
    total = tl.full([BLOCK_M], 1.0, HIGH)
    o_row = i_row
    for _ in tl.range(1, SPLIT):
        o_row += ROWS
        b_out = load_tile(partial_out, o_row, D, m_row, D, BLOCK_D)
        s = tl.load(partial_lse + o_row, mask=m_row, other=0.0) * LOG2E
        new_top = tl.maximum(top, s)
        p, decay = tl.exp2(s - new_top), tl.exp2(top - new_top)
        acc = acc * decay[:, None] + b_out * p[:, None]
        total, top = total * decay + p, new_top
    store_tile(out, i_row, D, m_row, acc / total[:, None], D, BLOCK_D)
    tl.store(lse + i_row, (top + tl.log2(total)) * LN2, mask=m_row)


def decode_launches(operands: Operands, out: Tensor, lse: Tensor, chip: Chip | None = None) -> list[Launch]:
    """Make the calls, in order, that fill out [B, N, 1, Hq, D] and lse [B, N, 1, Hq], both contiguous."""
    x, chip, heads = operands, chip or chip_of(operands.q), operands.B * operands.Hkv
    tile = decode_tile(D=x.D, itemsize=x.q.element_size(), G=x.G, T=x.T, N=x.N, heads=heads, chip=chip)
    part_out, part_lse = out, lse
    if tile.SPLIT > 1:
        part_out, part_lse = (lse.new_empty(tile.SPLIT, *result.shape) for result in (out, lse))
    decode = launch(
        thought_decode, (ceil_div(x.N * x.G, tile.BLOCK_M) * tile.SPLIT, heads), tile,
        **with_prefix(operands, tile, chip), out=part_out, lse=part_lse, s_split=lse.numel(),
    )  # fmt: skip
    if tile.SPLIT == 1:
        return [decode]
    rows = replace(delta_tile(x.D), SPLIT=tile.SPLIT)
    tensors = {"partial_out": part_out, "partial_lse": part_lse, "out": out, "lse": lse}
    merge = launch(
        thought_merge, (ceil_div(lse.numel(), rows.BLOCK_M),), rows, **tensors,
        ROWS=lse.numel(), D=x.D, HIGH=high_of(x.q),
    )  # fmt: skip
    return [decode, merge]
