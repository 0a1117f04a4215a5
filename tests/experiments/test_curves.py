"""The learning curves of the embedded task, in miniature: runs, going on, figures, table."""

import json
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments.curves import __main__ as curves
from experiments.curves import curves_run
from experiments.curves.curves_figures import summary
from experiments.curves.curves_run import Setting, Size
from qstar.demo import TINY_LM, walk_training

SMALL = ["--seeds", "0", "--training_steps", "1", "--test_walks", "4", "--base_steps", "1"]
SIZE = Size(training_steps=40, test_walks=200, base_steps=300)


def command(folder, *more):
    return curves.main(["--output_dir", str(folder), *SMALL, *more])


def lines(folder):
    return (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def task():
    return walk_training.WalkTask.make(seed=0, training_steps=3, test_walks=4)


# -- the command


def test_it_runs_each_setting_once_and_draws_every_figure(tmp_path, capsys):
    assert command(tmp_path, "--figures", "policy", "boundary") == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["level"] for row in document["rows"]] == [
        *("with policy term", "without", "dash", "random", "random, rate x 100"),
        "random, rate x 100, steps x 3",
    ]
    assert len(lines(tmp_path)) == 5  # two figures share the default
    for line in map(json.loads, lines(tmp_path)):
        assert [point["step"] for point in line["points"]] == [0, *range(1, line["setting"]["longer"] + 1)]
        assert "reward" not in line["points"][0] and "reward" in line["points"][1]
        assert line["points"][0]["mix_weight"] == 0 and line["told_accuracy"] == 1
    assert {path.name for path in tmp_path.glob("*.png")} == {"policy.png", "boundary.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_a_finished_run_is_not_done_again_and_one_cut_short_is(tmp_path, capsys):
    assert command(tmp_path, "--figures", "policy") == 0
    first, second = lines(tmp_path)
    known = json.dumps(json.loads(first) | {"seconds": -1})
    (tmp_path / "runs.jsonl").write_text(f"{known}\n{second[:80]}", encoding="utf-8")
    assert command(tmp_path, "--figures", "policy") == 0
    again = lines(tmp_path)
    assert len(again) == 2 and again[0] == known
    assert json.loads(again[1])["points"] == json.loads(second)["points"]  # a seed decides all of a run
    assert command(tmp_path, "--figures", "policy", "--seeds", "1") == 0
    assert lines(tmp_path)[:2] == again and len(lines(tmp_path)) == 4


def row(setting, seed, accuracies, useful=0.5):
    points = [
        {"step": step, "direct_accuracy": x, "useful_share": useful, "base_nll": 1.1}
        | {"mixed_nll": 1.1 - x, "mix_weight": 0.1 * step}
        | ({"reward": x} if step else {})
        for step, x in zip((0, 20, 40), accuracies)
    ]
    run = {"setting": asdict(setting), "size": asdict(SIZE), "seed": seed, "points": points}
    return run | {"told_accuracy": 1.0, "seconds": 1.0, "machine": {}}


def test_figures_and_table_are_of_the_rows_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(curves, "run", None)
    off = Setting(policy_weight=0.0)
    rows = [row(Setting(), 0, (0, 0.2, 0.9)), row(Setting(), 1, (0, 0.7, 1.0)), row(off, 0, (0, 0.6, 0.1))]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows), encoding="utf-8")
    assert curves.main(["--output_dir", str(tmp_path), "--draw_only", "True"]) == 0
    found = {row["level"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert {
        "with policy term",
        "without",
        "dash",
        "R = 2",
        "k = 8",
        "weight 0, T 1",
        "weight 1, T 1",
    } <= found.keys()
    with_, without = found["with policy term"], found["without"]
    assert (with_["seeds"], with_["learned"], without["seeds"], without["learned"]) == (2, 2, 1, 0)
    assert (with_["earliest step"], with_["latest step"], without["earliest step"]) == (20, 40, 20)
    assert (with_["accuracy"], with_["least accuracy"]) == (pytest.approx(0.95), 0.9)
    assert with_["mixed NLL"] == pytest.approx(0.15)
    assert (tmp_path / "policy.png").stat().st_size > (tmp_path / "boundary.png").stat().st_size > 0
    assert not (tmp_path / "useful_share.png").exists()  # it has no row


def test_the_table_says_what_no_seed_has_reached():
    (found,) = summary("any", {"level": [row(Setting(), 0, (0.1, 0.2, 0.5))]})
    assert found["learned"] == 0 and found["earliest step"] is found["latest step"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--figures", "moon"], "figures = ['moon']: must be different ones of thought_length"),
        (["--figures", "policy", "policy"], "figures = ['policy', 'policy']: must be different"),
        (["--seeds", "1", "1"], "seeds = [1, 1]: must be different numbers, each at least 0"),
        (["--seeds", "-1"], "seeds = [-1]: must be different numbers, each at least 0"),
        (["--training_steps", "0"], "training_steps = 0: must be at least 1"),
        (["--test_walks", "0"], "test_walks = 0: must be at least 1"),
        (["--base_steps", "0"], "base_steps = 0: must be at least 1"),
        (["--draw_only", "True"], "has no runs.jsonl to draw from"),
    ],
)
def test_a_user_error_is_one_line(tmp_path, capsys, options, said):
    assert command(tmp_path / "new", *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "new").exists()


def test_a_file_of_something_else_is_refused_and_not_touched(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text('{"prompt": "Once"}\n', encoding="utf-8")
    assert command(tmp_path) == 1
    assert "holds other lines than those of finished runs" in capsys.readouterr().err
    assert lines(tmp_path) == ['{"prompt": "Once"}']


def test_there_must_be_a_run_to_draw(tmp_path, capsys):
    other = json.dumps(row(Setting(), 7, (0, 0, 0)))
    (tmp_path / "runs.jsonl").write_text(f"{other}\n", encoding="utf-8")
    assert command(tmp_path, "--draw_only", "True") == 1
    assert "has no run of these figures, seeds and sizes" in capsys.readouterr().err


# -- a run


def test_every_setting_is_one_the_method_takes_and_differs_from_the_demo_where_it_says():
    every = {x for levels in curves.FIGURES.values() for x in levels.values()}
    assert Setting().config() == walk_training.thinking()
    assert (
        sum(x.config() == walk_training.thinking() for x in every) == 7
    )  # five of shares, a random boundary
    assert Setting(num_thoughts=4, boundary_scale=100.0).config().boundary_scale == 100.0
    assert all(
        None in {x.useful_share for x in levels.values()}
        for n, levels in curves.FIGURES.items()
        if n != "useful_share"
    )


def test_looking_at_the_model_does_not_change_its_training(task):
    def trained(at):
        torch.manual_seed(0)
        model = walk_training.before(task, walk_training.thinking(2))
        watch = curves_run.Watch(model, task, at)
        walk_training.fit_rows(model, task.rows, seed=0, callbacks=[watch])
        return model, watch.points

    (often, seen), (once, last) = trained([1, 2, 3]), trained([3])
    assert [point["step"] for point in seen] == [0, 1, 2, 3]
    assert {n: x for n, x in seen[-1].items() if n != "reward"} == {
        n: x for n, x in last[-1].items() if n != "reward"
    }
    # the mean since the point before: of one step, of three
    assert last[-1]["reward"] == pytest.approx(sum(point["reward"] for point in seen[1:]) / 3, abs=2e-5)
    for one, other in zip(often.parameters(), once.parameters()):
        assert torch.equal(one, other)


def test_moments_are_steps_of_the_run_and_end_with_its_last():
    assert curves_run.moments(40) == [2, 5, 8, 12, 16, 24, 40]
    assert curves_run.moments(1) == [1]


def test_a_base_model_is_made_once_and_one_half_made_is_made_again(tmp_path):
    begun = tmp_path / "useful-0.5-steps-1.begun"
    begun.mkdir()
    (begun / "model.safetensors").write_text("cut short")
    path = curves_run.base_model(0.5, 1, tmp_path)
    assert not begun.exists()
    made = (path / "model.safetensors").read_bytes()
    embedded = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype="float32")
    other = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    assert not torch.equal(embedded.lm_head.weight, other.lm_head.weight)
    (path / "mark").touch()
    assert curves_run.base_model(0.5, 1, tmp_path) == path and (path / "mark").exists()
    assert (path / "model.safetensors").read_bytes() == made
    assert curves_run.base_model(None, 1, tmp_path) == TINY_LM


def test_random_boundaries_are_of_the_seed_as_large_as_embeddings_and_nothing_else_moves(task):
    def begun(seed, scale=1.0):
        model = walk_training.before(task, Setting(boundary_scale=scale).config())
        curves_run.begin_from_noise(model, seed)
        return model.boundary.start.detach(), model.boundary.end.detach(), model

    start, end, model = begun(0)
    size = model.base.get_input_embeddings().weight.detach().square().sum(1).mean().sqrt()
    assert abs(float(start.norm() / size) - 1) < 0.3 and abs(float(end.norm() / size) - 1) < 0.3
    assert not torch.allclose(start, end)
    assert torch.allclose(start, begun(0, scale=100.0)[0]) and not torch.allclose(start, begun(1)[0])


def test_who_is_told_the_way_knows_the_answer_and_who_is_not_does_not(task):
    task = walk_training.WalkTask.make(seed=0, training_steps=1, test_walks=60)
    base = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype="float32").eval()
    assert curves_run.told_accuracy(base, task) > 0.95
    with torch.no_grad():
        base.lm_head.weight.zero_()
    assert curves_run.told_accuracy(base, task) < 0.2
