"""The CPU engine as a torch operator: registration, fake tensors, torch.compile, checkpointing, autocast."""

import pytest
import torch
from attention_cases import Case, problem
from qstar_kernels import thought_attention
from qstar_kernels.cpu_attention import _backward_op, _forward_no_grad, _forward_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

CASES = [
    Case(),
    Case(N=17, T=17, Lq=1, Lk=4),  # a sampling step
    Case(sinks=True, window=6, softcap=3.0, scale=0.5, ranges="padded"),
    Case(N=0),
    Case(scattered=True),
]


def leaves_and_call(case: Case, dtype: torch.dtype = torch.float64):
    p = problem(case, dtype)
    names = list(p.operands)

    def call(*x):
        return thought_attention(**dict(zip(names, x)), **p.options, impl="cpu")

    return [x.detach().requires_grad_() for x in p.operands.values()], call


def loss(call):
    def function(*x):
        out, lse = call(*x)
        return (out**2).sum() + lse.exp().sum()

    return function


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_finds_schema_fake_version_and_gradients_right(case):
    p = problem(case)
    leaves = [x.requires_grad_() for x in p.operands.values()]
    sinks = leaves[5] if case.sinks else None
    ends = p.ranges["prefix_end"], p.ranges["prefix_start"]
    options = 0.1, case.softcap, case.window, case.own
    torch.library.opcheck(_forward_op, (*leaves[:5], *ends, sinks, *options))
    operands = [None if x is None else x.detach() for x in (*leaves[:5], *ends, sinks)]
    torch.library.opcheck(_forward_no_grad, (*operands, *options))
    torch.library.opcheck(_backward_op, (p.d_out, p.d_lse, *operands, *options))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_as_one_graph_it_gives_the_eager_results_and_gradients(case):
    leaves, call = leaves_and_call(case)
    found = []
    for function in (loss(call), torch.compile(loss(call), backend="aot_eager", fullgraph=True)):
        value = function(*leaves)
        found.append([value, *torch.autograd.grad(value, leaves)])
    for eager, compiled in zip(*found):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_tensors_have_the_shapes_dtypes_and_strides_of_real_ones(case, dtype):
    leaves, call = leaves_and_call(case, dtype)
    real = call(*leaves)
    real = [*real, *torch.autograd.grad(real, leaves, [x.detach() for x in real])]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [mode.from_tensor(x.detach()).requires_grad_() for x in leaves]
        fake = call(*inputs)
        fake = [*fake, *torch.autograd.grad(fake, inputs, [x.detach() for x in fake])]
    for ours, theirs in zip(real, fake):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_checkpointing_changes_no_gradient():
    leaves, call = leaves_and_call(Case())
    found = []
    for function in (loss(call), lambda *x: checkpoint(loss(call), *x, use_reentrant=False)):
        found.append(torch.autograd.grad(function(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_gradient_it_is_another_operator_with_the_same_results(case):
    leaves, call = leaves_and_call(case, torch.float32)
    expected = call(*leaves)
    with torch.no_grad():
        found = call(*leaves)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves)
    for x, y, z in zip(expected, found, compiled):
        assert (x.requires_grad, y.requires_grad) == (True, False)
        assert torch.equal(x, y) and torch.equal(y, z)


@pytest.mark.parametrize("grad", [True, False])
def test_vmap_runs_it_once_for_each_item(grad):
    leaves, call = leaves_and_call(Case())
    q = torch.stack([leaves[0].detach(), 2 * leaves[0].detach()])
    rest = [x.detach() for x in leaves[1:]]
    with torch.set_grad_enabled(grad):
        mapped = torch.vmap(lambda x: call(x, *rest)[0])(q)
    assert torch.equal(mapped, torch.stack([call(x, *rest)[0] for x in q]))
