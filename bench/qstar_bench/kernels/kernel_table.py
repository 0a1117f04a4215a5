"""`qstar bench kernels`: compiles the Triton kernels for chips that are not here, and tables what came out.

No GPU is used. Registers, stack, shared memory and tensor-core instructions are read from the compiled code;
bytes and FLOPs are counted from the operator; the time is a model, not a measurement: the larger of
FLOPs / peak and bytes / bandwidth of the chip's data sheet. docs/kernels.md holds what `--whole` prints
between the machine's lines and the last one. Interrupted, it tells what was compiled until then.
"""

import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

import torch
from qstar_kernels.triton_tiles import CHIPS, HEAD_WIDTHS
from tqdm.auto import tqdm

from qstar.cli.options import parse_options
from qstar.reporting import tables
from qstar.reporting.benchmark_record import TableArguments, finish, machine
from qstar_bench.kernels.compile_gate import KERNELS, OPTIONS, TARGETS, Compiled, Gate, matrix

# dense bf16 TFLOP/s, TB/s, registers and threads of a processor; from the makers' data sheets
ROOFLINE = {
    "sm_80": (312.0, 2.04, 65536, 2048),
    "sm_90": (989.0, 3.35, 65536, 2048),
    "sm_100": (2250.0, 8.0, 65536, 2048),
    "gfx942": (1307.0, 5.3, 131072, 2048),
}


@dataclass
class KernelArguments:
    """A slice of the matrix; by default bf16, D 64 and 128, four query heads a group, no option."""

    chip: list[str] = field(default_factory=lambda: list(TARGETS), metadata={"help": "Chips."})
    kernel: list[str] = field(default_factory=lambda: list(KERNELS), metadata={"help": "Kernels."})
    width: list[int] = field(default_factory=lambda: [64, 128], metadata={"help": "D: head widths."})
    group: list[int] = field(default_factory=lambda: [4], metadata={"help": "G: query heads a group."})
    dtype: list[str] = field(default_factory=lambda: ["bfloat16"], metadata={"help": "bfloat16, float16."})
    option: list[str] = field(default_factory=lambda: ["plain"], metadata={"help": "Options."})
    whole: bool = field(default=False, metadata={"help": "The whole matrix, whatever else is given."})
    jobs: int = field(default=1, metadata={"help": "Processes that compile."})


def gates(args: KernelArguments) -> list[Gate]:
    """The points of the matrix that the arguments ask for. Raises ValueError for a name that is none."""
    for name, found, allowed in (
        ("chip", args.chip, TARGETS),
        ("kernel", args.kernel, KERNELS),
        ("width", args.width, HEAD_WIDTHS),
        ("option", args.option, OPTIONS),
        ("dtype", args.dtype, ("bfloat16", "float16")),
    ):
        for x in found:
            if x not in allowed:
                raise ValueError(f"{name} = {x}: must be one of {', '.join(map(str, allowed))}")
    if args.jobs < 1:
        raise ValueError(f"jobs = {args.jobs}: must be at least 1")
    wanted = [
        gate
        for gate in matrix()
        if args.whole
        or (
            gate.chip in args.chip
            and gate.kernel in args.kernel
            and gate.D in args.width
            and gate.G in args.group
            and gate.options in args.option
            and str(gate.dtype).removeprefix("torch.") in args.dtype
        )
    ]
    if not wanted:
        raise ValueError(f"group = {args.group}: must be of 1 and 4")
    return wanted


def costs(gate: Gate) -> tuple[float, float]:
    """(FLOPs, bytes) that the operator needs: only visible scores are counted, each tensor moves once."""
    launch = gate.launches()[0]
    tensors = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
    moved = float(sum(x.numel() * x.element_size() for x in tensors))
    if gate.kernel == "delta":
        return 2.0 * launch.arguments["out"].numel(), moved
    _, tokens, heads, D = launch.arguments["q"].shape
    T, Lk = launch.arguments["T"], launch.arguments["Lk"]
    prefix, own = T / 2, (Lk if gate.kernel == "decode" else (Lk + 1) / 2)
    products = {"forward": (2, 2), "decode": (2, 2), "rows": (3, 5), "keys": (4, 0), "own_keys": (0, 4)}
    of_prefix, of_own = products[gate.kernel]
    return 2.0 * tokens * heads * D * (of_prefix * prefix + of_own * own), moved


def programs_at_once(compiled: Compiled) -> int | None:
    """How many programs one processor holds, by registers, shared memory and threads; None off NVIDIA."""
    _, _, registers, threads = ROOFLINE[compiled.chip]
    if not compiled.chip.startswith("sm_") or compiled.registers <= 0:
        return None
    width = 32 * compiled.warps
    return min(
        registers // (compiled.registers * width),
        threads // width,
        CHIPS[compiled.chip].shared // max(1, compiled.shared),
    )


