"""NLL and sampling over a vocabulary of 32,000, for 512 hidden states 256 wide."""

import pytest
import torch
from qstar_kernels import vocabulary


@pytest.fixture(scope="module")
def problem():
    """(hidden [512, 256], head, targets [512])."""
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 256, generator=source)
    weight = torch.randn(32_000, 256, generator=source) / 16
    return hidden, vocabulary.LinearHead(weight), torch.randint(32_000, (512,), generator=source)


def test_nll(benchmark, problem):
    """Forward and backward."""
    hidden, head, targets = problem
    hidden = hidden.clone().requires_grad_()
    benchmark(lambda: torch.autograd.grad(vocabulary.log_likelihood(hidden, head, targets).sum(), hidden))


@torch.no_grad()
def test_sample(benchmark, problem):
    hidden, head, _ = problem
    source = torch.Generator().manual_seed(0)
    benchmark(lambda: vocabulary.sample(hidden, head, generator=source))
