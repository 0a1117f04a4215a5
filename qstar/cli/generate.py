"""`qstar generate`: prompts in, text out, as it comes; thoughts stay hidden unless asked for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from qstar.cli.options import parse_options
from qstar.cli.prompts import answers_file, check_lengths, read_records
from qstar.data import left_padded
from qstar.model import QuietStarForCausalLM
from qstar.reporting import tables

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass
class GenerateArguments:
    """Options of `qstar generate`; prompts come from `--prompt` or from a file."""

    model: str = field(metadata={"help": "Folder of a Quiet-STaR checkpoint."})
    prompt: list[str] = field(
        default_factory=list, metadata={"help": "One or more prompts; several are run as one batch."}
    )
    input: str | None = field(
        default=None, metadata={"help": "A JSONL file instead, a record with a `prompt` a line."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "JSONL file for its answers; what it holds already is not done again."},
    )
    batch_size: int = field(default=8, metadata={"help": "Prompts of the file that run together."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens to write."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the text; 0 is argmax."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the text."})
    top_k: int = field(default=0, metadata={"help": "Likeliest tokens to draw from; 0: all."})
    stop: list[str] = field(default_factory=list, metadata={"help": "Strings that end the text."})
    think: str = field(default="always", metadata={"help": "always, adaptive or never."})
    entropy_threshold: float | None = field(
        default=None, metadata={"help": "For adaptive, in nats; default: as `qstar calibrate` found."}
    )
    draft_length: int | None = field(
        default=None, metadata={"help": "Tokens drafted and thought about at once; default: adapts."}
    )
    thought_length: int | None = field(
        default=None, metadata={"help": "Tokens of a thought; default: as trained."}
    )
    thought_temperature: float = field(
        default=0.0, metadata={"help": "Temperature of the thoughts; 0 is argmax."}
    )
    truncate_prompt: bool = field(
        default=False, metadata={"help": "Cut a prompt that is too long for the model on its left."}
    )
    show_thoughts: bool = field(
        default=False, metadata={"help": "Show each thought before the token it led to."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON document instead of text."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})


class Answer:
    """One prompt's text as it grows: token by token from the loop, printed as soon as it is readable; ends:
    ids that end a text and are no part of it."""

    def __init__(self, tokenizer, prompt: str, ends: list[int], show_thoughts: bool, stream: bool):
        self.tokenizer, self.prompt, self.ends, self.show_thoughts = tokenizer, prompt, ends, show_thoughts
        self.ids = tokenizer(prompt)["input_ids"]
        self.before = len(tokenizer.decode(self.ids))
        self.stream, self.printed = stream, 0
        self.tokens: list[int] = []
        self.thoughts: list[str] = []

    def add(self, token: int, thought: list[int] | None) -> None:
        self.tokens.append(token)
        self.thoughts.append(self.tokenizer.decode(thought) if thought else "")
        if self.stream:
            self.show()

    def show(self) -> None:
        """Print what the last token added."""
        if len(self.tokens) == 1:
            print(self.prompt, end="")
        if self.show_thoughts and self.thoughts[-1]:
            shown = f" [{self.thoughts[-1].strip()}]"
            print(f"{DIM}{shown}{PLAIN}" if sys.stdout.isatty() else shown, end="")
        text = self.text()
        if not text.endswith("\ufffd"):  # a part of a character: the next token completes it
            self.show_rest(text)

    def show_rest(self, text: str | None = None) -> None:
        text = self.text() if text is None else text
        print(text[self.printed :], end="", flush=True)
        self.printed = len(text)

    def shown_again(self) -> Answer:
        """A copy of an answer that was not streamed, which has been."""
        copy = Answer(self.tokenizer, self.prompt, self.ends, self.show_thoughts, stream=True)
        for token, thought in zip(self.tokens, self.thoughts):
            copy.tokens.append(token)
            copy.thoughts.append(thought)
            copy.show()
        return copy

    def text(self) -> str:
        """What was written, up to the end. Decoded with its prompt: alone, some tokenizers lose the space
        before it."""
        tokens = self.tokens[:-1] if self.tokens and self.tokens[-1] in self.ends else self.tokens
        return self.tokenizer.decode(self.ids + tokens)[self.before :]

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = {"prompt": self.prompt, "text": self.text()}
        if self.show_thoughts:
            found["thoughts"] = self.thoughts[: len(self.tokens)]
        return found


def main(argv: list[str]) -> int:
    (args,) = parse_options(GenerateArguments, argv, prog="qstar generate")
    records = _records(args)
    done = answers_file(args.output) if args.output else None
    model = QuietStarForCausalLM.from_pretrained(args.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ends = _ends(model, tokenizer)
    if done is None:
        stream = not args.json and len(records) == 1
        answers = [Answer(tokenizer, x["prompt"], ends, args.show_thoughts, stream) for x in records]
        _run(model, tokenizer, answers, args, args.seed)
        for answer in answers if not args.json else ():
            if not stream:
                answer = answer.shown_again()
            answer.show_rest()
            print()
        if args.json:
            tables.last_line({"answers": [answer.document() for answer in answers]})
        return 0
    check_lengths(model, tokenizer, records, args)
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
    return 0


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


def _records(args: GenerateArguments) -> list[dict[str, Any]]:
    if bool(args.prompt) == (args.input is not None):
        raise ValueError(f"prompt = {args.prompt}, input = {args.input!r}: give exactly one of them")
    if (args.input is None) != (args.output is None):
        raise ValueError(f"input = {args.input!r}, output = {args.output!r}: one needs the other")
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("temperature", 0), ("top_k", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"{name} = {getattr(args, name)}: must be at least {least}")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"top_p = {args.top_p}: must be in (0, 1]")
    if args.input is None:
        records = [{"prompt": prompt} for prompt in args.prompt]
    else:
        records = read_records(args.input)
        if args.output is not None and Path(args.input).resolve() == Path(args.output).resolve():
            raise ValueError(f"output = {args.output!r}: must be another file than input")
    for record in records:
        if not record["prompt"]:
            raise ValueError("prompt = '': must not be empty")
    return records


def _ends(model, tokenizer) -> list[int]:
    """Ids that end a text: those of the model's generation config, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
