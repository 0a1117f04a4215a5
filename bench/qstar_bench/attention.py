"""`qstar bench attention`: thought attention beside the baselines that a reader would ask for, in one run.

Every candidate is first held to the dense mask's definition in fp64, on a slice of the blocks; then all run
once for warm-up (compilation included, told apart), then in alternating rounds. A ratio is the median over
the rounds of one round's ratio: what slows the machine for a while slows both sides of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from qstar_kernels import cpu_native, resolve_impl
from torch import Tensor
from tqdm.auto import tqdm

from qstar import report
from qstar.cli.options import parse_options
from qstar_bench.attention_candidates import Candidate, Problem, Shape, candidates
from qstar_bench.memory import peak_bytes
from qstar_bench.timing import kernel_seconds, timed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = Shape(T=256, L=14, R=1, Hq=8, Hkv=2, D=64)
MISTRAL = Shape(T=256, L=14, R=1, Hq=32, Hkv=8, D=128)
ALL = ("causal", "dense", "flex", "flash")
ON_A_CPU = ("causal", "dense", "flex")
# name: (shapes, baselines)
PRESETS: dict[str, tuple[list[Shape], tuple[str, ...]]] = {
    "cpu-small": ([SMALL.at(T=T) for T in (256, 512, 1024)], ON_A_CPU),
    "paper": ([MISTRAL.at(T=T) for T in (256, 1024, 4096)], ("causal", "flex", "flash")),
    "sweep-context": ([SMALL.at(T=T) for T in (64, 128, 256, 512, 1024, 2048)], ("causal",)),
    "sweep-length": ([SMALL.at(T=T, L=L) for T in (64, 256, 1024, 2048) for L in (1, 2, 4, 8, 16, 32)], ()),
}


@dataclass
class AttentionArguments:
    """A preset, or one shape of your own."""

    preset: str | None = field(default=None, metadata={"help": f"One of {', '.join(PRESETS)}."})
    tokens: int = field(default=256, metadata={"help": "T: prefix keys; a block at each."})
    slots: int = field(default=14, metadata={"help": "L: slots of a block."})
    num_thoughts: int = field(default=1, metadata={"help": "R: blocks at each token."})
    heads: int = field(default=8, metadata={"help": "Query heads."})
    kv_heads: int = field(default=2, metadata={"help": "Key/value heads."})
    width: int = field(default=64, metadata={"help": "D: head width."})
    dtype: str = field(default="float32", metadata={"help": f"One of {', '.join(DTYPES)}."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    impl: str = field(default="auto", metadata={"help": "The implementation that is measured."})
    baseline: list[str] | None = field(
        default=None, metadata={"help": f"Of {', '.join(ALL)} (default: the preset's, or all that can)."}
    )
    rounds: int = field(default=7, metadata={"help": "Alternating rounds after the warm-up."})
    plot: str | None = field(
        default=None, metadata={"help": "Draw time and memory over the slots as this PNG."}
    )
    json: bool = field(default=False, metadata={"help": "Print only the JSON document."})


def shapes(args: AttentionArguments) -> tuple[list[Shape], tuple[str, ...]]:
    """What the arguments ask for. Raises ValueError for a name that is none, and a size that cannot be."""
    names: list[tuple[str, str, Iterable[str]]] = [
        ("preset", args.preset or "cpu-small", PRESETS),
        ("dtype", args.dtype, DTYPES),
    ]
    for name, given, allowed in [*names, *(("baseline", x, ALL) for x in args.baseline or ())]:
        if given not in allowed:
            raise ValueError(f"{name} = {given}: must be one of {', '.join(allowed)}")
    for name in ("tokens", "slots", "num_thoughts", "heads", "kv_heads", "width", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} = {getattr(args, name)}: must be at least 1")
    if args.heads % args.kv_heads:
        raise ValueError(f"heads = {args.heads}: must be a multiple of kv_heads = {args.kv_heads}")

    def possible(baselines: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(x for x in baselines if args.device != "cpu" or x in ON_A_CPU)

    if args.preset is None:
        one = Shape(args.tokens, args.slots, args.num_thoughts, args.heads, args.kv_heads, args.width)
        return [one], tuple(args.baseline or possible(ALL))
    found, baselines = PRESETS[args.preset]
    return found, tuple(args.baseline or possible(baselines))


def check(name: str, problem: Problem, out: Tensor, naive_error: float) -> float:
    """The largest error of an output on some blocks. Raises RuntimeError when it is more than twice that of
    the dense mask in the same dtype plus 1e-5 (flash-attention's rule)."""
    error = problem.error(out)
    if not error <= 2 * naive_error + 1e-5:
        raise RuntimeError(f"{name}: error {error:.2e}; the dense mask's own is {naive_error:.2e}")
    return error


def measure(shape: Shape, args: AttentionArguments, baselines: tuple[str, ...], bar: tqdm) -> dict:
    """One case: the figures of every candidate and pass, and our ratios to the baselines."""
    problem = Problem(shape, DTYPES[args.dtype], args.device)
    runs: dict[tuple[str, str], Candidate] = {}
    warm_up, errors = {}, {}
    naive_error = problem.naive_error()
    for candidate in candidates(problem, args.impl, baselines):
        key = candidate.name, candidate.what
        bar.set_postfix_str(f"T {shape.T} L {shape.L}: {' '.join(key)}")
        runs[key] = candidate
        warm_up[key], result = timed(candidate.run, args.device)
        if candidate.gives_out:
            errors[candidate.name] = check(candidate.name, problem, result, naive_error)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for i in range(args.rounds):
        for key, candidate in runs.items():
            # the dense mask takes minutes where the others take a second: its rounds are fewer
            if candidate.name != "dense" or i < max(1, 3 * 512 // shape.T):
                bar.set_postfix_str(f"T {shape.T} L {shape.L}: round {i + 1}, {' '.join(key)}")
                times[key].append(kernel_seconds(candidate.run, args.device))
    q_bytes = problem.q.numel() * problem.q.element_size()
    rows = []
    for (name, what), found in times.items():
        low, _, _, high = statistics.quantiles(found, n=5) if len(found) > 1 else [*found * 4]
        memory = peak_bytes(runs[name, what].run, args.device) if name == "ours" else None
        rows.append(
            {
                "T": shape.T,
                "N": problem.N,
                "L": shape.L,
                "candidate": name,
                "pass": what,
                "median ms": 1e3 * statistics.median(found),
                "20 %": 1e3 * low,
                "80 %": 1e3 * high,
                "warm-up ms": 1e3 * warm_up[name, what],
                "GFLOP/s": runs[name, what].flops / statistics.median(found) / 1e9,
                "memory MiB": None if memory is None else memory / 2**20,
                "memory / q": None if memory is None else memory / q_bytes,
                "error * 1e6": None if name not in errors else 1e6 * errors[name],
            }
        )

    def ratio(above: tuple[str, str], below: tuple[str, str]) -> float | None:
        if not (times.get(above) and times.get(below)):
            return None
        return statistics.median(a / b for a, b in zip(times[above], times[below]))

    both, forward, sampling = ("ours", "both"), ("ours", "forward"), ("ours", "sampling")
    case = {
        **asdict(shape),
        "N": problem.N,
        "fwd_bwd_vs_causal": ratio(both, ("causal", "both")),
        "fwd_bwd_speedup_vs_dense": ratio(("dense", "both"), both),
        "fwd_vs_causal": ratio(forward, ("causal", "forward")),
        "fwd_speedup_vs_flex": ratio(("flex", "forward"), forward),
        "fwd_bwd_speedup_vs_flash": ratio(("flash", "both"), both),
        "sampling_vs_causal": ratio(sampling, ("causal", "sampling")),
        "extra_memory_vs_q": next(row["memory / q"] for row in rows if row["pass"] == "both"),
    }
    return {"case": case, "rows": rows}


def main(argv: list[str]) -> int:
    (args,) = parse_options(AttentionArguments, argv, prog="qstar bench attention")
    chosen, baselines = shapes(args)
    resolved = resolve_impl(args.impl, args.device, DTYPES[args.dtype], chosen[0].D)
    bar = tqdm(chosen, disable=args.json)
    found = [measure(shape, args, baselines, bar) for shape in bar]
    rows = [row for one in found for row in one["rows"]]
    cases = [one["case"] for one in found]
    machine = {
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "ours": f"cpu (forward: {cpu_native.built()})" if resolved == "cpu" else resolved,
    }
    if not args.json:
        print(report.table(rows, digits=2))
        print(report.table([{k: v for k, v in case.items() if v is not None} for case in cases], digits=2))
        print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if args.plot is not None:
        plot(rows, args.plot)
    report.last_line({"machine": machine, "cases": cases, "measurements": rows})
    return 0


def plot(rows: list[dict], path: str) -> None:
    """Milliseconds and peak memory of our forward + backward over the number of slots, a line for each T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
