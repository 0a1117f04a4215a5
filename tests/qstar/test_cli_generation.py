"""`qstar generate` over files, `qstar calibrate` and `qstar score`, on a tiny trained checkpoint."""

import json
import shutil

import pytest
import torch
from tiny_models import COMMON, thinking_model
from tiny_tokenizer import PROSE, saved_base_model
from transformers import AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.cli import generate as command
from qstar.cli.main import main
from qstar.evaluation.calibration import threshold
from qstar.evaluation.held_out import held_out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that mixes its thoughts in, and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    base = saved_base_model(tmp_path_factory.mktemp("base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = QuietStarForCausalLM.from_base(str(base), QuietStarConfig(thought_length=2), dtype="float32")
    torch.manual_seed(0)
    with torch.no_grad():
        model.mixing.layers[-1].weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ["the state", "we meet today to speak", "the roads", "of the work that is done", "the people"]
    path.write_text("".join(json.dumps({"prompt": t, "id": f"q{i}"}) + "\n" for i, t in enumerate(texts)))
    return path


def call(capsys, *argv):
    capsys.readouterr()
    code = main([str(x) for x in argv])
    return code, *capsys.readouterr()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_index(path):
    return {line["index"]: line for line in lines(path)}


def run(capsys, checkpoint, prompts, output, *more):
    options = ["--input", prompts, "--output", output, "--batch_size", 2, "--max_new_tokens", 6]
    return call(capsys, "generate", "--model", checkpoint, *options, *more)


def test_a_file_of_prompts_gives_a_line_each_with_its_own_fields(capsys, checkpoint, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    code, out, _ = run(capsys, checkpoint, prompts, output, "--show_thoughts", "--json")
    assert code == 0
    assert json.loads(out) == {"output": str(output), "prompts": 5, "already_there": 0}
    answers = by_index(output)
    assert sorted(answers) == [0, 1, 2, 3, 4]
    for i, given in enumerate(lines(prompts)):
        assert answers[i] | given == answers[i]
        argv = ["--prompt", given["prompt"], "--max_new_tokens", 6, "--json"]
        _, alone, _ = call(capsys, "generate", "--model", checkpoint, *argv)
        assert answers[i]["text"] == json.loads(alone)["answers"][0]["text"]
        assert len(answers[i]["thoughts"]) <= 6


def test_an_interrupted_file_keeps_what_was_finished_and_goes_on(
    capsys, checkpoint, prompts, tmp_path, monkeypatch
):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(capsys, checkpoint, prompts, whole)
    told: list[int] = []
    add = command.Answer.add

    def interrupted(self, token, thought):
        told.append(token)
        if len(told) == 15:  # in the second batch
            raise KeyboardInterrupt
        add(self, token, thought)

    with monkeypatch.context() as patch:
        patch.setattr(command.Answer, "add", interrupted)
        code, _, err = run(capsys, checkpoint, prompts, output)
        assert code == 130
        assert err.endswith("qstar generate: interrupted\n")
    kept = by_index(output)
    assert 2 <= len(kept) < 5
    with output.open("a") as file:
        file.write('{"index": 4, "te')  # the line that a killed process did not finish
    code, out, _ = run(capsys, checkpoint, prompts, output, "--json")
    assert code == 0
    assert json.loads(out)["already_there"] == len(kept)
    assert by_index(output) == by_index(whole)
    assert len(lines(output)) == 5


def test_one_prompt_streams_the_text_that_is_printed_at_once_in_a_batch(capsys, checkpoint):
    argv = ["generate", "--model", checkpoint, "--max_new_tokens", 9, "--show_thoughts"]
    _, one, _ = call(capsys, *argv, "--prompt", "we meet")
    _, both, _ = call(capsys, *argv, "--prompt", "we meet", "the roads")
    assert both.startswith(one)
    assert one.count("[") == 9


@pytest.mark.parametrize("more", [["--think", "never"], ["--draft_length", "0"], ["--stop", "e"]], ids=str)
def test_ways_to_generate(capsys, checkpoint, more):
    argv = ["generate", "--model", checkpoint, "--max_new_tokens", 9, "--prompt", "we meet", "--json"]
    _, free, _ = call(capsys, *argv)
    code, out, _ = call(capsys, *argv, *more)
    assert code == 0
    text, expected = (json.loads(x)["answers"][0]["text"] for x in (out, free))
    if more[0] == "--draft_length":
        assert text == expected
    if more[0] == "--stop":
        assert expected.startswith(text)
        assert "e" not in text[:-1] or "e" not in expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give exactly one of them"),
        (["--prompt", "a", "--input", "x.jsonl", "--output", "y"], "give exactly one of them"),
        (["--input", "x.jsonl"], "one needs the other"),
        (["--input", "no.jsonl", "--output", "y"], "input = 'no.jsonl': no such file"),
        (["--prompt", "a", "--think", "adaptive"], "entropy_threshold = None: must be set, here or by"),
        (["--prompt", "a", "--top_k", "-1"], "top_k = -1: must be at least 0"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_told_in_one_line(capsys, checkpoint, argv, message):
    code, out, err = call(capsys, "generate", "--model", checkpoint, *argv)
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1]


def test_lines_that_are_no_prompts_or_no_answers_are_told(capsys, checkpoint, prompts, tmp_path):
    bad = tmp_path / "bad.jsonl"
    for text, message in (
        ("not json\n", "line 1 is no JSON"),
        ('{"text": "a"}\n', "line 1 has no text `prompt`"),
        ("", "the file is empty"),
        ('{"prompt": ""}\n', "prompt = '': must not be empty"),
    ):
        bad.write_text(text)
        _, _, err = run(capsys, checkpoint, bad, tmp_path / "out.jsonl")
        assert message in err
    for other in ('{"no": "index"}\n', "precious notes, one line", '{"prompt": "a"}\n{"prompt": "b"}'):
        bad.write_text(other)
        _, _, err = run(capsys, checkpoint, prompts, bad)
        assert "holds other lines than answers" in err
        assert bad.read_text() == other  # untouched
    _, _, err = run(capsys, checkpoint, prompts, prompts)
    assert "must be another file than input" in err or "holds other lines than answers" in err
    assert len(lines(prompts)) == 5
    long = tmp_path / "long.jsonl"
    long.write_text('{"prompt": "the"}\n' + json.dumps({"prompt": PROSE * 3}) + "\n")
    _, _, err = run(capsys, checkpoint, long, tmp_path / "new.jsonl")
    assert "prompt 1 ('the state of the union is stro') needs" in err
    assert not (tmp_path / "new.jsonl").exists()


def test_records_with_odd_characters_and_names_of_their_own(capsys, checkpoint, tmp_path):
    given, output = tmp_path / "given.jsonl", tmp_path / "out.jsonl"
    records = [
        {"prompt": "the\u2028state", "index": 7},
        {"prompt": "we \x85 meet", "index": 7, "text": "mine"},
    ]
    text = "\r\n\r\n".join(json.dumps(x, ensure_ascii=False) for x in records)
    given.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n\n")
    assert run(capsys, checkpoint, given, output)[0] == 0
    answers = [json.loads(x) for x in output.read_text().split("\n") if x]
    assert sorted(x["index"] for x in answers) == [0, 1]
    assert {x["prompt"] for x in answers} == {x["prompt"] for x in records}
    before = output.read_bytes()
    output.write_bytes(before.rstrip(b"\n"))  # an editor may have taken the last newline
    code, out, _ = run(capsys, checkpoint, given, output, "--json")
    assert (code, json.loads(out)["already_there"]) == (0, 2)
    assert output.read_bytes() == before
    given.write_text(r'{"prompt": "half \ud800"}')
    assert "is no JSON" in run(capsys, checkpoint, given, output)[2]
    given.write_bytes("é".encode("latin-1"))
    assert "is no UTF-8 text" in run(capsys, checkpoint, given, output)[2]


def test_score_gives_every_token_its_figures_as_the_parallel_pass_has_them(capsys, checkpoint, tmp_path):
    text, output = tmp_path / "text.txt", tmp_path / "scores.jsonl"
    text.write_text(PROSE)
    argv = ["score", "--model", checkpoint, "--text", text, "--span_length", 40, "--batch_size", 2]
    assert call(capsys, *argv, "--output", output)[0] == 0
    found = lines(output)
    assert "".join(line["token"] for line in found).startswith(PROSE)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = [*tokenizer(PROSE)["input_ids"], tokenizer.eos_token_id]
    assert len(found) == len(ids)
    assert len(ids) == 81  # the last span would hold one token: it takes one of its neighbour's
    rows = [
        {"input_ids": ids[i:j], "position_ids": list(range(j - i))} for i, j in ((0, 40), (40, 79), (79, 81))
    ]
    expected = held_out(QuietStarForCausalLM.from_pretrained(checkpoint), rows, batch_size=1)
    without, scored = ([x for x in found if ("base_nll" in x) is has] for has in (False, True))
    assert len(without) == len(rows)  # the first token of a span
    for name in ("base_nll", "mixed_nll", "mix_weight", "base_entropy"):
        assert torch.allclose(torch.tensor([x[name] for x in scored]), getattr(expected, name), atol=1e-5)
    assert [x["thought"] for x in scored] == [tokenizer.decode(x) for x in expected.thought.tolist()]
    code, out, _ = call(capsys, *argv)
    assert code == 0
    assert [json.loads(line)["token"] for line in out.splitlines()] == [x["token"] for x in found]
    _, _, err = call(capsys, "score", "--model", checkpoint, "--text", tmp_path / "no.txt")
    assert "no such file" in err


def test_held_out_gives_the_entropy_of_the_base_prediction():
    model = thinking_model()
    ids = torch.arange(2, 12)
    row = {"input_ids": ids.tolist(), "position_ids": list(range(10))}
    base = model.base(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    assert torch.allclose(held_out(model, [row]).base_entropy, -(base.exp() * base).sum(-1), atol=1e-5)


def test_the_threshold_is_the_highest_that_keeps_the_gain():
    entropy = torch.tensor([0.1, 3.0, 2.0, 1.0, 2.0])
    gain = torch.tensor([0.0, 6.0, 1.0, -1.0, 2.0])
    for keep, limit, kept, share in (
        (0.5, 2.0, 0.75, 0.2),  # the most uncertain token alone
        (0.75, 2.0, 0.75, 0.2),
        (0.8, 1.0, 9 / 8, 0.6),  # tokens of one entropy think together
        (1.0, 1.0, 9 / 8, 0.6),
    ):
        found = threshold(entropy, gain, keep)
        assert (found.entropy_threshold, found.gain_kept) == (pytest.approx(limit), pytest.approx(kept))
        assert found.thinking_share == pytest.approx(share)
        assert int((entropy > found.entropy_threshold).sum()) == round(share * 5)
    everything = threshold(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), 1.0)
    assert everything.thinking_share == 1.0
    assert everything.entropy_threshold == 0.0
    with pytest.raises(ValueError, match=r"thoughts gain -1\.0000 nats a token: none to keep"):
        threshold(entropy, -torch.ones(5), 0.9)
    with pytest.raises(ValueError, match=r"keep = 1\.5: must be in \(0, 1\]"):
        threshold(entropy, gain, 1.5)


def test_calibrate_writes_the_threshold_that_adaptive_generation_takes(
    capsys, checkpoint, tmp_path, monkeypatch
):
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(checkpoint, folder)
    text.write_text(PROSE * 3)
    argv = ["calibrate", "--model", folder, "--text", text, "--span_length", 40]
    code, out, err = call(capsys, *argv)
    before = QuietStarForCausalLM.from_pretrained(checkpoint).state_dict()
    if code == 1:  # a random mixing head may gain nothing: then one that does
        assert "none to keep" in err
        with monkeypatch.context() as patch:
            patch.setattr("qstar.cli.calibrate.held_out", _gaining)
            code, out, _ = call(capsys, *argv)
    assert code == 0
    chosen = json.loads(out.splitlines()[-1])["chosen"]
    after = QuietStarForCausalLM.from_pretrained(folder)
    assert after.quiet_star.entropy_threshold == chosen["entropy_threshold"]
    assert chosen["gain_kept"] >= 0.95
    assert all(torch.equal(after.state_dict()[name], x) for name, x in before.items())
    generate = ["generate", "--model", folder, "--prompt", "we meet", "--think", "adaptive"]
    assert call(capsys, *generate, "--max_new_tokens", 5)[0] == 0


def _gaining(*args, **options):
    result = held_out(*args, **options)
    return result._replace(mixed_nll=result.base_nll - result.base_entropy)


def test_the_context_of_the_tiny_models_is_what_these_tests_count_on():
    assert COMMON["max_position_embeddings"] == 96
