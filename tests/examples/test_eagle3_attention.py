"""The operator is EAGLE-3's training-time-test attention: out and each gradient, all steps and one by one."""

import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "eagle3_attention.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("eagle3_attention", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operands(B=2, T=11, S=5, Hq=4, H=2, D=8):
    torch.manual_seed(0)
    shapes = {
        "q": (B, T, S, Hq, D),
        "k": (B, T, S, H, D),
        "v": (B, T, S, H, D),
        "k0": (B, T, H, D),
        "v0": (B, T, H, D),
    }
    return {n: torch.randn(x, dtype=torch.float64, requires_grad=True) for n, x in shapes.items()}


def test_out_and_each_gradient_equal_the_mask_of_its_definition(example):
    x = operands()
    ours, dense = example.draft_attention(**x), example.draft_attention_dense(**x)
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-10)
    d_out = torch.randn_like(ours)
    found = (torch.autograd.grad(out, list(x.values()), d_out) for out in (ours, dense))
    for name, a, b in zip(x, *found):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"d{n}: {text}")


def test_the_dense_mask_is_the_definition_for_one_query(example):
    x = {name: value.detach() for name, value in operands().items()}
    i, s = 4, 2  # position and step (from 0) of the query
    keys = torch.cat([x["k0"][0, : i + 1], x["k"][0, i, : s + 1]])[:, 1]
    values = torch.cat([x["v0"][0, : i + 1], x["v"][0, i, : s + 1]])[:, 1]
    p = torch.softmax(keys @ x["q"][0, i, s, 3] * 8**-0.5, dim=0)  # query head 3 uses key-value head 1
    torch.testing.assert_close(example.draft_attention_dense(**x)[0, i, s, 3], p @ values)


def test_step_after_step_equals_all_steps_at_once(example):
    x = {name: value.detach() for name, value in operands().items()}
    whole = example.draft_attention(**x)
    for s in range(5):
        step = x | {"q": x["q"][:, :, s : s + 1], "k": x["k"][:, :, : s + 1], "v": x["v"][:, :, : s + 1]}
        torch.testing.assert_close(example.draft_attention(**step), whole[:, :, s : s + 1])


def test_it_runs(example, capsys):
    example.main(T=16, S=2)
    assert "largest difference" in capsys.readouterr().out
