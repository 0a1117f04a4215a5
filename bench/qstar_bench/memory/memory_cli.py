"""`qstar memory plan` and `qstar memory profile`: finds the command."""

from __future__ import annotations

import importlib

COMMANDS = {"plan": "qstar_bench.memory.memory_plan", "profile": "qstar_bench.memory.memory_profile"}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        raise ValueError(f"memory {' '.join(argv[:1]) or '(nothing)'}: must be one of {', '.join(COMMANDS)}")
    return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
