"""A plan of a training step's memory, made without weights, is what the step then holds."""

import json
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from qstar_bench.memory.allocation_tracker import STEP_PHASES
from qstar_bench.memory.largest_fit import USABLE, estimate, fit, largest
from qstar_bench.memory.planned_step import CATEGORIES, plan
from qstar_bench.memory.profile_command import measure
from qstar_bench.memory.step_setup import MemoryStepArguments
from qstar_bench.model_shapes import SHAPES, base_config

from qstar import QuietStarConfig
from qstar.cli.main import main

SMALL = MemoryStepArguments(tokens=24)
THINKING = QuietStarConfig(thought_length=3, talk_length=2)
OPTIONS = ["--tokens", "24", "--thought_length", "3", "--talk_length", "2"]


@pytest.mark.parametrize(
    ("args", "thinking"),
    [
        (MemoryStepArguments(tokens=64), replace(THINKING, thought_length=5)),
        pytest.param(
            replace(SMALL, batch=2, tokens=12),
            replace(THINKING, num_thoughts=3, block_chunk=12 * THINKING.slots),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            replace(SMALL, gradient_checkpointing=True, precision="bf16-mixed"),
            replace(THINKING, num_thoughts=1, thinking_positions="random", thinking_fraction=0.5),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "batch and chunks", "checkpointing and autocast"],
)
def test_the_plan_is_within_15_percent_of_what_the_step_holds_and_each_phase_within_25(args, thinking):
    planned, measured = plan(args, thinking), measure(args, thinking)
    assert abs(planned.peak_bytes / measured.peak_bytes - 1) < 0.15
    assert list(measured.phases) and set(measured.phases) == set(STEP_PHASES)
    for phase, categories in planned.phases.items():
        assert abs(sum(categories.values()) / measured.phases[phase] - 1) < 0.25, phase
    # most of the memory is weights and their like: what the step adds to them must agree as well
    fixed = sum(planned.peak[x] for x in ("parameters", "optimiser")) + planned.parameters * 4
    assert abs((planned.peak_bytes - fixed) / (measured.peak_bytes - fixed) - 1) < 0.25


def test_weights_gradients_and_optimiser_are_counted_exactly():
    found = plan(SMALL, replace(THINKING, thought_length=0), layers=1)
    moment, count = found.phases["qstar.optimiser"], found.parameters
    steps = moment["optimiser"] - 2 * 4 * count
    assert moment["gradients"] == 4 * count and 0 < steps < 4 * 100  # one number for each parameter tensor
    assert 4 * count <= moment["parameters"] < 4 * count + 1000  # rotary frequencies


@pytest.mark.slow
def test_chunks_that_are_not_planned_would_change_nothing(monkeypatch):
    thinking = replace(THINKING, thought_length=1)
    thinking = replace(thinking, block_chunk=8 * thinking.slots)
    few = plan(SMALL, thinking, layers=1)
    assert few.chunks == (3, 6)
    monkeypatch.setattr("qstar_bench.memory.planned_step.PLANNED_CHUNKS", 6)
    every = plan(SMALL, thinking, layers=1)
    assert every.chunks == (6, 6)
    assert abs(few.peak_bytes / every.peak_bytes - 1) < 0.02


def test_chunks_and_adapters_take_less():
    thinking = replace(THINKING, thought_length=1)
    usual = plan(SMALL, thinking, layers=1)
    chunked = plan(SMALL, replace(thinking, block_chunk=16 * thinking.slots), layers=1)
    assert sum(chunked.phases["qstar.blocks"].values()) < sum(usual.phases["qstar.blocks"].values())
    pytest.importorskip("peft")
    adapted = plan(replace(SMALL, strategy="lora", lora_rank=2), thinking, layers=1)
    assert adapted.peak["optimiser"] < 0.2 * usual.peak["optimiser"]


def test_fsdp_shares_weights_gradients_and_optimiser():
    # heads and width of the embedded model divide by 4
    on_gpu, thinking = replace(SMALL, device="cuda"), replace(THINKING, thought_length=0)
    one, four = (plan(on_gpu, thinking, layers=1, gpus=gpus) for gpus in (1, 4))
    for category in ("parameters", "gradients", "optimiser"):
        share = four.phases["qstar.optimiser"][category] / one.phases["qstar.optimiser"][category]
        assert 0.25 <= share < 0.3, category
    assert not torch.distributed.is_initialized()


def test_the_estimate_from_few_layers_is_the_plan_of_many(tmp_path):
    base_config("embedded", layers=5).save_pretrained(tmp_path)
    args, thinking = replace(SMALL, model=str(tmp_path)), replace(THINKING, thought_length=1)
    estimated = estimate(args, thinking)
    assert abs(estimated / plan(args, thinking).peak_bytes - 1) < 0.02
    assert estimated > 1.4 * plan(args, thinking, layers=2).peak_bytes


@pytest.mark.parametrize("room", [0, 12, 16, 100, 1000, 5000])
@pytest.mark.parametrize(
    ("values", "begin"), [(range(1, 1025), 8), (range(5, 9000, 16), 256), (range(257), 9)]
)
def test_the_largest_that_fits_is_found_in_few_steps(room, values, begin):
    asked = []

    def peak(n):
        asked.append(n)
        return 3 * n + 10 + max(0, n - 500)  # two straight lines

    fitting = [n for n in values if peak(n) <= room]
    asked.clear()
    assert largest(peak, room, values, begin) == (max(fitting) if fitting else None)
    assert len(asked) <= 6


def test_the_command_prints_a_table_and_draws_a_plot(tmp_path, capsys):
    plot = tmp_path / "plan.png"
    assert main(["memory", "plan", *OPTIONS, "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert "A plan, not a measurement" in out and "qstar.backward" in out and plot.stat().st_size > 10_000
    assert document["bench"] == "memory plan" and set(document["phases"]) == set(STEP_PHASES)
    assert document["peak_bytes"] == sum(document["phases"][document["peak_phase"]].values())
    assert set(document["phases"]["qstar.loss"]) == set(CATEGORIES)


def test_what_fits_on_a_card_is_the_largest_that_does():
    args = MemoryStepArguments(model="tiny", device="cpu", tokens=32)
    thinking = QuietStarConfig(0, 2, 2)
    card = plan(args, thinking).peak_bytes / 2**30 / USABLE * 1.01
    assert fit("block_chunk", args, thinking, 1, card)["largest"] == "none needed"
    found = fit("tokens", args, thinking, 1, card)
    assert 32 <= found["largest"] < 64 and found["planned GiB"] <= card * USABLE
    assert plan(replace(args, tokens=found["largest"] + 16), thinking).peak_bytes > card * USABLE * 2**30


def test_on_a_card_that_is_too_small_nothing_fits(monkeypatch, capsys):
    monkeypatch.setattr("qstar_bench.memory.plan_command.OPTIONS", ("tokens", "batch"))
    options = ["--tokens", "8", "--thought_length", "0", "--talk_length", "2", "--json", "true"]
    assert main(["memory", "plan", *options, "--card_gb", "0.01"]) == 0
    rows = json.loads(capsys.readouterr().out)["fits"]
    assert [row["option"] for row in rows] == ["tokens", "batch"]
    assert {row["largest"] for row in rows} == {"none fits"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--model", "mistral-8b"],
            "model = mistral-8b: must be a folder with a config.json, or one of embedded",
        ),
        (["--gpus", "0"], "gpus = 0: must be at least 1"),
        (["--gpus", "2"], "gpus = 2: must be 1 with device = 'cpu'"),
        (["--tokens", "1"], "tokens = 1: must be at least 2"),
        (["--tokens", "4", "--talk_length", "4"], "tokens = 4: must be more than talk_length = 4"),
        (["--tokens", "600"], "tokens = 600: .* exceed the model's context of 512"),
        (["--batch", "0"], "batch = 0: must be at least 1"),
        (["--strategy", "qlora"], "strategy = 'qlora': must be one of full, lora"),
        (["--precision", "fp16"], "precision = 'fp16': must be one of fp32, bf16-mixed, bf16"),
        (["--device", "tpu"], "device = 'tpu': must be cpu or cuda"),
        (["--card_gb", "0"], r"card_gb = 0\.0: must be positive"),
        (["--plot", "/nowhere/plan.png"], "plot = .*: its folder does not exist"),
        (["--trace", "trace.json"], r"trace = trace\.json: must be left out"),
        (["--attention", "flash"], "attention = 'flash': must be auto, cpu, triton or reference for a plan"),
        (["--block_chunk", "1"], "block_chunk = 1: must be at least 28"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_planned_is_said_in_one_line(options, reason, capsys):
    assert main(["memory", "plan", *options]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    with pytest.raises(ValueError, match=reason):
        raise ValueError(error)


def test_without_peft_the_extra_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["memory", "plan", "--strategy", "lora"]) == 1
    said = "qstar memory: strategy = 'lora': peft is not installed; pip install 'qstar[bench]'\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("tiny", "gemma-3-1b") else pytest.param(name, marks=pytest.mark.slow)
        for name in SHAPES
    ],
)
def test_every_named_shape_can_be_planned(name):
    args = replace(SMALL, model=name, device=None, precision=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = plan(args, replace(THINKING, thought_length=1), layers=1)
    assert found.peak["parameters"] >= 4 * found.parameters
