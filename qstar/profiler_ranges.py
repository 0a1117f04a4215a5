"""Name the parts of a training step for profilers and the bench."""

import torch

PREFIX = "qstar.prefix"  # the base model over the text
ROLLOUT = "qstar.rollout"  # sampling the thoughts, without gradient
BLOCKS = "qstar.blocks"  # all slots of all thoughts, with gradient
LOSS = "qstar.loss"  # vocabulary products, mixing, rewards, policy term
PHASES = (PREFIX, ROLLOUT, BLOCKS, LOSS)


def phase(name: str) -> torch.profiler.record_function:
    """Open a range of that name in traces.

    With block_chunk, BLOCKS and LOSS occur again for each chunk, inside the backward pass.
    """
    return torch.profiler.record_function(name)
