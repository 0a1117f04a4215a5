"""The forward pass in C: cpu_forward.c, built by the machine's compiler when it is first asked for.

The library is kept in the user's cache. It is optional: without a compiler the same numbers come from torch's
operators, slower; `built()` says which. It asks for no OpenMP runtime of its own: it runs on the threads of
the one that torch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from qstar_kernels.operands import Operands, last_contiguous

SOURCE = Path(__file__).with_name("cpu_forward.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-fopenmp")
MOST_WIDE, MOST_SLOTS = 512, 1024  # D and Lk, as in cpu_forward.c
CONVERTED_BYTES = 4 << 20  # of queries in a low precision that are in fp32 at once
log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return $QSTAR_CACHE, or `qstar` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qstar"
    return Path(os.environ.get("QSTAR_CACHE") or default)


def _processor() -> str:
    """Return what `-march=native` depends on: machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def build(compiler: str, folder: Path) -> Path:
    """Build the library unless it exists, and return its path.

    Raises OSError or subprocess.CalledProcessError when it cannot be built.
    """
    key = "\0".join((SOURCE.read_text(), compiler, *FLAGS, platform.machine(), _processor()))
    library = folder / f"cpu_forward-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        compiled, linked = Path(work) / "cpu_forward.o", Path(work) / library.name
        subprocess.run(
            [compiler, *FLAGS, "-c", SOURCE, "-o", compiled], check=True, capture_output=True, text=True
        )
        # linked without -fopenmp: a second OpenMP runtime's threads would wait against torch's
        subprocess.run(
            [compiler, "-shared", compiled, "-o", linked, "-lm"], check=True, capture_output=True, text=True
        )
        linked.replace(library)  # at once: another process may be building the same
    return library


class _Problem(ctypes.Structure):
    """`Problem` of cpu_forward.c."""

    SIZES = ("B", "N", "Lq", "Lk", "T", "H", "G", "D")
    STRIDES = (
        *(f"{x}_{axis}" for x in ("q", "k", "v") for axis in ("batch", "block", "slot", "head")),
        *(f"{x}_{axis}" for x in ("kp", "vp") for axis in ("batch", "key", "head")),
    )
    _fields_ = (
        *((name, ctypes.c_int64) for name in (*SIZES, *STRIDES)),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("causal", ctypes.c_int64),
    )


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library or None, and what `built` says."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "torch's operators: no C compiler was found"
    try:
        library = ctypes.CDLL(str(build(compiler, cache_folder())), mode=os.RTLD_NOW)
    except subprocess.CalledProcessError as error:
        log.info("cpu_forward.c was not built: %s: %s", error, error.stderr)
        return None, f"torch's operators: {compiler} failed"
    except OSError as error:
        return None, f"torch's operators: {error}"
    library.qstar_cpu_forward.restype = ctypes.c_int
    library.qstar_cpu_forward.argtypes = [ctypes.POINTER(_Problem), *[ctypes.c_void_p] * 11]
    library.qstar_cpu_forward_panel.restype = ctypes.c_int64
    library.panel = library.qstar_cpu_forward_panel()  # type: ignore[attr-defined]
    return library, f"C, built by {compiler}"


def built() -> str:
    """Say what computes the forward pass in fp32 on this machine's CPU: for a benchmark's first lines."""
    return _load()[1]


def supports(q: Tensor, k: Tensor) -> bool:
    """Say whether `forward` takes such operands: all but fp64, with D <= 512 and Lk <= 1024."""
    fits = q.shape[-1] <= MOST_WIDE and k.shape[2] <= MOST_SLOTS
    return fits and q.dtype != torch.float64 and _load()[0] is not None


def forward(operands: Operands) -> tuple[Tensor, Tensor] | None:
    """Compute out and lse, or return None when a range lies outside the prefix.

    A low precision is converted to fp32 some blocks at a time.
    """
    q, k, v, k_prefix, v_prefix, end, start, sinks, *_ = operands.flat()
    end, start = _ranges(end), None if start is None else _ranges(start)
    sinks = None if sinks is None else sinks.float().contiguous()
    options = operands.scale, operands.softcap or 0.0, operands.window or 0, operands.own == "causal"
    if q.dtype == torch.float32:
        q, k, v, k_prefix, v_prefix = map(last_contiguous, (q, k, v, k_prefix, v_prefix))
        return _forward(q, k, v, k_prefix, v_prefix, end, start, sinks, *options)
    k_prefix, v_prefix = (last_contiguous(x.float()) for x in (k_prefix, v_prefix))
    out, lse = operands.empty_results()
    N = operands.N
    some = max(1, CONVERTED_BYTES * N // max(1, 4 * q.numel()))
    for i in range(0, N, some):
        blocks = slice(i, min(i + some, N))
        some_q, some_k, some_v = (last_contiguous(x[:, blocks].float()) for x in (q, k, v))
        some_end, some_start = (None if x is None else x[:, blocks].contiguous() for x in (end, start))
        found = _forward(some_q, some_k, some_v, k_prefix, v_prefix, some_end, some_start, sinks, *options)
        if found is None:
            return None
        out[:, blocks], lse[:, blocks] = found
    return out, lse


def _ranges(x: Tensor) -> Tensor:
    return x if x.dtype == torch.int64 and x.is_contiguous() else x.long().contiguous()


def _forward(
    q, k, v, k_prefix, v_prefix, end, start, sinks, scale, softcap, window, causal
) -> tuple[Tensor, Tensor] | None:
    library = _load()[0]
    assert library is not None
    B, N, Lq, Hq, D = q.shape
    H, Lk, T = k.shape[3], k.shape[2], k_prefix.shape[1]
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1])  # torch.empty takes twice as long
    strides = (x.stride()[:-1] for x in (q, k, v, k_prefix, v_prefix))
    sizes = (B, N, Lq, Lk, T, H, Hq // H, D)
    problem = _Problem(*sizes, *itertools.chain(*strides), scale, softcap, window, causal)
    panels = q.new_empty(B * H * -(-T // library.panel) * library.panel * D)
    tensors = (q, k, v, k_prefix, v_prefix, start, end, sinks, panels, out, lse)
    bad_range = library.qstar_cpu_forward(problem, *(None if x is None else x.data_ptr() for x in tensors))
    return None if bad_range else (out, lse)
