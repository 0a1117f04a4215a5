"""The study of two-hop facts, in miniature: task, tests and verdict; the command on a tiny model."""

import json
import string

import numpy as np
import pytest
import torch
from tiny_models import base_model
from tiny_tokenizer import tiny_tokenizer

from experiments.shared.fine_tuning import FineTuning, fine_tune
from experiments.two_hop_facts import facts_results, facts_training
from experiments.two_hop_facts.__main__ import main
from experiments.two_hop_facts.facts import TESTED, facts
from experiments.two_hop_facts.facts_task import Split
from qstar import QuietStarForCausalLM
from qstar.layout import IGNORE

LETTERS = "".join(f" {x}" for x in string.ascii_uppercase) * 20 + " is is — — —————" * 20


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(more=LETTERS, vocabulary=400)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    base_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def split(tokenizer):
    return Split.make(tokenizer, number=0, test_facts=12)


# -- the task


def test_there_are_enough_facts_each_with_one_answer_that_its_question_does_not_hold():
    every = facts()
    assert sum(fact.relation in TESTED for fact in every) >= 206
    assert len({fact.question for fact in every}) == len(every)
    for fact in every:
        assert fact.answer and fact.letter in string.ascii_uppercase and "\n" not in fact.question
        assert fact.answer == fact.answer.strip() and ":" not in fact.question + fact.answer


def test_a_split_trains_on_no_test_fact_tests_only_what_is_tested_and_its_number_decides(tokenizer, split):
    assert len(split.test) == 12 and {fact.relation for fact in split.test} <= set(TESTED)
    assert sorted((*split.train, *split.test), key=repr) == sorted(facts(), key=repr)
    assert Split.make(tokenizer, 0, 12).test == split.test != Split.make(tokenizer, 1, 12).test
    assert [facts()[i] for i in split.numbers] == split.test


def test_the_letter_is_the_only_target_and_only_before_it_is_thought(tokenizer, split):
    for fact, row in zip(split.train, split.rows(split.train)):
        n = len(tokenizer(fact.question)["input_ids"])
        assert tokenizer.decode(row["input_ids"]) == f"{fact.question} {fact.letter}."
        assert [i for i, x in enumerate(row["labels"]) if x != IGNORE] == [n]
        assert [i for i, x in enumerate(row["think_mask"]) if x] == [n - 1]


@pytest.mark.parametrize("count", [0, 10_000])
def test_a_test_of_no_fact_or_of_all_is_refused(tokenizer, count):
    with pytest.raises(ValueError, match=rf"^test_facts = {count}: must be in \[1, \d+\]$"):
        Split.make(tokenizer, 0, count)


def test_a_tokenizer_without_the_letters_is_refused():
    with pytest.raises(ValueError, match=r"^model: its tokenizer has not every letter after a space"):
        Split.make(tiny_tokenizer(), 0)


# -- training and testing


def trained(folder, split, config):
    recipe = FineTuning(steps=2, batch=8, trainable_layers=1, learning_rate=1e-2)
    return fine_tune(str(folder), split.tokenizer, split.rows(split.train), config, recipe, seed=0)


@pytest.fixture(scope="module")
def thinker(split, folder):
    return trained(folder, split, facts_training.thinking(2))


@torch.no_grad()
def test_every_test_of_a_model_that_thinks_is_what_it_generates_or_says_with_its_thought_alone(
    thinker, split, tokenizer
):
    found = facts_training.answers(thinker, split)
    for i, fact in enumerate(split.test):
        ids = torch.tensor([tokenizer(fact.question)["input_ids"]])
        options = {"max_new_tokens": 1, "thought_temperature": 0.0, "pad_token_id": 0, "output_logits": True}
        out = thinker.generate(ids, return_dict_in_generate=True, do_sample=False, **options)
        torch.testing.assert_close(found["thoughts"].scores[i], out.logits[0, 0, split.letters])
        assert tokenizer.decode(out.thoughts[0, 0]) == found["thoughts"].said[i]
        plain = thinker.base(ids).logits[0, -1, split.letters]
        torch.testing.assert_close(found["w = 0"].scores[i], plain)
        w = out.mix_weight[0, 0]
        alone = plain + (out.logits[0, 0, split.letters] - plain) / w
        torch.testing.assert_close(found["w = 1"].scores[i], alone, rtol=1e-3, atol=1e-3)
        right = string.ascii_uppercase.index(fact.letter)
        scores = found["thoughts"].scores[i]
        assert bool(found["thoughts"].correct[i]) == (int(scores.argmax()) == right)
        nll = torch.nn.functional.cross_entropy(scores[None], torch.tensor([right]))
        torch.testing.assert_close(found["thoughts"].nll[i], nll)


def test_shuffled_thoughts_are_those_of_other_questions_and_change_the_answers(thinker, split):
    found = facts_training.answers(thinker, split)
    own, other = found["thoughts"], found["shuffled"]
    assert sorted(own.said) == sorted(other.said)
    order = facts_training.derangement(50, seed=1)
    assert sorted(order.tolist()) == list(range(50)) and not (order == torch.arange(50)).any()
    assert not torch.equal(own.scores, other.scores)


def test_the_control_moves_the_same_layers_and_nothing_else(split, folder, thinker):
    control = trained(folder, split, None)
    begun = base_model(vocab_size=len(split.tokenizer)).state_dict()

    def moved(model):
        return {n for n, x in model.state_dict().items() if not torch.equal(x, begun[n])}

    assert not isinstance(control, QuietStarForCausalLM)
    assert moved(control) == moved(thinker.base) != set()
    assert all("layers.1." in n or n == "model.norm.weight" for n in moved(control))


