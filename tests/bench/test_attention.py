"""`qstar bench attention` runs every candidate, holds each to the definition, and ends with its JSON."""

from __future__ import annotations

import json

import pytest
import torch
from qstar_bench.attention import PRESETS, AttentionArguments, check, main, shapes
from qstar_bench.attention_candidates import Problem, Shape, candidates
from qstar_bench.memory import peak_bytes

SMALL = ["--tokens", "17", "--slots", "3", "--heads", "4", "--width", "16", "--rounds", "1"]
RATIOS = {
    "fwd_bwd_vs_causal",
    "fwd_bwd_speedup_vs_dense",
    "fwd_speedup_vs_flex",
    "sampling_vs_causal",
    "extra_memory_vs_q",
}


def test_the_command_prints_tables_and_ends_with_json(capsys, tmp_path):
    assert main([*SMALL, "--plot", str(tmp_path / "plot.png")]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    (case,) = document["cases"]
    assert case["T"] == 17
    assert all(case[name] > 0 for name in RATIOS)
    measured = {(row["candidate"], row["pass"]) for row in document["measurements"]}
    assert measured == {
        *((name, what) for name in ("ours", "causal") for what in ("forward", "both", "sampling")),
        ("dense", "forward"),
        ("dense", "both"),
        ("flex", "forward"),  # on a CPU it has no backward
    }
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_several_thoughts_at_a_token_and_a_baseline_that_is_not_asked_for(capsys):
    assert main([*SMALL, "--num_thoughts", "2", "--baseline", "dense", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (case,) = json.loads(line)["cases"]
    assert case["N"] == 34
    assert case["fwd_bwd_vs_causal"] is None


def test_a_wrong_output_is_never_timed():
    problem = Problem(Shape(T=9, L=2, R=1, Hq=2, Hkv=1, D=8), torch.float32, "cpu")
    ours = next(iter(candidates(problem, "cpu", ())))
    assert ours.gives_out
    check("ours", problem, ours.run(), problem.naive_error())
    with pytest.raises(RuntimeError, match="ours: error"):
        check("ours", problem, ours.run() + 1e-3, problem.naive_error())
    with pytest.raises(RuntimeError, match="error nan"):
        check("ours", problem, ours.run() * torch.nan, problem.naive_error())


def test_the_causal_baseline_is_the_prefix_part_of_the_operator():
    """With own slots that no query can see, the operator is plain causal attention of the folded queries."""
    shape = Shape(T=7, L=3, R=2, Hq=4, Hkv=2, D=8)
    problem = Problem(shape, torch.float64, "cpu")
    with torch.no_grad():
        problem.q[..., 0].abs_().add_(1)
        problem.k[..., 0] = -1e6
    causal = next(c for c in candidates(problem, "cpu", ("causal",)) if c.name == "causal")
    out = causal.run().view(2, 2, 2, 3, 7, 8)  # [Hkv, G, R, L, T, D]
    out = out.permute(4, 2, 3, 0, 1, 5).reshape(1, 14, 3, 4, 8)
    ours = next(iter(candidates(problem, "reference", ()))).run()
    torch.testing.assert_close(out, ours)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ({"preset": "huge"}, "preset = huge: must be one of cpu-small"),
        ({"dtype": "int8"}, "dtype = int8: must be one of float32"),
        ({"baseline": ["xformers"]}, "baseline = xformers: must be one of causal"),
        ({"tokens": 0}, "tokens = 0: must be at least 1"),
        ({"heads": 3}, "heads = 3: must be a multiple of kv_heads = 2"),
    ],
)
def test_bad_arguments_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        shapes(AttentionArguments(**argv))


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
    problem = Problem(Shape(T=9, L=2, R=1, Hq=2, Hkv=1, D=8), torch.float32, "cpu")
    ours = next(iter(candidates(problem, "cpu", ())))
    assert peak_bytes(ours.run, "cpu") > 1.5 * problem.q.nbytes  # out and lse alone are 1.125
