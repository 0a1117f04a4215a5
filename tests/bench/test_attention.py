"""`qstar bench attention` runs every candidate, holds each to the definition, and ends with its JSON."""

import json

import pytest
import torch
from qstar_bench.attention import attention_command, attention_request
from qstar_bench.attention import candidates as candidates_module
from qstar_bench.attention.attention_check import Judge
from qstar_bench.attention.attention_problem import PASSES, Problem, Shape
from qstar_bench.attention.attention_request import PRESETS, AttentionArguments, plan
from qstar_bench.attention.candidates import candidates, way
from qstar_bench.memory.memory_peaks import peak_bytes

from qstar.cli.main import main
from qstar.reporting.benchmark_record import WrongResultError

SMALL = ["--tokens", "17", "--slots", "3", "--heads", "4", "--width", "16", "--rounds", "1"]
TINY = Shape(T=9, L=2, R=1, Hq=2, Hkv=1, D=8)
CASE_KEYS = [
    "T", "L", "R", "Hq", "Hkv", "D", "N", "fwd_bwd_vs_causal", "fwd_bwd_speedup_vs_dense", "fwd_vs_causal",
    "fwd_speedup_vs_flex", "fwd_bwd_speedup_vs_flash", "sampling_vs_causal", "extra_memory_vs_q",
]  # fmt: skip


def bench(capsys, *argv: str) -> tuple[int, str, str]:
    """(exit status, stdout, the last line of stderr) of the command."""
    capsys.readouterr()
    code = main(["bench", "attention", *argv])
    out, err = capsys.readouterr()
    return code, out, (err.splitlines() or [""])[-1]


@pytest.mark.parametrize("flex", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "flex"])
def test_the_command_prints_a_card_and_tables_and_ends_with_its_document(capsys, tmp_path, flex):
    """flex takes long to compile."""
    plot, trace, runs = (str(tmp_path / name) for name in ("plot.png", "trace.json", "runs.jsonl"))
    files = ["--plot", plot, "--trace", trace, "--append", runs]
    code, out, _ = bench(
        capsys,
        *SMALL,
        *files,
        "--impl",
        "auto",
        "reference",
        *([] if flex else ["--baseline", "causal", "dense"]),
    )
    assert code == 0
    document = json.loads(out.splitlines()[-1])
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == out.splitlines()[-1:]
    (case,) = document["cases"]
    assert list(case) == CASE_KEYS
    assert case["T"] == 17 and case["fwd_bwd_speedup_vs_flash"] is None
    assert (case["fwd_speedup_vs_flex"] is not None) == flex
    assert all(
        case[name] > 0 for name in CASE_KEYS[7:] if "flash" not in name and (flex or "flex" not in name)
    )
    rows = {(row["candidate"], row["pass"]): row for row in document["rows"]}
    assert rows.keys() == {
        ("matmul", "product"),
        *((name, what) for name in ("ours", "impl=reference", "causal") for what in PASSES),
        *(("dense", what) for what in PASSES[:3]),
        *([("flex", "forward")] if flex else []),  # on a CPU it has no backward
    }
    assert all(row["memory MiB"] > 0 for key, row in rows.items() if key[0] != "matmul")
    assert all(row["of matmul %"] > 0 and row["20 %"] <= row["80 %"] for row in rows.values())
    assert all(row["times causal"] == 1 for key, row in rows.items() if key[0] == "causal")
    assert len({tuple(row) for row in document["rows"]}) == 1  # one header for all
    card, measured = out.index("needed %"), out.index("median ms")
    for said in (
        "SLOW: impl=reference is reference",
        *(["left out: flash"] if flex else []),
        "matmul GFLOP/s float32: ",
        "ours: cpu (forward",
    ):
        assert card < out.index(said) < measured
    assert (tmp_path / "plot.png").stat().st_size > 0
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {f"{' '.join(key)} T 17 L 3" for key in rows} <= names


@pytest.mark.slow
def test_in_bfloat16_on_a_cpu_every_baseline_is_measured(capsys):
    code, out, _ = bench(capsys, *SMALL, "--dtype", "bfloat16", "--json")
    assert code == 0
    (line,) = out.splitlines()
    assert {row["candidate"] for row in json.loads(line)["rows"]} == {
        "matmul",
        "ours",
        "causal",
        "dense",
        "flex",
    }


def test_several_thoughts_at_a_token_one_pass_and_a_baseline_that_is_not_asked_for(capsys):
    options = ["--num_thoughts", "2", "--baseline", "dense", "--passes", "backward", "--json"]
    code, out, _ = bench(capsys, *SMALL, *options)
    document = json.loads(out)
    (case,) = document["cases"]
    assert (code, case["N"], case["fwd_bwd_vs_causal"]) == (0, 34, None)
    assert [row["pass"] for row in document["rows"]] == ["product", "backward", "backward"]


