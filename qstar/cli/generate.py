"""Run `qstar generate`: continue prompts, and show the thoughts on request."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.hf_argparser import HfArg

from qstar.cli.common_options import CheckpointArguments
from qstar.cli.options import parse_options
from qstar.cli.prompts import answers_file, check_lengths, read_records
from qstar.data import left_padded
from qstar.model import QuietStarForCausalLM
from qstar.option_checks import check_least
from qstar.reporting import tables
from qstar.reporting.results_file import ResultsFile

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass
class GenerateArguments(CheckpointArguments):
    """Set what `qstar generate` reads, how it samples and what it prints."""

    prompt: list[str] = field(default_factory=list, metadata={"help": "Prompts, run as one batch."})
    input: str | None = HfArg(default=None, help="JSONL file with a `prompt` in each record.")
    output: str | None = HfArg(default=None, help="JSONL file for the answers; a rerun resumes it.")
    batch_size: int = HfArg(default=8, help="Prompts of the file that run together.")
    max_new_tokens: int = HfArg(default=64, help="Tokens to generate.")
    temperature: float = HfArg(default=0.0, help="Temperature of the text; 0 is argmax.")
    top_p: float = HfArg(default=1.0, help="Probability mass of the tokens to sample from, in (0, 1].")
    top_k: int = HfArg(default=0, help="Number of likeliest tokens to sample from; 0: all.")
    stop: list[str] = field(default_factory=list, metadata={"help": "Strings that end the text."})
    think: str = HfArg(default="always", help="always, adaptive or never.")
    entropy_threshold: float | None = HfArg(
        default=None, help="Entropy above which adaptive thinks, in nats; default: that of `qstar calibrate`."
    )
    draft_length: int | None = HfArg(default=None, help="Tokens drafted at once; default: adapts.")
    thought_length: int | None = HfArg(default=None, help="Tokens of a thought; default: as trained.")
    thought_temperature: float = HfArg(default=0.0, help="Temperature of the thoughts; 0 is argmax.")
    truncate_prompt: bool = HfArg(default=False, help="Cut the left of a prompt that is too long.")
    show_thoughts: bool = HfArg(default=False, help="Show each thought before the token that it led to.")
    json: bool = HfArg(default=False, help="Print one JSON document instead of text.")
    seed: int = HfArg(default=0, help="Seed of sampling.")

    def __post_init__(self) -> None:
        if bool(self.prompt) == (self.input is not None):
            raise ValueError(f"prompt = {self.prompt}, input = {self.input!r}: give exactly one of them")
        if (self.input is None) != (self.output is None):
            raise ValueError(f"input = {self.input!r}, output = {self.output!r}: one needs the other")
        if self.input and self.output and Path(self.input).resolve() == Path(self.output).resolve():
            raise ValueError(f"output = {self.output!r}: must be another file than input")
        check_least(self, max_new_tokens=1, batch_size=1, temperature=0, top_k=0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must be in (0, 1]")


class Answer:
    """Collect one prompt's text token by token, and print it as soon as it is readable if stream is True.

    ends: token ids that end the text and are no part of it.
    """

    def __init__(self, tokenizer, prompt: str, ends: list[int], show_thoughts: bool, stream: bool):
        self.tokenizer, self.prompt, self.ends, self.show_thoughts = tokenizer, prompt, ends, show_thoughts
        self.ids = tokenizer(prompt)["input_ids"]
        self.before = len(tokenizer.decode(self.ids))
        self.stream, self.printed = stream, 0
        self.tokens: list[int] = []
        self.thoughts: list[str] = []

    def add(self, token: int, thought: list[int] | None) -> None:
        """Append a token, with the thought before it."""
        self.tokens.append(token)
        self.thoughts.append(self.tokenizer.decode(thought) if thought else "")
        if self.stream:
            self.show()

    def show(self) -> None:
        """Print what the last token added: its thought, if shown, and the text as far as it is readable."""
        if len(self.tokens) == 1:
            print(self.prompt, end="")
        if self.show_thoughts and self.thoughts[-1]:
            shown = f" [{self.thoughts[-1].strip()}]"
            print(f"{DIM}{shown}{PLAIN}" if sys.stdout.isatty() else shown, end="")
        text = self.text()
        if not text.endswith("\ufffd"):  # part of a character, which a later token completes
            self.show_rest(text)

    def show_rest(self, text: str | None = None) -> None:
        """Print what is not printed yet."""
        text = self.text() if text is None else text
        print(text[self.printed :], end="", flush=True)
        self.printed = len(text)

    def show_again(self) -> None:
        """Print a finished answer as if it were streamed."""
        again = Answer(self.tokenizer, self.prompt, self.ends, self.show_thoughts, stream=True)
        for token, thought in zip(self.tokens, self.thoughts):
            again.tokens.append(token)
            again.thoughts.append(thought)
            again.show()
        again.show_rest()

    def text(self) -> str:
        """Return the generated text without the ending token."""
        tokens = self.tokens[:-1] if self.tokens and self.tokens[-1] in self.ends else self.tokens
        # decoded alone, the text loses its leading space with some tokenizers
        return self.tokenizer.decode(self.ids + tokens)[self.before :]

    def document(self) -> dict[str, Any]:
        """Return the answer's record in the JSON output."""
        found: dict[str, Any] = {"prompt": self.prompt, "text": self.text()}
        if self.show_thoughts:
            found["thoughts"] = self.thoughts
        return found


