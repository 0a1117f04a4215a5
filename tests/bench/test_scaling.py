"""`qstar bench scaling` compares losses before it shows a figure, and ends with flat rows."""

import json

import pytest
import torch
from qstar_bench.training_step import scaling_command
from qstar_bench.training_step.scaling_command import PRESETS, ScalingArguments, check, chosen, main, points

from qstar.reporting.benchmark_record import WrongResultError


def test_the_command_ends_with_its_run_and_chunks_need_less_memory(capsys, tmp_path):
    files = {name: str(tmp_path / name) for name in ("plot.png", "runs.jsonl", "trace.json")}
    options = ["--plot", files["plot.png"], "--append", files["runs.jsonl"], "--trace", files["trace.json"]]
    assert main(["--preset", "smoke", *options]) == 0
    run = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert run == json.loads((tmp_path / "runs.jsonl").read_text())
    assert run["bench"] == "scaling" and run["arguments"]["block_chunk"] == 32
    assert len(run["rows"]) == 2 * len(points(PRESETS["smoke"]))
    assert all(not isinstance(value, (dict, list)) for row in run["rows"] for value in row.values())
    over_R = [row for row in run["rows"] if row["over"] == "R"]
    assert [row["slots"] for row in over_R] == [112, 112, 448, 448]
    assert run["memory_growth_over_R_in_chunks"] < run["memory_growth_over_R"]
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert "qstar.rollout" in (tmp_path / "trace.json").read_text()


def test_a_chunked_step_of_another_loss_is_never_timed(monkeypatch):
    true = torch.tensor(7.5)
    check(points(PRESETS["smoke"])[0], true + 1e-6, true)
    real = scaling_command.one_step

    def wrong(model, text):
        """What a chunk that is left out would do."""
        if model.quiet_star.block_chunk is None:
            return real(model, text)
        return real(model, text[:, :-1])

    monkeypatch.setattr(scaling_command, "one_step", wrong)
    monkeypatch.setattr(scaling_command, "timed", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(WrongResultError, match="the loss in chunks is"):
        main(["--preset", "smoke", "--json"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "preset = huge: must be one of cpu, smoke"),
        ({"rounds": 0}, "rounds = 0: must be at least 1"),
        ({"block_chunk": 2}, "block_chunk = 2: must be at least"),
        ({"plot": "/nowhere/x.png"}, "plot = /nowhere/x.png: its folder does not exist"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        chosen(ScalingArguments(**options))
