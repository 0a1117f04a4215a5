"""`qstar look`: its figures against plain forwards of one position at a time, the data of its page, and what
it refuses."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch
from slow_predictions import SlowPredictions
from tiny_models import plain_slots, thinking_model, tokens
from tiny_tokenizer import PROSE, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.cli.main import main
from qstar.demo import TINY_LM
from qstar.evaluation.held_out import held_out
from qstar.look import thoughts as module
from qstar.look.page import content, name, page, pieces
from qstar.look.thoughts import look, look_config

ABOUT = {"model": "tiny", "seed": 0}
HOSTILE = (
    "<script>console.error('run')</script><!-- “q” 😀 \n\n\t& \"x\" <img src=x onerror=console.error(1)>"
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Slow:
    """One position and one thought of a text, by plain forwards of the model's eager twin."""

    def __init__(self, model, ids):
        self.model, self.ids, self.twin = model, torch.tensor(ids), SlowPredictions(model).twin
        self.head = self.twin.get_output_embeddings()
        with torch.no_grad():
            self.base = self.twin.base_model(input_ids=self.ids[None]).last_hidden_state[0]

    @torch.no_grad()
    def mixed(self, t, thought, j=0):
        """(log-probabilities [V], w) of x_{t+1+j} after the thought and j talk tokens."""
        talk = self.ids[t + 1 : t + 1 + j]
        after = plain_slots(self.model, self.twin, self.ids[: t + 1], torch.tensor(thought), talk)[-1]
        w = self.model.mixing(self.base[t + j], after)
        return self.head((1 - w) * self.base[t + j] + w * after).log_softmax(-1), w, self.head(after)

    def nll(self, log_p, t):
        return -log_p[self.ids[t + 1]]

    def before(self, t):
        return self.head(self.base[t]).log_softmax(-1).detach()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_figure_is_that_of_plain_forwards_one_position_at_a_time(kind):
    model, ids = thinking_model(kind, talk_length=3), tokens(1, 9)[0].tolist()
    found = look(model, ids, None, seeded())
    assert found.thought.shape == (9, 2, 3) and len(found.base_nll) == 8
    slow = Slow(model, ids)
    for t in (0, 4, 6, 7, 8):  # after 6 and 7 the text ends within the talk tokens; after 8 it has ended
        before = slow.before(t)
        values, likeliest = before.exp().topk(module.SHOWN)
        torch.testing.assert_close(found.before[0][t], values)
        assert found.before[1][t].tolist() == likeliest.tolist()
        for r in range(2):
            thought = found.thought[t, r].tolist()
            log_p, w, alone = slow.mixed(t, thought)
            torch.testing.assert_close(found.mix_weight[t, r], w)
            torch.testing.assert_close(found.after[0][t, r], log_p.exp().topk(module.SHOWN).values)
            if t == 8:
                continue
            torch.testing.assert_close(found.base_nll[t], slow.nll(before, t))
            torch.testing.assert_close(found.mixed_nll[t, r], slow.nll(log_p, t))
            torch.testing.assert_close(found.alone_nll[t, r], slow.nll(alone.log_softmax(-1), t))
            steps = range(min(3, 8 - t))
            reward = sum(
                slow.nll(slow.before(t + j), t + j) - slow.nll(slow.mixed(t, thought, j)[0], t + j)
                for j in steps
            )
            torch.testing.assert_close(found.reward[t, r], reward, rtol=1e-4, atol=1e-5)
    expected = (found.base_nll[:, None] - found.mixed_nll).mean(1)
    torch.testing.assert_close(found.gain, expected)
    summary = found.summary()
    assert summary["gain"] == pytest.approx(summary["base_nll"] - summary["mixed_nll"], abs=1e-5)
    assert summary["gaining_share"] == pytest.approx(sum(x > 0.01 for x in expected.tolist()) / 8)
    assert summary["losing_share"] == pytest.approx(sum(x < -0.01 for x in expected.tolist()) / 8)


