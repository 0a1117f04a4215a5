"""`qstar bench WHAT`: finds the measurement."""

from __future__ import annotations

import importlib

MEASUREMENTS = {
    "attention": "qstar_bench.attention",
    "curves": "qstar_bench.curves",
    "data": "qstar_bench.data",
    "generate": "qstar_bench.generate",
    "gpu": "qstar_bench.gpu",
    "kernels": "qstar_bench.kernels",
    "report": "qstar_bench.report",
    "scaling": "qstar_bench.scaling",
    "step": "qstar_bench.step",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in MEASUREMENTS:
        raise ValueError(
            f"bench {' '.join(argv[:1]) or '(nothing)'}: must be one of {', '.join(MEASUREMENTS)}"
        )
    return importlib.import_module(MEASUREMENTS[argv[0]]).main(argv[1:])
