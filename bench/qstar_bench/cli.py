"""`qstar bench WHAT`: finds the measurement."""

from __future__ import annotations

import importlib

MEASUREMENTS = {
    "attention": "qstar_bench.attention.attention_speed",
    "data": "qstar_bench.data_speed",
    "generate": "qstar_bench.generation_speed",
    "gpu": "qstar_bench.gpu",
    "kernels": "qstar_bench.kernels.kernel_table",
    "report": "qstar_bench.report.report_command",
    "scaling": "qstar_bench.training_step.scaling",
    "step": "qstar_bench.training_step.step_speed",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in MEASUREMENTS:
        raise ValueError(
            f"bench {' '.join(argv[:1]) or '(nothing)'}: must be one of {', '.join(MEASUREMENTS)}"
        )
    return importlib.import_module(MEASUREMENTS[argv[0]]).main(argv[1:])
