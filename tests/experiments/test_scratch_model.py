"""The study of a model made from scratch, in miniature: kinds of text, base model, tests, verdict and
command."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch

from experiments.scratch_model import scratch_base, scratch_results, scratch_training
from experiments.scratch_model.__main__ import main
from experiments.scratch_model.kinds import COUPLES, FAMILY, KINDS, NAMES, document, useless_aside
from experiments.scratch_model.muon import Muon, orthogonal
from qstar import QuietStarForCausalLM
from qstar.data import collate
from qstar.demo import walk_training as demo
from qstar.demo.town import STEPS, STREETS, is_held_out
from qstar.layout import IGNORE
from qstar.thinker import Thinker

NUMBERS = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture(scope="module")
def tokenizer():
    return scratch_base.make_tokenizer()


# -- the kinds of text


def follow_streets(text):
    start, way = re.fullmatch(r"From (\w+) go ([\w ]+)\. Where\?", text).groups()
    places = [start]
    for direction in way.split():
        places.append(STREETS[direction][places[-1]])
    return places[1:-1], places[-1]


def wait(text):
    start, hours = re.fullmatch(r"At (\w+) wait ([\w ]+) hours\. Now\?", text).groups()
    clock = NUMBERS.split()
    while clock[0] != start:
        clock.append(clock.pop(0))
    shown = []
    for wait in hours.split():
        for _ in range(1 + NUMBERS.split().index(wait)):
            clock.append(clock.pop(0))  # an hour has gone
        shown.append(clock[0])
    assert len(shown) == STEPS
    return shown[:-1], shown[-1]


def ask_the_family(text):
    person, way = re.fullmatch(r"Of (\w+) the ([\w ]+)\. Who\?", text).groups()
    found = []
    for relation in way.split():
        person = FAMILY[person][relation]
        found.append(person)
    assert len(found) == STEPS
    return found[:-1], found[-1]


def take_the_least(text):
    (animals,) = re.fullmatch(r"Sort ([\w ]+)\. Middle\?", text).groups()
    left, order = set(animals.split()), []
    while left:
        order.append(min(left))
        left.remove(order[-1])
    (middle,) = (x for x in order if sum(y < x for y in order) == sum(y > x for y in order))
    return order, middle


BEGINS = {"walks": "via", "sums": "until", "kinship": "through", "sorting": "order"}
SOLVED = {"walks": follow_streets, "sums": wait, "kinship": ask_the_family, "sorting": take_the_least}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_answer_are_those_that_the_question_leads_to(kind):
    for question in KINDS[kind].questions(300, "any"):
        steps, answer = SOLVED[kind](question.text)
        assert (list(question.steps), question.answer) == (steps, answer)
        assert answer in KINDS[kind].answers
        assert question.document() == f"{question.text} {answer}."
        aside = " ".join([BEGINS[kind], *steps])
        assert question.document(question.useful_aside) == f"{question.text} — {aside} — {answer}."


def test_the_family_is_one_children_have_their_parents_and_nobody_marries_a_sibling():
    parents = {name: (x["mother"], x["father"]) for name, x in FAMILY.items() if "mother" in x}
    generation = {name: NAMES.index(name) // (2 * COUPLES) for name in NAMES}
    assert len(FAMILY) == 24 and len(parents) == 18
    for child, couple in parents.items():
        assert {generation[parent] for parent in couple} == {generation[child] - 1}
        mother, father = couple
        assert FAMILY[mother]["eldest"] == FAMILY[father]["eldest"] != FAMILY[mother]["youngest"]
        assert child in (FAMILY[mother]["eldest"], FAMILY[mother]["youngest"])
        assert parents.get(mother, "no") != parents.get(father, "none")
        assert (NAMES.index(mother) % 2, NAMES.index(father) % 2) == (0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_occurs_and_none_is_common(kind):
    found = [question.answer for question in KINDS[kind].questions(3000, "any")]
    counts = {answer: found.count(answer) for answer in KINDS[kind].answers}
    # the first three and the last three animals are never in the middle of seven
    assert {a for a in counts if not counts[a]} <= (
        set(KINDS["sorting"].answers) if kind == "sorting" else set()
    )
    assert max(counts.values()) / 3000 < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_no_training_text_holds_a_test_question(kind, tokenizer):
    held_out = {question.text for question in KINDS[kind].questions(3000, "test", held_out=True)}
    draw = random.Random(0)
    made = [document(KINDS[kind], draw, 0.5, 0.5) for _ in range(3000)]
    begun = {re.split(r"(?<=\?) ", text)[0] for text in made}
    assert len(begun) > 2900 and not held_out & begun
    # of so many questions few would meet by chance
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, begun))
    recipe = scratch_training.TrainingRecipe(steps=40)
    rows = tokenizer.batch_decode(
        [row["input_ids"] for row in scratch_training.training_rows(recipe, tokenizer, 0)]
    )
    documents = [text for text in rows if text.endswith(tokenizer.eos_token)]  # no spans of prose
    assert len(documents) > 400
    assert not any(is_held_out(re.split(r"(?<=\?) ", text)[0]) for text in documents)


def test_no_prose_that_is_tested_or_read_later_is_in_what_the_base_model_reads():
    prose = scratch_base.prose()
    assert len(prose.base) > 150_000 and min(len(prose.later), len(prose.held_out)) > 30_000
    parts = (prose.base, prose.later, prose.held_out)
    for part in parts:
        sentences = [x for x in re.split(r"(?<=\.) ", part) if len(x) > 60]
        others = [x for x in parts if x is not part]
        assert len(sentences) > 50 and not any(x in other for x in sentences for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_every_aside_is_one_token_a_word_as_long_as_a_thought_and_questions_are_alike_long(kind, tokenizer):
    length = scratch_training.thinking().thought_length
    assert length == STEPS
    draw = random.Random(0)
    questions = KINDS[kind].questions(500, "any")
    for asides in ([q.useful_aside for q in questions], [useless_aside(draw) for _ in questions]):
        ids = tokenizer([f" {aside}" for aside in asides])["input_ids"]
        assert {len(x) for x in ids} == {length}
        assert all(len(aside.split()) == length for aside in asides)
    assert len({len(x) for x in tokenizer([q.text for q in questions])["input_ids"]}) == 1
    assert {len(x) for x in tokenizer([f" {a}" for a in KINDS[kind].answers])["input_ids"]} == {1}
    assert [len(tokenizer.encode(dash)) for dash in ("—", " —")] == [1, 1]


def test_asides_have_their_shares():
    draw = random.Random(1)
    texts = [document(KINDS["sums"], draw, aside_share=0.5, useful_share=0.2) for _ in range(4000)]
    asides = [text for text in texts if "—" in text]
    assert abs(len(asides) / 4000 - 0.5) < 0.04
    assert abs(sum("— until " in text for text in asides) / len(asides) - 0.2) < 0.04


# -- the base model and its text


def test_the_base_model_first_reads_useful_asides_alone_and_then_few(tokenizer):
    recipe = scratch_base.BaseRecipe(steps=10, common_share=0.3)
    useful = rf"\? — ({'|'.join(BEGINS.values())})\b"
    first, last = [], []
    for step, batch in enumerate(scratch_base.batches(recipe, tokenizer, seed=0)):
        rows = tokenizer.batch_decode(batch["input_ids"])
        found = [d for row in rows for d in row.split(tokenizer.eos_token) if "?" in d]
        (first if step < 3 else last).extend(found)
    whole = [d for d in first if d.endswith(".")]
    assert len(whole) > 50 and all(re.search(useful, d) for d in whole)
    asides = [d for d in last if "—" in d and not d.endswith("—")]
    assert 0.3 < len(asides) / len(last) < 0.7
    assert 0.05 < sum(bool(re.search(useful, d)) for d in asides) / len(asides) < 0.4


@torch.no_grad()
def test_a_document_of_a_packed_row_sees_no_other_and_its_first_token_is_no_target(tokenizer):
    (batch,) = scratch_base.batches(scratch_base.BaseRecipe(steps=1, common_share=0), tokenizer, seed=0)
    assert (batch["labels"][batch["position_ids"] == 0] == IGNORE).all()
    model = scratch_base.new_model(0, tokenizer).eval()
    logits = model(**batch, use_cache=False).logits[-1]
    begins = (batch["position_ids"][-1] == 0).nonzero()[:, 0].tolist()
    assert len(begins) > 1
    for first, last in zip(begins, [*begins[1:], None]):
        alone = model(input_ids=batch["input_ids"][-1:, first:last]).logits[0]
        torch.testing.assert_close(logits[first:last], alone, rtol=1e-4, atol=1e-4)


def test_muon_steps_are_orthogonal_and_those_of_torch_but_for_its_bf16():
    for shape in ((16, 40), (40, 16), (16, 16)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        in_its_frame = u.mT @ orthogonal(x) @ v.mT
        scale = in_its_frame.diagonal()
        assert scale.min() > 0.65 and scale.max() < 1.25
        torch.testing.assert_close(in_its_frame, torch.diag(scale), rtol=0, atol=1e-4)

    begun = [torch.randn(8, 24), torch.randn(24, 8), torch.randn(8, 24)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in begun] for _ in range(2))
    mine = Muon(ours, lr=0.1, weight_decay=0.05)
    stock = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.05, momentum=0.95)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            b.grad = torch.randn_like(a)
            a.grad = b.grad.clone()
        mine.step()
        stock.step()
    for x, a, b in zip(begun, ours, theirs):
        assert (a - b).norm() < 0.02 * (a - x).norm()


@torch.no_grad()
def test_told_accuracy_counts_the_answers_after_a_written_out_aside(tokenizer):
    model = scratch_base.new_model(0, tokenizer).eval()
    questions = KINDS["sorting"].questions(40, "any")
    right = 0
    for question in questions:
        ids = tokenizer(f"{question.text} — {question.useful_aside} —")["input_ids"]
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        scores = {a: float(logits[tokenizer.encode(f" {a}")[0]]) for a in KINDS["sorting"].answers}
        right += max(scores, key=scores.get) == question.answer
    assert scratch_base.told_accuracy(model, tokenizer, "sorting", questions) == pytest.approx(right / 40)


# -- training and testing


def test_the_text_has_every_kind_but_those_left_out_as_often_and_no_aside(tokenizer):
    recipe = scratch_training.TrainingRecipe(steps=5, kinds=("sums", "sorting"))
    rows = scratch_training.training_rows(recipe, tokenizer, seed=3)
    texts = tokenizer.batch_decode([row["input_ids"] for row in rows])
    assert len(texts) == 80 and not any("—" in text for text in texts)
    starts = [sum(text.startswith(word) for text in texts) for word in ("At ", "Sort", "From", "Of ")]
    assert starts == [27, 27, 0, 0]
    assert all(row["position_ids"] == list(range(len(row["input_ids"]))) for row in rows)
    assert (
        rows
        == scratch_training.training_rows(recipe, tokenizer, 3)
        != scratch_training.training_rows(recipe, tokenizer, 4)
    )


def test_the_control_sees_the_same_rows_in_the_same_order(tokenizer, monkeypatch):
    seen = []

    def recorded(rows):
        seen[-1] += [row["input_ids"] for row in rows]
        return collate(rows)

    monkeypatch.setattr(demo, "collate", recorded)
    for thinks in (False, True):
        seen.append([])
        model = scratch_base.new_model(0, tokenizer)
        trained = scratch_training.train(
            model, scratch_training.TrainingRecipe(steps=2), tokenizer, seed=5, thinks=thinks
        )
        assert isinstance(trained, QuietStarForCausalLM) == thinks
    rows = scratch_training.training_rows(scratch_training.TrainingRecipe(steps=2), tokenizer, seed=5)
    assert seen[0] == seen[1] != [row["input_ids"] for row in rows]
    assert sorted(seen[0]) == sorted(row["input_ids"] for row in rows)


@pytest.fixture(scope="module")
def thinker(tokenizer):
    model = scratch_training.thinker(scratch_base.new_model(0, tokenizer), tokenizer)
    torch.manual_seed(0)
    with torch.no_grad():
        model.mixing.layers[-1].weight.normal_(std=0.5)  # as if trained: w is not 0
    return model


@torch.no_grad()
def test_answers_are_those_that_the_model_generates_and_w_0_is_the_base_model_alone(thinker, tokenizer):
    unseen = scratch_training.Unseen.make("sorting", tokenizer, questions=12, texts=3)
    found = scratch_training.answers(thinker, unseen, scratch_training.WAYS, seed=0)
    for i, question in enumerate(unseen.questions):
        ids = torch.tensor(tokenizer([question.text])["input_ids"])
        options = {"max_new_tokens": 1, "thought_temperature": 0.0, "pad_token_id": 0, "output_logits": True}
        out = thinker.generate(ids, return_dict_in_generate=True, do_sample=False, **options)
        words = KINDS["sorting"].answers
        for way, logits in (("thoughts", out.logits[0, 0]), ("without", thinker.base(ids).logits[0, -1])):
            said = words[int(logits[unseen.words].argmax())]
            assert found[way][i] == int(said == question.answer), way


@torch.no_grad()
def test_every_token_of_a_text_is_scored_once_and_without_thoughts_as_the_base_model_does(
    thinker, tokenizer, monkeypatch
):
    def drawn(self, text, layout, generator):  # a model that has learned nothing thinks always the same
        shape = (*layout.positions.shape, 1, self.config.thought_length)
        return torch.randint(300, 1000, shape, generator=generator)

    monkeypatch.setattr(Thinker, "sample_thoughts", drawn)
    for kind, texts in (("kinship", 3), ("prose", 3)):
        unseen = scratch_training.Unseen.make(kind, tokenizer, questions=3, texts=texts)
        found = scratch_training.text_scores(thinker, unseen, scratch_training.WAYS, seed=0)
        for i, span in enumerate(unseen.spans):
            ids = torch.tensor([span.input_ids])
            logits = thinker.base(ids).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            torch.testing.assert_close(found["without"][i]["nll"], nll, rtol=1e-4, atol=1e-4)
            assert torch.equal(found["without"][i]["top"], logits.argmax(-1) == ids[0, 1:])
            assert not torch.allclose(found["thoughts"][i]["nll"], nll, atol=1e-4)
            assert not torch.equal(found["thoughts"][i]["nll"], found["shuffled"][i]["nll"])


def test_sums_of_the_tests_add_up_and_hard_tokens_are_the_tenth_that_the_base_finds_hardest(
    thinker, tokenizer
):
    unseen = scratch_training.Unseen.make("walks", tokenizer, questions=6, texts=5)
    chosen = scratch_training.hard(thinker, unseen)
    nll = torch.cat(
        [x["nll"] for x in scratch_training.text_scores(thinker, unseen, ("without",), 0)["without"]]
    )
    at = torch.cat(chosen)
    assert at.sum() == round(len(nll) / 10) and nll[at].min() >= nll[~at].max()
    sums = scratch_training.measure(thinker, unseen, chosen, ("without",), 0)["without"]
    assert sums["asked"] == [1] * 6 and sum(sums["tokens"]) == len(nll) and sum(sums["hard"]) == at.sum()
    assert sum(sums["nll"]) == pytest.approx(float(nll.sum()), rel=1e-4)
    assert sum(sums["hard_nll"]) == pytest.approx(float(nll[at].sum()), rel=1e-4)


def test_a_thought_that_is_the_useful_aside_is_counted(thinker, tokenizer, monkeypatch):
    unseen = scratch_training.Unseen.make("sums", tokenizer, questions=4, texts=1)
    assert scratch_training.useful_share(thinker, unseen, seed=0) == 0
    useful = torch.tensor(tokenizer([f" {q.useful_aside}" for q in unseen.questions])["input_ids"])
    useful[1, 3] += 1

    def written(self, text, layout, generator):
        assert self.config.thought_temperature == 1
        return useful[:, None, None]

    monkeypatch.setattr(Thinker, "sample_thoughts", written)
    assert scratch_training.useful_share(thinker, unseen, seed=0) == 0.75


# -- the verdict


def lines(accuracy, prose):
    """Two seeds, 40 questions a kind: accuracy[kind][condition] of them right; prose[condition] nats a
    token."""
    found = []
    for seed in (0, 1):
        for kind, shares in accuracy.items():
            for name, share in shares.items():
                correct = [int(i < 40 * share) for i in range(40)]
                sums = {"asked": [1] * 40, "nll": [4.0] * 40, "tokens": [2] * 40}
                hard = {"hard_nll": [1.0] * 40, "hard": [1] * 40}
                key = {"seed": seed, "condition": name, "kind": kind, "correct": correct}
                found.append(key | sums | hard | {"told": 1.0, "useful": 0.5, "seconds": 1.0})
        for name, nats in prose.items():
            sums = {"correct": [5] * 40, "asked": [10] * 40, "nll": [10 * nats] * 40, "tokens": [10] * 40}
            key = {"seed": seed, "condition": name, "kind": "prose", "seconds": 1.0}
            found.append(key | sums | {"hard_nll": [5.0] * 40, "hard": [1] * 40})
    return found


def judged(kinds, prose):
    names = ("control", "shuffled", "w = 0", "thoughts")
    accuracy = {f"kind {i}": dict(zip(names, shares)) for i, shares in enumerate(kinds)}
    rows = lines(accuracy, dict(zip(names, prose)))
    _, differences = scratch_results.summary(rows, [*accuracy, "prose"])
    return scratch_results.verdict(differences, list(accuracy))


GOOD, EVEN = (0.1, 0.1, 0.1, 0.9), (3.0, 3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("kinds", "prose", "holds"),
    [
        ([GOOD, GOOD, GOOD], EVEN, (True, True)),
        ([GOOD, GOOD], EVEN, (False, True)),
        ([GOOD, GOOD, (0.7, 0.1, 0.1, 0.9)], EVEN, (False, True)),  # .2 over the control
        ([GOOD, GOOD, (0.1, 0.7, 0.1, 0.9)], EVEN, (False, True)),  # .2 over shuffled thoughts
        ([GOOD, GOOD, (0.1, 0.1, 0.9, 0.9)], EVEN, (True, True)),  # w = 0 is no part of the claim
        ([GOOD, GOOD, GOOD], (3.0, 3.0, 3.0, 3.03), (True, False)),
        ([GOOD, GOOD, GOOD], (3.0, 3.0, 3.0, 3.01), (True, True)),
    ],
)
def test_it_holds_on_three_kinds_far_enough_over_both_with_prose_not_worse(kinds, prose, holds):
    found = judged(kinds, prose)
    assert (found["kinds"], found["prose"]) == holds


def test_means_intervals_and_seeds_are_those_of_the_lines():
    rows = lines({"walks": {"control": 0.2, "thoughts": 0.7}}, {"control": 3.0, "thoughts": 2.9})
    for row in rows:
        if (row["seed"], row["condition"], row["kind"]) == (1, "thoughts", "walks"):
            row["correct"] = [1] * 40
    conditions, differences = scratch_results.summary(rows, ["walks", "prose"])
    found = {(x["kind"], x["measure"], x["condition"]): x for x in conditions}
    row = found["walks", "accuracy", "thoughts"]
    assert (row["mean"], row["least seed"], row["largest seed"], row["n"]) == pytest.approx(
        (0.85, 0.7, 1, 80)
    )
    assert row["low"] < 0.85 < row["high"] and found["prose", "nll", "thoughts"]["n"] == 800
    assert found["walks", "nll", "control"]["mean"] == pytest.approx(2.0)
    (paired,) = (x for x in differences if (x["kind"], x["measure"]) == ("walks", "accuracy"))
    assert paired["difference"] == "thoughts - control" and paired["mean"] == pytest.approx(0.65)
    # a question in one cluster: of 40, 8 are always right, 20 with thoughts in both seeds, 12 in one of them
    gain = np.array([0.0] * 8 + [1.0] * 20 + [0.5] * 12)
    drawn = np.random.default_rng(1).choice(gain, (20_000, 40)).mean(1)
    assert (paired["low"], paired["high"]) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


# -- the command


def run(output, *more):
    options = ["--base_steps", "2", "--steps", "1", "--questions", "4", "--texts", "2", "--seeds", "7"]
    return main([*options, "--output_dir", str(output), *more])


def test_the_command_measures_every_condition_shows_them_and_goes_on_where_it_stopped(tmp_path, capsys):
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    kinds = [*KINDS, "prose"]
    expected = {
        (k, m, c) for k in kinds for m in scratch_results.MEASURES for c in scratch_results.CONDITIONS
    }
    assert {(x["kind"], x["measure"], x["condition"]) for x in found["conditions"]} == expected
    assert len(found["differences"]) == 5 * 3 * 3
    assert found["settings"]["kinds"] == ["walks", "sums", "sorting"] and found["left_out"] == ["kinship"]
    assert {x["kind"] for x in found["diagnostics"]} == set(KINDS)
    assert not found["holds"]["kinds"] and "DOES NOT HOLD: thoughts at least 0.3" in out
    assert (tmp_path / "scratch_model.png").read_bytes().startswith(b"\x89PNG")
    base_row = {x["kind"]: x["mean"] for x in found["conditions"] if x["condition"] == "base"}
    assert base_row.keys() == set(kinds)
    thinks = QuietStarForCausalLM.from_pretrained(tmp_path / "thinks-7")
    assert thinks.quiet_star.thought_length == STEPS

    kept = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    assert len(kept) == 1 + 5 * 5
    (tmp_path / "results.jsonl").write_text("".join(kept[:13]) + kept[13][:30])  # killed in the middle
    shutil.rmtree(tmp_path / "thinks-7")
    assert run(tmp_path) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (again["conditions"], again["differences"]) == (found["conditions"], found["differences"])
    now = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    assert now[:13] == kept[:13] and len(now) == len(kept)

    assert run(tmp_path, "--steps", "2") == 1
    assert "is of a run with other steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--base_steps", "1"], "base_steps = 1: must be at least 2"),
        (["--steps", "0"], "steps = 0: must be at least 1"),
        (["--questions", "1"], "questions = 1: must be at least 2"),
        (["--texts", "0"], "texts = 0: must be at least 1"),
        (["--texts", "9999"], "texts = 9999: must be in [1, "),
        (["--seeds", "1", "1"], "seeds = [1, 1]: must be different numbers, each at least 0"),
        (["--left_out", "poems"], "left_out = ['poems']: must be some of ['walks', "),
        (["--left_out", *KINDS], "not all"),
    ],
    ids=lambda x: "".join(x[:2]) if isinstance(x, list) else "",
)
def test_a_mistake_in_its_options_is_told_in_one_line(tmp_path, capsys, more, message):
    assert run(tmp_path, *more) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("scratch_model: ") and message in error
