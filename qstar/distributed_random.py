"""The random numbers of one process, when several share a batch."""

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
    """Numbers in [0, 1), [draws, rows, columns], for the rows of this process; generator None: torch's own.

    Under torch.distributed the batch is that of all processes, rank after rank: each draws the numbers of all
    rows and keeps its own. So from one seed no two processes think the same thoughts; together they think
    those that one process would, if their rows have the same lengths; and then their generators stay equal,
    so that a run resumes with another number of processes. With one process it is `torch.rand`.
    """
    rank, processes = 0, 1
    if distributed.is_available() and distributed.is_initialized():
        rank, processes = distributed.get_rank(), distributed.get_world_size()
    source = device if generator is None else generator.device
    own = torch.empty(draws, rows, columns, dtype=dtype, device=device)
    for numbers in own:  # one after the other: with many processes all of them at once would be large
        every = torch.rand(processes, rows, columns, dtype=dtype, generator=generator, device=source)
        numbers.copy_(every[rank])
    return own
