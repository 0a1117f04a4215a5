"""The developers' benchmarks (`make bench`): they are collected and run; no test judges their times."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pytest_on_suite(*options, **environment):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "bench/suite", *options]
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "bench"))
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_suite_is_collected_and_one_benchmark_of_it_runs():
    done = pytest_on_suite("-k", "sampling and 64", "--benchmark-disable")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"1 passed, 12 deselected", done.stdout)


def test_the_suite_refuses_to_measure_another_version_than_it_was_told(tmp_path):
    done = pytest_on_suite("--collect-only", QSTAR_MEASURED=str(tmp_path))
    assert done.returncode != 0
    assert f"wanted was {tmp_path}" in done.stderr


def test_a_commit_that_is_none_is_named():
    command = [sys.executable, "bench/suite/against.py", "no-such-commit"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "REF = no-such-commit: git knows no such commit\n"
