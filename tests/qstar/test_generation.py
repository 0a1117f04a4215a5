"""The generator: drafting changes nothing but the speed, and every convention of transformers' holds."""

import gc

import pytest
import torch
from tiny_models import base_model, thinking_model, tokens, write
from tiny_tokenizer import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.data import left_padded
from qstar.demo import TINY_LM
from qstar.generation import acceptance, loop
from qstar.generation.acceptance import DraftLength, accept_greedy, accept_sampled

KINDS = ["llama", "mistral", "gemma3_text", "gpt2", "opt"]


def prompts(padded: bool = True):
    """Four prompts of different lengths, left-padded: (ids [4, 12], mask)."""
    ids, mask = tokens(4, 12), torch.ones(4, 12, dtype=torch.long)
    if padded:
        mask[1, :5], mask[2, :1], mask[3, :9] = 0, 0, 0
    return ids, mask


# -- drafting changes nothing


@pytest.mark.parametrize("draft_length", [1, 3, 7, None])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_drafting_gives_the_sequential_text_thoughts_and_figures(kind, draft_length):
    model, (ids, mask) = thinking_model(kind, mix=0.1), prompts()
    options = {"max_new_tokens": 15, "thought_temperature": 0.0}
    slow = write(model, ids, mask, draft_length=0, **options)
    fast = write(model, ids, mask, draft_length=draft_length, **options)
    assert torch.equal(fast.sequences, slow.sequences)
    assert torch.equal(fast.thoughts, slow.thoughts)
    for name in ("mix_weight", "base_logprobs", "mixed_logprobs"):
        assert (getattr(fast, name) - getattr(slow, name)).abs().max() <= 1e-5, name
    assert fast.counts["model_steps"] < slow.counts["model_steps"]
    assert slow.counts["model_steps"] == 15 * (3 + 1) + 14  # thoughts, and tokens but the last


