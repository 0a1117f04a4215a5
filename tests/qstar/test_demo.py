"""The embedded model and the town it knows; the demo itself, in miniature."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qstar.cli.main import main
from qstar.demo import TINY_LM
from qstar.demo.town import DIRECTIONS, PLACES, STEPS, STREETS, USEFUL, document, walks


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LM)


def test_every_street_leads_elsewhere_and_every_place_is_reached():
    for direction in DIRECTIONS:
        assert sorted(STREETS[direction].values()) == sorted(PLACES)
        assert all(start != end for start, end in STREETS[direction].items())


def test_the_walk_that_asks_for_an_answer_ends_there():
    (walk,) = walks(1, seed="any")
    at = walk.start
    for direction in walk.directions:
        at = STREETS[direction][at]
    assert walk.answer == at
    assert walk.text() == f"{walk.question} {at}."
    assert walk.useful_thought.split() == [USEFUL, *walk.places[:-1]]


def test_no_training_text_holds_a_test_walk():
    questions = {walk.question for walk in walks(2000, seed="test", held_out=True)}
    assert questions.isdisjoint(walk.question for walk in walks(20_000, seed="train 0"))
    draw = random.Random(0)
    assert not any(q in document(draw, 0.5, 0.5) for _ in range(200) for q in list(questions)[:50])


def test_asides_have_their_shares():
    draw = random.Random(1)
    texts = [document(draw, aside_share=0.5, useful_share=0.2) for _ in range(4000)]
    asides = [text for text in texts if "—" in text]
    assert abs(len(asides) / 4000 - 0.5) < 0.04
    assert abs(sum(f"— {USEFUL} " in text for text in asides) / len(asides) - 0.2) < 0.04


def test_a_useful_thought_is_one_token_a_word_and_so_is_the_dash(tokenizer):
    for walk in walks(100, seed="tokens"):
        assert len(tokenizer(f" {walk.useful_thought}")["input_ids"]) == STEPS
    assert [len(tokenizer.encode(dash)) for dash in ("—", " —")] == [1, 1]


def test_the_embedded_model_is_small_enough_for_a_package():
    assert sum(path.stat().st_size for path in TINY_LM.iterdir()) < 4e6


@torch.no_grad()
def test_the_embedded_model_can_spell_a_walk_out_but_not_answer_at_once(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype="float32").eval()
    test = walks(100, seed="test", held_out=True)
    texts = torch.tensor([tokenizer(walk.text(walk.useful_thought))["input_ids"] for walk in test])
    length = len(tokenizer(test[0].question)["input_ids"])
    said = model(input_ids=texts).logits.argmax(-1)
    spelled = said[:, length + 1 : -2] == texts[:, length + 2 : -1]  # from the second word of the aside on
    assert spelled.float().mean() > 0.95
    places = torch.tensor([tokenizer.encode(f" {place}")[0] for place in PLACES])
    answer = torch.tensor([tokenizer.encode(f" {walk.answer}")[0] for walk in test])
    at_once = model(input_ids=texts[:, :length]).logits[:, -1, places].argmax(-1)
    assert (places[at_once] == answer).float().mean() < 0.15


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_the_demo_runs_saves_its_model_and_ends_with_its_figures(tmp_path, capsys, processes):
    out = str(tmp_path / "thinks")
    sizes = ["--training_steps", "1", "--test_walks", "4", "--processes", processes]
    assert main(["demo", *sizes, "--output_dir", out]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    accuracies = ("before", "control", "no_policy", "after")
    assert all(0 <= figures[f"direct_accuracy_{name}"] <= 1 for name in accuracies)
    assert list(figures["accuracy_by_thought_length"]) == ["0", "2", "4", "8"]
    assert 0 < figures["mixed_nll_after"] < 3
    assert {"useful_share_before", "useful_share_after", "mixed_nll_before", "chance"} <= set(figures)
    prompt = walks(1, seed="test", held_out=True)[0].question
    arguments = ["--model", out, "--prompt", prompt, "--max_new_tokens", "2", "--show_thoughts", "--json"]
    assert main(["generate", *arguments]) == 0
    (answer,) = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert answer["prompt"] == prompt
    assert len(answer["thoughts"]) == 2


@pytest.mark.parametrize("option", ["training_steps", "test_walks", "processes"])
def test_the_demo_refuses_to_do_nothing(option, capsys):
    assert main(["demo", f"--{option}", "0"]) == 1
    assert f"{option} = 0: must be at least 1" in capsys.readouterr().err
