"""The proof on text, in miniature: texts, rows, tests and verdict; the command on a tiny model."""

import json

import pytest
from tiny_models import base_model
from tiny_tokenizer import tiny_tokenizer

from qstar.cli.main import main
from qstar.layout import IGNORE
from qstar.proof_text import corpus, results

QUESTION = "Natalia sold clips to 48 friends. How many?"
ANSWER = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips.\nShe earns $5 x 4 = $<<5*4=20>>20.\n"
    "So 24 clips + 2 = <<24+2=26>>26 in all, and x is <<7=7>>7.\n#### 26"
)
MORE = " ".join(str(i) for i in range(10)) * 20 + "Question: Answer: $ = + / * x #### . , — ———" * 20


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(more=MORE, vocabulary=330)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    base_model(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "worked.jsonl"
    lines = [
        {"question": f"{i} and {i + 1}?", "answer": f"It is {i}+{i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}."}
        for i in range(12)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


# -- texts


def test_annotations_are_never_text_and_calculations_only_where_they_are_kept():
    kept, marks = corpus.worked_text(QUESTION, ANSWER, "kept")
    assert kept == f"Question: {QUESTION}\nAnswer: " + (
        "Natalia sold 48/2 = 24 clips.\nShe earns $5 x 4 = $20.\nSo 24 clips + 2 = 26 in all, and x is 7.\n#### 26"
    )
    removed, short = corpus.worked_text(QUESTION, ANSWER, "removed")
    assert removed == f"Question: {QUESTION}\nAnswer: " + (
        "Natalia sold 24 clips.\nShe earns $20.\nSo 24 clips + 2 = 26 in all, and x is 7.\n#### 26"
    )
    # a calculation with words between its numbers stays, and is none that could be an aside
    for text, found in ((kept, marks), (removed, short)):
        assert [(text[at : at + 2], aside) for at, aside in found.items()] == [("24", "48/2=24"), ("20", "5*4=20")]


# -- the command


def run(folder, data, output, *more):
    sizes = ["--steps", "1", "--aside_steps", "1", "--batch", "2", "--test_texts", "4", "--tokens_per_text", "5"]
    return main(
        ["proof-text", "--model", str(folder), "--data", str(data), *sizes, "--trainable_layers", "1"]
        + ["--thought_length", "5", "--positions", "2", "--output_dir", str(output), *more]
    )


def test_the_command_measures_every_condition_shows_them_and_goes_on_where_it_stopped(
    folder, data, tmp_path, capsys
):
    assert run(folder, data, tmp_path) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    for part in ("tokens drawn at random", "results of calculations"):
        shown = [row["condition"] for row in found[part]["conditions"]]
        plain = [name for name in shown if not name.startswith("base, T")]
        told = ["base", "after the asides", "control", "w = 0", "pause", "w = 1", "shuffled thoughts", "thoughts"]
        assert plain == told and "base, T = 1.05" in " ".join(shown)
    assert 0
