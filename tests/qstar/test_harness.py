"""The model `qstar` in the real lm-evaluation-harness, on tasks and data of our own."""

import sys

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from questions import checkpoint, choices_told, write_lines
from slow_predictions import SlowPredictions
from tiny_tokenizer import PROSE
from transformers import AutoTokenizer

from qstar import QuietStarForCausalLM
from qstar.cli.main import main
from qstar.evaluation.harness import QuietStarLM

DATA = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
"""
TASKS = {
    "letters": """
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: ["A", "B", "the", "state of"]
doc_to_target: "{{{{'ABCDE'.index(answerKey) % 4}}}}"
metric_list: [{{metric: acc}}]
""",
    "prose": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answerKey}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 9, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks."""
    found = tmp_path_factory.mktemp("tasks")
    questions = write_lines(found / "questions.jsonl", choices_told(6))
    # the second is longer than the model's context
    text = write_lines(found / "text.jsonl", [{"text": PROSE[:50]}, {"text": PROSE * 2}])
    for name, task in TASKS.items():
        data = text if name == "prose" else questions
        (found / f"{name}.yaml").write_text(f"task: {name}" + DATA.format(data=data) + task.format())
    return found


@pytest.fixture(scope="module")
def slow(folder):
    return SlowPredictions(QuietStarForCausalLM.from_pretrained(folder))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def evaluated(folder, tasks, name, *options, batch_size=4):
    """(metrics, answers of the model by document) of a task."""
    found = simple_evaluate(
        model="qstar",
        model_args=",".join([f"pretrained={folder}", "device=cpu", *options]),
        tasks=[name],
        batch_size=batch_size,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return found["results"][name], [(x["doc"], x["arguments"], x["resps"]) for x in samples]


def log_likelihood(slow, predict, context, continuation):
    """(sum of log p, whether greedy), a plain forward a token; the context is cut where there is no room."""
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        log_p = predict(context + continuation[:i]).log_softmax(-1)
        total += float(log_p[token])
        greedy = greedy and int(log_p.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("think", ["always", "never", "adaptive"])
def test_multiple_choice_equals_a_plain_forward_a_token(folder, tasks, slow, tokenizer, think):
    def predict(prefix):
        base = slow.logits(prefix)
        unsure = float(torch.distributions.Categorical(logits=base).entropy()) > 3.0
        return slow.with_thought(prefix) if think == "always" or (think == "adaptive" and unsure) else base

    options = [f"think={think}", *(["entropy_threshold=3.0"] if think == "adaptive" else [])]
    metrics, documents = evaluated(folder, tasks, "letters", *options)
    right = 0
    for document, arguments, answers in documents:
        truth = []
        for (text, continuation), ((found, greedy),) in zip(arguments, answers):
            context = tokenizer(text)["input_ids"]
            whole = tokenizer(text + continuation)["input_ids"]
            truth.append(log_likelihood(slow, predict, context, whole[len(context) :]))
            assert (found, greedy) == (pytest.approx(truth[-1][0], abs=1e-3), truth[-1][1])
        best = max(range(4), key=lambda i: truth[i][0])
        right += best == "ABCDE".index(document["answerKey"]) % 4
    assert metrics["acc,none"] == pytest.approx(right / 6)


def test_rolling_likelihood_equals_a_plain_forward_a_token_also_of_a_text_beyond_the_context(
    folder, tasks, slow, tokenizer
):
    metrics, documents = evaluated(folder, tasks, "prose")
    longest = 128 + 1 - 5  # the context beside <start>, three tokens and <end>
    total = 0.0
    for document, _, answers in documents:
        ids = [tokenizer.eos_token_id, *tokenizer(document["text"])["input_ids"]]
        truth = sum(
            float(slow.with_thought(ids[_from(i, len(ids), longest) : i]).log_softmax(-1)[ids[i]])
            for i in range(1, len(ids))
        )
        assert float(answers[0][0]) == pytest.approx(truth, abs=5e-3)
        total += truth
    size = sum(len(document["text"].encode()) for document, _, _ in documents)
    assert metrics["bits_per_byte,none"] == pytest.approx(-total / size / 0.6931471805599453, rel=1e-4)


def _from(i, length, longest):
    """Where the window that predicts token i begins: whole windows, the last moved back to be full."""
    first = (i - 1) // longest * longest
    return first if first + longest < length else max(0, length - 1 - longest)


@pytest.mark.parametrize("think", ["always", "never"])
def test_generation_equals_the_argmax_of_a_plain_forward_a_token(folder, tasks, slow, tokenizer, think):
    predict = slow.with_thought if think == "always" else slow.logits
    _, documents = evaluated(folder, tasks, "writing", f"think={think}")
    lengths = set()
    for document, _, answers in documents:
        ids = tokenizer(document["question"])["input_ids"]
        written: list[int] = []
        while len(written) < 9 and "e" not in tokenizer.decode(written):
            written.append(int(predict(ids + written).argmax()))
            if written[-1] == tokenizer.eos_token_id:
                break
        assert answers[0][0] == tokenizer.decode(written, skip_special_tokens=True).split("e")[0]
        lengths.add(len(ids))
    assert len(lengths) > 1  # prompts of one batch were padded


def test_choices_that_differ_in_their_last_token_are_read_once(folder, monkeypatch):
    model = QuietStarLM(str(folder), device="cpu", batch_size=8)
    read = []
    predict = QuietStarLM._predictions

    def counted(self, batch, at):
        read.append(batch["input_ids"].shape[0])
        return predict(self, batch, at)

    monkeypatch.setattr(QuietStarLM, "_predictions", counted)
    requests = [(("c", str(i)), [5, 6, 7], [token]) for i, token in enumerate((8, 9, 10))]
    requests.append((("c", "x"), [5, 6, 7], [8, 9]))
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert read == [2]
    alone = [model._loglikelihood_tokens([request], disable_tqdm=True)[0] for request in requests]
    assert [x[0] for x in found] == pytest.approx([x[0] for x in alone], abs=1e-5)


def test_an_empty_context_and_one_too_long(folder, slow, caplog):
    model = QuietStarLM(str(folder), device="cpu")
    assert model.max_length == 124
    prefix = model.prefix_token_id
    (found,) = model._loglikelihood_tokens([(None, [prefix], [9])], disable_tqdm=True)
    assert found[0] == pytest.approx(log_likelihood(slow, slow.with_thought, [prefix], [9])[0], abs=1e-3)
    long = [5 + i % 50 for i in range(140)]
    (cut,) = model._loglikelihood_tokens([(("a", "b"), long, [9])], disable_tqdm=True)
    assert cut[0] == pytest.approx(log_likelihood(slow, slow.with_thought, long[-124:], [9])[0], abs=1e-3)
    with pytest.raises(ValueError, match="a continuation has 140 tokens: 124 fit beside a thought"):
        model._loglikelihood_tokens([(("a", "b"), [5], long)], disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"think": "twice"}, "think = 'twice': must be one of always, adaptive, never"),
        ({"batch_size": "auto"}, "batch_size = 'auto': must be a positive number"),
        ({"think": "adaptive"}, "entropy_threshold = None: must be set for think = 'adaptive'"),
        ({"thought_temperature": -1.0}, "thought_temperature = -1.0: must be at least 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        QuietStarLM(str(folder), device="cpu", **options)


@pytest.mark.slow
def test_the_command_runs_the_harness(folder, tasks, capsys):
    argv = ["--model", "qstar", "--model_args", f"pretrained={folder}", "--tasks", "letters"]
    before = list(sys.argv)
    assert main(["lm_eval", *argv, "--include_path", str(tasks), "--limit", "2"]) == 0
    out, err = capsys.readouterr()
    assert "|letters|" in out and "qstar (" in out
    assert torch.cuda.is_available() or "device = cuda:0: torch sees no GPU" in err
    assert sys.argv == before


def test_without_the_package_the_command_says_what_to_install(monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["lm_eval"]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("qstar lm_eval: lm_eval: needs the package lm-eval")
    assert "pip install 'qstar[eval]'" in err
    assert out == ""
