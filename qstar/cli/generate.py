"""`qstar generate`: prompt in, text out; thoughts stay hidden unless asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer

from qstar import report
from qstar.cli.options import parse_options
from qstar.generation import generate
from qstar.model import QuietStarForCausalLM


@dataclass
class GenerateArguments:
    """Options of `qstar generate`."""

    model: str = field(metadata={"help": "Folder of a Quiet-STaR checkpoint."})
    prompt: list[str] = field(metadata={"help": "One or more prompts; several are run as one batch."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens to write."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the text; 0 is argmax."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the text."})
    thought_length: int | None = field(
        default=None, metadata={"help": "Tokens of a thought; default: as trained."}
    )
    thought_temperature: float = field(
        default=0.0, metadata={"help": "Temperature of the thoughts; 0 is argmax."}
    )
    show_thoughts: bool = field(
        default=False, metadata={"help": "Show each thought before the token it led to."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON document instead of text."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})


def main(argv: list[str]) -> int:
    (args,) = parse_options(GenerateArguments, argv, prog="qstar generate")
    if not all(args.prompt):
        raise ValueError("prompt = '': must not be empty")
    model = QuietStarForCausalLM.from_pretrained(args.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    input_ids, attention_mask = left_padded([tokenizer(text)["input_ids"] for text in args.prompt])
    result = generate(
        model,
        input_ids,
        attention_mask,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        thought_length=args.thought_length,
        thought_temperature=args.thought_temperature,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or 0,
        generator=torch.Generator().manual_seed(args.seed),
    )
    answers = []
    for prompt, tokens, thoughts in zip(args.prompt, result.tokens.tolist(), result.thoughts.tolist()):
        if tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
        text = tokenizer.decode(tokens)
        answer = {"prompt": prompt, "text": text}
        if args.show_thoughts:
            answer["thoughts"] = [tokenizer.decode(thought) for thought in thoughts[: len(tokens)]]
        answers.append(answer)
        if not args.json:
            print(
                prompt
                + (with_thoughts(tokenizer, tokens, answer["thoughts"]) if args.show_thoughts else text)
            )
    if args.json:
        report.last_line({"answers": answers})
    return 0


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) [B, T], padded on the left; a tokenizer may know no padding token."""
    if not all(prompts):
        raise ValueError("prompt: holds no token; each must hold at least one")
    length = max(map(len, prompts))
    input_ids = [[0] * (length - len(ids)) + ids for ids in prompts]
    mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(input_ids), torch.tensor(mask)


def with_thoughts(tokenizer, tokens: list[int], thoughts: list[str]) -> str:
    """The text with each thought in brackets before its token."""
    return "".join(
        f" [{thought.strip()}]{tokenizer.decode([token])}" for thought, token in zip(thoughts, tokens)
    )
