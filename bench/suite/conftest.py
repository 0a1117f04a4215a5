"""Which code is measured, since PYTHONPATH may point to another version of it."""

from pathlib import Path

import torch

import qstar


def pytest_report_header() -> str:
    folder = Path(qstar.__file__).parents[1]
    return f"qstar: {folder}, torch {torch.__version__}, {torch.get_num_threads()} threads"
