"""The ceiling that a kernel's FLOP/s are held against: a plain matrix product in the same dtype."""

from __future__ import annotations

import statistics

import torch

from qstar_bench.timing import kernel_seconds


class SquareProduct:
    """n x n x n on random numbers, large enough to keep the device busy: n 1,024 on a CPU, 8,192 on a GPU."""

    def __init__(self, dtype: torch.dtype, device: str):
        self.n, self.device = 1024 if device == "cpu" else 8192, device
        self.name = f"{self.n} x {self.n} x {self.n} in {str(dtype).removeprefix('torch.')}"
        self.flops = 2.0 * self.n**3
        self.a, self.b = (torch.randn(self.n, self.n, device=device).to(dtype) for _ in range(2))

    def run(self) -> object:
        return self.a @ self.b

    def flops_per_second(self, calls: int = 5) -> float:
        """The median of some calls, after one that is not counted."""
        self.run()
        return self.flops / statistics.median(kernel_seconds(self.run, self.device) for _ in range(calls))
