"""Compute the workspace of the operators: the bytes that they hold while they run, besides their results.

Pure functions of the operands' shapes and dtypes (real, fake or meta tensors). They follow the scratch memory
of cpu_tiles.py, the panels of cpu_native.py and the buffers of triton_attention.py and triton_decode.py. A
tile is taken to see all T prefix keys. Legend as in cpu_tiles.py.
"""

import torch
from qstar_kernels import cpu_native
from qstar_kernels.cpu_tiles import tile_sizes
from qstar_kernels.triton_tiles import Chip, decode_tile, keys_tile
from torch import Tensor

INDEX_BYTES = 8  # the ranges of the blocks, as int64
PANEL_KEYS = 16  # prefix keys that cpu_forward.c lays out together


def cpu_forward(q: Tensor, k: Tensor, k_prefix: Tensor, sinks: Tensor | None, softcap: float | None) -> int:
    """Count the bytes of qstar::thought_attention_cpu, by the C kernel where it supports q and k."""
    if cpu_native.supports(q, k):
        return _native_forward(q, k, k_prefix)
    tile, scores, itemsize = _cpu_tile(q, k, k_prefix, sinks)
    slopes = 0 if softcap is None else 2 * scores
    elements = 2 * k_prefix.numel() + tile["q"] * 2 + tile["k"] * 2 + tile["own"] + scores + slopes
    return elements * itemsize + _ranges(q)


def cpu_backward(q: Tensor, k: Tensor, k_prefix: Tensor, sinks: Tensor | None, softcap: float | None) -> int:
    """Count the bytes of qstar::thought_attention_cpu_backward."""
    tile, scores, itemsize = _cpu_tile(q, k, k_prefix, sinks)
    slopes = 0 if softcap is None else scores
    scratch = 3 * tile["q"] + 3 * tile["k"] + tile["own"] + 2 * scores + k_prefix.numel() // k_prefix.shape[0]
    return (4 * k_prefix.numel() + scratch + slopes) * itemsize + _ranges(q)


def triton_forward(q: Tensor, k: Tensor, k_prefix: Tensor, chip: Chip) -> int:
    """Count the bytes of qstar::thought_attention on a chip: of split rows, where a block has one query."""
    B, N, Lq, Hq, D = q.shape
    if Lq > 1:
        return 0
    H, T = k.shape[3], k_prefix.shape[1]
    tile = decode_tile(D=D, itemsize=q.element_size(), G=Hq // H, T=T, N=N, heads=B * H, chip=chip)
    return 0 if tile.SPLIT == 1 else tile.SPLIT * B * N * Hq * (D + 1) * _high(q).itemsize


def triton_backward(q: Tensor, k: Tensor, k_prefix: Tensor, chip: Chip) -> int:
    """Count the bytes of qstar::thought_attention_backward on a chip: delta, and the partial sums of
    dk_prefix and dv_prefix."""
    B, N, Lq, Hq, D = q.shape
    H, T = k.shape[3], k_prefix.shape[1]
    tile = keys_tile(
        D=D,
        itemsize=q.element_size(),
        rows=N * Lq * (Hq // H),
        keys=T,
        heads=B * H,
        split=True,
        N=N,
        chip=chip,
    )
    partial = 0 if tile.SPLIT == 1 else 2 * (tile.SPLIT + 1) * k_prefix.numel()
    return (B * N * Lq * Hq + partial) * _high(q).itemsize


def _native_forward(q: Tensor, k: Tensor, k_prefix: Tensor) -> int:
    B, T, H, D = k_prefix.shape
    floats = B * H * -(-T // PANEL_KEYS) * PANEL_KEYS * D
    if q.dtype != torch.float32:
        # both sides of the prefix, and of some blocks at a time q, k, v, out and lse
        blocks = min(q.shape[1], max(1, cpu_native.CONVERTED_BYTES * q.shape[1] // max(1, 4 * q.numel())))
        a_block = (2 * q.numel() + q.numel() // D + 2 * k.numel()) // max(1, q.shape[1])
        floats += 2 * k_prefix.numel() + blocks * a_block
    return 4 * floats + _ranges(q)


def _cpu_tile(
    q: Tensor, k: Tensor, k_prefix: Tensor, sinks: Tensor | None
) -> tuple[dict[str, int], int, int]:
    """Count elements of a tile's q, own k and own products, elements of its scores, and bytes an element."""
    B, N, Lq, Hq, D = q.shape
    T, Lk, H = k_prefix.shape[1], k.shape[2], k.shape[3]
    W, columns, itemsize = Lq * Hq // H, T + Lk + (sinks is not None), _high(q).itemsize
    rows, blocks = tile_sizes(B, N, H, W, columns, itemsize)
    count = rows * blocks * H
    return {"q": count * W * D, "k": count * Lk * D, "own": count * W * Lk}, count * W * columns, itemsize


def _high(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _ranges(q: Tensor) -> int:
    return 2 * q.shape[0] * q.shape[1] * INDEX_BYTES
