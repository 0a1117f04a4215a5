"""`qstar look TEXT -o look.html`: one page in which a person sees a model think."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qstar.cli.options import Parser
from qstar.data import read_text
from qstar.demo import TINY_LM
from qstar.look.page import page
from qstar.look.thoughts import Look, look, look_config
from qstar.model import QuietStarForCausalLM
from qstar.option_checks import check_folder
from qstar.reporting import tables


def options(argv: list[str]) -> argparse.Namespace:
    """Parse the options. Raises ValueError for one that is unknown, ill-formed or out of range."""
    parser = Parser(
        prog="qstar look",
        description="Write one self-contained HTML page about a text: how much each token gained by the "
        "thoughts before it, what they were, and what the model predicted without and with them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("text", nargs="?", metavar="TEXT", help="The text; or give --file.")
    add("--file", help="A text file.")
    add("--model", help="Folder of a Quiet-STaR checkpoint (default: the embedded model, untrained).")
    add("--thought_length", type=int, help="Tokens of a thought (default: as trained).")
    add("--num_thoughts", type=int, help="Thoughts per position (default: as trained; 1 if they are argmax).")
    add("--thought_temperature", type=float, help="Temperature of the thoughts; 0 is argmax.")
    add("--seed", type=int, default=0, help="Seed of the thoughts (default: %(default)s).")
    add("-o", "--output", default="look.html", help="The page (default: %(default)s).")
    args = parser.parse_intermixed_args(argv)
    if (args.text is None) == (args.file is None):
        raise ValueError(f"text = {args.text!r}, file = {args.file!r}: give exactly one of them")
    check_folder("output", args.output)
    return args


def load(folder: str | None) -> tuple[QuietStarForCausalLM, Any]:
    """Load a checkpoint and its tokenizer, or for None the embedded model, which has not learned to think."""
    if folder is not None:
        model = QuietStarForCausalLM.from_pretrained(folder, dtype="float32")
        return model, AutoTokenizer.from_pretrained(folder)
    from qstar.demo.walk_training import thinking  # imports the Trainer, which is slow

    model = QuietStarForCausalLM.from_base(str(TINY_LM), thinking(), dtype="float32")
    return model, AutoTokenizer.from_pretrained(TINY_LM)


def table(found: Look) -> str:
    """Return the table of the means that the page begins with."""
    figures = found.summary()
    ways = {"without thoughts": "base", "thoughts": "mixed", "thoughts of other positions": "shuffled"}
    rows = [
        {"condition": name, "NLL": figures[f"{way}_nll"], "gain": figures["base_nll"] - figures[f"{way}_nll"]}
        for name, way in ways.items()
    ]
    return tables.table(rows) + f"\n({figures['tokens']} tokens; nats per token)"


def main(argv: list[str]) -> int:
    args = options(argv)
    text = args.text if args.file is None else read_text("file", args.file)
    if not text.strip():
        raise ValueError(f"text = {text!r}: must not be empty")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"text = {text[:40]!a}: is no UTF-8 text")
    model, tokenizer = load(args.model)
    config = look_config(model.quiet_star, args.thought_length, args.num_thoughts, args.thought_temperature)
    ids = tokenizer(text, verbose=False)["input_ids"]
    found = look(model, ids, config, torch.Generator().manual_seed(args.seed))
    about = {"model": args.model or "the embedded model", "seed": args.seed}
    output = Path(args.output)
    output.write_text(page(found, tokenizer, about), encoding="utf-8")
    print(table(found))
    size = output.stat().st_size
    tables.last_line({"output": args.output, "bytes": size, "seed": args.seed, **found.summary()})
    return 0
