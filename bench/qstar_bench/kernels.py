"""`qstar bench kernels`: compiles the Triton kernels for chips that are not here, and tables what came out.

No GPU is used. Registers, stack, shared memory and tensor-core instructions are read from the compiled code;
bytes and FLOPs are counted from the operator; the time is a model, not a measurement: the larger of
FLOPs / peak and bytes / bandwidth of the chip's data sheet.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field

import torch
from qstar_kernels.compile_gate import KERNELS, OPTIONS, TARGETS, Compiled, Gate, matrix
from qstar_kernels.triton_tiles import CHIPS, HEAD_WIDTHS
from tqdm.auto import tqdm

from qstar import report
from qstar.cli.options import parse_options

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
    json: bool = field(default=False, metadata={"help": "Print only the JSON document."})


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
                "kernel": x.kernel,
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


def main(argv: list[str]) -> int:
    (args,) = parse_options(KernelArguments, argv, prog="qstar bench kernels")
    table: list[dict] = []
    complaints: list[str] = []
    wanted = gates(args)
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found, wrong in tqdm(
            pool.map(rows, wanted), desc="kernels", total=len(wanted), disable=args.json
        ):
            table += found
            complaints += wrong
    if not args.json:
        print(report.table(summary(table) if args.whole else table, digits=1))
        print("B 1, T = N = 1024, L 14 (own_keys 40), 8 key-value heads; model us: a roofline, not measured.")
        print("\n".join(complaints) or "every kernel passes the gate")
    report.last_line({"arguments": asdict(args), "kernels": table, "complaints": complaints})
    return 1 if complaints else 0
