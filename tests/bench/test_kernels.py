"""`qstar bench kernels` runs, and its last line is the JSON document."""

from __future__ import annotations

import json

import pytest
from qstar_bench.kernels import KernelArguments, costs, gates, main
from qstar_kernels.compile_gate import Gate


def test_the_command_prints_a_table_and_ends_with_json(capsys):
    assert main(["--kernel", "delta", "--chip", "sm_80", "--width", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert [row["kernel"] for row in document["kernels"]] == ["thought_delta"]
    assert document["complaints"] == []
    assert "every kernel passes the gate" in lines


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ValueError, match="chip = sm_70"):
        gates(KernelArguments(chip=["sm_70"]))


def test_only_visible_scores_are_counted():
    flops, _ = costs(Gate("forward", "sm_90", D=64, G=1))
    assert flops == 2 * 2 * 64 * 8 * 1024 * 14 * (1024 / 2 + 15 / 2)
