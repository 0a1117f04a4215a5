"""Every test of the operators runs with uninitialised memory full of NaN: what is read unwritten shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_full_of_nan():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert bool(torch.empty(3).isnan().all()), "this torch does not fill uninitialised memory"
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
