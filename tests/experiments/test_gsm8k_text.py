"""The study of GSM8K's text, in miniature: texts, rows, tests and verdict; the command on a tiny model."""

import json
from types import SimpleNamespace

import pytest
from tiny_models import base_model
from tiny_tokenizer import tiny_tokenizer

from experiments.gsm8k_text import corpus, gsm8k_results
from experiments.gsm8k_text.__main__ import main
from experiments.shared.fine_tuning import fine_tune
from qstar.layout import IGNORE

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
        {
            "question": f"{i} and {i + 1}?",
            "answer": f"It is {i}+{i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}.",
        }
        for i in range(12)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


# -- texts


def test_annotations_are_never_text_and_calculations_only_where_they_are_kept():
    kept, marks = corpus.worked_text(QUESTION, ANSWER, "kept")
    end = "So 24 clips + 2 = 26 in all, and x is 7.\n#### 26"
    begin = f"Question: {QUESTION}\nAnswer: Natalia sold"
    assert kept == f"{begin} 48/2 = 24 clips.\nShe earns $5 x 4 = $20.\n{end}"
    removed, short = corpus.worked_text(QUESTION, ANSWER, "removed")
    assert removed == f"{begin} 24 clips.\nShe earns $20.\n{end}"
    # a calculation with words between its numbers stays, and is none that could be an aside
    for text, found in ((kept, marks), (removed, short)):
        assert [(text[at : at + 2], aside) for at, aside in found.items()] == [
            ("24", "48/2=24"),
            ("20", "5*4=20"),
        ]


@pytest.fixture(scope="module")
def texts(data, tokenizer):
    return corpus.read(str(data), tokenizer, "removed", 96)


def test_a_result_is_found_among_the_tokens_with_its_calculation(texts, tokenizer):
    for i, text in enumerate(texts):
        assert (
            tokenizer.decode(text.input_ids) == f"Question: {i} and {i + 1}?\nAnswer: It is {2 * i + 1}.<eos>"
        )
        ((at, calculation),) = text.results.items()
        assert tokenizer.decode(text.input_ids[at:]).lstrip() == f"{2 * i + 1}.<eos>"
        assert tokenizer.decode(calculation) == f"{i}+{i + 1}={2 * i + 1}"


def test_texts_that_are_too_long_are_left_out(data, texts, tokenizer):
    lengths = [len(text.input_ids) for text in texts]
    shortest = min(lengths)
    kept = corpus.read(str(data), tokenizer, "removed", shortest)
    assert [text for text in texts if len(text.input_ids) == shortest] == kept != texts


def test_thoughts_are_before_every_result_and_at_as_many_other_tokens_as_asked_for(texts):
    for text, row in zip(texts, corpus.text_rows(texts, positions=3)):
        before = {at - 1 for at in text.results}
        chosen = {i for i, x in enumerate(row["think_mask"]) if x}
        assert before <= chosen and 3 <= len(chosen) <= 4 and row["input_ids"] == text.input_ids
    assert all("think_mask" not in row for row in corpus.text_rows(texts))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_aside_has_the_shape_of_a_thought_and_its_beginning_is_no_target(texts, tokenizer, share):
    mark = corpus.dash(tokenizer)
    rows = list(corpus.aside_rows(texts, 6, mark, share))
    for text, row in zip(texts, rows):
        ((at, calculation),) = text.results.items()
        if share == 0 or len(calculation) > 6:
            assert row["input_ids"] == row["labels"] == text.input_ids
            continue
        aside = row["input_ids"][at : at + 8]  # <start>, six tokens, <end>
        assert aside == [mark, *calculation, *[mark] * (7 - len(calculation))]
        assert row["input_ids"][:at] + row["input_ids"][at + 8 :] == text.input_ids
        assert [i for i, x in enumerate(row["labels"]) if x == IGNORE] == [at]
    assert share == 0 or len({len(calculation) > 6 for x in texts for calculation in x.results.values()}) == 2


def test_spans_score_the_results_and_as_many_drawn_tokens_as_asked_for(texts):
    for text, span in zip(texts, corpus.result_spans(texts)):
        assert span.input_ids == text.input_ids and [t + 1 for t in span.at] == sorted(text.results)
    drawn = corpus.drawn_spans(texts, 5)
    assert [len(span.at) for span in drawn] == [5] * len(texts) and drawn != corpus.drawn_spans(
        texts, 5, seed=1
    )
    assert all(0 <= t < len(span.input_ids) - 1 for span in drawn for t in span.at)


# -- the verdict


def differences(**of):
    named = {"control": "control", "shuffled": "shuffled thoughts", "without": "w = 0"}
    rows = [
        {"of": ["thoughts", named[name]], "all": high - 0.01, "all_high": high} for name, high in of.items()
    ]
    return [*rows, {"of": ["w = 0", "control"], "all": 0.02, "all_high": 0.05}]


