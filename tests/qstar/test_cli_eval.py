"""`qstar eval` on tiny checkpoints: every task, the tables, going on, and every mistake in one line."""

import json
import shutil

import pytest
import torch
from questions import checkpoint, choices_told, sums_told, write_lines
from tiny_tokenizer import PROSE, saved_base_model

from qstar import QuietStarForCausalLM
from qstar.cli.main import main
from qstar.evaluation.direct import DirectAnswers

CONDITIONS = ["base", "plain", "twin", "w = 0", "pause", "shuffled thoughts", "thoughts"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of one vocabulary by name, and questions as files."""
    folder = tmp_path_factory.mktemp("eval")
    found = {"model": checkpoint(folder), "base": folder / "base"}
    found["plain"] = saved_base_model(folder / "plain", seed=5, max_position_embeddings=128)
    found["other"] = saved_base_model(folder / "other", vocab_size=400, max_position_embeddings=128)
    found["gsm8k"] = write_lines(folder / "gsm8k.jsonl", sums_told(11))
    found["csqa"] = write_lines(folder / "csqa.jsonl", choices_told(9))
    found["text"] = folder / "text.txt"
    found["text"].write_text(PROSE * 3)
    return found


@pytest.fixture
def run(capsys, folders):
    """(exit code, stdout, stderr) of `qstar eval` with a model."""

    def call(*argv):
        capsys.readouterr()
        code = main(["eval", "--model", str(folders["model"]), *map(str, argv)])
        return code, *capsys.readouterr()

    return call


def others(folders):
    controls = (f"plain={folders['plain']}", f"twin={folders['model']}")
    return ["--before", folders["base"], "--control", *controls]


def document(out):
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(
    ("task", "data"), [("gsm8k", "gsm8k"), ("commonsense_qa", "csqa"), ("choice", "csqa")]
)
def test_questions_are_scored_in_every_condition_side_by_side(run, folders, task, data, tmp_path):
    runs = tmp_path / "runs.jsonl"
    code, out, _ = run("--task", task, "--data", folders[data], *others(folders), "--append", runs)
    assert code == 0
    found = document(out)
    assert json.loads(runs.read_text()) == found and found["bench"] == "eval"
    rows = {row["condition"]: row for row in found["rows"]}
    assert list(rows) == CONDITIONS
    n = len(folders[data].read_text().splitlines())
    for row in rows.values():
        for metric in ("soft", "argmax"):
            assert row[f"{metric}_low"] <= row[metric] <= row[f"{metric}_high"]
        assert row["n"] == n
    assert rows["base"] | {"condition": ""} == rows["w = 0"] | {"condition": ""}  # it was never trained
    assert rows["twin"] | {"condition": ""} == rows["thoughts"] | {"condition": ""}
    assert len({rows[name]["soft"] for name in CONDITIONS}) == 5
    differences = {tuple(row["of"]): row for row in found["differences"]}
    assert len(differences) == 21
    of = differences["thoughts", "shuffled thoughts"]
    assert of["soft"] == pytest.approx(rows["thoughts"]["soft"] - rows["shuffled thoughts"]["soft"])
    table = out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:9]] == CONDITIONS
    assert f"{rows['thoughts']['soft']:.3f} [" in table[8] and f"| {n} |" in " ".join(table[8].split())
    assert "95 % interval, bootstrap over questions" in out


def test_text_always_has_all_tokens_the_control_shuffled_thoughts_and_temperatures(run, folders, tmp_path):
    argv = ["--task", "text", "--data", folders["text"], "--span_length", 30]
    code, out, _ = run(*argv, *others(folders))
    assert code == 0
    found = document(out)
    rows = {row["condition"]: row for row in found["rows"]}
    smooth = [name for name in rows if name.startswith("base, T = ")]
    assert [name for name in rows if name not in smooth] == CONDITIONS
    assert (
        len(smooth) >= 3
        and any("best for all" in x for x in smooth)
        and any("best for hard" in x for x in smooth)
    )
    assert found["reference"] == "base" and found["best_temperature"].keys() == {"all", "hard"}
    for row in rows.values():
        assert row["all_low"] <= row["all"] <= row["all_high"]
        assert row["hard_low"] <= row["hard"] <= row["hard_high"]
        assert row["hard_n"] == round(0.1 * row["n"])
    assert rows["base"]["all_high"] < rows["base"]["hard_low"]
    assert rows["thoughts"]["weight"] != 0 == rows["w = 0"]["weight"]
    pairs = {tuple(row["of"]) for row in found["differences"]}
    assert {("thoughts", name) for name in rows if name != "thoughts"} <= pairs
    assert "anything" not in out and "flattens" in out and "N, hard" in out
    # without the model before, its own base prediction says what is hard; records are documents
    lines = write_lines(
        tmp_path / "text.jsonl", [{"a": PROSE[:60], "b": PROSE[60:]}, {"a": PROSE, "b": "the"}]
    )
    more = ["--template", "{a} {b}", "--tokens_per_span", 1, "--limit", 7, "--json"]
    code, out, _ = run("--task", "text", "--data", lines, "--span_length", 20, *more)
    assert code == 0 and len(out.splitlines()) == 1
    found = document(out)
    assert found["reference"] == "w = 0" and found["rows"][0]["n"] == 7 == found["questions"]


def test_majority_of_chains_with_and_without_thoughts(run, folders):
    argv = [
        "--task",
        "gsm8k_cot",
        "--data",
        folders["gsm8k"],
        "--limit",
        3,
        "--votes",
        2,
        "--chain_tokens",
        5,
    ]
    code, out, _ = run(*argv, "--before", folders["base"], "--batch_size", 2)
    assert code == 0
    found = document(out)
    assert [row["condition"] for row in found["rows"]] == ["base", "w = 0", "thoughts"]
    assert all(
        row["n"] == 3 and 0 <= row["chain"] <= 1 and 0 <= row["majority"] <= 1 for row in found["rows"]
    )
    assert found["options"]["votes"] == 2
    code, _, err = run(*argv, "--conditions", "shuffled")
    assert code == 1 and "conditions = 'shuffled': the task gsm8k_cot has without, thoughts" in err


def test_a_data_set_is_read_by_name_split_and_configuration(run, folders, tmp_path):
    (tmp_path / "own").mkdir()
    shutil.copy(folders["gsm8k"], tmp_path / "own" / "validation.jsonl")
    argv = ["--task", "gsm8k", "--conditions", "without", "--json"]
    _, by_name, _ = run(*argv, "--data", tmp_path / "own", "--data_split", "validation")
    _, by_file, _ = run(*argv, "--data", folders["gsm8k"])
    assert document(by_name)["rows"] == document(by_file)["rows"]


def test_an_interrupted_run_goes_on_to_the_same_figures(run, folders, tmp_path, monkeypatch):
    argv = ["--task", "gsm8k", "--data", folders["gsm8k"], "--batch_size", 3, "--thought_temperature", 1.0]
    argv += ["--before", folders["base"]]
    code, whole, _ = run(*argv, "--output", tmp_path / "whole.jsonl")
    assert code == 0
    score, calls = DirectAnswers.score, []

    def interrupted(self, *rest):
        calls.append(rest)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, *rest)

    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(DirectAnswers, "score", interrupted)
        code, _, err = run(*argv, "--output", output)
        assert code == 130 and "interrupted" in err
        assert (
            0
            < len(output.read_text().splitlines())
            < len((tmp_path / "whole.jsonl").read_text().splitlines())
        )
        lines = output.read_text().splitlines(keepends=True)
        output.write_text("".join(lines[:-1]) + lines[-1][:20])  # the last line was not finished
        calls.clear()
        patch.setattr(DirectAnswers, "score", lambda self, *rest: (calls.append(rest), score(self, *rest))[1])
        code, again, _ = run(*argv, "--output", output)
    assert code == 0
    assert len(calls) == 8 - 1  # of 4 batches of 2 models; the second had a line to write again
    for name in ("rows", "differences"):
        assert document(again)[name] == document(whole)[name]
    assert sorted(output.read_text().splitlines()) == sorted(
        (tmp_path / "whole.jsonl").read_text().splitlines()
    )
    # a control that comes later is all that is still to be done
    code, out, _ = run(*argv, "--output", output, "--control", f"plain={folders['plain']}")
    assert code == 0
    assert [row for row in document(out)["rows"] if row["condition"] != "plain"] == document(whole)["rows"]


def test_a_file_of_another_run_or_model_is_refused_and_stays(run, folders, tmp_path):
    output, copy = tmp_path / "out.jsonl", tmp_path / "model"
    argv = ["--task", "gsm8k", "--data", folders["gsm8k"], "--output", output]
    assert run(*argv, "--conditions", "without")[0] == 0
    before = output.read_text()
    for more, message in (
        (["--seed", 1], "is of a run with other seed"),
        (["--limit", 5, "--batch_size", 4], "is of a run with other batch_size, questions"),
    ):
        code, _, err = run(*argv, *more)
        assert code == 1 and message in err
    shutil.copytree(folders["model"], copy)
    model = QuietStarForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.mixing.layers[0].bias += 1e-3
    model.save_pretrained(copy)
    code, _, err = run(*argv, "--model", copy)
    assert code == 1 and "its figures of 'model' came from another model" in err
    assert output.read_text() == before
    for text in ('{"prompt": "mine"}\n', "notes"):
        output.write_text(text)
        code, _, err = run(*argv)
        assert code == 1 and "holds other lines than those of an evaluation" in err
        assert output.read_text() == text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "gsm"], "task = 'gsm': must be one of gsm8k, gsm8k_cot"),
        (["--task", "text"], "data = None: must be given, the task text has none of its own"),
        (["--task", "gsm8k", "--data", "no.jsonl"], "data = 'no.jsonl': no such file"),
        (["--task", "gsm8k", "--data", "{csqa}"], "data: record 1 has no texts `question` and `answer`"),
        (["--task", "choice", "--data", "{gsm8k}"], "data: record 1 has no text `question` and two or more"),
        (["--task", "gsm8k", "--data", "{gsm8k}", "--limit", "0"], "limit = 0: must be at least 1"),
        (["--task", "gsm8k", "--data", "{gsm8k}", "--limit", "1"], "an interval needs at least 2"),
        (["--task", "text", "--data", "{text}", "--span_length", "120", "--limit", "1"], "needs at least 2"),
        (["--task", "text", "--data", "{text}", "--span_length", "128"], "exceed the model's context of 128"),
        (
            ["--task", "gsm8k", "--data", "{gsm8k}", "--control", "mine"],
            "control = 'mine': must be NAME=FOLDER",
        ),
        (["--task", "gsm8k", "--data", "{gsm8k}", "--control", "base={base}"], "with a name of its own"),
        (["--task", "gsm8k", "--data", "{gsm8k}", "--control", "a={other}"], "has another vocabulary"),
        (["--task", "gsm8k", "--data", "{gsm8k}", "--conditions", "none"], "conditions = 'none': the task"),
        (
            ["--task", "text", "--data", "{text}", "--span_length", "40", "--conditions", "thoughts"],
            "conditions: must include without",
        ),
        (["--task", "gsm8k", "--data", "{gsm8k}", "--dtype", "int8"], "dtype = 'int8': must be one of"),
        (["--task", "gsm8k", "--data", "{gsm8k}", "--device", "tpu"], "device = tpu: must be cpu or cuda"),
        (["--task", "gsm8k", "--data", "{gsm8k}", "--thought_temperature", "-1"], "must be at least 0"),
        (["--task", "gsm8k_cot", "--data", "{gsm8k}"], "chain_tokens = 384: the longest question"),
        (["--task", "gsm8k", "--data", "{gsm8k}", "--model", "{base}"], "no quiet_star.json there"),
    ],
    ids=lambda x: " ".join(x[1:]) if isinstance(x, list) else "",
)
def test_a_mistake_is_told_in_one_line(run, folders, argv, message):
    code, out, err = run(*(x.format(**folders) for x in argv))
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1]


def test_a_question_too_long_is_an_error_or_cut_where_asked(run, folders, tmp_path):
    long = {"question": PROSE * 2, "answer": "#### 4"}
    data = write_lines(tmp_path / "long.jsonl", [*sums_told(2), long])
    argv = ["--task", "gsm8k", "--data", data, "--conditions", "without", "thoughts"]
    code, _, err = run(*argv)
    assert code == 1 and "question 2 has" in err and "truncate_prompt = True cuts" in err
    code, out, _ = run(*argv, "--truncate_prompt")
    assert code == 0 and document(out)["truncated"] == 1
