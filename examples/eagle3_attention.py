"""Compute EAGLE-3's training-time-test attention with thought_attention: no mask, all draft steps at once.

EAGLE-3 (Li et al. 2025, arXiv 2503.01840, section 3.2) trains a draft model on its own predictions: each
position i is unrolled for draft steps s = 1 .. S. The query of step s at position i sees the step-0 keys
j <= i and the keys of its own steps 1 .. s, so it is a block of S slots behind a prefix of i + 1 keys.

    python examples/eagle3_attention.py
"""

from __future__ import annotations

import time

import torch
from qstar_kernels import thought_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def draft_attention(q: Tensor, k: Tensor, v: Tensor, k0: Tensor, v0: Tensor) -> Tensor:
    """Attend from q [B, T, S, Hq, D] to k, v [B, T, S, H, D] (steps 1 .. S) and k0, v0 [B, T, H, D] (step 0).

    Returns a tensor like q. A trainer that unrolls step by step passes its last query only: [B, T, 1, Hq, D].
    """
    prefix_end = torch.arange(1, q.shape[1] + 1, device=q.device).expand(q.shape[0], -1)
    return thought_attention(q, k, v, k0, v0, prefix_end)[0]


def draft_attention_dense(q: Tensor, k: Tensor, v: Tensor, k0: Tensor, v0: Tensor) -> Tensor:
    """Compute the same from the definition, with a mask [T * S, T * (S + 1)]."""
    B, T, S, Hq, D = q.shape
    position, step = torch.arange(T).repeat_interleave(S), torch.arange(1, S + 1).repeat(T)
    sees_text = torch.arange(T) <= position[:, None]
    sees_own = (position == position[:, None]) & (step <= step[:, None])
    mask = torch.cat([sees_text, sees_own], dim=1).to(q.device)
    keys, values = (torch.cat([a, b.flatten(1, 2)], 1).transpose(1, 2) for a, b in ((k0, k), (v0, v)))
    queries = q.flatten(1, 2).transpose(1, 2)
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).view(B, T, S, Hq, D)


def main(B: int = 1, T: int = 256, S: int = 7, Hq: int = 8, H: int = 2, D: int = 64) -> None:
    shapes = (B, T, S, Hq, D), (B, T, S, H, D), (B, T, S, H, D), (B, T, H, D), (B, T, H, D)
    operands = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = []
    for function in (draft_attention, draft_attention_dense):
        for _ in range(2):  # the first call warms up
            began = time.perf_counter()
            out = function(*operands)
            gradients = torch.autograd.grad(out.sum(), operands)
            seconds = time.perf_counter() - began
        results.append((out, *gradients))
        print(f"{function.__name__:22} {1e3 * seconds:8.1f} ms forward and backward")
    print(f"largest difference {max(float((a - b).detach().abs().max()) for a, b in zip(*results)):.1e}")


if __name__ == "__main__":
    main()
