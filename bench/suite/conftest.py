"""Check which code is measured: PYTHONPATH may point to another version than the one around this folder."""

import os
from pathlib import Path

import pytest
import torch

import qstar

FOLDER = Path(qstar.__file__).resolve().parents[1]


def pytest_configure() -> None:
    """`against.py` says which version it wants, and would otherwise compare one with itself in silence."""
    wanted = os.environ.get("QSTAR_MEASURED")
    if wanted is not None and Path(wanted).resolve() != FOLDER:
        raise pytest.UsageError(f"qstar was imported from {FOLDER}, wanted was {wanted}")


def pytest_report_header() -> str:
    return f"qstar: {FOLDER}, torch {torch.__version__}, {torch.get_num_threads()} threads"
