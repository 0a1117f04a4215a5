"""`qstar bench step`: what one training step costs, ours beside the ways that a reader would compare it with.

A step is forward, backward and AdamW, on the same model and random text; the ways are told in step_ways.py.
Before anything is timed, loss and gradients of all ways are compared for the same thoughts. Each way runs in
processes of its own, so that its peak memory is its own; the rounds alternate, so that a slow minute
of the machine hurts all, and a ratio is the median of the rounds' ratios.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, fields
from typing import Any

from qstar_kernels import resolve_impl
from tqdm.auto import tqdm

from qstar.cli.options import parse_options
from qstar.reporting import tables
from qstar.reporting.benchmark_record import OutputArguments, finish, machine
from qstar_bench.step_flops import StepFlops, step_flops
from qstar_bench.timing import DTYPES, matmul_flops
from qstar_bench.training_step.step_ways import StepBenchArguments, build, check, work


def main(argv: list[str]) -> int:
    args, output = parse_options((StepBenchArguments, OutputArguments), argv, prog="qstar bench step")
    if args.worker is not None:
        way, dtype = args.worker.split(":")
        print(json.dumps(work(args, way, dtype, output.trace)))
        return 0
    resolved = resolve_impl(args.impl, args.device, DTYPES[args.dtype[0]])
    flops = step_flops(build(args, "dense", "meta")[0], args.batch, args.tokens)
    ceilings = {dtype: matmul_flops(DTYPES[dtype], args.device) for dtype in args.dtype}
    left_out = emulated(ceilings) if args.preset is not None else []
    args.dtype = [dtype for dtype in args.dtype if dtype not in left_out]
    where = machine(
        args.device,
        attention=resolved,
        **{f"matmul GFLOP/s {dtype}": x / 1e9 for dtype, x in ceilings.items()},
    )
    if not output.json:
        print(tables.table([card(args, flops)], digits=1))
        print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
        for dtype in left_out:
            print(
                f"{dtype} is LEFT OUT: this {args.device} has no instructions for it; without --preset, "
                f"--dtype {dtype} runs it all the same",
                flush=True,
            )
    difference = check(args)
    runs = [(way, dtype) for dtype in args.dtype for way in args.way]
    rounds: dict[tuple[str, str], list[dict]] = {run: [] for run in runs}
    bar = tqdm(total=args.rounds * len(runs), disable=output.json)
    for i in range(args.rounds):
        for run in runs:
            bar.set_postfix_str(" ".join(run))
            trace = output.trace if run == runs[0] and i == 0 else None
            rounds[run].append(_in_a_process(args, ":".join(run), trace))
            bar.update()
    bar.close()
    rows = [row(args, run, found, flops, ceilings[run[1]]) for run, found in rounds.items()]
    phases = [phase_row(run, found) for run, found in rounds.items()]
    figures = ratios(args, rounds, flops)
    if not output.json:
        print(tables.table(rows, digits=2))
        print("seconds of each phase, one step of each round:")
        print(tables.table(phases, digits=2))
        print(tables.table([{"figure": name, "value": value} for name, value in figures.items()], digits=2))
        print(f"all ways agree: loss and gradients within {difference:.1e} for the same thoughts")
    finish(
        "step",
        args,
        where,
        rows,
        output,
        phases=phases,
        flops=asdict(flops),
        difference=difference,
        left_out=left_out,
        **figures,
    )
    return 0


def emulated(ceilings: dict[str, float]) -> list[str]:
    """List the dtypes, of FLOP/s by dtype, that are ten times as slow as the first one or worse."""
    first, *others = ceilings
    return [dtype for dtype in others if ceilings[dtype] < ceilings[first] / 10]


def card(args: StepBenchArguments, flops: StepFlops) -> dict[str, Any]:
    """Count what a step needs, before any measurement."""
    k, m, R = args.thought_length, args.talk_length, args.num_thoughts
    T, slots, thoughts = args.tokens, k + m + 1, (args.tokens - 1) * R
    needed = R * T * (T - 1) // 2 * slots + thoughts * slots * (slots + 1) // 2
    model, _ = build(args, "dense", "meta")
    return {
        "parameters M": sum(p.numel() for p in model.parameters()) / 1e6,
        "thoughts": args.batch * thoughts,
        "slots": args.batch * thoughts * slots,
        "attention cells M": args.batch * needed / 1e6,
        "dense mask M": args.batch * R * T * T * (k + 2 + m) * (k + 3 + m) / 2 / 1e6,
        "GFLOP": flops.thinking / 1e9,
        "GFLOP plain": flops.plain / 1e9,
        "rollout": flops.rollout / 1e9,
        "blocks": flops.blocks / 1e9,
        "loss": flops.loss / 1e9,
    }


def row(
    args: StepBenchArguments, run: tuple[str, str], found: list[dict], flops: StepFlops, ceiling: float
) -> dict[str, Any]:
    way, dtype = run
    seconds = sorted(s for one in found for s in one["step_s"])
    median = statistics.median(seconds)
    low, *_, high = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else [median] * 2
    thinks = way != "plain"
    thoughts = args.batch * (args.tokens - 1) * args.num_thoughts
    return {
        "way": way,
        "dtype": dtype,
        "median s a step": median,
        "20 %": low,
        "80 %": high,
        "warm-up s": found[0]["warm_up_s"],
        "texts/s": args.batch / median,
        "thoughts/s": thoughts / median if thinks else None,
        "thought tokens/s": thoughts * args.thought_length / median if thinks else None,
        "model FLOP utilisation": (flops.thinking if thinks else flops.plain) / median / ceiling,
        "peak GiB": max(one["peak_bytes"] for one in found) / 2**30,
        "resident GiB": max(one["resident_bytes"] for one in found) / 2**30,
    }


def phase_row(run: tuple[str, str], found: list[dict]) -> dict[str, Any]:
    names = dict.fromkeys(name for one in found for name in one["phases"])
    medians = {name: statistics.median(one["phases"].get(name, 0.0) for one in found) for name in names}
    return {"way": run[0], "dtype": run[1]} | medians


def ratios(
    args: StepBenchArguments, rounds: dict[tuple[str, str], list[dict]], flops: StepFlops
) -> dict[str, float]:
    """Compute the figures that judge a step; those of further precisions carry their names."""
    figures = {"flops_ratio": flops.thinking / flops.plain}
    for dtype in args.dtype:
        suffix = "" if dtype == args.dtype[0] else f"_{dtype}"

        def per_round(way: str, dtype: str = dtype) -> list[float]:
            return [statistics.median(one["step_s"]) for one in rounds.get((way, dtype), [])]

        def most(way: str, what: str, dtype: str = dtype) -> float:
            return max(one[what] for one in rounds[way, dtype])

        ours = per_round("ours")
        for name, way in (("speedup_vs_published_way", "published"), ("speedup_vs_dense", "dense")):
            if ours and (theirs := per_round(way)):
                figures[name + suffix] = statistics.median(a / b for a, b in zip(theirs, ours))
        if ours and per_round("published"):
            for name, what in (("memory", "peak_bytes"), ("resident", "resident_bytes")):
                figures[f"{name}_vs_published_way{suffix}"] = most("ours", what) / most("published", what)
        if ours and (plain := per_round("plain")):
            price = statistics.median(a / b for a, b in zip(ours, plain))
            figures["price_of_thinking" + suffix] = price
            figures["price_vs_flops" + suffix] = price / figures["flops_ratio"]
    return figures


def _in_a_process(args: StepBenchArguments, worker: str, trace: str | None) -> dict:
    options = ["--worker", worker, *(["--trace", trace] if trace else [])]
    for option in fields(StepBenchArguments):
        value = getattr(args, option.name)
        if option.name in ("preset", "worker", "rounds") or value is None:
            continue
        options += [f"--{option.name}", *map(str, value if isinstance(value, list) else [value])]
    command = [sys.executable, "-m", "qstar.cli.main", "bench", "step", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"way = {worker}: its process ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])
