"""`qstar bench step`: all ways compute the same step before any is timed, and its counts are the method's."""

import json

import pytest
import torch
from qstar_bench import timing
from qstar_bench.step_flops import step_flops
from qstar_bench.timing import PhaseClock
from qstar_bench.training_step import step_command, step_ways
from qstar_bench.training_step.published_step import published_step
from qstar_bench.training_step.step_command import main
from qstar_bench.training_step.step_ways import StepBenchArguments, build
from tiny_models import thinking_model, tokens
from torch.utils.flop_counter import FlopCounterMode

from qstar.cli.main import main as qstar

TINY = ["--model", "tiny", "--tokens", "9", "--thought_length", "2", "--talk_length", "2"]


@pytest.fixture
def in_this_process(monkeypatch):
    """A new Python for each round costs seconds; the slow test has them."""

    def work(args, worker, trace):
        return json.loads(json.dumps(step_ways.work(args, *worker.split(":"), trace)))

    monkeypatch.setattr(step_command, "_in_a_process", work)
    monkeypatch.setattr(step_command, "matmul_flops", lambda dtype, device: 1e11)


@pytest.mark.parametrize(
    "rounds", [pytest.param("in_processes_of_their_own", marks=pytest.mark.slow), "in_this_process"]
)
def test_the_command_compares_the_ways_and_ends_with_json(capsys, tmp_path, rounds, request):
    if rounds == "in_this_process":
        request.getfixturevalue(rounds)
    trace, runs = tmp_path / "trace.json", tmp_path / "runs.jsonl"
    ways = ["--way", "ours", "dense", "published", "plain", "--steps", "1", "--rounds", "1"]
    assert main([*TINY, *ways, "--trace", str(trace), "--append", str(runs)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert json.loads(runs.read_text()) == document
    assert [row["way"] for row in document["rows"]] == ["ours", "dense", "published", "plain"]
    for figure in (
        "speedup_vs_published_way",
        "memory_vs_published_way",
        "price_of_thinking",
        "price_vs_flops",
        "speedup_vs_dense",
    ):
        assert document[figure] > 0
        assert figure in printed
    ours = document["phases"][0]
    assert all(ours[name] > 0 for name in ("prefix", "rollout", "blocks", "loss", "backward", "optimiser"))
    assert document["difference"] < 1e-6
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"qstar.prefix", "qstar.rollout", "qstar.blocks", "qstar.loss", "qstar.backward"} <= names


def test_a_preset_leaves_out_what_the_machine_only_emulates_and_says_so(monkeypatch, in_this_process, capsys):
    rates = {torch.float32: 1e11, torch.bfloat16: 3e8}
    monkeypatch.setattr(step_command, "matmul_flops", lambda dtype, device: rates[dtype])
    monkeypatch.setitem(
        step_ways.PRESETS,
        "small",
        {"model": "tiny", "tokens": 9, "thought_length": 2, "talk_length": 2, "rounds": 1, "way": ["plain"]}
        | {"dtype": ["float32", "bfloat16"]},
    )
    assert main(["--preset", "small"]) == 0
    printed = capsys.readouterr().out
    assert "bfloat16 is LEFT OUT: this cpu has no instructions for it" in printed
    document = json.loads(printed.splitlines()[-1])
    assert document["left_out"] == ["bfloat16"]
    assert [row["dtype"] for row in document["rows"]] == ["float32"]
    # asked for by name it runs
    assert main([*TINY, "--way", "plain", "--rounds", "1", "--dtype", "float32", "bfloat16"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["left_out"] == []
    assert [row["dtype"] for row in document["rows"]] == ["float32", "bfloat16"]


def test_the_ceiling_of_an_emulated_dtype_is_measured_on_a_small_product(monkeypatch):
    sizes = []

    clock = [0.0]

    def run(product):
        sizes.append(product.flops)
        clock[0] += product.flops / 3e8

    monkeypatch.setattr(timing.SquareProduct, "run", run)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert timing.matmul_flops(torch.bfloat16, "cpu") == pytest.approx(3e8)
    assert max(sizes) == 2 * 256**3


@pytest.mark.parametrize(("k", "m", "R"), [(1, 1, 1), (3, 2, 2), (2, 4, 3)])
def test_the_published_way_gives_our_loss_and_every_gradient_for_the_same_thoughts(k, m, R):
    model = (
        thinking_model(thought_length=k, talk_length=m, num_thoughts=R, policy_weight=10.0).double().train()
    )
    ids = tokens(2, 9)
    torch.manual_seed(1)
    loss, thoughts = published_step(model, ids)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and float(g.norm()) > 0 for g in expected.values())
    model.zero_grad(set_to_none=True)
    ours = model(ids, thoughts=thoughts).loss
    ours.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-6, name  # the weights of the means are fp32


def test_a_way_that_computes_something_else_is_never_timed(monkeypatch, capsys):
    def wrong(model, text):
        loss, thoughts = published_step(model, text)
        return loss * 1.01, thoughts

    monkeypatch.setattr(step_ways, "published_step", wrong)
    assert qstar(["bench", "step", *TINY, "--way", "ours", "published"]) == 1
    printed = capsys.readouterr()
    assert "way = ours: its loss differs from that of published by 9.9e-03" in printed.err
    assert "median s a step" not in printed.out


def test_the_counted_operations_of_plain_training_are_those_that_torch_counts():
    args = StepBenchArguments(model="tiny", tokens=9, thought_length=2, talk_length=2, way=["plain"])
    model, text = build(args, "plain")
    model.base.set_attn_implementation("eager")  # counted in full, where the method needs the causal half
    with FlopCounterMode(display=False) as counter:
        model.base(input_ids=text, labels=text, use_cache=False).loss.backward()
    config, T = model.base.config, args.tokens
    pair = 3 * 4 * config.hidden_size * config.num_hidden_layers
    head = 3 * 2 * config.hidden_size * config.vocab_size
    masked = pair * (T * T - T * (T + 1) / 2)
    by_module = counter.get_flop_counts()  # the angles of rotary are a matrix product in some versions
    rotary = sum(sum(by_module[name].values()) for name in by_module if name.endswith("rotary_emb"))
    counted = counter.get_total_flops() - rotary
    assert counted - masked - head == step_flops(model, 1, T).plain  # one row has no target


def test_the_counted_operations_of_thinking_are_those_that_torch_counts_in_the_layers():
    args = StepBenchArguments(model="tiny", tokens=9, thought_length=2, talk_length=2)
    model, text = build(args, "dense")
    with FlopCounterMode(display=False) as counter:
        model(text).loss.backward()
    layers = sum(counter.get_flop_counts()["QuietStarForCausalLM.base.model.layers.0.mlp"].values())
    config = model.base.config
    mlp = 2 * 3 * config.hidden_size * config.intermediate_size
    thoughts, slots = 2 * (args.tokens - 1), 5
    assert layers == mlp * (3 * args.tokens + 2 * thoughts + 3 * thoughts * slots)
    flops = step_flops(model, 1, args.tokens)
    assert flops.thinking > flops.plain + layers - mlp * 3 * args.tokens


def test_nested_phases_count_once_and_the_rest_is_other():
    with PhaseClock("cpu") as clock:
        with torch.profiler.record_function("qstar.backward"):
            with torch.profiler.record_function("qstar.blocks"):
                torch.ones(1000).exp()
            with torch.profiler.record_function("a library's"):
                torch.ones(1000).exp()
        torch.ones(1000).exp()
    assert list(clock.seconds) == ["backward", "other"]
    assert all(seconds > 0 for seconds in clock.seconds.values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--preset", "x"], "preset = x: must be one of authors-cpu"),
        (["--way", "theirs"], "way = theirs: must be one of ours, dense, published, plain"),
        (["--dtype", "int8"], "dtype = int8: must be one of float32"),
        (
            ["--model", "nothing"],
            "model = nothing: must be a folder with a config.json, or one of embedded, tiny",
        ),
        (["--tokens", "4"], "tokens = 4: must exceed talk_length = 4"),
        (["--rounds", "0"], "rounds = 0: must be at least 1"),
        (["--block_chunk", "1"], "block_chunk = 1: must be at least 28, the slots of one position"),
        (
            ["--thought_length", "0", "--way", "published"],
            "thought_length = 0: the published way needs at least 1",
        ),
        (["--impl", "triton"], "impl = 'triton'"),
        (["--model", "tiny", "--tokens", "40000"], "tokens has 40000 tokens"),
    ],
)
def test_bad_input_is_told_in_one_line_before_anything_runs(options, reason, capsys):
    assert qstar(["bench", "step", *options]) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
