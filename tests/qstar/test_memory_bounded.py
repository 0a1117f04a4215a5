"""What trainers do to save memory or time leaves the training step what it is: the model's own gradient
checkpointing, bf16 autocast, accumulated gradients, torch.compile."""

import copy

import pytest
import torch
from tiny_models import thinking_model, tokens

from qstar.data import collate


def gradients(model, batches, **options):
    """(loss, gradients by name) of the batches one after the other, thoughts from one source."""
    source = torch.Generator().manual_seed(3)
    model.zero_grad(set_to_none=True)
    loss = 0.0
    for batch in batches:
        output = model(**batch, generator=source, **options)
        output.loss.backward()
        loss += output.loss.detach()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    errors = {name: relative(g, expected[name]) for name, g in found.items()}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


BATCH = {"input_ids": tokens(2, 12), "attention_mask": torch.tensor([[1] * 12, [0] * 4 + [1] * 8])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("chunk", [None, 24], ids=["all-at-once", "chunks"])
def test_the_models_own_gradient_checkpointing_changes_no_gradient(dtype, kind, chunk):
    model = thinking_model(kind, block_chunk=chunk, policy_weight=10.0).to(dtype).train()
    expected_loss, expected = gradients(model, [BATCH])
    runs = []
    mlp = model.base.base_model.get_submodule("layers.0.mlp")
    mlp.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    gradients(model, [BATCH])
    plain = runs.count(True)
    runs.clear()
    model.gradient_checkpointing_enable()
    loss, found = gradients(model, [BATCH])
    assert runs.count(True) > plain  # it ran again in backward
    assert torch.equal(loss, expected_loss)
    assert_close(found, expected, 1e-6)


def test_under_bf16_autocast_the_master_weights_and_gradients_are_fp32_and_the_loss_is_near():
    model = thinking_model(policy_weight=0.0).train()
    # the thoughts of both are those of fp32: only how they are scored differs
    thoughts = torch.randint(2, 61, (2, 11, 2, 3), generator=torch.Generator().manual_seed(0))
    expected, _ = gradients(model, [BATCH], thoughts=thoughts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = gradients(model, [BATCH], thoughts=thoughts)
    assert loss.dtype == torch.float32 and bool(torch.isfinite(loss))
    assert 0 < abs(float(loss - expected)) < 0.02 * float(expected)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and found[name].dtype == torch.float32, name
        assert bool(torch.isfinite(found[name]).all()), name
    before = copy.deepcopy(model.state_dict())
    torch.optim.AdamW(model.parameters(), lr=1e-6).step()
    moved = [bool((x != before[name]).any()) for name, x in model.state_dict().items()]
    assert all(moved)


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_micro_batches_have_the_gradients_of_the_large_batch(micro):
    rows = [{"input_ids": tokens(1, 10, i)[0].tolist(), "position_ids": list(range(10))} for i in range(4)]
    # greedy thoughts, for random numbers come in another order
    model = thinking_model(thought_temperature=0.0, num_thoughts=1).double().train()
    large = [collate(rows)]
    loss, expected = gradients(model, large)
    targets = sum(int((batch["labels"] != -100).sum()) for batch in large)
    parts = [collate(rows[i : i + micro]) for i in range(0, len(rows), micro)]
    accumulated_loss, found = gradients(model, parts, num_items_in_batch=torch.tensor(targets))
    torch.testing.assert_close(accumulated_loss, loss)
    assert_close(found, expected, 1e-6)


@pytest.mark.slow
def test_a_compiled_model_has_the_loss_and_gradients_of_the_eager_one():
    torch._dynamo.reset()
    model = thinking_model(policy_weight=10.0).train()
    expected_loss, expected = gradients(model, [BATCH])
    compiled_layers = []

    def backend(graph, inputs):
        compiled_layers.append(graph)
        return graph.forward

    loss, found = gradients(torch.compile(model, backend=backend), [BATCH])
    assert compiled_layers
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    found = {name.removeprefix("_orig_mod."): g for name, g in found.items()}
    assert_close(found, expected, 1e-5)
