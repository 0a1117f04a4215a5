"""`qstar bench attention`: thought attention beside the baselines that a reader would ask for, in one run.

What is known without measuring is printed first. Every candidate runs once for warm-up (compilation
included, told apart) and is held to the dense mask's definition in fp64, outputs and each gradient; then all
take turns in alternating rounds. A ratio is the median over the rounds of one round's ratio: what slows the
machine for a while slows both sides of it. The row of "matmul" is a large square product (SquareProduct in
timing.py) in the same rounds: the ceiling.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

from torch.profiler import record_function
from tqdm.auto import tqdm

from qstar.cli.options import parse_options
from qstar.reporting import tables
from qstar.reporting.benchmark_record import OutputArguments, finish, machine
from qstar.reporting.profiling import traced
from qstar_bench.attention.attention_check import Judge
from qstar_bench.attention.attention_problem import Problem, Shape
from qstar_bench.attention.attention_request import AttentionArguments, Request, plan
from qstar_bench.attention.candidates import Candidate, can, candidates, way
from qstar_bench.memory.memory_peaks import peak_bytes
from qstar_bench.report import run_plots
from qstar_bench.timing import SquareProduct, kernel_seconds, matmul_flops, timed

SLOW_SECONDS = 10.0  # a candidate whose calls took longer than this in all gets no more of them
NEEDED = ("ours", "causal")  # but these two: the ratio of theirs is the first figure that is asked for
MATMUL = ("matmul", "product")
Key = tuple[str, str]


@dataclass
class Case:
    """Hold the measurement of one shape: candidates and their figures by (name, pass)."""

    shape: Shape
    runs: dict[Key, Candidate] = field(default_factory=dict)
    warm_up: dict[Key, float] = field(default_factory=dict)  # seconds
    errors: dict[Key, float] = field(default_factory=dict)
    times: dict[Key, list[float]] = field(default_factory=dict)  # seconds, one of each round
    memory: dict[Key, int] = field(default_factory=dict)  # bytes
    q_bytes: int = 0

    def ratio(self, above: Key, below: Key) -> float | None:
        """Give the median ratio of times; None where one of the two was not measured."""
        if not (self.times.get(above) and self.times.get(below)):
            return None
        return statistics.median(a / b for a, b in zip(self.times[above], self.times[below]))

    def memory_vs_q(self, key: Key) -> float | None:
        return self.memory[key] / self.q_bytes if key in self.memory else None


def measure(shape: Shape, args: AttentionArguments, chosen: Request, bar: tqdm) -> Case:
    """Measure time and memory of every candidate and pass. Raises WrongResultError before any time is
    known."""
    problem = Problem(shape, chosen.dtype, args.device)
    judge = Judge(problem)
    product = SquareProduct(chosen.dtype, args.device)
    case = Case(shape, q_bytes=problem.q.numel() * problem.q.element_size())

    def show(what: str) -> None:
        bar.set_postfix_str(f"T {shape.T} L {shape.L}: {what}")

    case.runs[MATMUL] = Candidate(*MATMUL, run=lambda _: product.run(), flops=product.flops)
    case.warm_up[MATMUL] = timed(product.run, args.device)[0]
    for name in chosen.names:
        passes = tuple(x for x in chosen.passes if x in can(name, args.impl[0], args.device))
        if not passes:
            continue
        one = way(problem, name, args.impl[0])
        for candidate in candidates(name, one, passes):
            show(f"warm-up, {name} {candidate.what}")
            key = name, candidate.what
            case.runs[key] = candidate
            case.warm_up[key] = timed(partial(candidate.run, candidate.prepare()), args.device)[0]
        show(f"is {name} right?")
        case.errors |= {(name, what): x for what, x in judge.check(name, one, passes).items()}
    case.times = {key: [] for key in case.runs}
    for i in range(args.rounds):
        for key, candidate in case.runs.items():
            if key[0] in NEEDED or sum(case.times[key]) < SLOW_SECONDS:
                show(f"round {i + 1}, {' '.join(key)}")
                run = partial(candidate.run, candidate.prepare())
                case.times[key].append(kernel_seconds(run, args.device))
    for key, candidate in case.runs.items():
        if key[0] in NEEDED or (key != MATMUL and case.times[key][0] < SLOW_SECONDS):
            show(f"memory, {' '.join(key)}")
            case.memory[key] = peak_bytes(partial(candidate.run, candidate.prepare()), args.device)
    return case


def rows(case: Case, args: AttentionArguments) -> list[dict]:
    """Make the table's rows, one for each candidate and pass. "error * 1e6" is the largest of the output or
    the gradients on some blocks; "of matmul %" the share of the ceiling's FLOP/s."""

    def scaled(x: float | None, factor: float) -> float | None:
        return None if x is None else factor * x

    found = []
    for key, times in case.times.items():
        (name, what), candidate, median = key, case.runs[key], statistics.median(times)
        two = times if len(times) > 1 else times * 2
        low, _, _, high = statistics.quantiles(two, n=5, method="inclusive")
        shares = [
            candidate.flops / x / (case.runs[MATMUL].flops / y) for x, y in zip(times, case.times[MATMUL])
        ]
        found.append(
            {
                **asdict(case.shape),
                "N": case.shape.N,
                "dtype": args.dtype,
                "candidate": name,
                "pass": what,
                "median ms": 1e3 * median,
                "20 %": 1e3 * low,
                "80 %": 1e3 * high,
                "warm-up ms": 1e3 * case.warm_up[key],
                "GFLOP/s": candidate.flops / median / 1e9,
                "of matmul %": 100 * statistics.median(shares),
                "times causal": case.ratio(key, ("causal", what)),
                "memory MiB": scaled(case.memory.get(key), 2**-20),
                "memory / q": case.memory_vs_q(key),
                "error * 1e6": scaled(case.errors.get(key), 1e6),
            }
        )
    return found


