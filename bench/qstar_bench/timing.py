"""The clock of every measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


def timed(run: Callable[[], _Result], device: str) -> tuple[float, _Result]:
    """Wall-clock seconds of one call, the device waited for; and what it returned."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result
