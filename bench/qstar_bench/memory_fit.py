"""What fits on a card: the largest T, batch, k and R, each alone, and the block chunk.

Plans of one and of two layers give the peak of any number of layers, which grows by the same with each: an
estimate, by which the answer is searched. The answer itself is planned in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from qstar import QuietStarConfig
from qstar_bench import memory_setup
from qstar_bench.memory_planner import plan
from qstar_bench.memory_setup import StepArguments

USABLE = 0.95  # of a card: an assumption; the rest is CUDA's context, cuBLAS's workspace and fragmentation
FEW_LAYERS = (1, 2)
TOKENS = 16_384  # the most that are tried


def estimate(args: StepArguments, thinking: QuietStarConfig, gpus: int = 1) -> float:
    """Peak bytes: of each phase by a straight line through two small plans, then the highest phase's."""
    layers = memory_setup.model_config(args.model).num_hidden_layers
    few, more = FEW_LAYERS
    if layers <= more:
        return plan(args, thinking, gpus=gpus).peak_bytes
    small, large = (
        {phase: sum(found.values()) for phase, found in plan(args, thinking, n, gpus).phases.items()}
        for n in FEW_LAYERS
    )
    return max(small[x] + (large[x] - small[x]) * (layers - few) / (more - few) for x in small)


def largest(peak: Callable[[int], float], room: float, values: range, begin: int) -> int | None:
    """The largest of the values whose peak is within the room, or None; the peak must grow with them.

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


def fits(
    args: StepArguments, thinking: QuietStarConfig, gpus: int, card_gib: float, quiet: bool = False
) -> list[dict[str, Any]]:
    """A row for each of the block chunk, T, batch, k and R: the largest value that fits with the others as
    given, what was estimated for it, and what its full plan says, in GiB."""
    room = card_gib * 2**30 * USABLE
    context = getattr(memory_setup.model_config(args.model), "max_position_embeddings", None)
    blocks = (args.tokens - 1) * thinking.num_thoughts
    values = {
        "block_chunk": range(thinking.num_thoughts, blocks + 1, thinking.num_thoughts),
        "tokens": range(thinking.talk_length + 1, min(TOKENS, (context or TOKENS) - thinking.slots) + 1, 16),
        "batch": range(1, 1025),
        "thought_length": range(257),
        "num_thoughts": range(1, min(64, thinking.block_chunk or 64) + 1),
    }
    rows = []
    for name in tqdm(values, desc="what fits", disable=quiet):
        of_step = name in ("tokens", "batch")
        given = getattr(args if of_step else thinking, name)

        def changed(value: int, name=name, of_step=of_step) -> tuple[StepArguments, QuietStarConfig]:
            if name == "block_chunk" and value >= blocks:
                return args, replace(thinking, block_chunk=None)
            option: dict[str, Any] = {name: value}
            return (replace(args, **option), thinking) if of_step else (args, replace(thinking, **option))

        def peak(value: int, changed=changed) -> float:
            changed_args, changed_thinking = changed(value)
            return estimate(changed_args, changed_thinking, gpus)

        if name == "block_chunk" and peak(blocks) <= room:
            found: int | None = blocks
        else:
            found = largest(peak, room, values[name], given or 32 * thinking.num_thoughts)
        row: dict[str, Any] = {"option": name, "given": given}
        if found is None:
            row["largest"] = "none fits"
        else:
            row["largest"] = "none needed" if (name, found) == ("block_chunk", blocks) else found
            row["estimated GiB"] = peak(found) / 2**30
            row["planned GiB"] = plan(*changed(found), gpus=gpus).peak_bytes / 2**30
            row["note"] = (
                "the most that is tried" if name != "block_chunk" and found == values[name][-1] else ""
            )
        rows.append(row)
    return rows