# -- the verdict


def rows(accuracy):
    """Lines of a file in which a condition has these shares right, one a split, of 10 facts each."""
    return [
        {
            "seed": 0,
            "split": split,
            "condition": name,
            "seconds": 0.0,
            "facts": [10 * split + i for i in range(10)],
            "correct": [int(i < 10 * share) for i in range(10)],
            "nll": [1.0] * 10,
            "said": [""] * 10,
        }
        for name, shares in accuracy.items()
        for split, share in enumerate(shares)
    ]


def claims(thoughts, shuffled, control):
    named = {"control": control, "thoughts, k = 1": thoughts, "thoughts, k = 1, shuffled": shuffled}
    return facts_results.summary(rows(named), [1])


@pytest.mark.parametrize(
    ("thoughts", "shuffled", "control", "does"),
    [
        ([0.4, 0.4, 0.4], [0.3, 0.3, 0.3], [0.2, 0.2, 0.2], True),
        ([0.3, 0.3, 0.4], [0.1, 0.1, 0.1], [0.2, 0.2, 0.2], False),  # .133 over the control
        ([0.4, 0.4, 0.4], [0.4, 0.3, 0.3], [0.2, 0.2, 0.2], False),  # .067 over the shuffled
        ([0.1, 0.9, 0.9], [0.1, 0.1, 0.1], [0.2, 0.2, 0.2], False),  # below the control in a split
    ],
)
def test_it_holds_where_the_means_are_large_enough_and_no_split_is_below(thoughts, shuffled, control, does):
    _, differences = claims(thoughts, shuffled, control)
    assert facts_results.holds(differences, 1) == does


def test_means_extremes_and_paired_differences_are_those_of_the_lines():
    conditions, differences = claims([0.4, 0.6, 0.5], [0.1, 0.1, 0.4], [0.2, 0.2, 0.2])
    by_name = {row["condition"]: row for row in conditions}
    assert by_name["thoughts, k = 1"]["mean"] == pytest.approx(0.5)
    row = {row["difference"]: row for row in differences}["thoughts, k = 1 - thoughts, k = 1, shuffled"]
    assert (row["mean"], row["least split"], row["largest split"]) == pytest.approx((0.3, 0.1, 0.5))
    assert row["n"] == 30 and row["low"] < 0.3 < row["high"]
    control = {row["difference"]: row for row in differences}["thoughts, k = 1 - control"]
    assert control["mean"] == pytest.approx(0.3)


def test_conditions_stand_in_one_order_whatever_was_measured_first():
    names = ["control", "thoughts, k = 1, shuffled", "thoughts, k = 1", "thoughts, k = 4", "thoughts, k = 2"]
    for measured in (names, names[::-1], names[2:] + names[:2]):
        conditions, _ = facts_results.summary(rows({name: [0.5, 0.5] for name in measured}), [1, 4])
        assert [row["condition"] for row in conditions] == names


def test_the_interval_counts_a_fact_of_several_splits_once():
    named = {"control": [0.5], "thoughts, k = 1": [0.5], "thoughts, k = 1, shuffled": [0.5]}
    once = rows(named)
    again = [row | {"seed": seed} for seed in range(4) for row in once]
    one, four = (facts_results.summary(x, [1])[0][0] for x in (once, again))
    assert four["n"] == 4 * one["n"]
    assert np.isclose(four["high"] - four["low"], one["high"] - one["low"], rtol=0.05)


# -- the command


def run(folder, output, *more):
    options = ["--steps", "1", "--test_facts", "6", "--trainable_layers", "1", "--lengths", "1", "2"]
    return main(["--model", str(folder), "--splits", "2", *options, "--output_dir", str(output), *more])


def test_the_command_measures_every_condition_shows_them_and_goes_on_where_it_stopped(
    folder, tmp_path, capsys
):
    assert run(folder, tmp_path) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    shown = [row["condition"] for row in found["conditions"]]
    tests = [f"thoughts, k = {k}{test}" for k in (1, 2) for test in (", w = 1", ", w = 0", ", shuffled", "")]
    assert shown == ["before", "control", "pause", *tests]
    assert found["holds"].keys() == {"1", "2"} and "figure:" in out
    assert len(found["differences"]) == 8 and all(row["n"] == 12 for row in found["conditions"])
    assert (tmp_path / "two_hop_facts.png").read_bytes().startswith(b"\x89PNG")

    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * len(shown)
    (tmp_path / "results.jsonl").write_text("".join(lines[:6]) + lines[6][:20])  # killed in the middle
    assert run(folder, tmp_path) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    for row, before in zip(again["conditions"], found["conditions"]):
        assert row == before

    assert run(folder, tmp_path, "--steps", "2") == 1
    assert "is of a run with other steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--splits", "0"], "splits = 0: must be at least 1"),
        (["--seeds", "1", "1"], "seeds = [1, 1]: must be different numbers, each at least 0"),
        (["--lengths", "0"], "lengths = [0]: must be different numbers, each at least 1"),
        (["--model", "nowhere"], "model = 'nowhere': no such folder"),
        (["--trainable_layers", "7"], "trainable_layers = 7: must be in [0, 2]"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_mistake_in_its_options_is_told_in_one_line(folder, tmp_path, capsys, more, message):
    assert run(folder, tmp_path, *more) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"two_hop_facts: {message}"