def main(argv: list[str]) -> int:
    """Run `qstar generate`; return the exit status."""
    (args,) = parse_options(GenerateArguments, argv, prog="qstar generate")
    records = read_records(args.input) if args.input else [{"prompt": prompt} for prompt in args.prompt]
    if not all(record["prompt"] for record in records):
        raise ValueError("prompt = '': must not be empty")
    done = answers_file(args.output) if args.output else None
    model = QuietStarForCausalLM.from_pretrained(args.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if done is None:
        _answer_prompts(model, tokenizer, args)
    else:
        check_lengths(model, tokenizer, records, args)
        _answer_file(model, tokenizer, records, done, args)
    return 0


def _answer_prompts(model, tokenizer, args: GenerateArguments) -> None:
    stream = not args.json and len(args.prompt) == 1
    ends = _ends(model, tokenizer)
    answers = [Answer(tokenizer, prompt, ends, args.show_thoughts, stream) for prompt in args.prompt]
    _run(model, tokenizer, answers, args, args.seed)
    if args.json:
        tables.last_line({"answers": [answer.document() for answer in answers]})
        return
    for answer in answers:
        if stream:
            answer.show_rest()
        else:
            answer.show_again()
        print()


def _answer_file(model, tokenizer, records: list[dict], done: ResultsFile, args: GenerateArguments) -> None:
    """Write the answers that the output does not hold yet, each as soon as it is finished."""
    ends = _ends(model, tokenizer)
    waiting = [i for i in range(len(records)) if i not in done]
    already_there = len(done.rows)
    with tqdm(total=len(records), initial=already_there, desc="prompts", disable=args.json) as bar:
        for first in range(0, len(waiting), args.batch_size):
            batch = waiting[first : first + args.batch_size]
            answers = [
                Answer(tokenizer, records[i]["prompt"], ends, args.show_thoughts, False) for i in batch
            ]

            def finished(row: int, batch=batch, answers=answers) -> None:
                done.add({**records[batch[row]], **answers[row].document(), "index": batch[row]})
                bar.update()

            _run(model, tokenizer, answers, args, args.seed + batch[0], finished)
    if args.json:
        tables.last_line({"output": args.output, "prompts": len(records), "already_there": already_there})


def _run(model, tokenizer, answers: list[Answer], args: GenerateArguments, seed: int, finished=None) -> None:
    ids, mask = left_padded([answer.ids for answer in answers])
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
        sampling["top_k"] = args.top_k
    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=answers[0].ends or None,
        pad_token_id=tokenizer.pad_token_id or 0,
        stop_strings=args.stop or None,
        tokenizer=tokenizer,
        think=args.think,
        entropy_threshold=args.entropy_threshold,
        draft_length=args.draft_length,
        thought_length=args.thought_length,
        thought_temperature=args.thought_temperature,
        truncate_prompt=args.truncate_prompt,
        generator=torch.Generator().manual_seed(seed),
        on_token=lambda row, token, thought: answers[row].add(token, thought),
        on_finished=finished,
        **sampling,
    )


def _ends(model, tokenizer) -> list[int]:
    """Return the ids that end a text: those of the model's generation config, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
