"""Draw the random numbers of one process when several share a batch."""

import torch
from torch import Tensor, distributed


def rand(
    draws: int,
    rows: int,
    columns: int,
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw numbers in [0, 1), [draws, rows, columns], for this process's rows; generator None: torch's own.

    Under torch.distributed every process draws the numbers of all processes, rank after rank, and keeps its
    own: with one seed, no two think the same thoughts. If all have rows of the same lengths, they think what
    one process would, and their generators stay equal, so a run can resume with another number of processes.
    """
    rank, processes = 0, 1
    if distributed.is_available() and distributed.is_initialized():
        rank, processes = distributed.get_rank(), distributed.get_world_size()
    source = device if generator is None else generator.device
    own = torch.empty(draws, rows, columns, dtype=dtype, device=device)
    for numbers in own:  # one draw at a time, to bound memory with many processes
        every = torch.rand(processes, rows, columns, dtype=dtype, generator=generator, device=source)
        numbers.copy_(every[rank])
    return own
