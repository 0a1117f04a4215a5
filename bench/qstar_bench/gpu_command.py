"""`qstar bench gpu`, run by `make gpu`: GPU tests and benchmarks in ten minutes, as one JSON file and tables.

First the GPU-marked tests, then the benchmarks and their memory, each in a process of its own with a share of
the time; what fails or runs out of it is reported as that, and the rest still runs. Another measurement is
one more line in `stages`: what its document has under "rows", and single figures beside, is shown.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from qstar.cli.options import parse_options
from qstar.demo import TINY_LM
from qstar.reporting import tables
from qstar.reporting.benchmark_record import TableArguments, check_device, finish, machine

ROOT = Path(__file__).parents[2]
GPU_TESTS = "tests/kernels"  # collecting the other tests needs the extras, which a GPU machine may lack
MISTRAL = {"slots": 14, "heads": 32, "kv_heads": 8, "width": 128}  # attention of Mistral-7B, k 9, m 4
TINY_ATTENTION = {"slots": 2, "heads": 2, "kv_heads": 1, "width": 16}
TINY_STEP = {"model": "tiny", "tokens": 9, "thought_length": 2, "talk_length": 2}
# of the model that generates: 0.14B with random weights, heads 64 wide
WRITER = {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4}
TINY_WRITER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@dataclass
class GpuArguments:
    """What `make gpu` takes."""

    output: str = field(default="gpu.json", metadata={"help": "The JSON file that is written."})
    rehearse: bool = field(
        default=False, metadata={"help": "The same stages at tiny sizes on the CPU: tests this command."}
    )


@dataclass(frozen=True)
class Stage:
    """Run one process, `python -m command`, for at most so many seconds."""

    name: str
    command: list[str]
    seconds: int

    def run(self) -> dict[str, Any]:
        """{"stage", "seconds", "failed" (why, or None), "result" (its last line's JSON, or None)}."""
        began = time.perf_counter()
        path = os.pathsep.join(str(ROOT / x) for x in (".", "kernels", "bench"))
        process = subprocess.Popen(
            [sys.executable, "-m", *self.command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        failed = None
        try:
            out, error = process.communicate(timeout=self.seconds)
        except BaseException as reason:
            os.killpg(process.pid, signal.SIGKILL)  # its own processes too: they would hold the GPU
            out, error = process.communicate()
            if not isinstance(reason, subprocess.TimeoutExpired):
                raise
            failed = f"not done in {self.seconds} s"
        if failed is None and process.returncode:
            failed = f"exit status {process.returncode}: {(error or out)[-2000:]}"
        seconds = time.perf_counter() - began
        return {"stage": self.name, "seconds": seconds, "failed": failed, "result": _last_document(out)}


def _last_document(out: str) -> dict[str, Any] | None:
    lines = out.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:  # a process that was stopped, or that ends with no document
        return None
    return found if isinstance(found, dict) else None


def stages(rehearse: bool, folder: Path) -> list[Stage]:
    """List the stages in order, together at most ten minutes. folder: holds the tests' report, tests.xml, and
    the model that generates, model/."""
    tests = ["pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={folder / 'tests.xml'}"]
    if importlib.util.find_spec("xdist") and not rehearse:
        tests += ["-n", str(min(12, os.cpu_count() or 1))]  # what they wait for is the compiler
    tests.append(GPU_TESTS)
    bench = ["qstar.cli.main", "bench"]
    generate = [*bench, "generate", "--model", str(folder / "model")]
    if rehearse:
        attention = ["attention", *_options(TINY_ATTENTION), "--rounds", "1"]
        step = ["step", *_options(TINY_STEP), "--steps", "1", "--rounds", "1"]
        return [
            Stage("tests", tests, 180),
            Stage("attention T 9", [*bench, *attention, "--tokens", "9", "--baseline", "causal"], 300),
            Stage("step", [*bench, *step], 300),
            Stage("generate", [*generate, "--new_tokens", "3", "--rounds", "1"], 300),
        ]
    on_gpu = ["--device", "cuda"]
    attention = [*bench, "attention", *on_gpu, "--dtype", "bfloat16"]
    baselines = ["--baseline", "causal", "flex", "flash"]
    step = [*bench, "step", *on_gpu, "--model", "mistral-0.9b", "--dtype", "bfloat16", "--rounds", "1"]
    return [
        Stage("tests", tests, 150),
        *(
            Stage(f"attention T {T}", [*attention, *_options(MISTRAL), "--tokens", str(T), *baselines], 60)
            for T in (256, 1024, 4096)
        ),
        Stage("step", [*step, "--way", "ours", "published", "plain"], 130),
        Stage("generate", [*generate, *on_gpu], 60),
        Stage(
            "attention over N and L",
            [*attention, "--preset", "sweep-length", "--passes", "forward", "both", "--rounds", "3"],
            80,
        ),
    ]


def _options(values: dict[str, Any]) -> list[str]:
    return [x for name, value in values.items() for x in (f"--{name}", str(value))]


def write_model(folder: Path, sizes: dict[str, int]) -> None:
    """Write a model with random weights and the embedded model's tokenizer: only its speed is measured."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM)
    torch.manual_seed(0)
    MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            intermediate_size=11 * sizes["hidden_size"] // 4,
            max_position_embeddings=1024,
            sliding_window=None,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            **sizes,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def counts(junit: Path) -> dict[str, Any]:
    """Count passed, failed and skipped tests, and name those that failed, from pytest's report."""
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


def summary(rows: list[dict[str, Any]], tests: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """Print tables of stages and tests, and for each bench its rows, cases and single figures."""
    parts = [
        tables.table([row | {"failed": "failed" if row["failed"] else ""} for row in rows], digits=1),
        tables.table([{name: value for name, value in tests.items() if name != "names"}]),
    ]
    for stage in found:
        result = stage["result"] or {}
        figures = {name: x for name, x in result.items() if isinstance(x, float)}
        several = [result.get("rows", []), result.get("cases", []), [figures] if figures else []]
        parts += [f"{stage['stage']}:\n{tables.table(x, digits=2)}" for x in several if x]
    failures = [f"{stage['stage']} failed: {stage['failed']}" for stage in found if stage["failed"]]
    return "\n\n".join(parts + failures + tests["names"])


def main(argv: list[str]) -> int:
    args, output = parse_options((GpuArguments, TableArguments), argv, prog="qstar bench gpu")
    if not args.rehearse:
        check_device("cuda")
    if not (ROOT / "tests").is_dir():
        raise ValueError("bench gpu: runs the tests, which only a clone of the project has")
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    here = machine("cpu", rehearsal=True) if args.rehearse else machine("cuda")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = counts(folder / "tests.xml")
        write_model(folder / "model", TINY_WRITER if args.rehearse else WRITER)
        bar = tqdm(stages(args.rehearse, folder), disable=output.json)
        for stage in bar:
            bar.set_postfix_str(stage.name)
            found.append(stage.run())
            tests = counts(folder / "tests.xml")
            so_far = {"machine": here, "stages": found, "tests": tests}
            path.write_text(json.dumps(so_far, indent=1))  # after each: a machine may be taken away
    rows = [{name: stage[name] for name in ("stage", "seconds", "failed")} for stage in found]
    tested = args.rehearse or tests["passed"] > 0  # where every test is skipped, nothing is shown
    passed = tested and not any(stage["failed"] for stage in found)
    if not output.json:
        print(", ".join(f"{name} {value}" for name, value in here.items()))
        print(summary(rows, tests, found))
    document = finish("gpu", args, here, rows, output, stages=found, tests=tests, passed=passed)
    path.write_text(json.dumps(document, indent=1))
    return 0 if passed else 1
