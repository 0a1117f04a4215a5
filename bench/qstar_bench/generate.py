"""`qstar bench generate`: tokens a second of every way to generate, on one prompt, in one run.

- plain: the base model alone (think="never");
- adaptive: thoughts where the base prediction is uncertain;
- speculative: a thought before every token, several at once over drafted tokens;
- sequential: the same, one token at a time (draft_length 0), for the first tokens;
- recompute: the published way (its `custom_generate`): for every new token the whole text is read again,
  every position of it thinks again, and every pass computes all logits; but with our attention in place of
  the dense mask, so that it is faster than the published code. A few tokens spread evenly over the text,
  since it takes long.

All are greedy, with greedy thoughts: speculative, sequential and recompute must write the same tokens, which
is checked before a figure is printed. The threshold of adaptive thinking comes from the checkpoint (`qstar
calibrate`), or is the entropy that a stated share of the base model's own continuation exceeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from qstar_kernels.vocabulary import logits
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM, report
from qstar.attention import BlockPass
from qstar.cache import SlotCache
from qstar.cli.options import parse_options
from qstar.cli.train import open_model
from qstar.layout import TextRows
from qstar_bench.memory import peak_bytes
from qstar_bench.timing import timed

PROMPT = (
    "The ship had been at sea for three weeks when the captain called the crew together. The water was low, "
    "the bread was hard, and the wind had not changed since the storm. He told them what he had seen on the "
    "old chart, that there was an island two days to the south, and that nobody who had landed there"
)
# name: (new tokens, thought length, tokens of recompute, of sequential)
PRESETS = {"cpu": (128, 8, 3, 24)}


@dataclass
class GenerateArguments:
    """A checkpoint, or a base model, which then begins to think with the weight of a fresh mixing head."""

    model: str = field(metadata={"help": "Folder of a Quiet-STaR checkpoint or a base model."})
    preset: str = field(default="cpu", metadata={"help": f"One of {', '.join(PRESETS)}."})
    prompt: str = field(default=PROMPT, metadata={"help": "The prompt."})
    new_tokens: int | None = field(default=None, metadata={"help": "Tokens to write; default: the preset's."})
    thinking_share: float = field(
        default=0.2, metadata={"help": "For adaptive, where the checkpoint is not calibrated."}
    )
    rounds: int = field(default=2, metadata={"help": "Alternating rounds after the warm-up."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    json: bool = field(default=False, metadata={"help": "Print only the JSON document."})


@torch.no_grad()
def recompute(model: QuietStarForCausalLM, ids: Tensor, k: int) -> int:
    """The next token of ids [1, T], as the published code finds it: nothing is kept from the token before."""
    T = ids.shape[1]
    hidden, text = model.read_text(ids, TextRows.from_batch(ids))
    base = logits(hidden[0], model.head)
    end = torch.arange(1, T + 1, device=ids.device)[None]
    slots = SlotCache(k + 2)
    embedding = model.boundary.start.expand(1, T, -1)
    for slot in range(k + 2):
        block_pass = BlockPass(text, torch.zeros_like(end), end, slots, slot)
        after = model.read_slots(embedding, end + slot, block_pass)
        scores = logits(after[0], model.head)  # of all positions, as all of them go on thinking
        if slot < k:
            scores[:, model.suppress] = -torch.inf
            embedding = model.get_input_embeddings()(scores.argmax(-1))[None]
        else:
            embedding = model.boundary.end.expand(1, T, -1)
    w = model.mixing(hidden[0], after[0])[:, None]
    mixed = (1 - w) * base + w * scores
    return int(mixed[-1].argmax())


@torch.no_grad()
def threshold_of(model: QuietStarForCausalLM, ids: Tensor, share: float) -> float:
    """The entropy (nats) of the base prediction that a share of the tokens of ids [1, T] exceeds."""
    hidden, _ = model.read_text(ids, TextRows.from_batch(ids))
    p = logits(hidden[0], model.head).softmax(-1)
    return float(torch.special.entr(p).sum(-1).quantile(1 - share))


def main(argv: list[str]) -> int:
    (args,) = parse_options(GenerateArguments, argv, prog="qstar bench generate")
    if args.preset not in PRESETS:
        raise ValueError(f"preset = {args.preset}: must be one of {', '.join(PRESETS)}")
    if args.rounds < 1 or not 0 < args.thinking_share < 1:
        raise ValueError(
            f"rounds = {args.rounds}, thinking_share = {args.thinking_share}: must be at least 1, in (0, 1)"
        )
    new, k, few, some = PRESETS[args.preset]
    new = args.new_tokens or new
    few, some = min(few, new), min(some, new)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = open_model(args.model, QuietStarConfig(thought_length=k), tokenizer).to(args.device).eval()
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids.to(args.device)
    options = {"eos_token_id": None, "pad_token_id": 0, "thought_temperature": 0.0, "thought_length": k}

    def run(tokens: int, **how):
        return model.generate(ids, max_new_tokens=tokens, return_dict_in_generate=True, **options, **how)

    bar = tqdm(total=5 * (1 + args.rounds), desc="generate", disable=args.json)
    plain_text = run(new, think="never").sequences
    limit = model.quiet_star.entropy_threshold
    if limit is None:
        limit = threshold_of(model, plain_text, args.thinking_share)
    # name: (tokens written, the way to write n of them)
    ways: dict[str, tuple[int, Callable[[int], Any]]] = {
        "plain": (new, lambda n: run(n, think="never")),
        "adaptive": (new, lambda n: run(n, think="adaptive", entropy_threshold=limit)),
        "speculative": (new, lambda n: run(n)),
        "sequential": (some, lambda n: run(n, draft_length=0)),
    }
    outputs: dict[str, Any] = {}
    for name, (tokens, way) in ways.items():
        outputs[name] = way(tokens)
        bar.update()
    written = outputs["speculative"].sequences
    T = ids.shape[1]
    places = sorted({T + round(i * (new - 1) / max(1, few - 1)) for i in range(few)})
    ways["recompute"] = len(places), lambda n: [recompute(model, written[:, :i], k) for i in places[:n]]
    outputs["recompute"] = ways["recompute"][1](len(places))
    bar.update()
    first = outputs["sequential"].sequences
    if not torch.equal(first, written[:, : first.shape[1]]):
        raise RuntimeError("sequential does not write the tokens of speculative")
    if outputs["recompute"] != written[0, places].tolist():
        raise RuntimeError("recompute does not write the tokens of speculative")
    peaks = {
        name: peak_bytes(partial(way, min(tokens, 1 if name == "recompute" else 16)), args.device)
        for name, (tokens, way) in ways.items()
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, (tokens, way) in ways.items():
            times[name].append(timed(partial(way, tokens), args.device)[0] / tokens)
            bar.update()
    bar.close()
    rows = [_row(name, tokens, times[name], outputs[name], peaks[name]) for name, (tokens, _) in ways.items()]
    counts = outputs["speculative"].counts

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(times[above], times[below]))

    document = {
        "arguments": asdict(args),
        "prompt_tokens": T,
        "machine": {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__},
        "calibrated": model.quiet_star.entropy_threshold is not None,
        "speedup_vs_sequential": ratio("sequential", "speculative"),
        "speedup_vs_recompute": ratio("recompute", "speculative"),
        "adaptive_vs_plain": ratio("adaptive", "plain"),
        "acceptance_rate": counts["accepted"] / max(1, counts["tested"]),
        "steps_per_token": counts["model_steps"] / new,
        "adaptive_thinking_share": outputs["adaptive"].counts["thoughts"] / new,
        "ways": rows,
    }
    if not args.json:
        print(report.table(rows, digits=2))
        shown = {name: x for name, x in document.items() if isinstance(x, float)}
        print(report.table([shown], digits=2))
        print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32, k {k}")
    report.last_line(document)
    return 0


def _row(name: str, tokens: int, seconds: list[float], output: Any, peak: int) -> dict:
    counts = getattr(output, "counts", None)
    return {
        "way": name,
        "tokens": tokens,
        "tokens/s": 1 / statistics.median(seconds),
        "slowest": 1 / max(seconds),
        "fastest": 1 / min(seconds),
        "model steps a token": counts["model_steps"] / tokens if counts else None,
        "thoughts": counts["thoughts"] if counts else None,
        "memory MiB": peak / 2**20,
        "accepted": counts["accepted"] / counts["tested"] if counts and counts["tested"] else None,
    }
