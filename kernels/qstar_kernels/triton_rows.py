"""What the Triton kernels share: a tile's rows, their prefix ranges, scores, and how a kernel is launched.

Rows are position-major: row r of key-value head h in batch row b is token r // G (blocks in order, Lq slots
each) and query head h * G + r % G, so that rows of a tile are neighbours that share nearly all prefix keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    return Chip(known.name, known.shared, properties.multi_processor_count)


def interpreted(kernel: Any) -> bool:
    return not isinstance(kernel, triton.JITFunction)


def precision_of(dtype: torch.dtype) -> str:
    """fp32 products follow torch's own switch, torch.set_float32_matmul_precision."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


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
