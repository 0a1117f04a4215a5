"""Thought attention, backward to the queries and to the own slots, in one pass over a tile's rows.

With the global lse, P_ij = exp(s_ij - lse_i) is the global probability, and delta = rowsum(dO * O) - dlse the
global correction, so prefix and own part need nothing of each other: dS = P (dO V^T - delta),
dQ = scale dS K, own dK = scale dS^T Q, own dV = P^T dO. A tile of whole blocks owns its blocks' dK and dV: no
atomics. Legend as in triton_forward.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qstar_kernels.operands import Operands
from qstar_kernels.triton_common import (
    LOG2E,
    Launch,
    attend_prefix,
    capped,
    chip_of,
    high_of,
    key_tiles,
    launch,
    load_own,
    load_rows,
    load_tile,
    own_range,
    program_rows,
    store_tile,
    with_prefix,
)
from qstar_kernels.triton_tiles import Chip, backward_tile, ceil_div, delta_tile


@triton.jit
def thought_delta(
    out, d_out, d_lse, delta,
    ROWS, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = i_row < ROWS
    b_out = load_tile(out, i_row, D, m_row, D, BLOCK_D).to(HIGH)  # [BLOCK_M, D]
    b_d_out = load_tile(d_out, i_row, D, m_row, D, BLOCK_D).to(HIGH)
    row_d_lse = tl.load(d_lse + i_row, mask=m_row, other=0.0)
    tl.store(delta + i_row, tl.sum(b_out * b_d_out, 1) - row_d_lse, mask=m_row)


@triton.jit
def _probability(
    rows, b_k, b_v,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(P, dS / scale / P) [BLOCK_M, keys], before any mask."""
    EXPONENT: tl.constexpr = (SCALE if SOFTCAP is None else SOFTCAP) * LOG2E
    b_q, b_d_out, row_lse, row_delta = rows
    s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=HIGH)
    s = capped(s, SCALE, SOFTCAP)
    p = tl.exp2(s * EXPONENT - row_lse[:, None])
    dp = tl.dot(b_d_out, tl.trans(b_v), input_precision=PRECISION, out_dtype=HIGH) - row_delta[:, None]
    if SOFTCAP is not None:
        dp = dp * (1.0 - s * s)
    return p, dp


@triton.jit
def _add_queries(
    scores, b_k, b_v, m_seen, acc,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_D] + dS K / scale."""
    p, dp = scores
    if m_seen is not None:
        p = tl.where(m_seen, p, 0.0)
    return tl.dot((p * dp).to(b_k.dtype), b_k, acc, input_precision=PRECISION, out_dtype=HIGH)


@triton.jit(do_not_specialize=["N", "T", "Lq", "Lk"])
def thought_backward_rows(
    q, k, v, k_prefix, v_prefix, prefix_start, prefix_end, d_out, lse, delta, dq, dk, dv,
    s_q_batch, s_q_token, s_q_head,
    s_k_batch, s_k_block, s_k_slot, s_k_head,
    s_v_batch, s_v_block, s_v_slot, s_v_head,
    s_kp_batch, s_kp_key, s_kp_head,
    s_vp_batch, s_vp_key, s_vp_head,
    N, T, Lq, Lk,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OWN: tl.constexpr,
    TILE_ROWS: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    i_tile, i_batch, i_head, i_row, m_row, i_block, i_slot, lower, upper = program_rows(
        prefix_start, prefix_end, N, T, Lq, Lk, H, G, WINDOW, BLOCK_M, TILE_ROWS
    )
    b_q, b_d_out, row_lse, row_delta, o_row = load_rows(
        q, d_out, lse, delta, i_row, m_row, i_batch, i_head, s_q_batch, s_q_token, s_q_head, N, Lq,
        H, G, D, BLOCK_D,
    )  # fmt: skip
    own_first, own_last = own_range(i_tile, N, Lq, Lk, G, CAUSAL, TILE_ROWS)
    rows = (b_q, b_d_out, row_lse, row_delta)
    acc = tl.zeros([BLOCK_M, BLOCK_D], HIGH)
    for o_own in tl.range(own_first, own_last, BLOCK_OWN, num_stages=1):
        i_own = o_own + tl.arange(0, BLOCK_OWN)
        b_k, b_v, m_seen = load_own(
            k, v, i_own, own_last, i_block, i_slot, i_batch, i_head,
            s_k_batch, s_k_block, s_k_slot, s_k_head, s_v_batch, s_v_block, s_v_slot, s_v_head, Lk,
            D, BLOCK_D, CAUSAL, WINDOW,
        )  # fmt: skip
        p, dp = _probability(rows, b_k, b_v, SCALE, SOFTCAP, HIGH, PRECISION)
        p = tl.where(m_seen, p, 0.0)
        ds = (p * dp).to(b_k.dtype)
        acc = tl.dot(ds, b_k, acc, input_precision=PRECISION, out_dtype=HIGH)
        if WHOLE_BLOCKS:
            m_own = i_own < own_last
            o_own_row = (i_batch.to(tl.int64) * N * Lk + i_own) * H + i_head
            b_dv = tl.dot(tl.trans(p.to(b_k.dtype)), b_d_out, input_precision=PRECISION, out_dtype=HIGH)
            store_tile(dv, o_own_row, D, m_own, b_dv, D, BLOCK_D)  # [BLOCK_OWN, D]
            b_dk = tl.dot(tl.trans(ds), b_q, input_precision=PRECISION, out_dtype=HIGH)
            store_tile(dk, o_own_row, D, m_own, b_dk * SCALE, D, BLOCK_D)
    acc = attend_prefix(
        _probability, _add_queries, rows, acc, key_tiles(lower, upper, m_row, BLOCK_N),
        k_prefix, v_prefix, i_batch, i_head,
        lower, upper, T, s_kp_batch, s_kp_key, s_kp_head, s_vp_batch, s_vp_key, s_vp_head,
        SCALE, SOFTCAP, D, BLOCK_N, BLOCK_D, HIGH, PRECISION, TMA,
    )  # fmt: skip
    store_tile(dq, o_row, D, m_row, acc * SCALE, D, BLOCK_D)


def delta_launch(out: Tensor, d_out: Tensor, d_lse: Tensor, delta: Tensor) -> Launch:
    """Make the call that computes delta = rowsum(d_out * out) - d_lse; all contiguous."""
    tile, rows = delta_tile(out.shape[-1]), delta.numel()
    tensors = {"out": out, "d_out": d_out, "d_lse": d_lse, "delta": delta}
    return launch(
        thought_delta, (ceil_div(rows, tile.BLOCK_M),), tile, **tensors,
        ROWS=rows, D=out.shape[-1], HIGH=high_of(out),
    )  # fmt: skip


def rows_launch(
    operands: Operands,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    chip: Chip | None = None,
) -> Launch:
    """Make the call that fills dq, and dk, dv of the own slots where a block fits a tile (tile.WHOLE_BLOCKS).

    d_out, lse, delta and the three results are contiguous.
    """
    x, chip = operands, chip or chip_of(operands.q)
    tile = backward_tile(D=x.D, itemsize=x.q.element_size(), G=x.G, Lq=x.Lq, Lk=x.Lk, N=x.N, chip=chip)
    return launch(
        thought_backward_rows, (ceil_div(x.N * x.Lq * x.G, tile.TILE_ROWS), x.B * x.Hkv), tile,
        **with_prefix(operands, tile, chip), d_out=d_out, lse=lse, delta=delta, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
