"""Thought attention, backward to keys and values: a program owns a tile of keys, and the rows walk by.

It serves the prefix (all blocks' rows; several programs may share a tile, each writing its own partial sum,
so the result does not depend on the order they run in) and the own slots of blocks too large for one tile of
triton_backward_queries. Legend as in triton_forward.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qstar_kernels.operands import Operands
from qstar_kernels.triton_common import (
    LOG2E,
    Launch,
    capped,
    chip_of,
    common_arguments,
    launch,
    load_rows,
    load_tile,
    own_seen,
    row_ranges,
    store_tile,
)
from qstar_kernels.triton_tiles import Chip, Tile, ceil_div, keys_tile


@triton.jit
def _blocks_that_see(
    o_key, p_prefix_start, p_prefix_end, i_batch, N, T, Lq, Lk, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):  # fmt: skip
    """(first, whole, last): blocks outside [first, last) see no key of [o_key, o_key + BLOCK_N), all of
    [whole, last) see every one."""
    first, last, whole = N, 0, 0
    p_start = p_prefix_start + i_batch.to(tl.int64) * N
    p_end = p_prefix_end + i_batch.to(tl.int64) * N
    for o_block in tl.range(0, N, BLOCK_SCAN, num_stages=1):
        i_block = o_block + tl.arange(0, BLOCK_SCAN)
        end = tl.minimum(tl.load(p_end + i_block, mask=i_block < N, other=0).to(tl.int32), T)
        lower = tl.load(p_start + i_block, mask=i_block < N, other=0).to(tl.int32)
        if WINDOW is not None:
            lower = tl.maximum(lower, end + (Lk - Lq) - WINDOW + 1)
        m_seen = (lower < end) & (end > o_key) & (lower < o_key + BLOCK_N)
        first = tl.minimum(first, tl.min(tl.where(m_seen, i_block, N), 0))
        last = tl.maximum(last, tl.max(tl.where(m_seen, i_block + 1, 0), 0))
    first = tl.minimum(first, last)
    whole = first
    for o_block in tl.range(first, last, BLOCK_SCAN, num_stages=1):
        i_block = o_block + tl.arange(0, BLOCK_SCAN)
        end = tl.minimum(tl.load(p_end + i_block, mask=i_block < last, other=0).to(tl.int32), T)
        lower = tl.load(p_start + i_block, mask=i_block < last, other=0).to(tl.int32)
        if WINDOW is not None:
            lower = tl.maximum(lower, end + (Lk - 1) - WINDOW + 1)
        m_partly = (i_block < last) & ((end < o_key + BLOCK_N) | (lower > o_key))
        whole = tl.maximum(whole, tl.max(tl.where(m_partly, i_block + 1, 0), 0))
    return first, whole, last


@triton.jit
def _accumulate(
    b_q, b_k, b_v, b_d_out, row_lse, row_delta, m_seen, acc_k, acc_v,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, EXPONENT: tl.constexpr, HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one tile of rows; everything lies keys by rows. m_seen None: every row sees every key."""
    s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=HIGH)  # [BLOCK_N, BLOCK_M]
    s = capped(s, SCALE, SOFTCAP)
    p = tl.exp2(s * EXPONENT - row_lse[None, :])
    if m_seen is not None:
        p = tl.where(m_seen, p, 0.0)
    acc_v = tl.dot(p.to(b_d_out.dtype), b_d_out, acc_v, input_precision=PRECISION, out_dtype=HIGH)
    dp = tl.dot(b_v, tl.trans(b_d_out), input_precision=PRECISION, out_dtype=HIGH) - row_delta[None, :]
    if SOFTCAP is not None:
        dp = dp * (1.0 - s * s)
    acc_k = tl.dot((p * dp).to(b_q.dtype), b_q, acc_k, input_precision=PRECISION, out_dtype=HIGH)
    return acc_k, acc_v