def test_a_slow_baseline_is_called_once_a_pass_and_ours_in_every_round(capsys, monkeypatch):
    monkeypatch.setattr(attention_command, "SLOW_SECONDS", 1e-9)
    monkeypatch.setattr(attention_command.statistics, "quantiles", lambda times, **_: [len(times)] * 4)
    options = ["--rounds", "3", "--baseline", "dense", "--passes", "forward", "--json"]
    _, out, _ = bench(capsys, *SMALL, *options)
    found = {row["candidate"]: (row["20 %"], row["memory MiB"]) for row in json.loads(out)["rows"]}
    assert (found["ours"][0], found["dense"]) == (3e3, (2e3, None))  # of one time, twice


class _Scaled(torch.autograd.Function):
    """The same values, a gradient that is a little too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


def _wrong_output(q, k, v, k_prefix, v_prefix, end, impl):
    out, lse = operator_as_it_is(q, k, v, k_prefix, v_prefix, end, impl=impl)
    return out + 1e-3, lse


def _wrong_gradient(q, k, v, k_prefix, v_prefix, end, impl):
    return operator_as_it_is(q, k, v, _Scaled.apply(k_prefix), v_prefix, end, impl=impl)


operator_as_it_is = candidates_module.thought_attention


@pytest.mark.parametrize(
    ("operator", "what"),
    [(_wrong_output, "ours forward: out"), (_wrong_gradient, "ours backward: dk_prefix")],
    ids=["output", "gradient"],
)
def test_a_wrong_operator_gives_one_line_and_no_time(capsys, monkeypatch, operator, what):
    monkeypatch.setattr(candidates_module, "thought_attention", operator)
    code, out, error = bench(capsys, *SMALL, "--baseline", "causal")
    assert code == 1
    assert error.startswith(f"qstar bench: {what} is wrong, no time is shown: its error is ")
    assert "median ms" not in out and "{" not in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ours", "causal", "dense"])
def test_each_gradient_of_each_candidate_is_looked_at(monkeypatch, name, dtype):
    problem = Problem(Shape(T=9, L=2, R=2, Hq=4, Hkv=2, D=8), dtype, "cpu")
    one, judge = way(problem, name, "auto"), Judge(problem)
    assert judge.check(name, one, ("forward", "both")).keys() == {"forward", "both"}
    found = judge._with_gradients
    for i_leaf, leaf in enumerate(one.leaves):

        def wrong(one, i_leaf=i_leaf):
            out, gradients = found(one)
            return out, tuple(x * 1.2 if i == i_leaf else x for i, x in enumerate(gradients))

        monkeypatch.setattr(judge, "_with_gradients", wrong)
        with pytest.raises(WrongResultError, match=f"{name} backward: d{leaf} is wrong"):
            judge.check(name, one, ("both",))


def test_an_output_that_is_no_number_is_wrong():
    problem = Problem(TINY, torch.float32, "cpu")
    one = way(problem, "ours", "auto")
    one.forward = lambda: problem.q * torch.nan
    with pytest.raises(WrongResultError, match="its error is nan"):
        Judge(problem).check("ours", one, ("forward",))


def test_the_backward_is_timed_without_its_forward():
    problem = Problem(TINY, torch.float32, "cpu")
    one = way(problem, "ours", "auto")
    (backward,) = candidates("ours", one, ("backward",))
    graph = backward.prepare()
    one.forward = None  # would raise
    gradients = backward.run(graph)
    expected = torch.autograd.grad(
        way(problem, "ours", "auto").forward(), tuple(one.leaves.values()), problem.d_out
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected))


def test_costs_count_visible_cells_alone():
    """T 3, L 2: the three blocks see 1, 2 and 3 prefix keys, a slot itself and the earlier ones."""
    shape = Shape(T=3, L=2, R=1, Hq=4, Hkv=2, D=8)
    cells = 2 * (1 + 2 + 3) + 3 * (1 + 2)
    assert sum(shape.cells()) == cells
    assert shape.flops("forward") == 2 * 2 * 8 * 4 * cells
    assert shape.flops("both") == shape.flops("forward") + shape.flops("backward")
    assert shape.flops("sampling") == 2 * 2 * 8 * 4 * ((1 + 2 + 3) + 3 * 2)
    q, kv, prefix, lse = 3 * 2 * 4 * 8 * 2, 2 * 3 * 2 * 2 * 8 * 2, 2 * 3 * 2 * 8 * 2, 3 * 2 * 4 * 4
    assert shape.bytes("forward", 2) == 2 * q + kv + prefix + lse
    assert shape.bytes("backward", 2) == 4 * q + 2 * (kv + prefix) + lse
    card = shape.card(2)
    assert (card["cells needed"], card["cells dense"]) == (cells, 6 * (3 + 6))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--preset huge", "preset = huge: must be one of cpu-small, paper, sweep-context, sweep-length"),
        ("--preset paper --tokens 9", "tokens = 9: preset = paper has shapes of its own"),
        ("--dtype int8", "dtype = int8: must be one of float32, bfloat16, float16"),
        ("--baseline xformers", "baseline = xformers: must be one of causal, dense, flex, flash"),
        ("--passes training", "passes = training: must be one of forward, backward, both, sampling"),
        ("--tokens 0", "tokens = 0: must be at least 1"),
        ("--rounds 0", "rounds = 0: must be at least 1"),
        ("--heads 3", "heads = 3: must be a multiple of kv_heads = 2"),
        ("--impl auto auto", "impl = auto auto: each at most once"),
        ("--impl nothing", "impl = 'nothing': must be 'auto' or one of"),
        ("--impl auto triton", "impl = 'triton': "),
        ("--baseline flash", "baseline = flash: impl = 'flash': "),
        ("--baseline flex --passes backward", "passes = backward: flex has only forward here"),
        ("--impl flex --passes both", "passes = both: ours has only forward, sampling here"),
        ("--device tpu", "device = tpu: must be cpu or cuda"),
        ("--append /nowhere/runs.jsonl", "append = /nowhere/runs.jsonl: its folder does not exist"),
        ("--fast", "unknown options ['--fast']; see qstar bench attention --help"),
    ],
    ids=lambda x: x if x.startswith("--") else "",
)
def test_what_cannot_be_measured_is_told_in_one_line_before_anything_is(capsys, monkeypatch, argv, message):
    monkeypatch.setattr(attention_command, "measure", None)
    if "triton" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, error = bench(capsys, *argv.split())
    assert (code, out) == (1, "")
    assert error.startswith(f"qstar bench: {message}")


def test_a_gpu_that_is_not_there_is_told():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="device = cuda: torch sees no GPU on this machine"):
        plan(AttentionArguments(device="cuda"))


def test_a_cpu_path_without_its_forward_in_c_is_called_slow(monkeypatch):
    native = attention_request.cpu_native
    monkeypatch.setattr(native, "supports", lambda q, k: k.shape[2] <= 1024)
    monkeypatch.setattr(native, "built", lambda: "C, built by cc")
    assert not any("SLOW" in x for x in plan(AttentionArguments()).remarks)
    assert "SLOW: ours is cpu (forward: torch's operators" in plan(AttentionArguments(slots=2000)).remarks[-1]
    monkeypatch.setattr(native, "supports", lambda q, k: False)
    monkeypatch.setattr(native, "built", lambda: "torch's operators: no C compiler was found")
    assert "(forward: torch's operators: no C compiler" in plan(AttentionArguments()).remarks[-1]


def test_the_causal_baseline_is_the_prefix_part_of_the_operator():
    """With own slots that no query can see, the operator is plain causal attention of the folded queries."""
    problem = Problem(Shape(T=7, L=3, R=2, Hq=4, Hkv=2, D=8), torch.float64, "cpu")
    with torch.no_grad():
        problem.q[..., 0].abs_().add_(1)
        problem.k[..., 0] = -1e6
    causal, ours = way(problem, "causal", "auto"), way(problem, "ours", "reference")
    torch.testing.assert_close(causal.unfold("out", causal.forward()), ours.forward())
    torch.testing.assert_close(causal.unfold("out", causal.sampling()), ours.sampling())
    torch.testing.assert_close(
        problem.definition(torch.float64, own=False)["out"], ours.forward()[:, problem.some]
    )


def test_the_small_preset_is_the_shapes_that_the_targets_are_stated_for():
    found, baselines = PRESETS["cpu-small"]
    assert [shape.T for shape in found] == [256, 512, 1024]
    assert {(s.L, s.R, s.Hq, s.Hkv, s.D) for s in found} == {(14, 1, 8, 2, 64)}
    assert baselines == ("causal", "dense", "flex")


def test_peak_memory_counts_what_is_alive_together():
    x = torch.zeros(1000)
    scalars = 32  # the allocator is asked for these too
    assert 8000 <= peak_bytes(lambda: (x + 1).add_(1) + 1, "cpu") <= 8000 + scalars
    assert 12000 <= peak_bytes(lambda: (x + 1) + (x + 2), "cpu") <= 12000 + scalars


def test_peak_memory_looks_into_a_custom_operator():
    problem = Problem(TINY, torch.float32, "cpu")
    ours = way(problem, "ours", "cpu")
    assert peak_bytes(ours.forward, "cpu") > 1.5 * problem.q.nbytes  # out and lse alone are 1.125
