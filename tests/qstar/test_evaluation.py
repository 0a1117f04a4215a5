"""`qstar eval`'s protocols against slow and hand-made truths."""

import numpy as np
import pytest
import torch
from questions import LETTERS, checkpoint, choices_told, sums_told
from slow_predictions import SlowPredictions, teacher_forced
from tensor_sizes import LargestTensor
from tiny_models import thinking_model, tokens
from tiny_tokenizer import PROSE
from transformers import AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.data import collate
from qstar.evaluation.direct import DirectAnswers
from qstar.evaluation.majority import MajorityVote, first_integer
from qstar.evaluation.predictions import ALONE, WAYS, ThoughtSampling, pause_token, predict, shuffled
from qstar.evaluation.questions import Question, Tokens, choice, fitted, gsm8k
from qstar.evaluation.run import batches
from qstar.evaluation.statistics import Sums, estimates
from qstar.evaluation.text import SMOOTHED, TEMPERATURES, PlainText, Span, measured, spans


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("thinks"))


@pytest.fixture(scope="module")
def model(folder):
    return QuietStarForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def scores(model, items, ways=("without", "thoughts"), batch_size=8):
    task, found = DirectAnswers(items), {way: [None] * len(items) for way in ways}
    for batch in batches(task.lengths, batch_size):
        of = task.score(model, batch, ways, ThoughtSampling(), torch.Generator().manual_seed(0))
        for way in ways:
            for i, figures in zip(batch, of[way]):
                found[way][i] = figures
    return found