@pytest.mark.parametrize("threshold", [0.0, 2.0, 2.6, 3.2, 9.0])
def test_adaptive_thinking_is_the_same_with_drafts_and_thinks_where_the_base_is_unsure(threshold):
    model, (ids, mask) = thinking_model(mix=0.1), prompts()
    options = {"max_new_tokens": 15, "thought_temperature": 0.0, "think": "adaptive"}
    slow, fast = (
        write(model, ids, mask, draft_length=n, entropy_threshold=threshold, **options) for n in (0, None)
    )
    assert torch.equal(fast.sequences, slow.sequences)
    assert torch.equal(fast.thoughts, slow.thoughts)
    for row in range(4):
        text = fast.sequences[row, mask[row].argmax() :]
        base = model.base(input_ids=text[None]).logits[0, -16:-1].log_softmax(-1)
        unsure = -(base.exp() * base).sum(-1) > threshold
        assert torch.equal(fast.thoughts[row, :, 0] >= 0, unsure)
        assert bool((fast.mix_weight[row][~unsure] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_without_thinking_it_is_stock_generation_of_the_base_model(kind):
    model, (ids, mask) = thinking_model(kind), prompts()
    options = {"max_new_tokens": 12, "eos_token_id": 7, "pad_token_id": 0, "repetition_penalty": 1.3}
    stock = model.base.generate(ids, attention_mask=mask, do_sample=False, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, think="never", **options), stock)
    unsure = model.generate(ids, attention_mask=mask, think="adaptive", entropy_threshold=1e9, **options)
    assert torch.equal(unsure, stock)


def test_processors_see_the_text_of_their_own_row_up_to_the_token():
    class Seen(LogitsProcessor):
        def __init__(self):
            self.seen: dict[tuple, torch.Tensor] = {}

        def __call__(self, input_ids, scores):
            for row in input_ids.tolist():
                self.seen[tuple(row)] = scores
            return scores - torch.nn.functional.one_hot(input_ids[:, -1], 61) * 2.0

    model, (ids, mask) = thinking_model(mix=0.1), prompts()
    found = []
    for draft_length in (0, None):
        seen = Seen()
        options = {"logits_processor": LogitsProcessorList([seen]), "thought_temperature": 0.0}
        out = write(model, ids, mask, max_new_tokens=9, draft_length=draft_length, **options)
        for row in out.sequences.tolist():
            assert all(tuple(row[:n]) in seen.seen for n in range(12, 21))
        found.append(out.sequences)
    assert torch.equal(*found)


# -- sampling has exactly the sequential distribution


def _small_model() -> QuietStarForCausalLM:
    base = base_model(vocab_size=6, seed=3)
    config = QuietStarConfig(thought_length=2, talk_length=1, num_thoughts=1, suppressed_tokens=[])
    model = QuietStarForCausalLM.from_base(base, config)
    torch.manual_seed(4)
    with torch.no_grad():
        for boundary in (model.boundary.start_raw, model.boundary.end_raw):
            boundary.normal_(0, 0.6 / model.boundary.scale)
        model.mixing.layers[-1].weight.normal_(0, 0.15)
    return model.eval()


DRAWS, ROWS = 20_000, 2_500


def _pairs(model, seed: int, **options) -> torch.Tensor:
    """How often each pair of the first two tokens was drawn, [36]."""
    source, counts = torch.Generator().manual_seed(seed), torch.zeros(36)
    for _ in range(DRAWS // ROWS):
        out = model.generate(
            torch.tensor([[2, 5, 3, 4]]), do_sample=True, top_k=0, num_return_sequences=ROWS,
            max_new_tokens=3, eos_token_id=None, pad_token_id=0, generator=source, **options,
        )  # fmt: skip
        counts += torch.bincount(out[:, 4] * 6 + out[:, 5], minlength=36)
    return counts


def _p_value(a: torch.Tensor, b: torch.Tensor) -> float:
    """Chi-square test that two equally long series of draws have one distribution."""
    seen = (a + b) > 0
    statistic = ((a - b) ** 2 / (a + b))[seen].sum().double()
    freedom = torch.tensor((int(seen.sum()) - 1) / 2, dtype=torch.double)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.fixture(scope="module")
def sequential():
    model = _small_model()
    return model, _pairs(model, seed=0, draft_length=0)


def test_sampled_drafts_have_the_distribution_of_thinking_one_token_at_a_time(sequential):
    model, expected = sequential
    assert _p_value(expected, _pairs(model, seed=1, draft_length=2)) > 1e-3
    assert _p_value(expected, _pairs(model, seed=2, think="never")) < 1e-9  # thoughts do change it


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["keep every draft", "no residual"])
def test_a_wrong_acceptance_rule_is_caught(sequential, rule, monkeypatch):
    def wrong(wanted, drafted_from, drafts, generator=None):
        if rule == "keep every draft":
            wanted = torch.cat([drafted_from, wanted[:, -1:]], 1)
            return accept_sampled(wanted, drafted_from, drafts, generator)
        count, _ = accept_sampled(wanted, drafted_from, drafts, generator)
        after = wanted[torch.arange(len(count)), count]
        return count, torch.multinomial(after, 1, generator=generator).squeeze(1)

    model, expected = sequential
    monkeypatch.setattr(loop, "accept_sampled", wrong)
    assert _p_value(expected, _pairs(model, seed=1, draft_length=2)) < 1e-3


def test_the_same_seed_gives_the_same_text_whatever_else_the_machine_does():
    model, (ids, mask) = thinking_model(mix=0.1), prompts()
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
    one, two = (
        write(model, ids, mask, generator=torch.Generator().manual_seed(5), **options).sequences
        for _ in range(2)
    )
    assert torch.equal(one, two)


def test_acceptance_by_hand():
    scores = torch.tensor([[[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]])
    for drafts, count, last in (([1, 2], 2, 0), ([1, 0], 1, 2), ([0, 2], 0, 1)):
        assert [x.tolist() for x in accept_greedy(scores, torch.tensor([drafts]))] == [[count], [last]]
    certain, other = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
    wanted = torch.cat([certain, other], 1)
    assert [x.tolist() for x in accept_sampled(wanted, certain, torch.tensor([[1]]))] == [[1], [0]]
    assert [x.tolist() for x in accept_sampled(wanted, other, torch.tensor([[0]]))] == [[0], [1]]


def test_the_draft_grows_with_the_acceptance_and_shrinks_without():
    length, found = DraftLength(thought_steps=9), []
    for accepted in (0, 16):
        for _ in range(60):
            length.saw(accepted, 16)
        found.append(length.next())
    assert found[0] <= 1
    assert found[1] >= 12
    assert DraftLength(9, fixed=3).next() == 3
    assert acceptance.DraftLength.MOST <= loop.LONGEST_DRAFT


# -- transformers' conventions


def test_a_row_that_ends_inside_a_draft_ends_there_and_the_others_go_on():
    model, (ids, mask) = thinking_model(mix=0.1), prompts()
    options = {"max_new_tokens": 15, "thought_temperature": 0.0}
    free = write(model, ids, mask, **options).new_tokens
    for step in (0, 1, 4, 14):  # at once, in a draft, at the very end
        eos = int(free[0, step])
        out = write(model, ids, mask, eos_token_id=eos, pad_token_id=60, draft_length=6, **options)
        for row, expected in zip(out.new_tokens.tolist(), free.tolist()):
            until = expected.index(eos) + 1 if eos in expected else 15
            assert row == expected[:until] + [60] * (len(row) - until)
        ended = out.new_tokens[0].tolist().index(eos) + 1
        assert bool((out.thoughts[0, ended:] == -1).all())


@pytest.mark.parametrize("draft_length", [0, 2, 5, None])
def test_a_stop_string_ends_the_text_also_across_drafts(draft_length):
    model, tokenizer = thinking_model(mix=0.1), tiny_tokenizer()
    ids = tokens(1, 12)
    options = {"max_new_tokens": 15, "thought_temperature": 0.0, "draft_length": draft_length}
    free = write(model, ids, **options).new_tokens[0]
    stop = tokenizer.decode(free[4:6])
    out = write(model, ids, stop_strings=[stop], tokenizer=tokenizer, **options).new_tokens[0].tolist()
    assert out == free[: len(out)].tolist()
    assert stop in tokenizer.decode(out)
    assert stop not in tokenizer.decode(out[:-1])
    with pytest.raises(ValueError, match="tokenizer = None: stop_strings = "):
        write(model, ids, stop_strings=[stop], **options)


def test_stopping_criteria_streamer_and_callbacks_see_every_token_once():
    class Five(StoppingCriteria):
        def __call__(self, input_ids, scores, **options):
            return torch.full((len(input_ids),), input_ids.shape[1] == 17)

    class Streamer:
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, ids, streamer = thinking_model(mix=0.1), tokens(1, 12), Streamer()
    told, finished = [], []
    out = write(
        model, ids, max_new_tokens=15, stopping_criteria=StoppingCriteriaList([Five()]), streamer=streamer,
        on_token=lambda *x: told.append(x), on_finished=finished.append,
    )  # fmt: skip
    assert out.sequences.shape == (1, 17)
    assert streamer.values == out.sequences[0].tolist()
    assert streamer.ended
    assert [token for _, token, _ in told] == out.new_tokens[0].tolist()
    assert [thought for *_, thought in told] == out.thoughts[0].tolist()
    assert finished == [0]


def test_a_tokenizers_output_is_taken_as_it_is():
    tokenizer = tiny_tokenizer(pad=True)
    tokenizer.padding_side = "left"
    model = QuietStarForCausalLM.from_base(base_model(vocab_size=len(tokenizer)), QuietStarConfig())
    batch = tokenizer(["the state", "we meet today"], padding=True, return_tensors="pt")
    options = {"max_new_tokens": 4, "thought_temperature": 0.0, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(**batch, **options)
    expected = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    assert torch.equal(out, expected)
    for given in ({}, {"inputs": batch["input_ids"], "input_ids": batch["input_ids"]}):
        with pytest.raises(ValueError, match="inputs, input_ids: give exactly one of them"):
            model.generate(**given)


def test_several_sequences_of_a_prompt_and_what_is_returned():
    model, (ids, mask) = thinking_model(mix=0.1), prompts()
    plain = model.generate(
        ids, attention_mask=mask, do_sample=True, num_return_sequences=3, max_new_tokens=4, min_p=0.05
    )
    assert plain.shape == (12, 16)
    assert torch.equal(plain[:, :12], ids.repeat_interleave(3, 0))
    out = write(model, ids, mask, max_new_tokens=5, output_scores=True, do_sample=True, temperature=0.5)
    assert out.logits.shape == out.scores.shape == (4, 5, 61)
    top = torch.topk(out.logits / 0.5, 50).values[..., -1:]  # transformers' default is top_k 50
    expected = (out.logits / 0.5).masked_fill(out.logits / 0.5 < top, -torch.inf)
    assert torch.allclose(out.scores, expected, atol=1e-5)
    at = out.new_tokens[..., None]
    assert torch.allclose(out.mixed_logprobs, out.logits.log_softmax(-1).gather(2, at)[..., 0], atol=1e-5)
    for row in range(4):
        text = out.sequences[row, mask[row].argmax() :]
        base = model.base(input_ids=text[None]).logits[0, -6:-1].log_softmax(-1)
        assert torch.allclose(out.base_logprobs[row], base.gather(1, at[row])[:, 0], atol=1e-4)
    assert out.counts["tokens"] == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "num_beams = 3: is not supported"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha = 0.6: is not supported"),
        ({"output_attentions": True}, "output_attentions = True: is not supported"),
        ({"think": "often"}, "think = 'often': must be one of always, adaptive, never"),
        ({"think": "adaptive"}, "entropy_threshold = None: must be set, here or by `qstar calibrate`"),
        ({"draft_length": -1}, "draft_length = -1: must be at least 0, or None"),
        ({"thought_length": -1}, "thought_length = -1: must be at least 0"),
        ({"thought_temperature": -0.1}, "thought_temperature = -0.1: must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_token": 3}, "max_new_token"),
        ({"streamer": object()}, "streamer: streams one sequence"),
        ({"labels": tokens(2, 5)}, "labels: is not used by this generator"),
        (
            {"think": "adaptive", "entropy_threshold": float("nan")},
            "entropy_threshold = nan: must be a number",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else x[:40],
)
def test_what_cannot_be_done_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        thinking_model().generate(tokens(2, 5), **options)


def test_an_empty_prompt_and_one_beyond_the_context_are_refused_unless_cutting_is_asked_for(caplog):
    model = thinking_model("gpt2")
    with pytest.raises(ValueError, match=r"input_ids has shape \(1, 0\): must be .* at least 1"):
        model.generate(tokens(1, 0))
    ids = tokens(1, 120)
    with pytest.raises(ValueError, match=r"a prompt of 120, .* exceed the model's context of 96"):
        model.generate(ids, max_new_tokens=5)
    out = write(model, ids, max_new_tokens=5, truncate_prompt=True, thought_temperature=0.0)
    fits = 96 - (5 - 1 + 5)
    expected = write(model, ids[:, -fits:], max_new_tokens=5, thought_temperature=0.0)
    assert torch.equal(out.sequences, expected.sequences)
    assert f"the prompt of 120 tokens is cut to its last {fits}" in caplog.text


def test_without_a_length_twenty_tokens_are_written_and_a_max_length_counts_the_prompt():
    model = thinking_model(mix=0.1)
    options = {"eos_token_id": None, "pad_token_id": 0}
    assert model.generate(tokens(1, 25), **options).shape == (1, 45)
    assert model.generate(tokens(1, 25), max_length=30, **options).shape == (1, 30)
    with pytest.raises(ValueError, match="max_new_tokens = -5: must be at least 1"):
        model.generate(tokens(1, 25), max_length=20, **options)
    cut = model.generate(tokens(1, 200), max_length=206, truncate_prompt=True, **options)
    assert cut.shape == (1, 96 - (6 - 1 + 5) + 6)


def test_a_draft_stops_at_the_end_and_no_processor_is_asked_what_follows_it():
    model, (ids, _) = thinking_model(mix=0.1), prompts()
    eos = int(write(model, ids[:1], max_new_tokens=5, thought_temperature=0.0).new_tokens[0, 3])

    def allowed(batch_id, text):
        return [] if eos in text[12:].tolist() else list(range(2, 61))

    options = {"max_new_tokens": 12, "eos_token_id": eos, "thought_temperature": 0.0}
    out = write(model, ids[:1], prefix_allowed_tokens_fn=allowed, draft_length=9, **options)
    assert out.new_tokens[0, -1] == eos
    slow = write(model, ids[:1], prefix_allowed_tokens_fn=allowed, draft_length=0, **options)
    assert torch.equal(out.sequences, slow.sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_low_precision_generates_and_leaves_every_module_in_its_mode(dtype):
    model = thinking_model().to(dtype).train()
    model.base.eval()
    ids, mask = prompts()
    out = write(model, ids, mask, max_new_tokens=4)
    assert out.mix_weight.dtype == torch.float32
    assert (model.training, model.base.training, model.mixing.training) == (True, False, True)


# -- the embedded model


def _embedded(**changes) -> QuietStarForCausalLM:
    """The demo's model with a random mixing head: it thinks, and its thoughts change what it says."""
    base = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype=torch.float32, **changes)
    model = QuietStarForCausalLM.from_base(base, QuietStarConfig(thought_length=8))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.mixing.layers[-1].weight, std=0.01)
    return model.eval()


@pytest.mark.slow
def test_fifty_prompts_alone_and_in_batches_of_four_are_continued_as_one_token_at_a_time():
    model, generator = _embedded(), torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 30, (50,), generator=generator).tolist()
    texts = [torch.randint(1, 2048, (n,), generator=generator) for n in lengths]
    options = {"max_new_tokens": 10, "thought_temperature": 0.0, "output_logits": False}
    slow = [write(model, text[None], draft_length=0, **options) for text in texts]
    assert max(float(x.mix_weight.abs().max()) for x in slow) > 0.01
    accepted = tested = 0
    for text, expected in zip(texts, slow):
        fast = write(model, text[None], **options)
        assert torch.equal(fast.sequences, expected.sequences)
        accepted, tested = accepted + fast.counts["accepted"], tested + fast.counts["tested"]
    assert 0 < accepted < tested  # some drafts are not kept
    for first in range(0, 50, 4):
        ids, mask = left_padded([text.tolist() for text in texts[first : first + 4]])
        fast = write(model, ids, mask, **options)
        for row, expected in zip(fast.new_tokens, slow[first:]):
            assert torch.equal(row, expected.new_tokens[0])


@pytest.mark.slow
def test_memory_grows_with_the_text_alone_and_not_with_the_thoughts(monkeypatch):
    def held() -> int:
        gc.collect()
        return sum(x.numel() for x in gc.get_objects() if isinstance(x, torch.Tensor))

    model = _embedded(max_position_embeddings=2_100)
    seen: list[int] = []
    step = loop.Generation._round

    def watched(self):
        if self.counts.rounds % 20 == 1:
            seen.append(held())
        step(self)

    monkeypatch.setattr(loop.Generation, "_round", watched)
    options = {"max_new_tokens": 2_000, "thought_length": 4, "output_logits": False}
    out = write(model, tokens(1, 5), **options)
    assert out.counts["thoughts"] >= 2_000
    assert len(seen) > 4
    # the text's keys and values lie in buffers made at the start
    assert max(seen[1:]) - min(seen[1:]) < 20_000 < model.boundary.start.numel() * 2_000 / 10
