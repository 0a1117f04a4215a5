"""`qstar score`: one JSON line for every token of a text, from one parallel pass."""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer
from transformers.hf_argparser import HfArg

from qstar.cli.common_options import TextFileArguments
from qstar.cli.options import parse_options
from qstar.data import encode, read_text
from qstar.evaluation.held_out import scored
from qstar.model import QuietStarForCausalLM

FIGURES = ("base_nll", "mixed_nll", "mix_weight", "base_entropy")


@dataclass
class ScoreArguments(TextFileArguments):
    """Options of `qstar score`."""

    output: str | None = HfArg(default=None, help="File for the lines, instead of stdout.")


def read_rows(args: TextFileArguments) -> tuple[QuietStarForCausalLM, Any, list[dict]]:
    """Return the model, its tokenizer and the rows of the text. Raises ValueError for a text or a span that
    the model cannot read."""
    text = read_text("text", args.text)
    model = QuietStarForCausalLM.from_pretrained(args.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model.check_length(args.span_length, "a row of span_length")
    (ids,) = encode([text], tokenizer)
    spans = [ids[i : i + args.span_length] for i in range(0, len(ids), args.span_length)]
    if len(spans[-1]) == 1:  # a token alone predicts nothing, and none is to be lost
        spans[-1].insert(0, spans[-2].pop())
    rows = [{"input_ids": span, "position_ids": list(range(len(span)))} for span in spans]
    return model, tokenizer, rows


def main(argv: list[str]) -> int:
    (args,) = parse_options(ScoreArguments, argv, prog="qstar score")
    model, tokenizer, rows = read_rows(args)
    decode = tokenizer.decode
    with open(args.output, "w", encoding="utf-8") if args.output else nullcontext(sys.stdout) as out:
        parts = scored(model, rows, args.batch_size, progress="score")
        for first, part in zip(range(0, len(rows), args.batch_size), parts):
            figures = zip(*(getattr(part, name).tolist() for name in FIGURES))
            thoughts = iter(part.thought.tolist())
            for row in rows[first : first + args.batch_size]:
                for token, position in zip(row["input_ids"], row["position_ids"]):
                    line: dict[str, Any] = {"token": decode([token])}
                    if position:  # the first token of a span has nothing before it
                        line |= zip(FIGURES, next(figures))
                        line["thought"] = decode(next(thoughts))
                    print(json.dumps(line, ensure_ascii=False), file=out)
            out.flush()
    return 0