def test_shuffled_nll_is_that_after_the_thought_of_another_position():
    model, ids = thinking_model(), tokens(1, 2)[0].tolist()
    found = look(model, ids, look_config(model.quiet_star, num_thoughts=1), seeded())
    log_p, *_ = Slow(model, ids).mixed(0, found.thought[1, 0].tolist())  # of two, the other one
    torch.testing.assert_close(found.shuffled_nll[0, 0], -log_p[ids[1]])
    assert abs(found.shuffled_nll - found.mixed_nll).max() > 1e-3


def test_at_temperature_0_it_is_what_score_and_the_generator_predict_with():
    model, ids = thinking_model(), tokens(1, 20)[0].tolist()
    found = look(model, ids, look_config(model.quiet_star, thought_temperature=0.0))
    expected = held_out(model, [{"input_ids": ids, "position_ids": list(range(20))}])
    assert found.thought[:-1, 0].tolist() == expected.thought.tolist()
    for figure in ("base_nll", "mixed_nll", "mix_weight"):
        torch.testing.assert_close(getattr(found, figure)[:19].flatten(), getattr(expected, figure))


def test_positions_read_some_at_a_time_give_the_same(monkeypatch):
    model, ids = thinking_model(), tokens(1, 20)[0].tolist()
    config = look_config(model.quiet_star, thought_temperature=0.0)
    whole = look(model, ids, config)
    monkeypatch.setattr(module, "POSITIONS", 7)
    parts = look(model, ids, config)
    assert whole.thought.tolist() == parts.thought.tolist()
    for figure in ("mixed_nll", "alone_nll", "mix_weight", "reward"):
        torch.testing.assert_close(getattr(whole, figure), getattr(parts, figure))
    torch.testing.assert_close(whole.after[0], parts.after[0])


