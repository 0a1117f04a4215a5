"""The Triton kernels on a CPU, by Triton's interpreter: forward and every gradient of every option."""

import json
import os
import subprocess
import sys

import pytest
import torch
import triton_cases
from triton_cases import CASES, FLASH_CASES, PROPERTIES, failures

HALF = ("groups_of_4", "everything", "everything_full", "block_larger_than_a_tile")
RUNS = [
    *(f"{case}-{dtype}" for case in CASES for dtype in ("fp64", "fp32", "fp32-tma")),
    *(f"{case}-fp16" for case in HALF),
    *(f"{case}-{dtype}-flash" for case in FLASH_CASES for dtype in ("fp64", "fp32")),
    *PROPERTIES,
]


@pytest.fixture(scope="module")
def interpreted(request) -> dict[str, list[str]]:
    """{run: what failed}; one process runs all that were asked for: TRITON_INTERPRET is read at import."""
    prefix = "test_holds_in_the_interpreter["
    wanted = [x.name[len(prefix) : -1] for x in request.session.items if x.name.startswith(prefix)]
    process = subprocess.run(
        [sys.executable, triton_cases.__file__, *wanted],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"name"')]
    missing = [f"no result; the process ended with {process.returncode}: {process.stderr[-2000:]}"]
    return {name: missing for name in wanted} | {line["name"]: line["failed"] for line in lines}


@pytest.mark.parametrize("run", RUNS)
def test_holds_in_the_interpreter(run, interpreted):
    assert interpreted[run] == []


def test_a_wrong_or_missing_number_breaks_the_rule():
    errors = {"out": {"error": float("nan"), "dense": 1e-7}, "dq": {"error": 4e-5, "dense": 1e-5}}
    assert len(failures(errors, torch.float32)) == 1
    errors["dq"]["error"] = 5e-5
    assert len(failures(errors, torch.float32)) == 2
