"""What the Triton kernels share: a tile's rows, their prefix ranges, scores, and how a kernel is launched.

Rows are position-major: row r of key-value head h in batch row b is token r // G (blocks in order, Lq slots
each) and query head h * G + r % G, so that rows of a tile are neighbours that share nearly all prefix keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qstar_kernels.triton_tiles import CHIPS, Chip, Tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING_SEEN = tl.constexpr(-1e30)  # finite: a row without keys yet needs no guard against inf - inf


@triton.jit
def row_ranges(
    i_row, m_row, p_prefix_start, p_prefix_end, i_batch, N, T, Lq, Lk, G: tl.constexpr, WINDOW: tl.constexpr
):
    """(block, slot, first prefix key, end of prefix keys) of rows [BLOCK_M]; rows that are not real see
    nothing."""
    i_token = i_row // G
    i_block = i_token // Lq
    i_slot = i_token % Lq + (Lk - Lq)
    o_block = i_batch.to(tl.int64) * N + i_block
    end = tl.load(p_prefix_end + o_block, mask=m_row, other=0).to(tl.int32)
    lower = tl.maximum(tl.load(p_prefix_start + o_block, mask=m_row, other=0).to(tl.int32), 0)
    if WINDOW is not None:
        lower = tl.maximum(lower, end + i_slot - WINDOW + 1)
    return i_block, i_slot, lower, tl.minimum(end, T)


@triton.jit
def key_tiles(lower, upper, m_row, BLOCK_N: tl.constexpr):
    """(first, first whole, last whole, last) tiles of BLOCK_N prefix keys: outside the outer two no row sees
    a key, between the inner two every row sees every key."""
    m_seen = m_row & (lower < upper)
    FAR: tl.constexpr = 2147483647
    first = tl.min(tl.where(m_seen, lower, FAR), 0) // BLOCK_N
    last = tl.maximum((tl.max(tl.where(m_seen, upper, 0), 0) + BLOCK_N - 1) // BLOCK_N, 0)
    first = tl.minimum(first, last)
    whole = (tl.max(tl.where(m_row, tl.minimum(lower, upper), 0), 0) + BLOCK_N - 1) // BLOCK_N
    whole = tl.minimum(tl.maximum(whole, first), last)
    whole_end = tl.min(tl.where(m_row, tl.where(lower < upper, upper, 0), FAR), 0) // BLOCK_N
    return first, whole, tl.minimum(tl.maximum(whole_end, whole), last), last


@triton.jit
def load_tile(p, o_row, stride, m_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[len(o_row), BLOCK_D] from rows of D contiguous numbers; m_row None when every row exists."""
    o_d = tl.arange(0, BLOCK_D)
    pointers = p + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    if D == BLOCK_D and m_row is None:
        tile = tl.load(pointers)
    elif D == BLOCK_D:
        tile = tl.load(pointers, mask=m_row[:, None], other=0.0)
    elif m_row is None:
        tile = tl.load(pointers, mask=o_d[None, :] < D, other=0.0)
    else:
        tile = tl.load(pointers, mask=m_row[:, None] & (o_d[None, :] < D), other=0.0)
    return tile


