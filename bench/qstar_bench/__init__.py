"""The measurements, reached as `qstar bench ...` and `qstar memory ...`."""

from qstar_bench.memory.memory_peaks import memory_snapshot

__all__ = ["memory_snapshot"]
