"""Thought attention, backward to the queries and to the own slots, in one pass over a tile's rows.

With the global lse, P_ij = exp(s_ij - lse_i) is the global probability, and delta = rowsum(dO * O) - dlse the
global correction, so prefix and own part need nothing of each other: dS = P (dO V^T - delta),
dQ = scale dS K, own dK = scale dS^T Q, own dV = P^T dO. A tile of whole blocks owns its blocks' dK and dV: no
atomics. Legend as in triton_forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qstar_kernels.triton_common import (
    LOG2E,
    Launch,
    capped,
    chip_of,
    key_tiles,
    load_own,
    load_prefix,
    load_tile,
    prefix_operands,
    row_ranges,
    store_tile,
)
from qstar_kernels.triton_forward import common_arguments
from qstar_kernels.triton_tiles import Chip, Tile, backward_tile, ceil_div, delta_tile


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
    b_q, b_k, b_v, b_d_out, row_lse, row_delta,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, EXPONENT: tl.constexpr, HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(P, dS / scale) [BLOCK_M, keys], before any mask."""
    s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=HIGH)
    s = capped(s, SCALE, SOFTCAP)
    p = tl.exp2(s * EXPONENT - row_lse[:, None])
    dp = tl.dot(b_d_out, tl.trans(b_v), input_precision=PRECISION, out_dtype=HIGH) - row_delta[:, None]
    if SOFTCAP is not None:
        dp = dp * (1.0 - s * s)
    return p, dp


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
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late blocks see the most keys: they start first
    i_batch, i_head = tl.program_id(1) // H, tl.program_id(1) % H
    EXPONENT: tl.constexpr = (SCALE if SOFTCAP is None else SOFTCAP) * LOG2E

    i_row = i_tile * TILE_ROWS + tl.arange(0, BLOCK_M)
    m_row = (tl.arange(0, BLOCK_M) < TILE_ROWS) & (i_row < N * Lq * G)
    i_block, i_slot, lower, upper = row_ranges(
        i_row, m_row, prefix_start, prefix_end, i_batch, N, T, Lq, Lk, G, WINDOW
    )
    i_query_head = i_head * G + i_row % G
    o_query = i_batch.to(tl.int64) * s_q_batch + i_query_head.to(tl.int64) * s_q_head
    o_row = (i_batch.to(tl.int64) * N * Lq + i_row // G) * (H * G) + i_query_head  # of contiguous tensors
    b_q = load_tile(q, (i_row // G).to(tl.int64) * s_q_token + o_query, 1, m_row, D, BLOCK_D)  # [BLOCK_M, D]
    b_d_out = load_tile(d_out, o_row, D, m_row, D, BLOCK_D)
    row_lse = tl.load(lse + o_row, mask=m_row, other=float("inf")) * LOG2E  # no row: probability 0
    row_delta = tl.load(delta + o_row, mask=m_row, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], HIGH)

    first_row = i_tile * TILE_ROWS
    last_token = (tl.minimum(first_row + TILE_ROWS, N * Lq * G) - 1) // G
    own_first = first_row // G // Lq * Lk
    own_last = (last_token // Lq + 1) * Lk
    if CAUSAL:
        own_last += last_token % Lq + 1 - Lq
    for o_own in tl.range(own_first, own_last, BLOCK_OWN, num_stages=1):
        i_own = o_own + tl.arange(0, BLOCK_OWN)
        b_k, b_v, m_seen = load_own(
            k, v, i_own, own_last, i_block, i_slot, i_batch, i_head,
            s_k_batch, s_k_block, s_k_slot, s_k_head, s_v_batch, s_v_block, s_v_slot, s_v_head, Lk,
            D, BLOCK_D, CAUSAL, WINDOW,
        )  # fmt: skip
        p, dp = _probability(
            b_q, b_k, b_v, b_d_out, row_lse, row_delta, SCALE, SOFTCAP, EXPONENT, HIGH, PRECISION
        )
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

    first, whole, whole_end, last = key_tiles(lower, upper, m_row, BLOCK_N)
    skipped = whole_end - whole
    for i_masked in tl.range(first, last - skipped):
        i_key_tile = tl.where(i_masked < whole, i_masked, i_masked + skipped)
        o_key = i_key_tile * BLOCK_N
        i_key = o_key + tl.arange(0, BLOCK_N)
        b_k, b_v = load_prefix(
            k_prefix, v_prefix, o_key, i_key < T, i_batch, i_head, s_kp_batch, s_kp_key, s_kp_head,
            s_vp_batch, s_vp_key, s_vp_head, D, BLOCK_N, BLOCK_D, TMA,
        )  # fmt: skip
        p, dp = _probability(
            b_q, b_k, b_v, b_d_out, row_lse, row_delta, SCALE, SOFTCAP, EXPONENT, HIGH, PRECISION
        )
        m_seen = (i_key[None, :] >= lower[:, None]) & (i_key[None, :] < upper[:, None])
        ds = (tl.where(m_seen, p, 0.0) * dp).to(b_k.dtype)
        acc = tl.dot(ds, b_k, acc, input_precision=PRECISION, out_dtype=HIGH)
    for i_key_tile in tl.range(whole, whole_end):
        o_key = i_key_tile * BLOCK_N
        b_k, b_v = load_prefix(
            k_prefix, v_prefix, o_key, None, i_batch, i_head, s_kp_batch, s_kp_key, s_kp_head,
            s_vp_batch, s_vp_key, s_vp_head, D, BLOCK_N, BLOCK_D, TMA,
        )  # fmt: skip
        p, dp = _probability(
            b_q, b_k, b_v, b_d_out, row_lse, row_delta, SCALE, SOFTCAP, EXPONENT, HIGH, PRECISION
        )
        acc = tl.dot((p * dp).to(b_k.dtype), b_k, acc, input_precision=PRECISION, out_dtype=HIGH)
    store_tile(dq, o_row, D, m_row, acc * SCALE, D, BLOCK_D)


def delta_launch(out: Tensor, d_out: Tensor, d_lse: Tensor, delta: Tensor) -> Launch:
    """delta = rowsum(d_out * out) - d_lse; all contiguous."""
    D = out.shape[-1]
    tile = delta_tile(D)
    arguments = {
        "out": out,
        "d_out": d_out,
        "d_lse": d_lse,
        "delta": delta,
        "ROWS": delta.numel(),
        "D": D,
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_D": tile.BLOCK_D,
        "HIGH": tl.float64 if out.dtype == torch.float64 else tl.float32,
    }
    return Launch(thought_delta, (ceil_div(delta.numel(), tile.BLOCK_M),), arguments, tile)


def rows_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    prefix_end: Tensor,
    prefix_start: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    own: str,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    chip: Chip | None = None,
    tile: Tile | None = None,
) -> Launch:
    """Fills dq, and dk, dv of the own slots where a block fits a tile (tile.WHOLE_BLOCKS); d_out, lse, delta
    and the three results are contiguous."""
    B, N, Lq, Hq, D = q.shape
    H, Lk = k.shape[3], k.shape[2]
    G = Hq // H
    chip = chip or chip_of(q)
    tile = tile or backward_tile(D=D, itemsize=q.element_size(), G=G, Lq=Lq, Lk=Lk, N=N, chip=chip)
    arguments = common_arguments(q, k, v, k_prefix, v_prefix)
    arguments |= prefix_operands(arguments["k_prefix"], arguments["v_prefix"], tile, chip) | {
        "prefix_start": prefix_start.contiguous(),
        "prefix_end": prefix_end.contiguous(),
        "d_out": d_out,
        "lse": lse,
        "delta": delta,
        "dq": dq,
        "dk": dk,
        "dv": dv,
        "SCALE": scale,
        "SOFTCAP": softcap,
        "WINDOW": window,
        "CAUSAL": own == "causal",
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_D": tile.BLOCK_D,
        "BLOCK_OWN": tile.BLOCK_OWN,
        "TILE_ROWS": tile.TILE_ROWS,
        "WHOLE_BLOCKS": tile.WHOLE_BLOCKS,
    }
    return Launch(thought_backward_rows, (ceil_div(N * Lq * G, tile.TILE_ROWS), B * H), arguments, tile)
