"""`qstar bench scaling`: a training step over thought length, thoughts and thinking positions at fixed T.

Each point is one forward + backward of a small random Mistral with thoughts, all blocks at once and with
`block_chunk`; the same seed must give both the same loss before any figure is printed. Without chunks time
and memory grow in proportion to the slots; with them memory stays, and a part of the time is spent twice.
"""

import statistics
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import MistralConfig, MistralForCausalLM

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.cli.options import parse_options
from qstar.option_checks import check_folder
from qstar.reporting import tables
from qstar.reporting.benchmark_record import OutputArguments, WrongResultError, finish, machine
from qstar.reporting.profiling import traced
from qstar_bench.memory.memory_peaks import peak_bytes
from qstar_bench.report import run_plots
from qstar_bench.timing import timed

# fp32 sums in another order, over some thousand terms: a wrong thought or a block left out is far above it
LOSS_TOLERANCE = 1e-5
TOGETHER = "all at once"


@dataclass(frozen=True)
class ScalingPreset:
    """T tokens of text and the options of a Mistral's config; the values of each sweep, and where k and R
    stand in the others (all positions think there); block_chunk and rounds unless told otherwise."""

    T: int
    model: dict[str, int]
    k: int
    R: int
    lengths: tuple[int, ...]
    thoughts: tuple[int, ...]
    shares: tuple[float, ...]
    block_chunk: int
    rounds: int


def shape(width: int, layers: int, heads: int, mlp: int, vocabulary: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
    }


PRESETS = {
    "cpu": ScalingPreset(
        T=129,
        model=shape(width=128, layers=4, heads=4, mlp=352, vocabulary=2048),
        k=6,
        R=2,
        lengths=(1, 7, 13, 25),
        thoughts=(1, 2, 4, 8),
        shares=(0.125, 0.25, 0.5, 1.0),
        block_chunk=176,
        rounds=3,
    ),
    "smoke": ScalingPreset(
        T=17,
        model=shape(width=16, layers=1, heads=2, mlp=16, vocabulary=64),
        k=2,
        R=1,
        lengths=(1, 4),
        thoughts=(1, 4),
        shares=(0.25, 1.0),
        block_chunk=32,
        rounds=1,
    ),
}


@dataclass
class ScalingArguments:
    """What `qstar bench scaling` takes."""

    preset: str = field(default="cpu", metadata={"help": f"One of {', '.join(PRESETS)}."})
    block_chunk: int | None = field(
        default=None,
        metadata={"help": "Slots of a row at once, of the chunked step; default: the preset's."},
    )
    rounds: int | None = field(
        default=None, metadata={"help": "Alternating rounds after the warm-up; default: the preset's."}
    )
    plot: str | None = field(default=None, metadata={"help": "Draw time and memory as this PNG."})

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset = {self.preset}: must be one of {', '.join(PRESETS)}")
        check_folder("plot", self.plot)


def chosen(args: ScalingArguments) -> tuple[ScalingPreset, int, int]:
    """(preset, block_chunk, rounds). Raises ValueError for a size that cannot be."""
    preset = PRESETS[args.preset]
    rounds = preset.rounds if args.rounds is None else args.rounds
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}: must be at least 1")
    chunk = preset.block_chunk if args.block_chunk is None else args.block_chunk
    for point in points(preset):
        configs(point, chunk)  # raises for a chunk that is too small
    return preset, chunk, rounds


@dataclass(frozen=True)
class Point:
    """k, R and the share of positions that think, one of which (`over`) the sweep changes."""

    over: str
    k: int
    R: int
    share: float


def points(preset: ScalingPreset) -> list[Point]:
    middle = Point("", preset.k, preset.R, 1.0)
    return [
        *(replace(middle, over="k", k=k) for k in preset.lengths),
        *(replace(middle, over="R", R=R) for R in preset.thoughts),
        *(replace(middle, over="positions", share=share) for share in preset.shares),
    ]


def build(preset: ScalingPreset) -> tuple[QuietStarForCausalLM, Tensor]:
    """Build a random model in fp32 and random text [1, T]."""
    torch.manual_seed(0)
    base = MistralForCausalLM(MistralConfig(**preset.model, sliding_window=None))
    model = QuietStarForCausalLM.from_base(base, QuietStarConfig()).train()
    torch.nn.init.normal_(model.mixing.layers[-1].weight, std=0.3)  # with w near 0 thoughts hardly count
    return model, torch.randint(3, preset.model["vocab_size"], (1, preset.T))