@pytest.mark.parametrize("worse", [None, "control", "shuffled", "without"])
def test_thoughts_help_where_they_are_below_control_shuffled_and_their_own_base_beyond_doubt(worse):
    high = {name: 0.001 if name == worse else -0.001 for name in ("control", "shuffled", "without")}
    assert gsm8k_results.helps(differences(**high)) == (worse is None)


@pytest.mark.parametrize(("of", "cost", "keeps"), [
    (["w = 0", "control"], 0.02, True), (["w = 0", "control"], 0.04, False),
    (["control", "w = 0"], -0.04, False), (["control", "w = 0"], 0.04, True),
])  # fmt: skip
def test_its_language_is_kept_where_its_own_prediction_is_near_the_control(of, cost, keeps):
    assert gsm8k_results.keeps_its_language([{"of": of, "all": cost}]) == keeps


# -- the command


SIZES = "--steps 1 --aside_steps 1 --batch 2 --test_texts 4 --tokens_per_text 5 --trainable_layers 1"


def run(folder, data, output, *more):
    options = [*SIZES.split(), "--thought_length", "5", "--positions", "2", "--output_dir", str(output)]
    return main(["--model", str(folder), "--data", str(data), *options, *more])


TOLD = ["base", "after the asides", "control", "w = 0", "pause", "w = 1", "shuffled thoughts", "thoughts"]


def test_the_command_measures_every_condition_shows_them_and_goes_on_where_it_stopped(
    folder, data, tmp_path, capsys, monkeypatch
):
    trained = []

    def recorded(path, tokenizer, rows, config, *more):
        trained.append("asides" if "labels" in rows[0] else "control" if config is None else "thoughts")
        return fine_tune(path, tokenizer, rows, config, *more)

    monkeypatch.setattr("experiments.gsm8k_text.gsm8k_training.fine_tune", recorded)
    assert run(folder, data, tmp_path) == 0
    assert trained == ["asides", "control", "thoughts"]
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for part, n in (("drawn", 20), ("results", 4)):
        rows = found[part]["conditions"]
        shown = [row["condition"] for row in rows]
        assert [name for name in shown if not name.startswith("base, T")] == TOLD
        assert any(name.startswith("base, T = 1.05") for name in shown)
        assert all(row["n"] == n for row in rows)
    assert found.keys() >= {"helps_drawn", "helps_results", "keeps_its_language"}

    lines = (tmp_path / "drawn.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "drawn.jsonl").write_text("".join(lines[:-7]) + lines[-7][:20])  # killed in the middle
    assert run(folder, data, tmp_path) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert trained[3:] == ["thoughts"]
    assert {**again, "seconds": 0} == {**found, "seconds": 0}

    assert run(folder, data, tmp_path, "--steps", "2") == 1
    assert "is of a run with other steps" in capsys.readouterr().err


def test_without_asides_the_text_teaches_no_dash_and_that_condition_is_absent(folder, data, tmp_path, capsys):
    more = ("--aside_steps", "0", "--positions", "-1", "--calculations", "kept")
    assert run(folder, data, tmp_path, *more) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    shown = [row["condition"] for row in found["drawn"]["conditions"]]
    assert [name for name in shown if not name.startswith("base, T")] == [x for x in TOLD if x != TOLD[1]]
    assert not list(tmp_path.glob("asides*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "steps = 0: must be at least 1"),
        (["--positions", "-2"], "positions = -2: must be at least -1"),
        (["--calculations", "some"], "calculations = 'some': must be one of kept, removed"),
        (["--longest", "4"], "longest = 4: must be at least 8"),
        (["--model", "nowhere"], "model = 'nowhere': no such folder"),
        (["--data", "nowhere"], "data = 'nowhere': no such file"),
        (["--test_texts", "11"], "test_texts = 11: leaves 1 of 12 texts to train on, a batch has 2"),
        (["--trainable_layers", "7"], "trainable_layers = 7: must be in [0, 2]"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_mistake_in_its_options_is_told_in_one_line(folder, data, tmp_path, capsys, more, message):
    assert run(folder, data, tmp_path, *more) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"gsm8k_text: {message}"


def test_a_file_of_other_records_or_without_results_is_refused(folder, tmp_path, capsys):
    path = tmp_path / "worked.jsonl"
    path.write_text("\n".join([json.dumps({"question": "1?", "answer": "It is 1, as we know well."})] * 8))
    assert run(folder, path, tmp_path) == 1
    assert "0 of the last 4 texts have the result of a calculation" in capsys.readouterr().err
    path.write_text(json.dumps({"question": "1?", "text": "1"}))
    assert run(folder, path, tmp_path) == 1
    assert "line 1 has no text in 'answer'" in capsys.readouterr().err


def test_a_tokenizer_that_cannot_tell_where_its_tokens_lie_or_knows_no_dash_is_refused(data):
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match=r"^model: its tokenizer does not tell where in the text its tokens"):
        corpus.read(str(data), slow, "removed", 96)
    speechless = SimpleNamespace(encode=lambda *a, **k: [1, 2], unk_token_id=None)
    with pytest.raises(ValueError, match=r"^model: none of .* is one token of its tokenizer$"):
        corpus.dash(speechless)
