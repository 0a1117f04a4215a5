"""The Triton kernels on a real GPU: the interpreter's cases and larger ones, by the same rule."""

from dataclasses import replace

import pytest
import torch
from triton_cases import CASES, FLASH_CASES, FLEX_CASES, Case, failures, run_case

LARGE = {
    "T256_L14_G4": Case(N=256, T=256, Lq=14, Lk=14, G=4, H=2, D=64),
    "T1024_L12_G4_D128": Case(N=128, T=1024, Lq=12, Lk=12, G=4, H=2, D=128),
    "T300_L20_G1": Case(N=257, T=300, Lq=20, Lk=20, H=2, D=128),
    "sampling_T1024": Case(N=128, T=1024, Lq=1, Lk=14, G=4, H=2, D=128),
    "generation_T4096": Case(N=1, T=4096, Lq=1, Lk=9, G=4, H=2, D=128),
    "block_larger_than_a_tile": Case(N=32, T=256, Lq=40, Lk=40, G=8, H=1, D=64),
    "everything": replace(CASES["everything"], N=97, T=300, Lq=9, Lk=12, window=100, D=128, G=4),
}
FLASH = {
    **FLASH_CASES,
    "T256_L14_G4": Case(B=2, N=256, T=256, Lq=14, Lk=14, G=4, H=2, D=128, ends="tokens"),
}
ALL = {**CASES, **{f"large_{name}": case for name, case in LARGE.items()}}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_output_and_gradients_keep_the_rule_on_the_gpu(name, dtype):
    torch.use_deterministic_algorithms(True, warn_only=True)  # every torch.empty is full of NaN
    try:
        assert failures(run_case(ALL[name], dtype, "cuda"), dtype) == []
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FLASH)
def test_flash_keeps_the_rule_on_the_gpu(name, dtype):
    assert failures(run_case(FLASH[name], dtype, "cuda", "flash"), dtype) == []


@pytest.mark.parametrize("name", FLEX_CASES)
def test_flex_keeps_the_rule_on_the_gpu(name):
    assert failures(run_case(CASES[name], torch.bfloat16, "cuda", "flex"), torch.bfloat16) == []


def test_auto_takes_the_kernels_on_a_gpu():
    from qstar_kernels import resolve_impl

    assert resolve_impl("auto", "cuda", torch.bfloat16, 64) == "triton"


def test_a_cuda_graph_captures_and_replays_forward_and_backward():
    from qstar_kernels import thought_attention

    inputs, options = CASES["groups_of_4"].operands(torch.float16, "cuda")
    leaves = [x.requires_grad_() for x in inputs]

    def step():
        out, lse = thought_attention(*leaves, **options, impl="triton")
        return [out, *torch.autograd.grad(out.float().sum() + lse.sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [x.clone() for x in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, captured))
