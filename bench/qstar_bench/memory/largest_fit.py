"""Find what fits on a card: the largest T, batch, k and R, each alone, and the block chunk.

Plans of one and of two layers give the peak of any number of layers, which grows by the same with each: an
estimate, by which the answer is searched. The answer itself is planned in full.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qstar import QuietStarConfig
from qstar.supported import context_length
from qstar_bench.memory.planned_step import plan
from qstar_bench.memory.step_setup import MemoryStepArguments
from qstar_bench.model_shapes import base_config

USABLE = 0.95  # of a card: an assumption; the rest is CUDA's context, cuBLAS's workspace and fragmentation
FEW_LAYERS = (1, 2)
TOKENS = 16_384  # the most that are tried
OPTIONS = ("block_chunk", "tokens", "batch", "thought_length", "num_thoughts")


def estimate(args: MemoryStepArguments, thinking: QuietStarConfig, gpus: int = 1) -> float:
    """Estimate peak bytes: of each phase by a straight line through two small plans, then the highest
    phase's."""
    layers = base_config(args.model).num_hidden_layers
    few, more = FEW_LAYERS
    if layers <= more:
        return plan(args, thinking, gpus=gpus).peak_bytes
    small, large = (
        {phase: sum(found.values()) for phase, found in plan(args, thinking, n, gpus).phases.items()}
        for n in FEW_LAYERS
    )
    return max(small[x] + (large[x] - small[x]) * (layers - few) / (more - few) for x in small)


def largest(peak: Callable[[int], float], room: float, values: range, begin: int) -> int | None:
    """Find the largest value whose peak is within the room, or None; the peak must grow with the value.

    Searched from `begin` on by the straight line through the last two peaks, which is nearly always the peak.
    """
    fits, does_not = -1, len(values)  # indices into values
    known: list[tuple[int, float]] = []
    guess: float = (begin - values.start) // values.step
    while does_not - fits > 1:
        at = min(max(int(guess), fits + 1), does_not - 1)
        known.append((at, peak(values[at])))
        if known[-1][1] > room:
            does_not = at
        else:
            fits = at
        guess = 2 * at + 1 if fits == at else at / 2
        if len(known) > 1:
            (x, f), (y, g) = known[-2:]
            guess = y + (room - g) * (y - x) / (g - f) if g != f else guess
    return None if fits < 0 else values[fits]


def fit(
    name: str, args: MemoryStepArguments, thinking: QuietStarConfig, gpus: int, card_gib: float
) -> dict[str, Any]:
    """{"option", "given", "largest" that fits with the others as given, and, if any does, "estimated GiB" and
    "planned GiB" (in full) of it, "note"}; name: one of OPTIONS."""
    room = card_gib * 2**30 * USABLE
    context = context_length(base_config(args.model))
    longest = min(TOKENS, (context or TOKENS) + 1 - thinking.slots)
    L, R = thinking.slots, thinking.num_thoughts
    every = (args.tokens - 1) * R * L  # slots of a row
    chunk = thinking.block_chunk or sys.maxsize
    values = {
        "block_chunk": range(R * L, every + 1, R * L),
        "tokens": range(-(-(thinking.talk_length + 1) // 16) * 16, longest + 1, 16),
        "batch": range(1, 1025),
        "thought_length": range(min(257, chunk // R - thinking.talk_length)),
        "num_thoughts": range(1, min(64, chunk // L) + 1),
    }[name]
    of_step = name in ("tokens", "batch")
    given = getattr(args if of_step else thinking, name)

    def changed(value: int) -> tuple[MemoryStepArguments, QuietStarConfig]:
        option: dict[str, Any] = {name: value if (name, value) != ("block_chunk", every) else None}
        return (replace(args, **option), thinking) if of_step else (args, replace(thinking, **option))

    @functools.cache
    def peak(value: int) -> float:
        changed_args, changed_thinking = changed(value)
        return estimate(changed_args, changed_thinking, gpus)

    row: dict[str, Any] = {"option": name, "given": given}
    if name == "block_chunk" and peak(every) <= room:
        found: int | None = every
    else:
        found = largest(peak, room, values, 32 * R * L if given is None else given)
    if found is None:
        return row | {"largest": "none fits"}
    changed_args, changed_thinking = changed(found)
    none_needed = (name, found) == ("block_chunk", every)
    return row | {
        "largest": "none needed" if none_needed else found,
        "estimated GiB": peak(found) / 2**30,
        "planned GiB": plan(changed_args, changed_thinking, gpus=gpus).peak_bytes / 2**30,
        "note": "the most that is tried" if found == values[-1] and not none_needed else "",
    }