def test_the_seed_draws_the_thoughts_and_the_model_stays_in_its_mode():
    model, ids = thinking_model().train(), tokens(1, 9)[0].tolist()
    one, again, other = (look(model, ids, None, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.thought, again.thought) and torch.equal(one.shuffled_nll, again.shuffled_nll)
    assert not torch.equal(one.thought, other.thought)
    assert model.training


def test_knobs_are_those_of_training_unless_given():
    trained = QuietStarConfig(
        thought_length=5, num_thoughts=3, thought_temperature=0.7, talk_length=6, block_chunk=99
    )
    config = look_config(trained)
    assert (config.thought_length, config.num_thoughts, config.thought_temperature) == (5, 3, 0.7)
    assert (config.talk_length, config.block_chunk) == (6, None)
    assert look_config(trained, thought_temperature=0.0).num_thoughts == 1
    config = look_config(trained, thought_length=0, num_thoughts=9, thought_temperature=2.0)
    assert (config.thought_length, config.num_thoughts, config.thought_temperature) == (0, 9, 2.0)


def test_a_model_that_has_not_learned_to_think_is_shown_at_w_1_and_says_so():
    model, ids = thinking_model(mix=0), tokens(1, 6)[0].tolist()
    found = look(model, ids, None, seeded())
    assert found.silent and found.gain.abs().max() < 1e-5
    _, w, alone = Slow(model, ids).mixed(3, found.thought[3, 0].tolist())
    assert w == 0
    torch.testing.assert_close(found.after[0][3, 0], alone.softmax(-1).topk(module.SHOWN).values)
    assert not look(thinking_model(), ids, None, seeded()).silent


# -- from tokens to what is read


@pytest.mark.parametrize(
    "text", ["from here", "😀é日本", HOSTILE, "a\ufffdb", "x\ufffd", "  two \n\n lines  "]
)
def test_pieces_joined_are_the_text_and_half_characters_are_nothing(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    found = pieces(ids, tokenizer)
    assert len(found) == len(ids) and "".join(found) == text
    assert not any("\ufffd" in piece for piece in found) or "\ufffd" in text


def test_a_token_that_is_half_a_character_is_named_by_its_bytes():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("😀 é")["input_ids"]
    assert [name(token, tokenizer) for token in ids] == ["⟨F0⟩", "⟨9F⟩", "⟨98⟩", "⟨80⟩", " ", "⟨C3⟩", "⟨A9⟩"]
    assert pieces(ids, tokenizer) == ["", "", "", "😀", " ", "", "é"]


@pytest.fixture(scope="module")
def hostile():
    """(figures, tokenizer) of a text full of markup."""
    tokenizer = tiny_tokenizer()
    model = thinking_model(base={"vocab_size": len(tokenizer), "max_position_embeddings": 256})
    return look(model, tokenizer(HOSTILE)["input_ids"], None, seeded()), tokenizer


def data_of(document):
    return json.loads(
        re.search('<script id="data" type="application/json">(.*?)</script>', document, re.S)[1]
    )


def test_the_page_holds_the_figures_rounded(hostile):
    found, tokenizer = hostile
    data = data_of(page(found, tokenizer, ABOUT))
    assert "".join(data["piece"]) == HOSTILE
    for figure in ("base_nll", "mixed_nll", "alone_nll", "mix_weight", "reward"):
        torch.testing.assert_close(torch.tensor(data[figure]), getattr(found, figure), atol=6e-5, rtol=0)
    assert [data["table"][i] for i in data["token"]] == [name(x, tokenizer) for x in found.token.tolist()]
    for place in ("before", "after"):
        shown = torch.tensor(data[place])
        torch.testing.assert_close(shown[..., 1::2], getattr(found, place)[0], atol=6e-5, rtol=0)
        names = [data["table"][int(i)] for i in shown[..., ::2].flatten().tolist()]
        assert names == [name(x, tokenizer) for x in getattr(found, place)[1].flatten().tolist()]
    assert data["thought"][3][1] == tokenizer.decode(found.thought[3, 1].tolist())
    nll = found.base_nll.tolist()
    assert (
        data["hardest"] == sorted(range(1, len(nll) + 1), key=lambda i: -nll[i - 1])[: len(data["hardest"])]
    )
    assert len(data["hardest"]) == round(0.1 * len(nll))


def test_the_page_has_no_markup_of_the_text_and_allows_only_its_own_style_and_script(hostile):
    document = page(*hostile, ABOUT | {"model": HOSTILE})
    assert re.findall("<script[^>]*>", document) == ['<script id="data" type="application/json">', "<script>"]
    assert document.count("</script>") == 2 and "<img" not in document and "<!--" not in document
    assert "://" not in document and "url(" not in document
    for kind in ("script", "style"):
        source = re.search(f"<{kind}>(.*?)</{kind}>", document, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in document
    assert "content=\"default-src 'none';" in document


def test_a_figure_that_is_no_number_is_refused(hostile):
    found, tokenizer = hostile
    broken = type(found)(**(vars(found) | {"base_nll": found.base_nll * float("inf")}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        page(broken, tokenizer, ABOUT)


def test_500_tokens_with_two_long_thoughts_are_under_500_kb():
    base = AutoModelForCausalLM.from_pretrained(TINY_LM, dtype="float32", max_position_embeddings=1024)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM)
    model = QuietStarForCausalLM.from_base(base, QuietStarConfig(thought_length=48), tokenizer=tokenizer)
    with torch.no_grad():
        model.mixing.layers[-1].weight.normal_(0, 0.3, generator=seeded())
    found = look(model, tokenizer(PROSE)["input_ids"][:50], None, seeded())

    def tenfold(x):  # the same figures again and again are as long to write as others
        return x.repeat(11, *[1] * (x.ndim - 1))[: 500 - (len(x) == 49)]

    figures = {name: tenfold(x) for name, x in vars(found).items() if isinstance(x, torch.Tensor)}
    pairs = {name: tuple(map(tenfold, getattr(found, name))) for name in ("before", "after")}
    found = replace(found, **figures, **pairs)
    assert found.thought.shape == (500, 2, 48) and found.reward.shape == (499, 2)
    assert 100_000 < len(page(found, tokenizer, ABOUT).encode()) < 500_000


# -- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = tiny_tokenizer()
    thinking_model(base={"vocab_size": len(tokenizer)}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def call(capsys, *argv):
    capsys.readouterr()
    code = main(["look", *map(str, argv)])
    return code, *capsys.readouterr()


def test_the_command_writes_a_page_and_ends_with_its_figures(capsys, checkpoint, tmp_path):
    output, file = tmp_path / "x.html", tmp_path / "text.txt"
    file.write_text("the people & the roads", encoding="utf-8")
    code, out, _ = call(capsys, "--model", checkpoint, "the people & the roads", "-o", output, "--seed", 3)
    figures = json.loads(out.splitlines()[-1])
    assert code == 0 and figures["output"] == str(output)
    assert figures["bytes"] == output.stat().st_size
    data = data_of(output.read_text(encoding="utf-8"))
    assert figures | data["summary"] == figures
    assert data["about"] == {
        "model": checkpoint,
        "seed": 3,
        "thought_length": 3,
        "talk_length": 2,
        "num_thoughts": 2,
        "thought_temperature": 1.0,
    }
    assert "thoughts of other positions" in out
    before = output.read_bytes()
    assert call(capsys, "-o", output, "--file", file, "--seed", 3, "--model", checkpoint)[0] == 0
    assert output.read_bytes() == before
    knobs = ["--thought_length", 1, "--num_thoughts", 3, "--thought_temperature", 0.5]
    assert call(capsys, "the people", *knobs, "--model", checkpoint, "-o", output)[0] == 0
    data = data_of(output.read_text(encoding="utf-8"))
    assert [len(x) for x in data["thought"]] == [3] * len(data["piece"])
    assert data["about"]["thought_temperature"] == 0.5


def test_without_a_model_it_is_the_embedded_one_that_has_not_learned_to_think(capsys, tmp_path):
    code, out, _ = call(capsys, "From mill go north.", "-o", tmp_path / "x.html")
    figures = json.loads(out.splitlines()[-1])
    assert (code, figures["mix_weight"]) == (0, 0)
    assert figures["mixed_nll"] == pytest.approx(figures["base_nll"], abs=1e-5)
    data = data_of((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert data["silent"] and data["about"]["model"] == "the embedded model"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "text = None, file = None: give exactly one of them"),
        (["a b", "--file", "x"], "text = 'a b', file = 'x': give exactly one of them"),
        (["--file", "no.txt"], "file = 'no.txt': no such file"),
        ([" \n"], "text = ' \\n': must not be empty"),
        (["t"], "text has 1 tokens: must have at least 2"),
        (["the\udcff"], "text = 'the\\udcff': is no UTF-8 text"),
        (["the people", "--num_thoughts", "0"], "num_thoughts = 0: must be at least 1"),
        (["the people", "--thought_length", "-1"], "thought_length = -1: must be at least 0"),
        (["the people", "--thought_temperature", "-1"], "thought_temperature = -1.0: must be at least 0"),
        (
            ["the people", "--num_thoughts", "2", "--thought_temperature", "0"],
            "num_thoughts = 2: must be 1 if thought_temperature is 0",
        ),
        (["the people", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["the people", "--colour", "red"], "unrecognized arguments: --colour red; see qstar look --help"),
        (["the people", "-o", "/nowhere/x.html"], "output = /nowhere/x.html: its folder does not exist"),
        ([PROSE * 4], "positions exceed the model's context of 96"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(
    capsys, checkpoint, tmp_path, monkeypatch, argv, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *argv, "--model", checkpoint)
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_checkpoint_is_refused(capsys, tmp_path):
    code, _, err = call(capsys, "the people", "--model", TINY_LM, "-o", tmp_path / "x.html")
    assert code == 1 and err.splitlines()[-1].startswith("qstar look: ")


def test_the_last_position_thinks_too_and_must_fit_the_context():
    model = thinking_model(thought_length=3, talk_length=2)  # context 96: <start> c c c <end> x
    assert len(look(model, tokens(1, 90)[0].tolist()).token) == 90
    with pytest.raises(ValueError, match="text, with the token to come, has 92 tokens: with 6 slots"):
        look(model, tokens(1, 91)[0].tolist())


def test_content_tells_special_tokens_and_ends_of_texts():
    tokenizer = tiny_tokenizer()
    model = thinking_model(base={"vocab_size": len(tokenizer)})
    ids = [*tokenizer("the")["input_ids"], tokenizer.eos_token_id, *tokenizer("roads")["input_ids"]]
    found = content(look(model, ids, None, seeded()), tokenizer, ABOUT)
    at = ids.index(tokenizer.eos_token_id)
    assert found["special"] == found["ends"] == [at]
    assert found["piece"][at] == "<eos>"
