"""What the Triton kernels share: a tile's rows, their prefix ranges, scores, and how a kernel is launched.

Rows are position-major: row r of key-value head h in batch row b is token r // G (blocks in order, Lq slots
each) and query head h * G + r % G, so that rows of a tile are neighbours that share nearly all prefix keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qstar_kernels.operands import Operands, last_contiguous
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
def program_rows(
    prefix_start, prefix_end, N, T, Lq, Lk, H: tl.constexpr, G: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Return the program's tile, batch row and head, its rows [BLOCK_M], which of them are real, and what
    `row_ranges` says of them."""
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late blocks see the most keys: they start first
    i_batch, i_head = tl.program_id(1) // H, tl.program_id(1) % H
    i_row = i_tile * TILE_ROWS + tl.arange(0, BLOCK_M)
    m_row = (tl.arange(0, BLOCK_M) < TILE_ROWS) & (i_row < N * Lq * G)
    i_block, i_slot, lower, upper = row_ranges(
        i_row, m_row, prefix_start, prefix_end, i_batch, N, T, Lq, Lk, G, WINDOW
    )
    return i_tile, i_batch, i_head, i_row, m_row, i_block, i_slot, lower, upper


@triton.jit
def own_range(i_tile, N, Lq, Lk, G: tl.constexpr, CAUSAL: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Return the first own key of a tile of rows and the end: own keys are numbered through the blocks, from
    the first row's block up to the last row's slot."""
    first_row = i_tile * TILE_ROWS
    last_token = (tl.minimum(first_row + TILE_ROWS, N * Lq * G) - 1) // G
    own_first = first_row // G // Lq * Lk
    own_last = (last_token // Lq + 1) * Lk
    if CAUSAL:
        own_last += last_token % Lq + 1 - Lq
    return own_first, own_last


@triton.jit
def load_queries(
    q, i_row, m_row, i_batch, i_head, s_q_batch, s_q_token, s_q_head,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return q [BLOCK_M, BLOCK_D] of rows, and their query heads [BLOCK_M]."""
    i_query_head = i_head * G + i_row % G
    o_query = i_batch.to(tl.int64) * s_q_batch + i_query_head.to(tl.int64) * s_q_head
    b_q = load_tile(q, (i_row // G).to(tl.int64) * s_q_token + o_query, 1, m_row, D, BLOCK_D)
    return b_q, i_query_head


@triton.jit
def row_offsets(i_row, i_query_head, i_batch, N, Lq, H: tl.constexpr, G: tl.constexpr):
    """Return the offsets [BLOCK_M] of rows in a contiguous [B, N, Lq, Hq]."""
    return (i_batch.to(tl.int64) * N * Lq + i_row // G) * (H * G) + i_query_head


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
def attend_prefix(
    score: tl.constexpr, add: tl.constexpr, rows, sums, tiles,
    k_prefix, v_prefix, i_batch, i_head, lower, upper, T,
    s_kp_batch, s_kp_key, s_kp_head, s_vp_batch, s_vp_key, s_vp_head,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HIGH: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return `sums` after every tile of prefix keys was added: first those that need a mask, then the others.

    scores = score(rows, k [BLOCK_N, BLOCK_D], v alike, SCALE, SOFTCAP, HIGH, PRECISION);
    sums = add(scores, k, v, m_seen [BLOCK_M, BLOCK_N] or None, sums, SCALE, SOFTCAP, HIGH, PRECISION);
    tiles are those of `key_tiles`. Two functions, because a mask made before the scores costs registers.
    """
    first, whole, whole_end, last = tiles
    skipped = whole_end - whole
    for i_masked in tl.range(first, last - skipped):
        i_key_tile = tl.where(i_masked < whole, i_masked, i_masked + skipped)
        o_key = i_key_tile * BLOCK_N
        i_key = o_key + tl.arange(0, BLOCK_N)
        b_k, b_v = load_prefix(
            k_prefix, v_prefix, o_key, i_key < T, i_batch, i_head, s_kp_batch, s_kp_key, s_kp_head,
            s_vp_batch, s_vp_key, s_vp_head, D, BLOCK_N, BLOCK_D, TMA,
        )  # fmt: skip
        scores = score(rows, b_k, b_v, SCALE, SOFTCAP, HIGH, PRECISION)
        m_seen = (i_key[None, :] >= lower[:, None]) & (i_key[None, :] < upper[:, None])
        sums = add(scores, b_k, b_v, m_seen, sums, SCALE, SOFTCAP, HIGH, PRECISION)
    for i_key_tile in tl.range(whole, whole_end):
        b_k, b_v = load_prefix(
            k_prefix, v_prefix, i_key_tile * BLOCK_N, None, i_batch, i_head, s_kp_batch, s_kp_key, s_kp_head,
            s_vp_batch, s_vp_key, s_vp_head, D, BLOCK_N, BLOCK_D, TMA,
        )  # fmt: skip
        scores = score(rows, b_k, b_v, SCALE, SOFTCAP, HIGH, PRECISION)
        sums = add(scores, b_k, b_v, None, sums, SCALE, SOFTCAP, HIGH, PRECISION)
    return sums


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
def load_rows(
    q, d_out, lse, delta, i_row, m_row, i_batch, i_head, s_q_batch, s_q_token, s_q_head, N, Lq,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return q and d_out [BLOCK_M, BLOCK_D], lse in log2, delta and `row_offsets` of rows. A row that is not
    real has an infinite lse, hence probability 0."""
    b_q, i_query_head = load_queries(
        q, i_row, m_row, i_batch, i_head, s_q_batch, s_q_token, s_q_head, G, D, BLOCK_D
    )
    o_row = row_offsets(i_row, i_query_head, i_batch, N, Lq, H, G)
    b_d_out = load_tile(d_out, o_row, D, m_row, D, BLOCK_D)
    row_lse = tl.load(lse + o_row, mask=m_row, other=float("inf")) * LOG2E
    row_delta = tl.load(delta + o_row, mask=m_row, other=0.0)
    return b_q, b_d_out, row_lse, row_delta, o_row


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
    """Name the precision of products: fp32 follows torch.set_float32_matmul_precision."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def high_of(x: Tensor) -> tl.dtype:
    """Return the dtype of sums of products of x's dtype."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def common_arguments(operands: Operands) -> dict[str, Any]:
    """Name the operands, strides, sizes and options as the kernels do."""
    x = operands
    tokens = x.q.reshape(
        x.B, x.N * x.Lq, x.Hq, x.D
    )  # a view, unless blocks and slots are not one stride apart
    own, prefix = ("batch", "block", "slot", "head"), ("batch", "key", "head")
    arguments: dict[str, Any] = {
        "prefix_start": None if x.prefix_start is None else x.prefix_start.contiguous(),
        "prefix_end": x.prefix_end.contiguous(),
        "sinks": x.sinks,
        "SCALE": x.scale,
        "SOFTCAP": x.softcap,
        "WINDOW": x.window,
        "CAUSAL": x.own == "causal",
        "HIGH": high_of(x.q),
        "PRECISION": precision_of(x.q.dtype),
    }
    arguments |= {"N": x.N, "T": x.T, "Lq": x.Lq, "Lk": x.Lk, "H": x.Hkv, "G": x.G, "D": x.D}
    for name, short, tensor, axes in (
        ("q", "q", tokens, ("batch", "token", "head")),
        ("k", "k", x.k, own),
        ("v", "v", x.v, own),
        ("k_prefix", "kp", x.k_prefix, prefix),
        ("v_prefix", "vp", x.v_prefix, prefix),
    ):
        arguments[name] = tensor = last_contiguous(tensor)
        arguments |= {f"s_{short}_{axis}": stride for axis, stride in zip(axes, tensor.stride())}
    return arguments


def prefix_operands(k_prefix: Tensor, v_prefix: Tensor, tile: Tile, chip: Chip) -> dict[str, Any]:
    """Make the kernel arguments k_prefix, v_prefix and TMA: descriptors where the chip copies by them and
    both tensors [B, T, H, D] are aligned to 16 bytes in every axis, else the tensors."""
    tensors = {"k_prefix": k_prefix, "v_prefix": v_prefix}
    if not (chip.tma and all(map(_describable, tensors.values()))):
        return {**tensors, "TMA": False}
    block = [1, tile.BLOCK_N, 1, tile.BLOCK_D]
    descriptors = {name: TensorDescriptor(x, x.shape, x.stride(), block) for name, x in tensors.items()}
    return {**descriptors, "TMA": True}


def with_prefix(operands: Operands, tile: Tile, chip: Chip) -> dict[str, Any]:
    """Make `common_arguments` with `prefix_operands`."""
    arguments = common_arguments(operands)
    return arguments | prefix_operands(arguments["k_prefix"], arguments["v_prefix"], tile, chip)


def _describable(x: Tensor) -> bool:
    outer = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in outer)


@dataclass(frozen=True)
class Launch:
    """One kernel call, to run or (the compile gate) to compile from the same arguments."""

    kernel: Any
    grid: tuple[int, ...]
    tile: Tile
    arguments: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        return {
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
            "enable_fp_fusion": True,
        }

    def run(self) -> None:
        if min(self.grid) > 0:
            self.kernel[self.grid](**self.arguments, **self.options)


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, **arguments: Any) -> Launch:
    """Make a call of the kernel with those of the arguments and of the tile's fields that it takes."""
    named = vars(tile) | arguments
    return Launch(kernel, grid, tile, {name: named[name] for name in kernel.arg_names})
