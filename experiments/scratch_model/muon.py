"""Step weight matrices by their momentum, made orthogonal: Muon (K. Jordan et al. 2024).

torch.optim.Muon computes in bf16: on a CPU without bf16 units its step takes 2.06 s for this study's model,
this one's 0.16 s, and the forward and backward pass 0.57 s (torch 2.13, one thread).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration


def orthogonal(x: Tensor) -> Tensor:
    """Map each matrix U S V^T of x [N, A, B], A <= B, to about U V^T.

    The new singular values are within 0.7 and 1.2, unless the old one was very small.
    """
    a, b, c = COEFFICIENTS
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Optimise matrices alone: those of the layers, not embeddings and head."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = {}  # by shape, the shorter side first
            for p in group["params"]:
                alike.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for parameters in alike.values():
                steps = []
                for p in parameters:
                    assert p.grad is not None
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    step = p.grad.lerp(buffer, group["momentum"])
                    steps.append(step if p.shape[0] <= p.shape[1] else step.T)
                for p, step in zip(parameters, orthogonal(torch.stack(steps))):
                    scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(step if p.shape[0] <= p.shape[1] else step.T, alpha=group["lr"] * scale)
