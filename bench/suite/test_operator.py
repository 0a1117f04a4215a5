"""thought_attention at three sizes: L 14, 8 query and 2 key-value heads, D 64, a block at every token."""

import pytest
import torch
from qstar_kernels import thought_attention

HEADS, KV_HEADS, D, L = 8, 2, 64, 14
SIZES = (64, 128, 256)


def operands(T, queries=L, grad=False):
    """q [1, T, queries, H, D], own k, v [1, T, L, Hkv, D], prefix k, v [1, T, Hkv, D], prefix_end [1, T]."""
    source = torch.Generator().manual_seed(0)
    shapes = [
        (1, T, queries, HEADS, D),
        *[(1, T, L, KV_HEADS, D)] * 2,
        *[(1, T, KV_HEADS, D)] * 2,
    ]
    tensors = [torch.randn(*shape, generator=source).requires_grad_(grad) for shape in shapes]
    return (*tensors, torch.arange(1, T + 1)[None])


@pytest.mark.parametrize("T", SIZES)
@torch.no_grad()
def test_forward(benchmark, T):
    benchmark(thought_attention, *operands(T))


@pytest.mark.parametrize("T", SIZES)
def test_backward(benchmark, T):
    """Time the backward pass alone; its forward is made before."""
    *leaves, prefix_end = operands(T, grad=True)
    out = thought_attention(*leaves, prefix_end)[0]
    d_out = torch.ones_like(out)
    benchmark(lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True))


@pytest.mark.parametrize("T", SIZES)
@torch.no_grad()
def test_sampling(benchmark, T):
    """Time one query slot of every block over the prefix and L own keys."""
    benchmark(thought_attention, *operands(T, queries=1))
