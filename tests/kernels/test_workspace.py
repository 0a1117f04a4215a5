"""What an operator is said to hold besides its results is what torch's allocator hands out inside it."""

import pytest
import torch
from attention_cases import Case, problem
from qstar_bench.kernels import workspace
from qstar_bench.memory.memory_peaks import peak_bytes
from qstar_kernels import cpu_native
from qstar_kernels.cpu_attention import _backward_op, _forward_op
from qstar_kernels.operands import Operands
from qstar_kernels.triton_backward_keys import keys_tile_of
from qstar_kernels.triton_tiles import CHIPS

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
        monkeypatch.setattr(cpu_native, "supports", lambda q, k: False)
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


def operands(case: Case, dtype: torch.dtype = torch.bfloat16):
    q = torch.empty(case.B, case.N, case.Lq, case.Hq, case.D, dtype=dtype, device="meta")
    k = torch.empty(case.B, case.N, case.Lk or case.Lq, case.Hkv, case.D, dtype=dtype, device="meta")
    return q, k, torch.empty(case.B, case.T, case.Hkv, case.D, dtype=dtype, device="meta")


def test_triton_holds_partial_sums_only_where_programs_share_a_tile():
    chip = CHIPS["sm_90"]
    full = Case(B=8, N=2046, T=1024, Lq=14, Hq=32, Hkv=8, D=128)  # programs enough to fill the chip
    q, k, k_prefix = operands(full)
    assert workspace.triton_forward(q, k, k_prefix, chip) == 0
    assert workspace.triton_backward(q, k, k_prefix, chip) == 8 * 2046 * 14 * 32 * 4  # delta
    few = Case(B=1, N=510, T=256, Lq=14, Hq=32, Hkv=8, D=128)
    q, k, k_prefix = operands(few)
    ends = torch.empty(q.shape[:2], dtype=torch.int32, device="meta")
    few_operands = Operands(q, k, k, k_prefix, k_prefix, ends, ends, sinks=None, scale=1.0)
    split = keys_tile_of(few_operands, own_slots=False, chip=chip).SPLIT
    assert split > 1
    sums = 2 * (split + 1) * k_prefix.numel() * 4
    assert workspace.triton_backward(q, k, k_prefix, chip) == 510 * 14 * 32 * 4 + sums


def test_sampling_with_few_blocks_holds_the_parts_of_split_rows():
    few = Case(B=1, N=2, T=4096, Lq=1, Lk=9, Hq=8, Hkv=8, D=64)
    q, k, k_prefix = operands(few)
    held = workspace.triton_forward(q, k, k_prefix, CHIPS["sm_90"])
    part = q.numel() * 4 + q.numel() // 64 * 4
    assert held >= 2 * part and held % part == 0
    many = operands(Case(B=16, N=2046, T=1024, Lq=1, Lk=9, Hq=32, Hkv=8, D=128))
    assert workspace.triton_forward(*many, CHIPS["sm_90"]) == 0
