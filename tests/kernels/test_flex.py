"""impl="flex": FlexAttention under the operator's block mask, on a CPU, where it has a forward pass alone."""

import pytest
import torch
from qstar_kernels import flex, resolve_impl, thought_attention
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton_cases import CASES, FLEX_CASES


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Not compiled, which takes seconds a shape: then torch computes lse on a CPU too."""
    monkeypatch.setattr(flex, "_compiled", lambda device: (create_block_mask, flex_attention))
    monkeypatch.setattr(flex, "_gives_lse", lambda q: True)


@pytest.mark.parametrize("name", FLEX_CASES)
@torch.no_grad()
def test_out_and_lse_of_every_option_equal_the_dense_mask(name, as_on_a_gpu):
    inputs, options = CASES[name].operands(torch.float32, "cpu")
    high = options | {"sinks": None if options["sinks"] is None else options["sinks"].double()}
    truth = thought_attention(*(x.double() for x in inputs), **high, impl="reference")
    naive = thought_attention(*inputs, **options, impl="reference")
    for found, dense, true in zip(thought_attention(*inputs, **options, impl="flex"), naive, truth):
        assert (found.shape, found.dtype) == (dense.shape, dense.dtype)
        if true.numel():
            assert (found - true).abs().max() <= 2 * (dense - true).abs().max() + 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_compiled_on_a_cpu_it_gives_out_and_no_lse():
    for name in ("window_9", "plain"):  # two shapes: compiled for changing shapes, it is wrong C++
        inputs, options = CASES[name].operands(torch.float32, "cpu")
        inputs[0].requires_grad_()  # under no_grad it may be; torch itself refuses it on a CPU
        out, lse = thought_attention(*inputs, **options, impl="flex")
        expected, _ = thought_attention(*inputs, **options, impl="reference")
        assert (out - expected).abs().max() <= 1e-5
        assert bool(lse.isnan().all())


def test_what_a_cpu_cannot_do_is_refused():
    inputs, options = CASES["plain"].operands(torch.float32, "cpu")
    with pytest.raises(ValueError, match="has no backward on a CPU; use impl = 'cpu'"):
        thought_attention(inputs[0].requires_grad_(), *inputs[1:], **options, impl="flex")
    sinks = torch.zeros(inputs[0].shape[3])
    with pytest.raises(ValueError, match="sinks need lse, which FlexAttention does not give on a CPU"):
        thought_attention(*(x.detach() for x in inputs), **options | {"sinks": sinks}, impl="flex")
    with pytest.raises(ValueError, match=r"impl = 'flex': q\.dtype is torch\.float64"):
        resolve_impl("flex", "cpu", torch.float64, 64)
    with pytest.raises(ValueError, match="impl = 'flex': heads are 8 wide"):
        resolve_impl("flex", "cpu", torch.float32, 8)