@pytest.mark.parametrize(
    ("records", "read", "allowed"),
    [(sums_told(50), gsm8k, "0123456789\n"), (choices_told(50), choice, "ABCDE\n")],
    ids=["gsm8k", "commonsense_qa"],
)
def test_soft_and_argmax_scores_of_fifty_questions_equal_ten_lines_of_numpy(tmp_path, records, read, allowed):
    folder = checkpoint(tmp_path, by_hand=True)
    model = QuietStarForCausalLM.from_pretrained(folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = Tokens(tokenizer)
    found = scores(model, [tokens.item(read(record)) for record in records])

    state = {name: x.double().numpy() for name, x in model.state_dict().items()}
    embedding, head = state["base.model.embed_tokens.weight"], state["base.lm_head.weight"]
    layers = [state[f"mixing.layers.{i}.{part}"] for i in (0, 2) for part in ("weight", "bias")]

    def normed(x):
        return x / np.sqrt((x**2).mean() + model.config.rms_norm_eps) * state["base.model.norm.weight"]

    def mixing(base, thought):
        x = np.maximum(layers[0] @ np.concatenate([base, thought]) + layers[1], 0)
        return state["mixing.layers.4.weight"][0] @ np.maximum(layers[2] @ x + layers[3], 0)

    ids = {c: tokenizer.convert_tokens_to_ids({"\n": "Ċ"}.get(c, c)) for c in allowed}
    for i, record in enumerate(records):
        answer = record["answer"].split("#### ")[1] if "answer" in record else record["answerKey"]
        for way in ("without", "thoughts"):
            product, best, before = 1.0, True, tokenizer.convert_tokens_to_ids("Ġ")
            for c in f"{answer}\n":
                h = normed(embedding[before])
                if way == "thoughts":  # the hidden state at <end> is that of <end> alone
                    after = normed(state["boundary.end_raw"] * model.boundary.scale)
                    h = h + mixing(h, after) * (after - h)
                before = tokenizer.convert_tokens_to_ids({"\n": "Ċ"}.get(c, c))
                if c in allowed:  # a comma is read, not scored
                    p = {of: np.exp(head[token] @ h) for of, token in ids.items()}
                    product, best = product * p[c] / sum(p.values()), best and p[c] == max(p.values())
            assert found[way][i]["soft"] == pytest.approx(product, rel=1e-6, abs=1e-9)
            assert found[way][i]["argmax"] == best
    assert max(x["soft"] for x in found["thoughts"]) > 1e-3
    assert 0 < sum(x["argmax"] for x in found["without"]) < 50
    assert found["without"] != found["thoughts"]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_scores_of_a_batch_equal_one_plain_forward_a_token(model, tokenizer, batch_size):
    slow, tokens = SlowPredictions(model), Tokens(tokenizer)
    asked = [*map(gsm8k, sums_told(5)), *map(choice, choices_told(5))]  # sets of both kinds in a batch
    items = [tokens.item(question) for question in asked]
    found = scores(model, items, batch_size=batch_size)
    for i, item in enumerate(items):
        for way, logits in (("without", slow.logits), ("thoughts", slow.with_thought)):
            soft, best = teacher_forced(item.input_ids, [t + 1 for t in item.at], item.allowed, logits)
            assert found[way][i]["soft"] == pytest.approx(soft, rel=1e-3, abs=1e-9)
            assert found[way][i]["argmax"] == best


@torch.no_grad()
def test_shuffled_and_paused_predictions_equal_a_plain_forward_with_those_thoughts(model, tokenizer):
    slow = SlowPredictions(model)
    texts = [tokenizer(x)["input_ids"] for x in ("the state of", "we meet today to speak", "the roads, the")]
    batch = collate([{"input_ids": x, "position_ids": list(range(len(x)))} for x in texts])
    at = batch["attention_mask"] != 0
    at[:, ::3] = False
    source = torch.Generator().manual_seed(1)
    found = predict(model, batch, at, WAYS, ThoughtSampling(pause_token=pause_token(tokenizer)), source)
    where = at.nonzero().tolist()
    assert len(where) > 10
    for i, (row, t) in enumerate(where):
        prefix = texts[row][: t + 1]
        assert found["thoughts"].tokens[i].tolist() == slow.greedy_thought(prefix)
        assert found["pause"].tokens[i].tolist() == [pause_token(tokenizer)] * 3
        for way in ("thoughts", "shuffled", "pause"):
            truth = slow.logits(prefix, found[way].tokens[i].tolist())
            assert torch.allclose(found[way].logits(model.linear_head())[i], truth, atol=2e-4)
        assert torch.allclose(found["without"].logits(model.linear_head())[i], slow.logits(prefix), atol=2e-4)
    assert sorted(found["shuffled"].tokens.tolist()) == sorted(found["thoughts"].tokens.tolist())


@torch.no_grad()
def test_the_prediction_after_a_thought_alone_is_what_the_mixed_one_adds_to_the_base(model):
    ids = tokens(1, 9)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = predict(model, batch, torch.ones_like(ids, dtype=torch.bool), ("without", "thoughts", ALONE))
    base, mixed, alone = (found[way].logits(model.linear_head()) for way in ("without", "thoughts", ALONE))
    w = found["thoughts"].weight[:, None]
    torch.testing.assert_close(base + w * (alone - base), mixed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, mixed, atol=0.1)
    again = predict(model, batch, torch.ones_like(ids, dtype=torch.bool), (ALONE,))[ALONE]
    assert torch.equal(again.logits(model.linear_head()), alone)


@torch.no_grad()
def test_a_frozen_writers_thoughts_are_those_of_the_model_before_it_learned():
    model = thinking_model(writer="base", policy_weight=0.0)
    before = SlowPredictions(model)
    model.writer.keep(model.base.parameters())
    torch.manual_seed(0)
    for parameter in model.base.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    after = SlowPredictions(model)
    ids = tokens(1, 9)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = predict(model, batch, torch.ones_like(ids, dtype=torch.bool), ("thoughts",))["thoughts"]
    for t in range(9):
        prefix = ids[0, : t + 1].tolist()
        thought = before.greedy_thought(prefix)
        assert found.tokens[t].tolist() == thought
        assert torch.allclose(found.logits(model.linear_head())[t], after.logits(prefix, thought), atol=2e-4)
    assert any(after.greedy_thought(ids[0, : t + 1].tolist()) != found.tokens[t].tolist() for t in range(9))


def test_block_chunks_change_no_prediction(model, tokenizer):
    ids = torch.tensor([tokenizer(PROSE[:60])["input_ids"]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    at = torch.ones_like(ids, dtype=torch.bool)
    whole = predict(model, batch, at, ("thoughts",))["thoughts"]
    own = model.quiet_star
    try:
        model.quiet_star = QuietStarConfig(**(vars(own) | {"block_chunk": 3 * own.num_thoughts * own.slots}))
        parts = predict(model, batch, at, ("thoughts",))["thoughts"]
    finally:
        model.quiet_star = own
    assert torch.equal(parts.tokens, whole.tokens)
    assert torch.allclose(parts.thought, whole.thought, atol=1e-5)


@pytest.mark.parametrize("counts", [[3, 4, 4], [1, 1], [5], [9, 1, 1], [2]], ids=str)
def test_no_shuffled_thought_stays_and_none_stays_in_its_row_where_no_row_has_most(counts):
    P = max(counts)
    valid = torch.arange(P) < torch.tensor(counts)[:, None]
    numbers = torch.arange(len(counts) * P).view(len(counts), P, 1, 1)
    for seed in range(20):
        moved = shuffled(numbers, valid, torch.Generator().manual_seed(seed))
        assert sorted(moved[valid].flatten().tolist()) == sorted(numbers[valid].flatten().tolist())
        assert bool((moved != numbers)[valid].all())
        if 2 * max(counts) <= sum(counts):
            assert bool((moved // P != numbers // P)[valid].all())
        again = shuffled(numbers, valid, torch.Generator().manual_seed(seed))
        assert torch.equal(moved, again)


def test_thoughts_that_cannot_be_shuffled_are_refused():
    with pytest.raises(ValueError, match="batch_size: 1 thoughts in a batch cannot be shuffled"):
        shuffled(torch.zeros(1, 1, 1, 2), torch.ones(1, 1, dtype=torch.bool))


def test_sampled_thoughts_follow_the_temperature_and_the_seed(model, tokenizer):
    ids = torch.tensor([tokenizer(PROSE[:40])["input_ids"]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    at = torch.ones_like(ids, dtype=torch.bool)

    def drawn(temperature, seed):
        source = torch.Generator().manual_seed(seed)
        return predict(model, batch, at, ("thoughts",), ThoughtSampling(temperature), source)[
            "thoughts"
        ].tokens

    assert torch.equal(drawn(0.0, 0), drawn(0.0, 1))
    assert torch.equal(drawn(2.0, 0), drawn(2.0, 0))
    assert not torch.equal(drawn(2.0, 0), drawn(2.0, 1))
    with pytest.raises(ValueError, match=r"thought_temperature = -1: must be at least 0"):
        ThoughtSampling(-1)


# -- questions


def test_prompts_are_those_of_the_paper():
    asked = gsm8k({"question": "How many?", "answer": "It is.\n#### 1,080"})
    assert (asked.prompt, asked.answer) == ("Q: How many?\nA:", " 1,080\n")
    record = {
        "question": "Where?",
        "choices": {"label": list("ABC"), "text": ["x", "y", "z"]},
        "answerKey": "B",
    }
    asked = choice(record)
    assert asked.prompt == "Q: Where?\n(A) x\n(B) y\n(C) z\nA:"
    assert (asked.answer, asked.labels) == (" B\n", ("A", "B", "C"))
    pairs = [{"label": label, "text": text} for label, text in zip("ABC", "xyz")]
    for same in (
        {"question": {"stem": "Where?", "choices": pairs}, "answerKey": "B"},
        {"question": "Where?", "choices": pairs, "answer": "B"},
        {"question_stem": "Where?", "choices": list("xyz"), "answer": 1},
    ):
        assert choice(same) == asked


@pytest.mark.parametrize(
    ("read", "record", "message"),
    [
        (gsm8k, {"question": "a", "answer": "5"}, "has no texts `question` and `answer`"),
        (gsm8k, {"question": "a", "answer": "#### five"}, "its answer 'five' holds no digit"),
        (choice, {"question": "a", "answerKey": "A"}, "two or more `choices`"),
        (choice, {"question": "a", "choices": ["x", 3], "answer": 0}, "two or more `choices`"),
        (choice, {"question": "a", "choices": ["x", "y"], "answer": "C"}, "is 'C': must be one of"),
        (choice, {"question": "a", "choices": ["x", "y"], "answer": 2}, "is 2: must be one of"),
    ],
)
def test_a_record_of_another_format_is_refused(read, record, message):
    with pytest.raises(ValueError, match=message):
        read(record)


def test_the_set_holds_numbers_or_labels_and_the_newline_and_a_comma_is_not_scored(tokenizer):
    tokens = Tokens(tokenizer)
    item = tokens.item(gsm8k({"question": "a", "answer": "#### 1,072"}))
    names = tokenizer.convert_ids_to_tokens
    assert set(names(item.allowed)) == {"Ċ", *"0123456789"}
    assert [names(item.allowed[i]) for i in item.targets] == [*"1072", "Ċ"]
    assert [names(item.input_ids[t + 1]) for t in item.at] == [*"1072", "Ċ"]
    item = tokens.item(choice(choices_told(1)[0]))
    assert set(names(item.allowed)) == {"Ċ", *LETTERS}
    with pytest.raises(ValueError, match="label 'the end' must be one token"):
        tokens.item(Question("Q: a\nA:", " the end\n", ("the end", "b")))


def test_too_long_a_question_is_an_error_or_cut_and_logged(tokenizer, caplog):
    item = Tokens(tokenizer).item(gsm8k({"question": PROSE, "answer": "#### 42"}))
    longest = len(item.input_ids) - 10
    assert fitted([item], len(item.input_ids)) == ([item], 0)
    with pytest.raises(ValueError, match=rf"question 0 has {longest + 10} tokens .* context holds {longest}"):
        fitted([item], longest)
    (short,), cut = fitted([item], longest, truncate=True)
    assert cut == 1 and "1 of 1 questions are cut" in caplog.text
    assert short.input_ids == item.input_ids[10:]
    assert [short.input_ids[t] for t in short.at] == [item.input_ids[t] for t in item.at]
    with pytest.raises(ValueError, match="question 0 has"):  # not even the answer would be whole
        fitted([item], 2, truncate=True)


# -- text


def test_nll_of_text_equals_a_plain_forward_a_token_in_every_way(model, tokenizer):
    slow = SlowPredictions(model)
    found = spans([PROSE[:70], PROSE[70:150]], tokenizer, span_length=14, tokens_per_span=5)
    assert max(len(span.input_ids) for span in found) == 14 and len(found) > 4
    task = PlainText(found)
    figures = {"without": [], "thoughts": []}
    for first in range(0, len(found), 2):
        numbers = list(range(first, min(first + 2, len(found))))
        of = task.score(model, numbers, ("without", "thoughts"), ThoughtSampling(), torch.Generator())
        for way in figures:
            figures[way] += of[way]
    for way, logits in (("without", slow.logits), ("thoughts", slow.with_thought)):
        for span, x in zip(found, figures[way]):
            truth = [-logits(span.input_ids[: t + 1]).log_softmax(-1)[span.input_ids[t + 1]] for t in span.at]
            assert x["nll"] == pytest.approx([float(v) for v in truth], abs=1e-4)
    assert figures["without"][0]["weight"] == 0 != figures["thoughts"][0]["weight"]


def test_spans_are_the_clusters_of_one_text_and_documents_those_of_many(tokenizer):
    one = spans([PROSE], tokenizer, 20)
    assert [span.cluster for span in one] == list(range(len(one)))
    many = spans([PROSE, "the state"], tokenizer, 20)
    assert {span.cluster for span in many} == {0, 1}
    assert sum(len(span.at) for span in one) == sum(len(span.input_ids) - 1 for span in one)
    for name, value in (("span_length", 1), ("tokens_per_span", 0)):
        with pytest.raises(ValueError, match=f"{name} = {value}: must be at least"):
            spans([PROSE], tokenizer, **({"span_length": 9} | {name: value}))


def test_the_table_of_text_shows_that_a_temperature_alone_lowers_the_hard_nll():
    draw = np.random.default_rng(0)
    temperatures = torch.tensor(TEMPERATURES, dtype=torch.float64)
    logits = torch.from_numpy(draw.normal(0, 3, (40, 25, 50)))
    # a calibrated model: its targets are drawn from its own prediction
    target = (logits + torch.from_numpy(draw.gumbel(size=logits.shape))).argmax(-1)
    nll = -(logits / temperatures.view(-1, 1, 1, 1)).log_softmax(-1)
    nll = nll.gather(-1, target.expand(len(TEMPERATURES), -1, -1)[..., None])[..., 0]
    chosen = [Span([0] * 26, list(range(25)), i) for i in range(40)]
    plain = [{"nll": row.tolist(), "weight": 0.0} for row in nll[TEMPERATURES.index(1.0)]]
    smooth = [{"nll": row.T.tolist()} for row in nll.transpose(0, 1)]
    found = measured(chosen, {"base": plain, "thoughts": plain}, smooth, "base")
    means = {name: x.sums.sum() / x.counts.sum() for name, x in found.hard.items()}
    at = {t: next(x for name, x in means.items() if name.startswith(f"base, T = {t}")) for t in (1.05, 1.1)}
    assert at[1.1] < at[1.05] < means["base"] - 0.05
    assert next(iter(means)) == "base" and list(means)[-1] == "thoughts"
    best = [name for name in means if "best for hard" in name]
    assert len(best) == 1 and means[best[0]] == min(means.values())
    best = [name for name in means if "best for all" in name]
    everything = {name: x.sums.sum() for name, x in found.all.items()}
    assert everything[best[0]] == min(everything.values())
    assert found.hard["base"].counts.sum() == 100 and found.all["base"].counts.sum() == 1000


def test_text_is_scored_without_ever_holding_all_logits(model, tokenizer, monkeypatch):
    V = len(tokenizer)
    monkeypatch.setattr("qstar_kernels.vocabulary.head.WORKSPACE_BYTES", 16 * V * 4)
    found = spans([PROSE * 3], tokenizer, 60)
    with LargestTensor() as seen:
        PlainText(found).score(
            model, [0, 1, 2], (*WAYS, SMOOTHED), ThoughtSampling(0.0, 5), torch.Generator()
        )
    assert seen.elements < 3 * 59 * V


# -- majority vote


def test_the_first_integer_of_an_answer_counts():
    assert first_integer(" 1,080 apples and 3") == 1080
    assert first_integer(" $5.50") == 5
    assert first_integer(" none") is None


def test_chains_are_cut_asked_and_voted_on(model, tokenizer, monkeypatch):
    asked = [
        gsm8k({"question": "How many?", "answer": "#### 12"}),
        gsm8k({"question": "And?", "answer": "#### 3"}),
    ]
    chains = [" First. Q: And", " a\n\n\nb\n\n\nc", " d  ", " e", " f", " g"]
    answers = [" 12.", " 12", " 7", " 3", " none", " nothing"]
    seen = []

    def continued(self, model, prompts, tokens, stop, think, thinking, seed):
        seen.append((prompts, tokens, stop, think))
        return chains if tokens == 20 else answers

    monkeypatch.setattr(MajorityVote, "_continued", continued)
    task = MajorityVote(asked, tokenizer, votes=3, chain_tokens=20)
    both = task.score(model, [0, 1], ("without", "thoughts"), ThoughtSampling(), torch.Generator())
    assert [think for *_, think in seen] == ["never", "never", "always", "always"]
    found = both["without"]
    assert found[0] == {"answers": [12, 12, 7], "chain": pytest.approx(2 / 3), "majority": 1}
    assert found[1] == {"answers": [3, None, None], "chain": pytest.approx(1 / 3), "majority": 0}
    begin = "Q: How many?\nA: Let's think step by step."
    assert seen[0] == ([begin] * 3 + [begin.replace("How many?", "And?")] * 3, 20, ["Q:"], "never")
    ask = "\nTherefore, the answer (arabic numerals) is"
    assert seen[1][0][:3] == [begin + x + ask for x in (" First.", " a\n\n\nb", " d")]


def test_votes_are_sampled_by_the_seed_and_do_not_depend_on_the_other_way(model, tokenizer):
    asked = [gsm8k(x) for x in sums_told(2)]
    task = MajorityVote(asked, tokenizer, votes=2, chain_tokens=5, answer_tokens=3)

    def texts(seed, way):
        source = torch.Generator().manual_seed(seed)
        return task._continued(
            model, ["the state"] * 3, 6, None, way, ThoughtSampling(), source.initial_seed()
        )

    assert texts(0, "always") == texts(0, "always") != texts(1, "always")
    assert len(set(texts(0, "never"))) > 1
    source = torch.Generator().manual_seed(0)
    both = task.score(model, [0, 1], ("without", "thoughts"), ThoughtSampling(), source)
    assert task.score(model, [0, 1], ("thoughts",), ThoughtSampling(), source)["thoughts"] == both["thoughts"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"votes": 0}, "votes = 0: must be at least 1"),
        ({"temperature": 0.0}, "temperature = 0.0: must be positive"),
    ],
)
def test_options_of_the_majority_vote_are_checked(tokenizer, option, message):
    with pytest.raises(ValueError, match=message):
        MajorityVote([], tokenizer, **option)


def test_chains_that_do_not_fit_the_context_are_refused_before_any_is_written(model, tokenizer):
    task = MajorityVote([gsm8k(sums_told(1)[0])], tokenizer)
    with pytest.raises(ValueError, match=r"chain_tokens = 384: .* more than the model's context of 128"):
        task.check(model)


# -- intervals


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(2, 3, 400)
    (alone, _) = estimates({"a": Sums.of(values)}, [])
    a, half = alone["a"], 1.96 * values.std() / 20
    assert a.mean == pytest.approx(values.mean()) and a.n == 400
    assert (a.low, a.high) == (pytest.approx(a.mean - half, abs=0.03), pytest.approx(a.mean + half, abs=0.03))


def test_a_paired_difference_is_narrower_than_its_conditions_and_clusters_are_wider_than_tokens():
    draw = np.random.default_rng(2)
    hard = draw.normal(0, 1, 100)
    a, b = hard + draw.normal(0, 0.1, 100), hard + 0.2 + draw.normal(0, 0.1, 100)
    alone, of = estimates({"a": Sums.of(a), "b": Sums.of(b)}, [("b", "a")])
    difference = of["b", "a"]
    assert difference.mean == pytest.approx((b - a).mean())
    assert 0.1 < difference.low < 0.2 < difference.high < 0.3
    assert alone["a"].high - alone["a"].low > 4 * (difference.high - difference.low)

    text = np.repeat(np.arange(20), 30)
    nll = draw.normal(0, 1, 20)[text] + draw.normal(0, 1, 600)
    by_text = estimates({"a": Sums.by_cluster(nll, text)}, [])[0]["a"]
    by_token = estimates({"a": Sums.of(nll)}, [])[0]["a"]
    assert by_text.mean == pytest.approx(by_token.mean) and by_text.n == by_token.n == 600
    assert by_text.high - by_text.low > 2 * (by_token.high - by_token.low)


def test_only_chosen_tokens_count_and_draws_without_any_are_left_out():
    values, text = np.array([1.0, 5.0, 7.0]), np.array([0, 1, 1])
    found = Sums.by_cluster(values, text, np.array([False, True, False]))
    (alone, _) = estimates({"a": found}, [])
    assert (alone["a"].mean, alone["a"].low, alone["a"].high, alone["a"].n) == (5, 5, 5, 1)


def test_batches_are_even_and_the_longest_question_comes_first():
    assert batches([1, 9, 5, 7, 3], 2) == [[1], [3, 2], [4, 0]]
    found = batches(list(range(17)), 8)
    assert sorted(i for batch in found for i in batch) == list(range(17))
    assert [len(batch) for batch in found] == [5, 6, 6]
