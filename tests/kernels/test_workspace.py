"""What an operator is said to hold besides its results is what torch's allocator hands out inside it."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, problem
from qstar_bench.memory import peak_bytes
from qstar_kernels import cpu_native, workspace
from qstar_kernels.cpu_attention import _backward_op, _forward_op

CASES = [
    Case(B=1, N=63, T=64, Lq=14, Hq=9, Hkv=3, D=64),
    Case(B=3, N=40, T=200, Lq=8, Hq=8, D=32, sinks=True, softcap=3.0),
    Case(B=2, N=100, T=512, Lq=1, Lk=9, Hq=8, D=64),
]


def held(run) -> int:
    """Bytes besides the results at the highest moment."""
    results: list = []
    peak = peak_bytes(lambda: results.extend(run()), "cpu")
    return peak - sum(x.nbytes for x in results)


@pytest.mark.parametrize("native", [True, False], ids=["C", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cpu_operators_hold_what_is_said(case, dtype, native, monkeypatch):
    if not native:
        monkeypatch.setattr(cpu_native, "can", lambda q, k: False)
    elif not cpu_native.built().startswith("C"):
        pytest.skip(cpu_native.built())
    p = problem(case, dtype)
    sinks = p.operands["sinks"] if case.sinks else None
    operands = [p.operands[x] for x in ("q", "k", "v", "k_prefix", "v_prefix")]
    rest = (p.ranges["prefix_end"], p.ranges["prefix_start"], sinks, 0.1, case.softcap, None, "causal")
    _forward_op(*operands, *rest)  # the first call may load a library
    q, k, _, k_prefix, _ = operands
    said = workspace.cpu_forward(q, k, k_prefix, sinks, case.softcap)
    found = held(lambda: _forward_op(*operands, *rest))
    assert 0.75 * found <= said <= 1.35 * found, "forward"
    said = workspace.cpu_backward(q, k, k_prefix, sinks, case.softcap)
    found = held(lambda: _backward_op(p.d_out, p.d_lse, *operands, *rest))
    assert 0.75 * found <= said <= 1.35 * found, "backward"