@triton.jit
def load_prefix(
    k_prefix, v_prefix, o_key, m_key, i_batch, i_head,
    s_kp_batch, s_kp_key, s_kp_head, s_vp_batch, s_vp_key, s_vp_head,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(k, v) [BLOCK_N, BLOCK_D] of the prefix from key o_key on; m_key None when all of them exist."""
    if TMA:  # both are descriptors: what lies past the last key is zero
        b_k = k_prefix.load([i_batch, o_key, i_head, 0]).reshape(BLOCK_N, BLOCK_D)
        b_v = v_prefix.load([i_batch, o_key, i_head, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        i_key = o_key + tl.arange(0, BLOCK_N)
        p_k = k_prefix + i_batch.to(tl.int64) * s_kp_batch + i_head.to(tl.int64) * s_kp_head
        p_v = v_prefix + i_batch.to(tl.int64) * s_vp_batch + i_head.to(tl.int64) * s_vp_head
        b_k = load_tile(p_k, i_key, s_kp_key, m_key, D, BLOCK_D)
        b_v = load_tile(p_v, i_key, s_vp_key, m_key, D, BLOCK_D)
    return b_k, b_v


@triton.jit
def load_own(
    k, v, i_own, own_last, i_block, i_slot, i_batch, i_head,
    s_k_batch, s_k_block, s_k_slot, s_k_head,
    s_v_batch, s_v_block, s_v_slot, s_v_head, Lk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """(k, v [own, BLOCK_D], which of them rows see [BLOCK_M, own]) of own slots i_own = block * Lk + slot,
    before own_last."""
    p_k = k + i_batch.to(tl.int64) * s_k_batch + i_head.to(tl.int64) * s_k_head
    p_v = v + i_batch.to(tl.int64) * s_v_batch + i_head.to(tl.int64) * s_v_head
    i_key_block, i_key_slot = i_own // Lk, i_own % Lk
    m_own = i_own < own_last
    o_k = i_key_block.to(tl.int64) * s_k_block + i_key_slot.to(tl.int64) * s_k_slot
    o_v = i_key_block.to(tl.int64) * s_v_block + i_key_slot.to(tl.int64) * s_v_slot
    b_k = load_tile(p_k, o_k, 1, m_own, D, BLOCK_D)
    b_v = load_tile(p_v, o_v, 1, m_own, D, BLOCK_D)
    m_seen = own_seen(
        i_block[:, None], i_slot[:, None], i_key_block[None, :], i_key_slot[None, :], m_own[None, :],
        CAUSAL, WINDOW,
    )  # fmt: skip
    return b_k, b_v, m_seen


@triton.jit
def store_tile(p, o_row, stride, m_row, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    pointers = p + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(pointers, tile.to(p.dtype.element_ty), mask=m_row[:, None] & (o_d[None, :] < D))


@triton.jit
def capped(s, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """tanh(s * SCALE / SOFTCAP), or s as it is without a cap; times EXPONENT it is the score in log2."""
    if SOFTCAP is not None:
        s = 2.0 / (1.0 + tl.exp2(s * (-2.0 * SCALE / SOFTCAP * LOG2E))) - 1.0
    return s


@triton.jit
def own_seen(i_block, i_slot, i_key_block, i_key_slot, m_key, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which own keys rows see: those of their block, up to their slot, within the window. Arguments
    broadcast."""
    m_seen = m_key & (i_block == i_key_block)
    if CAUSAL:
        m_seen = m_seen & (i_key_slot <= i_slot)
    if WINDOW is not None:
        m_seen = m_seen & (i_slot - i_key_slot < WINDOW)
    return m_seen


def chip_of(x: Tensor) -> Chip:
    """The chip that a tensor lives on, by its capability; the interpreter's for a CPU tensor."""
    if x.device.type != "cuda":
        return CHIPS["interpreter"]
    properties = torch.cuda.get_device_properties(x.device)
    name = getattr(properties, "gcnArchName", "").split(":")[0] or f"sm_{properties.major}{properties.minor}"
    known = CHIPS.get(name) or CHIPS["gfx942" if name.startswith("gfx") else "sm_86"]
    return replace(known, processors=properties.multi_processor_count)


def interpreted(kernel: Any) -> bool:
    return not isinstance(kernel, triton.JITFunction)


def precision_of(dtype: torch.dtype) -> str:
    """fp32 products follow torch's own switch, torch.set_float32_matmul_precision."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def prefix_operands(k_prefix: Tensor, v_prefix: Tensor, tile: Tile, chip: Chip) -> dict[str, Any]:
    """The kernel arguments k_prefix, v_prefix and TMA: descriptors where the chip copies by them and both
    tensors [B, T, H, D] are aligned to 16 bytes in every axis, else the tensors."""
    tensors = {"k_prefix": k_prefix, "v_prefix": v_prefix}
    if not (chip.tma and all(map(_describable, tensors.values()))):
        return {**tensors, "TMA": False}
    block = [1, tile.BLOCK_N, 1, tile.BLOCK_D]
    return {
        **{name: TensorDescriptor(x, x.shape, x.stride(), block) for name, x in tensors.items()},
        "TMA": True,
    }


def _describable(x: Tensor) -> bool:
    outer = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in outer)


@dataclass(frozen=True)
class Launch:
    """One kernel call, to run or (the compile gate) to compile from the same arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tile: Tile
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        if min(self.grid) > 0:
            self.kernel[self.grid](**self.arguments, **self.all_options())

    def all_options(self) -> dict[str, Any]:
        return {
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
            "enable_fp_fusion": True,
            **self.options,
        }