def rows(gate: Gate) -> tuple[list[dict], list[str]]:
    """(a row of the table for each kernel launched, complaints)."""
    began = time.perf_counter()
    try:
        compiled, complaints = gate.check()
    except Exception as error:
        return [], [f"{gate}: does not compile: {type(error).__name__}: {error}"]
    seconds = time.perf_counter() - began
    flops, moved = costs(gate)
    peak, bandwidth, _, _ = ROOFLINE[gate.chip]
    found = []
    for x in compiled:
        first = x is compiled[0]
        found.append(
            {
                "kernel": x.kernel + (" (own slots)" if gate.kernel == "own_keys" else ""),
                "chip": x.chip,
                "dtype": str(gate.dtype).removeprefix("torch."),
                "D": gate.D,
                "G": gate.G,
                "options": gate.options,
                "tensor-core instructions": x.tensor_core_instructions,
                "registers": x.registers,
                "stack": x.stack,
                "shared KiB": x.shared / 1024,
                "programs a processor": programs_at_once(x),
                "GFLOP": flops / 1e9 if first else None,
                "MB": moved / 1e6 if first else None,
                "model us": 1e6 * max(flops / (peak * 1e12), moved / (bandwidth * 1e12)) if first else None,
                "compile s": seconds if first else None,
            }
        )
    return found, complaints


def summary(table: list[dict]) -> list[dict]:
    """A row for each kernel, chip and width: the worst over dtypes, groups and options; the model's figures
    are those of bf16 with four query heads a group and no option."""
    groups: dict[tuple, list[dict]] = {}
    for row in table:
        groups.setdefault((row["kernel"], row["chip"], row["D"]), []).append(row)
    found = []
    for (kernel, chip, D), rows in groups.items():
        plain = [x for x in rows if (x["dtype"], x["G"], x["options"]) == ("bfloat16", 4, "plain")] or rows
        at_once = [x["programs a processor"] for x in rows if x["programs a processor"] is not None]
        found.append(
            {
                "kernel": kernel,
                "chip": chip,
                "D": D,
                "points": len(rows),
                "tensor-core instructions": min(x["tensor-core instructions"] for x in rows),
                "registers": max(x["registers"] for x in rows),
                "stack": max(x["stack"] for x in rows),
                "shared KiB": max(x["shared KiB"] for x in rows),
                "programs a processor": min(at_once, default=None),
                **{name: plain[0][name] for name in ("GFLOP", "MB", "model us")},
            }
        )
    return found


def compiled(wanted: list[Gate], jobs: int) -> Iterator[tuple[Gate, list[dict], list[str]]]:
    """(gate, its rows, complaints) of each point, as soon as it is done."""
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # an interrupted terminal tells every process: one answers
    )
    try:
        gates = {pool.submit(rows, gate): gate for gate in wanted}
        for done in as_completed(gates):
            yield gates[done], *done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def told(table: list[dict], whole: bool, complaints: list[str], points: int) -> str:
    """The Markdown that docs/kernels.md holds; of a slice each point has a row of its own."""
    return "\n".join(
        [
            tables.table(summary(table) if whole else table, digits=1),
            "",
            f"{points} points of kernel, chip, dtype, head width D, query heads a group G and option.",
            "A row is the worst of its points. Shapes: B 1, T = N = 1024, L 14 (own_keys 40), 8 key-value",
            "heads, one query slot for decode. GFLOP, MB and model us are those of bf16 with G 4 and no",
            "option; model us is a roofline, not measured.",
            "",
            *(complaints or ["Every kernel passes the gate."]),
        ]
    )


def main(argv: list[str]) -> int:
    args, output = parse_options((KernelArguments, TableArguments), argv, prog="qstar bench kernels")
    wanted = gates(args)
    where = machine("cpu", chips=sorted({gate.chip for gate in wanted}))
    if not output.json:
        print(f"{len(wanted)} points, {args.jobs} at a time")
        print("\n".join(f"{name}: {value}" for name, value in where.items()), flush=True)
    found: dict[Gate, list[dict]] = {}
    complaints: list[str] = []
    bar = tqdm(total=len(wanted), desc="kernels", disable=output.json)
    try:
        for gate, its_rows, wrong in compiled(wanted, args.jobs):
            found[gate] = its_rows
            complaints += wrong
            bar.set_postfix_str(str(gate))
            bar.update()
            for line in wrong:
                bar.write(line, file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {len(found)} of {len(wanted)} points were compiled", file=sys.stderr)
    bar.close()
    table = [row for gate in wanted for row in found.get(gate, [])]  # in the order of the matrix
    if not output.json:
        print(told(table, args.whole, complaints, len(found)))
    points = {"points": len(found), "points_wanted": len(wanted)}
    finish("kernels", args, where, table, output, **points, complaints=complaints)
    if len(found) < len(wanted):
        return 130
    return 1 if complaints else 0