def ratios(case: Case) -> dict:
    """Compare ours with the baselines, None where one was not measured; memory is that of forward and
    backward."""
    both, forward, sampling = ("ours", "both"), ("ours", "forward"), ("ours", "sampling")
    return {
        **asdict(case.shape),
        "N": case.shape.N,
        "fwd_bwd_vs_causal": case.ratio(both, ("causal", "both")),
        "fwd_bwd_speedup_vs_dense": case.ratio(("dense", "both"), both),
        "fwd_vs_causal": case.ratio(forward, ("causal", "forward")),
        "fwd_speedup_vs_flex": case.ratio(("flex", "forward"), forward),
        "fwd_bwd_speedup_vs_flash": case.ratio(("flash", "both"), both),
        "sampling_vs_causal": case.ratio(sampling, ("causal", "sampling")),
        "extra_memory_vs_q": case.memory_vs_q(both),
    }


def trace(path: str, cases: list[Case]) -> None:
    """Trace one call of every candidate in a range of its name; a backward's graph is made outside of it."""
    with traced(path):
        for case in cases:
            for (name, what), candidate in case.runs.items():
                prepared = candidate.prepare()
                with record_function(f"{name} {what} T {case.shape.T} L {case.shape.L}"):
                    candidate.run(prepared)


def main(argv: list[str]) -> int:
    args, output = parse_options((AttentionArguments, OutputArguments), argv, prog="qstar bench attention")
    chosen = plan(args)
    ceiling = {f"matmul GFLOP/s {args.dtype}": matmul_flops(chosen.dtype, args.device) / 1e9}
    where = machine(args.device, dtype=args.dtype, **chosen.runs, **ceiling)
    cards = [shape.card(chosen.dtype.itemsize) for shape in chosen.shapes]
    say: Callable[[str], None] = (lambda _: None) if output.json else partial(print, flush=True)
    say(tables.table(cards, digits=1))
    say("\n".join(f"{name}: {value}" for name, value in where.items()))
    say("\n".join(chosen.remarks))
    cases: list[Case] = []
    bar = tqdm(chosen.shapes, disable=output.json)
    for shape in bar:
        case = measure(shape, args, chosen, bar)
        if output.trace is None:
            case.runs = {
                key: Candidate(*key, run=lambda _: None, flops=x.flops) for key, x in case.runs.items()
            }
        cases.append(case)
    found = [row for case in cases for row in rows(case, args)]
    own = [ratios(case) for case in cases]
    in_card = ("R", "Hq", "Hkv", "D", "dtype")
    say(
        tables.table([{name: x for name, x in row.items() if name not in in_card} for row in found], digits=2)
    )
    measured = [name for name in own[0] if any(case[name] is not None for case in own)]
    say(tables.table([{name: case[name] for name in measured} for case in own], digits=2))
    if args.plot is not None:
        plot(found, args.plot)
    if output.trace is not None:
        trace(output.trace, cases)
    finish("attention", args, where, found, output, cases=own, costs=cards)
    return 0


def plot(rows: list[dict], path: str) -> None:
    """Draw milliseconds and peak memory of our forward + backward over the number of slots, a line for each
    T."""
    with run_plots.style("black") as pyplot:
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        both = [row for row in rows if (row["candidate"], row["pass"]) == ("ours", "both")]
        for axis, key, label in zip(axes, ("median ms", "memory MiB"), ("ms", "peak extra memory, MiB")):
            for T in dict.fromkeys(row["T"] for row in both):
                points = [(row["N"] * row["L"], row[key]) for row in both if row["T"] == T]
                axis.plot(*zip(*points), marker="o", label=f"T {T}")
            axis.set_title(f"forward + backward: {label}")
            axis.set_xlabel("slots N * L")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.legend()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
