"""Thoughts computed some positions at a time give the loss and gradients of all at once, in less memory."""

import json

import pytest
import torch
from qstar_bench.memory.memory_peaks import peak_bytes
from tiny_models import base_model, thinking_model, tokens

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.profiler_ranges import PHASES
from qstar.reporting.profiling import traced
from qstar.thinker import Thinker


def step(model, chunk, ids, **batch):
    """(loss and metrics, gradients by name) of one training step with that chunk."""
    model.quiet_star = QuietStarConfig(**{**vars(model.quiet_star), "block_chunk": chunk})
    model.zero_grad(set_to_none=True)
    output = model(ids, generator=torch.Generator().manual_seed(3), **batch)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), **output.metrics}, gradients


def relative(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


PADDED = {"attention_mask": torch.tensor([[1] * 12, [0] * 5 + [1] * 7])}
PACKED = {"position_ids": torch.tensor([[*range(7), *range(5)], [*range(4), *range(8)]])}
UNLABELLED = {"labels": torch.tensor([[-100] * 8 + [5, 6, 7, 8], [5, -100] * 6])}


@pytest.mark.parametrize(
    ("kind", "options", "batch"),
    [
        ("llama", {}, {}),
        ("llama", {"num_thoughts": 3, "thought_length": 4}, PADDED),
        ("llama", {"num_thoughts": 1, "talk_length": 1}, PACKED),
        ("llama", {"advantage": "normalized"}, UNLABELLED),
        ("llama", {"thinking_positions": "uncertain", "thinking_fraction": 0.5}, PADDED),
        ("llama", {"thought_length": 0}, {}),
        ("llama", {"talk_weight": 0.7, "base_weight": 0.0}, UNLABELLED),
        ("llama", {}, {"think_mask": torch.tensor([[0, 1] * 6, [0] * 8 + [1] * 4])}),
        ("gemma2", {}, PADDED),  # a soft-capped head mixes logits
        ("gpt2", {"thought_temperature": 0.0}, {}),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else x,
)
@pytest.mark.parametrize("positions", [pytest.param(1, marks=pytest.mark.slow), 3, 100])
def test_loss_metrics_and_every_gradient_are_those_of_all_blocks_at_once(kind, options, batch, positions):
    model = thinking_model(kind, mix=0.3, policy_weight=10.0, **options).double().train()
    ids = tokens(2, 12)
    slots = model.quiet_star.num_thoughts * model.quiet_star.slots
    expected, expected_gradients = step(model, None, ids, **batch)
    found, gradients = step(model, positions * slots, ids, **batch)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=1e-6, atol=1e-9)
    assert gradients.keys() == expected_gradients.keys()
    wrong = {
        name: error
        for name, g in gradients.items()
        if (error := relative(g, expected_gradients[name])) > 1e-6
    }
    assert wrong == {}


def test_the_thoughts_of_a_seed_do_not_depend_on_the_chunks():
    model = thinking_model(thought_length=3, num_thoughts=2)
    kept = []
    read = Thinker.read_thoughts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Thinker, "read_thoughts", lambda *a: kept.append(a[5]) or read(*a))
        with torch.no_grad():
            for chunk in (None, 12, 65):
                kept.append("|")
                model.quiet_star = QuietStarConfig(**{**vars(model.quiet_star), "block_chunk": chunk})
                model(tokens(2, 9), generator=torch.Generator().manual_seed(5))
    runs, run = [], []
    for x in [*kept[1:], "|"]:
        if isinstance(x, str):
            runs.append(torch.cat(run, dim=1))
            run = []
        else:
            run.append(x)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.slow
def test_peak_memory_grows_with_thoughts_only_when_all_are_computed_at_once():
    base = base_model("llama", hidden_size=64, intermediate_size=256)

    def peak(chunk, **options):
        model = QuietStarForCausalLM.from_base(base, QuietStarConfig(block_chunk=chunk, **options)).train()
        ids = tokens(1, 48)
        step_ = lambda: model(ids).loss.backward()  # noqa: E731
        step_()  # the parameters' gradients are there now
        return peak_bytes(step_, "cpu")

    few = {"thought_length": 2, "talk_length": 2, "num_thoughts": 2}
    many = {"thought_length": 8, "talk_length": 2, "num_thoughts": 4}
    assert peak(None, **many) > 2.5 * peak(None, **few)
    assert peak(80, **many) < peak(None, **few)


@pytest.mark.parametrize(
    ("chunk", "allowed"),
    [
        (27, "at least 28, the slots of one position"),
        (0, "at least"),
        (2.5, "an integer"),
        (True, "an integer"),
    ],
)
def test_a_chunk_that_splits_the_thoughts_of_a_position_is_refused(chunk, allowed):
    with pytest.raises(ValueError, match=f"block_chunk = {chunk}: must be .*{allowed}"):
        QuietStarConfig(num_thoughts=2, block_chunk=chunk)


def test_every_phase_of_a_step_is_a_named_range_of_its_trace(tmp_path):
    model = thinking_model(block_chunk=24).train()
    with traced(str(tmp_path / "trace.json")):
        model(tokens(1, 5)).loss.backward()  # four positions, two at a time
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert set(PHASES) <= {event["name"] for event in events if event.get("cat") == "user_annotation"}