def configs(point: Point, chunk: int) -> dict[str, QuietStarConfig]:
    """Configure the two ways. The policy weight is 1: the paper's 1e6 would leave nothing else in the
    compared loss."""
    together = QuietStarConfig(
        thought_length=point.k,
        num_thoughts=point.R,
        thinking_positions="random",
        thinking_fraction=point.share,
        policy_weight=1.0,
    )
    return {TOGETHER: together, f"chunks of {chunk} slots": replace(together, block_chunk=chunk)}


def one_step(model: QuietStarForCausalLM, text: Tensor) -> tuple[Tensor, int]:
    """Run forward + backward with seed 0: (the loss, the number of blocks)."""
    model.zero_grad(set_to_none=True)
    output = model(text, generator=torch.Generator(text.device).manual_seed(0))
    output.loss.backward()
    return output.loss.detach(), int(output.metrics["thoughts"])


def check(point: Point, found: Tensor, expected: Tensor) -> None:
    """Compare losses. Raises WrongResultError if the chunked step's differs from that of all blocks at
    once."""
    error = float((found - expected).abs() / expected.abs().clamp(min=1))
    if not error <= LOSS_TOLERANCE:
        raise WrongResultError(
            f"{point}: the loss in chunks is {found}, all at once {expected}: {error:.1e} off"
        )


def measure(
    model: QuietStarForCausalLM, text: Tensor, point: Point, chunk: int, rounds: int, trace: str | None = None
) -> list[dict[str, Any]]:
    """Measure a row for each way: seconds of a step, and the peak memory that it takes beside the weights,
    gradients included. trace: where the chunked step's chrome trace goes."""
    ways = configs(point, chunk)

    def step(way: str) -> tuple[Tensor, int]:
        model.quiet_star = ways[way]
        return one_step(model, text)

    losses = {way: step(way) for way in ways}  # the warm-up
    loss, blocks = losses[TOGETHER]
    for found_loss, _ in losses.values():
        check(point, found_loss, loss)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, found in times.items():
            found.append(timed(partial(step, way), "cpu")[0])
    rows = []
    for way, found in times.items():
        model.zero_grad(set_to_none=True)  # the gradients are part of what a step takes
        rows.append(
            {
                "over": point.over,
                "k": point.k,
                "R": point.R,
                "positions": blocks // point.R,
                "slots": blocks * ways[way].slots,
                "way": way,
                "median s": statistics.median(found),
                "slowest s": max(found),
                "memory MiB": peak_bytes(partial(step, way), "cpu") / 2**20,
                "loss": float(loss),
            }
        )
    if trace is not None:
        with traced(trace):
            step(way)
    return rows


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each sweep and way: how many times the slots, the time and the memory of its smallest point the
    largest point has."""
    found = []
    for over, way in dict.fromkeys((row["over"], row["way"]) for row in rows):
        first, *_, last = [row for row in rows if (row["over"], row["way"]) == (over, way)]
        grown = {
            f"{name} growth": last[column] / first[column]
            for name, column in (("slots", "slots"), ("time", "median s"), ("memory", "memory MiB"))
        }
        found.append({"over": over, "way": way, **grown})
    return found


def memory_growth(grown: list[dict[str, Any]]) -> dict[str, float]:
    """Name the figures of the run: growth of peak memory over each sweep, in chunks and all at once."""
    return {
        f"memory_growth_over_{row['over']}{'' if row['way'] == TOGETHER else '_in_chunks'}": row[
            "memory growth"
        ]
        for row in grown
    }


def main(argv: list[str]) -> int:
    args, output = parse_options((ScalingArguments, OutputArguments), argv, prog="qstar bench scaling")
    preset, chunk, rounds = chosen(args)
    wanted = points(preset)
    model, text = build(preset)
    rows: list[dict[str, Any]] = []
    for point in tqdm(wanted, desc="points", disable=output.json):
        trace = output.trace if point is wanted[-1] else None
        rows += measure(model, text, point, chunk, rounds, trace)
    grown = growth(rows)
    where = machine("cpu", dtype="float32")
    if not output.json:
        print(tables.table(rows, digits=2))
        print(tables.table(grown, digits=2))
        print(", ".join(f"{name} {value}" for name, value in where.items()))
    arguments = replace(args, block_chunk=chunk, rounds=rounds)
    document = finish(
        "scaling",
        arguments,
        where,
        rows,
        output,
        **memory_growth(grown),
        growth=grown,
        model={"T": preset.T} | preset.model,
    )
    if args.plot is not None:
        run_plots.save(run_plots.of_run(document), args.plot)
    return 0