@triton.jit(do_not_specialize=["N", "T", "Lq", "Lk"])
def thought_backward_keys(
    q, k, v, prefix_start, prefix_end, d_out, lse, delta, dk, dv,
    s_q_batch, s_q_token, s_q_head,
    s_k_batch, s_k_block, s_k_slot, s_k_head,
    s_v_batch, s_v_block, s_v_slot, s_v_head,
    s_split,
    N, T, Lq, Lk,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SCAN: tl.constexpr,
    SPLIT: tl.constexpr, OWN: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_batch, i_head = tl.program_id(1) // H, tl.program_id(1) % H
    EXPONENT: tl.constexpr = (SCALE if SOFTCAP is None else SOFTCAP) * LOG2E
    if OWN:
        keys, key_blocks = Lk, N
        key_tiles = (Lk + BLOCK_N - 1) // BLOCK_N
        i_key_block, o_key, i_split = tl.program_id(0) // key_tiles, tl.program_id(0) % key_tiles * BLOCK_N, 0
        first, last = i_key_block, i_key_block + 1
        row = i_key_block * Lq * G
        if CAUSAL:
            row += tl.maximum(o_key - (Lk - Lq), 0) * G  # earlier slots see no key of this tile
        whole_row = last * Lq * G
    else:
        keys, key_blocks = T, 1
        i_key_block, o_key, i_split = 0, tl.program_id(0) // SPLIT * BLOCK_N, tl.program_id(0) % SPLIT
        first, whole, last = _blocks_that_see(
            o_key, prefix_start, prefix_end, i_batch, N, T, Lq, Lk, WINDOW, BLOCK_N, BLOCK_SCAN
        )
        row, whole_row = first * Lq * G, whole * Lq * G
    row_end = last * Lq * G

    i_key = o_key + tl.arange(0, BLOCK_N)
    m_key = i_key < keys
    p_k = k + i_batch.to(tl.int64) * s_k_batch + i_head.to(tl.int64) * s_k_head
    p_v = v + i_batch.to(tl.int64) * s_v_batch + i_head.to(tl.int64) * s_v_head
    if OWN:
        p_k += i_key_block.to(tl.int64) * s_k_block
        p_v += i_key_block.to(tl.int64) * s_v_block
    b_k = load_tile(p_k, i_key, s_k_slot, m_key, D, BLOCK_D)  # [BLOCK_N, D]
    b_v = load_tile(p_v, i_key, s_v_slot, m_key, D, BLOCK_D)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], HIGH)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], HIGH)

    row_tiles = (row_end - row + BLOCK_M - 1) // BLOCK_M
    masked_tiles = (whole_row - row + BLOCK_M - 1) // BLOCK_M
    share = (row_tiles + SPLIT - 1) // SPLIT
    tile, tile_end = i_split * share, tl.minimum((i_split + 1) * share, row_tiles)
    for i_tile in tl.range(tile, tl.minimum(tile_end, masked_tiles)):
        i_row = row + i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_row = i_row < row_end
        b_q, b_d_out, row_lse, row_delta, _ = load_rows(
            q, d_out, lse, delta, i_row, m_row, i_batch, i_head, s_q_batch, s_q_token, s_q_head, N, Lq,
            H, G, D, BLOCK_D,
        )  # fmt: skip
        i_block, i_slot, lower, upper = row_ranges(
            i_row, m_row, prefix_start, prefix_end, i_batch, N, T, Lq, Lk, G, WINDOW
        )
        if OWN:
            m_seen = own_seen(
                i_block[None, :], i_slot[None, :], i_key_block, i_key[:, None], m_key[:, None], CAUSAL, WINDOW
            )
        else:
            m_seen = (i_key[:, None] >= lower[None, :]) & (i_key[:, None] < upper[None, :])
        acc_k, acc_v = _accumulate(
            b_q, b_k, b_v, b_d_out, row_lse, row_delta, m_seen, acc_k, acc_v,
            SCALE, SOFTCAP, EXPONENT, HIGH, PRECISION,
        )  # fmt: skip
    if not OWN:
        for i_tile in tl.range(tl.maximum(tile, masked_tiles), tile_end):
            i_row = row + i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
            b_q, b_d_out, row_lse, row_delta, _ = load_rows(
                q, d_out, lse, delta, i_row, i_row < row_end, i_batch, i_head, s_q_batch, s_q_token, s_q_head,
                N, Lq, H, G, D, BLOCK_D,
            )  # fmt: skip
            acc_k, acc_v = _accumulate(
                b_q, b_k, b_v, b_d_out, row_lse, row_delta, None, acc_k, acc_v,
                SCALE, SOFTCAP, EXPONENT, HIGH, PRECISION,
            )  # fmt: skip

    o_row = ((i_batch.to(tl.int64) * key_blocks + i_key_block) * keys + i_key) * H + i_head
    o_split = tl.cast(i_split, tl.int64) * s_split
    store_tile(dk + o_split, o_row, D, m_key, acc_k * SCALE, D, BLOCK_D)
    store_tile(dv + o_split, o_row, D, m_key, acc_v, D, BLOCK_D)


def keys_launch(
    operands: Operands,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    own_slots: bool,
    tile: Tile,
) -> Launch:
    """Make the call that fills dk, dv: of the own slots like k, or partial sums of the prefix, [SPLIT, B, T,
    Hkv, D]; tile as from keys_tile_of."""
    x, arguments = operands, common_arguments(operands)
    if not own_slots:
        for name in ("k", "v"):
            arguments[name] = arguments[f"{name}_prefix"]
            arguments |= {f"s_{name}_{axis}": arguments[f"s_{name}p_{axis}"] for axis in ("batch", "head")}
            arguments |= {f"s_{name}_block": 0, f"s_{name}_slot": arguments[f"s_{name}p_key"]}
        arguments["CAUSAL"] = False  # one kernel for both: the prefix part is the same
    tiles = x.N * ceil_div(x.Lk, tile.BLOCK_N) if own_slots else ceil_div(x.T, tile.BLOCK_N) * tile.SPLIT
    return launch(
        thought_backward_keys, (tiles, x.B * x.Hkv), tile, **arguments,
        d_out=d_out, lse=lse, delta=delta, dk=dk, dv=dv,
        s_split=0 if own_slots else dk.stride(0), OWN=own_slots,
    )  # fmt: skip


def keys_tile_of(operands: Operands, own_slots: bool, chip: Chip | None = None) -> Tile:
    """Choose the keys kernel's tile for these operands; its SPLIT says how many partial sums to hold."""
    x = operands
    return keys_tile(
        D=x.D,
        itemsize=x.q.element_size(),
        rows=x.N * x.Lq * x.G,
        keys=x.Lk if own_slots else x.T,
        heads=x.B * x.Hkv,
        split=not own_slots,
        N=x.N,
        chip=chip or chip_of(x.q),
    )
