"""Our losses and every gradient against the values that the authors' published code computed (fp32, CPU).

tests/golden/official_a.json explains each tensor and its convention, and how it was made.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from qstar import QuietStarConfig, QuietStarForCausalLM

GOLDEN = Path(__file__).parents[1] / "golden"
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "official_a.safetensors")


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request, golden):
    facts = json.loads((GOLDEN / "official_a.json").read_text())
    values = dict(facts["model_config"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=request.param, dtype=torch.float32)
    base.load_state_dict({name: golden[name] for name in base.state_dict()})
    sizes = facts["sizes"]
    ours = QuietStarForCausalLM.from_base(
        base,
        QuietStarConfig(
            thought_length=sizes["k"],
            talk_length=sizes["m"],
            num_thoughts=sizes["P"],
            suppressed_tokens=[sizes["V"] - 2, sizes["V"] - 1],
        ),
    )
    with torch.no_grad():
        ours.boundary.start_raw.copy_(golden["start_embedding_raw"][0])
        ours.boundary.end_raw.copy_(golden["end_embedding_raw"][0])
        for layer in (0, 2, 4):
            for name, parameter in ours.mixing.layers[layer].named_parameters():
                parameter.copy_(golden[f"mixing.{layer}.{name}"])
    return ours.train()


@pytest.fixture(scope="module")
def output(model, golden):
    # theirs [B, copy, T, k]; ours [B, position, thought, k], without the last position, which predicts
    # nothing
    thoughts = golden["thought_tokens"].transpose(1, 2)[:, :-1]
    return model(golden["input_ids"], thoughts=thoughts)


def relative(ours, theirs):
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


def test_loss_parts_agree(output, golden):
    metrics = output.metrics
    assert relative(metrics["base_nll"], golden["out.loss_base_mean"]) <= LOSS_TOLERANCE
    steps = torch.stack([metrics[f"mixed_nll_{j + 1}"] for j in range(4)])
    assert relative(steps, golden["out.loss_mixed_mean"]) <= LOSS_TOLERANCE
    assert relative(output.nll_loss, golden["out.loss_nll"]) <= LOSS_TOLERANCE
    assert relative(metrics["policy_loss"], golden["out.loss_policy"]) <= LOSS_TOLERANCE
    assert relative(output.loss, golden["out.loss_total"]) <= LOSS_TOLERANCE


@pytest.mark.parametrize("part", ["nll", "policy"])
def test_every_gradient_agrees(part, model, output, golden):
    names = {
        "boundary.start_raw": "start_embedding_raw",
        "boundary.end_raw": "end_embedding_raw",
        **{
            f"mixing.layers.{i}.{kind}": f"mixing.{i}.{kind}"
            for i in (0, 2, 4)
            for kind in ("weight", "bias")
        },
    }
    parameters = dict(model.named_parameters())
    loss = output.nll_loss if part == "nll" else output.policy_loss
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    compared = set()
    for name, ours in zip(parameters, gradients):
        theirs = golden[f"grad_{part}." + names.get(name, name.removeprefix("base."))]
        theirs = theirs[0] if name.startswith("boundary.") else theirs
        ours = torch.zeros_like(theirs) if ours is None else ours
        if not theirs.any():
            assert not ours.any(), f"{name}: must be exactly zero"
        else:
            assert relative(ours, theirs) <= GRADIENT_TOLERANCE, name
        compared.add(name)
    assert len(compared) == len(golden_parameters(golden, part))


def golden_parameters(golden, part):
    repeated = {
        f"grad_{part}.start_embedding",
        f"grad_{part}.end_embedding",
    }  # per effective vector, given twice
    return [name for name in golden if name.startswith(f"grad_{part}.") and name not in repeated]
