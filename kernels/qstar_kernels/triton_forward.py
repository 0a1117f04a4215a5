"""Thought attention, forward, in one kernel: a pass over the prefix tiles, then the tile's own slots, one
online softmax.

Legend: B rows, N blocks, Lq queries, Lk own keys, T prefix keys, H key-value heads, G query heads of each, D
width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qstar_kernels.triton_common import (
    LN2,
    LOG2E,
    NOTHING_SEEN,
    Launch,
    capped,
    chip_of,
    key_tiles,
    load_own,
    load_prefix,
    load_tile,
    precision_of,
    prefix_operands,
    row_ranges,
    store_tile,
)
from qstar_kernels.triton_tiles import Chip, Tile, ceil_div, forward_tile


@triton.jit
def update(s, v, acc, total, top, EXPONENT: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr):
    """The online softmax takes in scores s [BLOCK_M, keys] and values v [keys, BLOCK_D]."""
    new_top = tl.maximum(top, tl.max(s, 1) * EXPONENT)
    p = tl.exp2(s * EXPONENT - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION, out_dtype=HIGH)
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
    b_q = load_tile(q, (i_row // G).to(tl.int64) * s_q_token + o_query, 1, m_row, D, BLOCK_D)  # [BLOCK_M, D]

    acc = tl.zeros([BLOCK_M, BLOCK_D], HIGH)
    if sinks is not None:
        top = tl.load(sinks + i_query_head).to(HIGH) * LOG2E
        total = tl.full([BLOCK_M], 1.0, HIGH)
    else:
        top = tl.full([BLOCK_M], NOTHING_SEEN, HIGH)
        total = tl.zeros([BLOCK_M], HIGH)

    # own keys, numbered through the blocks: from the first row's block up to the last row's slot
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
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=HIGH)  # [BLOCK_M, BLOCK_OWN]
        s = tl.where(m_seen, capped(s, SCALE, SOFTCAP), float("-inf"))
        acc, total, top = update(s, b_v, acc, total, top, EXPONENT, HIGH, PRECISION)

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
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=HIGH)
        m_seen = (i_key[None, :] >= lower[:, None]) & (i_key[None, :] < upper[:, None])
        s = tl.where(m_seen, capped(s, SCALE, SOFTCAP), float("-inf"))
        acc, total, top = update(s, b_v, acc, total, top, EXPONENT, HIGH, PRECISION)
    for i_key_tile in tl.range(whole, whole_end):
        o_key = i_key_tile * BLOCK_N
        b_k, b_v = load_prefix(
            k_prefix, v_prefix, o_key, None, i_batch, i_head, s_kp_batch, s_kp_key, s_kp_head,
            s_vp_batch, s_vp_key, s_vp_head, D, BLOCK_N, BLOCK_D, TMA,
        )  # fmt: skip
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=HIGH)  # [BLOCK_M, BLOCK_N]
        acc, total, top = update(capped(s, SCALE, SOFTCAP), b_v, acc, total, top, EXPONENT, HIGH, PRECISION)

    total = tl.where(m_row, total, 1.0)
    o_row = (i_batch.to(tl.int64) * N * Lq + i_row // G) * (H * G) + i_query_head  # out, lse are contiguous
    store_tile(out, o_row, D, m_row, acc / total[:, None], D, BLOCK_D)
    tl.store(lse + o_row, (top + tl.log2(total)) * LN2, mask=m_row)


def common_arguments(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> dict[str, Any]:
    """The operands, strides and sizes that forward and backward kernels take, under their names there."""
    B, N, Lq, Hq, D = q.shape
    H, T = k.shape[3], k_prefix.shape[1]
    tokens = q.reshape(B, N * Lq, Hq, D)  # a view, unless blocks and slots are not one stride apart
    tokens, k, v, k_prefix, v_prefix = (last_contiguous(x) for x in (tokens, k, v, k_prefix, v_prefix))
    arguments: dict[str, Any] = {"q": tokens, "k": k, "v": v, "k_prefix": k_prefix, "v_prefix": v_prefix}
    for name, x, axes in (
        ("q", tokens, ("batch", "token", "head")),
        ("k", k, ("batch", "block", "slot", "head")),
        ("v", v, ("batch", "block", "slot", "head")),
        ("kp", k_prefix, ("batch", "key", "head")),
        ("vp", v_prefix, ("batch", "key", "head")),
    ):
        arguments.update({f"s_{name}_{axis}": stride for axis, stride in zip(axes, x.stride())})
    high = tl.float64 if q.dtype == torch.float64 else tl.float32
    sizes = {"N": N, "T": T, "Lq": Lq, "Lk": k.shape[2], "H": H, "G": Hq // H, "D": D}
    return arguments | sizes | {"HIGH": high, "PRECISION": precision_of(q.dtype)}


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward_launch(
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
    sinks: Tensor | None,
    own: str,
    out: Tensor,
    lse: Tensor,
    chip: Chip | None = None,
    tile: Tile | None = None,
) -> Launch:
    """The kernel call that fills out [B, N, Lq, Hq, D] and lse [B, N, Lq, Hq], both contiguous."""
    B, N, Lq, Hq, D = q.shape
    H, Lk, T = k.shape[3], k.shape[2], k_prefix.shape[1]
    G = Hq // H
    chip = chip or chip_of(q)
    tile = tile or forward_tile(D=D, itemsize=q.element_size(), G=G, Lq=Lq, Lk=Lk, T=T, N=N, chip=chip)
    arguments = common_arguments(q, k, v, k_prefix, v_prefix)
    arguments |= prefix_operands(arguments["k_prefix"], arguments["v_prefix"], tile, chip) | {
        "prefix_start": prefix_start.contiguous(),
        "prefix_end": prefix_end.contiguous(),
        "sinks": sinks,
        "out": out,
        "lse": lse,
        "SCALE": scale,
        "SOFTCAP": softcap,
        "WINDOW": window,
        "CAUSAL": own == "causal",
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "BLOCK_D": tile.BLOCK_D,
        "BLOCK_OWN": tile.BLOCK_OWN,
        "TILE_ROWS": tile.TILE_ROWS,
    }
    return Launch(thought_forward, (ceil_div(N * Lq * G, tile.TILE_ROWS), B * H), arguments, tile)
