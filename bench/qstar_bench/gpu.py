"""`qstar bench gpu`, run by `make gpu`: what a GPU can tell in ten minutes, as one JSON file and tables.

First the GPU-marked tests, then the benchmarks and their memory, each in a process of its own with a share of
the time; what fails or runs out of it is reported as that, and the rest still runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from tqdm.auto import tqdm

from qstar import report
from qstar.cli.options import parse_options
from qstar_bench.timing import kernel_seconds

ROOT = Path(__file__).parents[2]
MISTRAL = {"slots": 14, "heads": 32, "kv_heads": 8, "width": 128}  # attention of Mistral-7B, k 9, m 4
STEP = {"tokens": 256, "width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "mlp": 5632}  # 0.9B
TINY_ATTENTION = {"heads": 2, "kv_heads": 1, "width": 16}
TINY_STEP = {"tokens": 16, "width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 32, "vocabulary": 64}


@dataclass
class GpuArguments:
    """What `make gpu` takes."""

    output: str = field(default="gpu.json", metadata={"help": "The JSON file that is written."})
    rehearse: bool = field(
        default=False, metadata={"help": "The same stages at tiny sizes on the CPU: tests this command."}
    )
    json: bool = field(default=False, metadata={"help": "Print only the JSON document."})


@dataclass(frozen=True)
class Stage:
    """One process: `python -m command`, and how many seconds it may take."""

    name: str
    command: list[str]
    seconds: int

    def run(self) -> dict[str, Any]:
        """{"stage", "seconds", "failed" (why, or None), "result" (its last line's JSON, or None)}."""
        began = time.perf_counter()
        result, failed = None, None
        path = os.pathsep.join(str(ROOT / x) for x in (".", "kernels", "bench"))
        environment = {**os.environ, "PYTHONPATH": path}
        try:
            done = subprocess.run(
                [sys.executable, "-m", *self.command], capture_output=True, text=True, timeout=self.seconds,
                cwd=ROOT, env=environment,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            failed = f"not done in {self.seconds} s"
        else:
            lines = done.stdout.strip().splitlines()
            if lines and lines[-1].startswith("{"):
                result = json.loads(lines[-1])
            if done.returncode:
                failed = f"exit status {done.returncode}: {(done.stderr or done.stdout)[-2000:]}"
        return {
            "stage": self.name,
            "seconds": time.perf_counter() - began,
            "failed": failed,
            "result": result,
        }


def stages(rehearse: bool, junit: Path) -> list[Stage]:
    """In order; together at most ten minutes."""
    tests = ["pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={junit}", "tests"]
    if importlib.util.find_spec("xdist") and not rehearse:
        tests += ["-n", str(min(12, os.cpu_count() or 1))]  # what they wait for is the compiler
    bench = ["qstar.cli.main", "bench"]
    if rehearse:
        attention = ["attention", "--slots", "2", *_sizes(TINY_ATTENTION), "--rounds", "1"]
        return [
            Stage("tests", tests, 180),
            Stage("attention T 9", [*bench, *attention, "--tokens", "9", "--baseline", "causal"], 90),
            Stage("step", [*bench, "step", *_sizes(TINY_STEP), "--impl", "auto", "--steps", "1"], 90),
        ]
    on_gpu = ["--device", "cuda"]
    attention = [*bench, "attention", *on_gpu, "--dtype", "bfloat16"]
    baselines = ["--baseline", "causal", "flex", "flash"]
    step = [*bench, "step", *on_gpu, "--autocast", "bfloat16", *_sizes(STEP)]
    return [
        Stage("tests", tests, 180),
        *(
            Stage(f"attention T {T}", [*attention, *_sizes(MISTRAL), "--tokens", str(T), *baselines], 70)
            for T in (256, 1024, 4096)
        ),
        Stage("step", [*step, "--batch", "4", "--impl", "auto"], 50),
        Stage("step beside the dense mask", [*step, "--batch", "1"], 60),
        Stage("attention over N and L", [*attention, "--preset", "sweep-length", "--rounds", "3"], 100),
    ]


def _sizes(sizes: dict[str, int]) -> list[str]:
    return [x for name, value in sizes.items() for x in (f"--{name}", str(value))]


def counts(junit: Path) -> dict[str, Any]:
    """passed, failed and skipped tests, and the names of those that failed, from pytest's own report."""
    if not junit.exists():
        return {"passed": 0, "failed": 0, "skipped": 0, "names": []}
    cases = list(xml.parse(junit).getroot().iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(bad) - skipped,
        "failed": len(bad),
        "skipped": skipped,
        "names": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
    }


def machine(rehearse: bool) -> dict[str, Any]:
    """The device and the versions that every figure depends on."""
    found: dict[str, Any] = {
        "device": "cpu (a rehearsal)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    found["commit"] = commit.stdout.strip() or None
    if not rehearse:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "memory GiB": properties.total_memory / 2**30,
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    found["matmul TFLOP/s"] = _matmul(64 if rehearse else 8192, "cpu" if rehearse else "cuda")
    return found


def _matmul(n: int, device: str) -> float:
    """What a square bf16 product reaches on random numbers: the ceiling that a kernel is held against."""
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    times = sorted(kernel_seconds(lambda: a @ b, device) for _ in range(6))
    return 2 * n**3 / times[2] / 1e12


def summary(found: dict[str, Any]) -> list[str]:
    """The tables: stages, tests, the attention's measurements and ratios, the step."""
    results = {stage["stage"]: stage["result"] or {} for stage in found["stages"]}
    attention = [x for name, x in results.items() if name.startswith("attention T")]
    tables = [
        [
            {"stage": x["stage"], "seconds": x["seconds"], "": "failed" if x["failed"] else "done"}
            for x in found["stages"]
        ],
        [{k: v for k, v in found["tests"].items() if k != "names"}],
        [row for x in attention for row in x.get("measurements", [])],
        [row for x in attention for row in x.get("cases", [])],
        [row for name, x in results.items() if name.startswith("step") for row in x.get("results", [])],
    ]
    return [report.table(rows, digits=2) for rows in tables if rows]


def main(argv: list[str]) -> int:
    (args,) = parse_options(GpuArguments, argv, prog="qstar bench gpu")
    if not args.rehearse and not torch.cuda.is_available():
        raise ValueError("device = cuda: torch sees no GPU on this machine")
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(args.rehearse), "stages": []}
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "tests.xml"
        bar = tqdm(stages(args.rehearse, junit), disable=args.json)
        for stage in bar:
            bar.set_postfix_str(stage.name)
            found["stages"].append(stage.run())
            found["tests"] = counts(junit)
            output.write_text(json.dumps(found, indent=1))  # after each: a machine may be taken away
    tested = args.rehearse or found["tests"]["passed"] > 0  # where every test is skipped, nothing is shown
    found["passed"] = tested and not any(stage["failed"] for stage in found["stages"])
    output.write_text(json.dumps(found, indent=1))
    if not args.json:
        print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
        print("\n\n".join(summary(found)))
        for stage in found["stages"]:
            if stage["failed"]:
                print(f"{stage['stage']} failed: {stage['failed']}")
        print(*found["tests"]["names"], sep="\n")
    report.last_line(found)
    return 0 if found["passed"] else 1
