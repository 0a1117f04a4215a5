"""The parts of a training step, named where they run, for profilers and the benches."""

import torch

PREFIX = "qstar.prefix"  # the base model over the text
ROLLOUT = "qstar.rollout"  # sampling the thoughts, without gradient
BLOCKS = "qstar.blocks"  # all slots of all thoughts, with gradient
LOSS = "qstar.loss"  # vocabulary products, mixing, rewards, policy term
PHASES = (PREFIX, ROLLOUT, BLOCKS, LOSS)


def phase(name: str) -> torch.profiler.record_function:
    """A range of that name in every trace. With block chunks under activation checkpointing, BLOCKS and LOSS
    occur once more for each chunk, inside the backward pass."""
    return torch.profiler.record_function(name)
