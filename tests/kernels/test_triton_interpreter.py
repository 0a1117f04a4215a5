"""The Triton kernels on a CPU, by Triton's interpreter: forward and every gradient of every option."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import triton_cases
from triton_cases import CASES, FLASH_CASES, PROPERTIES, failures

# fp64 runs every case. fp32 and descriptors (TMA) run those that together reach every line of the kernels.
FP32 = (
    "groups_of_4", "one_slot_of_4", "split_prefix_of_one_block", "split_prefix_padded", "split_keys",
    "late_slots_of_a_large_block", "T0", "D80", "D256", "own_full_large", "scale_negative", "softcap_50",
    "window_large_block", "everything", "everything_full",
)  # fmt: skip
TMA = (
    "groups_of_4", "split_prefix_of_one_block", "split_prefix_padded", "T111_many_blocks", "T0", "D80",
    "documents", "window_large_block", "everything",
)  # fmt: skip
FP16 = ("groups_of_4", "everything", "everything_full", "block_larger_than_a_tile")
FLASH_FP32 = ("groups_of_4", "one_slot", "sinks_scale", "block_larger_than_a_tile", "D80")
RUNS = [
    *(f"{case}-fp64" for case in CASES),
    *(f"{case}-fp32" for case in FP32),
    *(f"{case}-fp32-tma" for case in TMA),
    *(f"{case}-fp16" for case in FP16),
    *(f"{case}-fp64-flash" for case in FLASH_CASES),
    *(f"{case}-fp32-flash" for case in FLASH_FP32),
    *PROPERTIES,
]


@pytest.fixture(scope="session")
def ask(tmp_path_factory) -> Iterator[Callable[[str], list[str]]]:
    """Start one process of this test worker, and ask it run by run.

    It needs a process of its own, because triton reads TRITON_INTERPRET when imported. It ends when its stdin
    is closed, hence with the worker too. One that crashed is replaced at the next run.
    """
    errors = tmp_path_factory.mktemp("interpreter") / "stderr"
    processes: list[subprocess.Popen] = []

    def started() -> subprocess.Popen:
        if not processes or processes[-1].poll() is not None:
            with errors.open("w") as stderr:
                process = subprocess.Popen(
                    [sys.executable, triton_cases.__file__],
                    env={**os.environ, "TRITON_INTERPRET": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                )
            processes.append(process)
        return processes[-1]

    def ask(run: str) -> list[str]:
        process = started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(run) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            return [f"no answer; the process ended with {process.wait()}: {errors.read_text()[-2000:]}"]
        return json.loads(line)

    yield ask
    for process in processes:
        process.communicate()  # closes its stdin


@pytest.mark.parametrize("run", RUNS)
def test_holds_in_the_interpreter(run, ask):
    assert ask(run) == []


def test_a_wrong_or_missing_number_breaks_the_rule():
    errors = {"out": {"error": float("nan"), "dense": 1e-7}, "dq": {"error": 4e-5, "dense": 1e-5}}
    assert len(failures(errors, torch.float32)) == 1
    errors["dq"]["error"] = 5e-5
    assert len(failures(errors, torch.float32)) == 2
