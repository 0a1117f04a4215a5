"""`qstar bench generate`: tokens a second of every way to generate, on one prompt, in one run.

- plain: the base model alone (think="never");
- adaptive: thoughts where the base prediction is uncertain;
- speculative: a thought before every token, several at once over drafted tokens;
- sequential: the same, one token at a time (draft_length 0), for the first tokens;
- recompute: the published way (its `custom_generate`): for every new token the whole text is read again,
  every position of it thinks again, and every pass computes all logits; but with our attention in place of
  the dense mask, so that it is faster than the published code. A few tokens spread evenly over the text,
  since it takes long.

What is known without measuring is printed first. All are greedy, with greedy thoughts: speculative,
sequential and recompute must write the same tokens, which is checked before a figure is printed. The
threshold of adaptive thinking comes from the checkpoint (`qstar calibrate`), or is the entropy that a stated
share of the base model's own continuation exceeds.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from qstar_kernels import resolve_impl
from qstar_kernels.vocabulary import logits
from torch import Tensor
from torch.profiler import record_function
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.attention_interface import BlockPass
from qstar.base_model import read_slots
from qstar.cli.options import parse_options
from qstar.cli.train import open_model
from qstar.kv_cache import SlotCache
from qstar.layout import TextRows
from qstar.reporting import tables
from qstar.reporting.benchmark_record import OutputArguments, WrongResultError, check_device, finish, machine
from qstar.reporting.profiling import traced
from qstar_bench.memory.memory_peaks import peak_bytes
from qstar_bench.timing import timed

PROMPT = (
    "The ship had been at sea for three weeks when the captain called the crew together. The water was low, "
    "the bread was hard, and the wind had not changed since the storm. He told them what he had seen on the "
    "old chart, that there was an island two days to the south, and that nobody who had landed there"
)


@dataclass(frozen=True)
class Sizes:
    """Tokens: new ones, of a thought, and of the ways that take long: recompute and sequential."""

    new: int
    thought_length: int
    recompute: int
    sequential: int


PRESETS = {"cpu": Sizes(new=128, thought_length=8, recompute=3, sequential=24)}
Way = tuple[int, Callable[[int], Any]]  # tokens written, the way to write n of them
SHORT = 16  # tokens of the generation whose memory is measured; of the one that is traced a quarter


@dataclass
class GenerationBenchArguments:
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

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset = {self.preset}: must be one of {', '.join(PRESETS)}")
        if self.rounds < 1:
            raise ValueError(f"rounds = {self.rounds}: must be at least 1")
        if not 0 < self.thinking_share < 1:
            raise ValueError(f"thinking_share = {self.thinking_share}: must be in (0, 1)")
        if self.new_tokens is not None and self.new_tokens < 1:
            raise ValueError(f"new_tokens = {self.new_tokens}: must be at least 1")
        check_device(self.device)


@torch.no_grad()
def recompute(model: QuietStarForCausalLM, ids: Tensor, k: int) -> int:
    """Find the next token of ids [1, T] as the published code does: nothing is kept from the token before."""
    T = ids.shape[1]
    hidden, text = model.thinker.read_text(ids, TextRows.from_batch(ids))
    base = logits(hidden[0], model.linear_head())
    end = torch.arange(1, T + 1, device=ids.device)[None]
    slots = SlotCache(k + 2)
    embedding = model.boundary.start.expand(1, T, -1)
    for slot in range(k + 2):
        block_pass = BlockPass(text, torch.zeros_like(end), end, slots, slot)
        after = read_slots(model.base, embedding, end + slot, block_pass)
        scores = logits(after[0], model.linear_head())  # of all positions, as all of them go on thinking
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
    """Find the entropy (nats) of the base prediction that a share of the tokens of ids [1, T] exceeds."""
    hidden, _ = model.thinker.read_text(ids, TextRows.from_batch(ids))
    p = logits(hidden[0], model.linear_head()).softmax(-1)
    return float(torch.special.entr(p).sum(-1).quantile(1 - share))


def main(argv: list[str]) -> int:
    args, output = parse_options(
        (GenerationBenchArguments, OutputArguments), argv, prog="qstar bench generate"
    )
    sizes = PRESETS[args.preset]
    new, k = args.new_tokens or sizes.new, sizes.thought_length
    sizes = Sizes(new, k, min(sizes.recompute, new), min(sizes.sequential, new))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = open_model(args.model, QuietStarConfig(thought_length=k), tokenizer).to(args.device).eval()
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids.to(args.device)
    T = ids.shape[1]
    if T == 0:
        raise ValueError("prompt: has no tokens")
    a_thought_alone = replace(model.quiet_star, talk_length=1)  # its talk token is the one that is written
    model.check_length(T + new, "the prompt with new_tokens", a_thought_alone)
    text = model.base.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    resolved = resolve_impl(model.quiet_star.attention, args.device, torch.float32, width)
    where = machine(args.device, dtype="float32", ours=resolved)
    card = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt tokens": T,
        "new tokens": new,
        "thought length": k,
        "model steps a token, sequential": k + 2,
        "positions read again a token, recompute": (T + new / 2) * (k + 3),
    }
    if not output.json:
        print(tables.table([card], digits=0))
        print("\n".join(f"{name}: {value}" for name, value in where.items()), flush=True)
        if resolved == "reference":
            print(
                "SLOW: thought attention is reference, the dense mask: no figures to judge it by", flush=True
            )
    with tqdm(total=5 * (1 + args.rounds), desc="generate", disable=output.json) as bar:
        ways, outputs = checked_ways(model, ids, args, sizes, bar)
        peaks = {
            name: peak_bytes(partial(way, min(tokens, 1 if name == "recompute" else SHORT)), args.device)
            for name, (tokens, way) in ways.items()
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, (tokens, way) in ways.items():
                times[name].append(timed(partial(way, tokens), args.device)[0] / tokens)
                bar.update()
    rows = [_row(name, tokens, times[name], outputs[name], peaks[name]) for name, (tokens, _) in ways.items()]
    figures = ratios(times, outputs, new)
    if not output.json:
        print(tables.table(rows, digits=2))
        print(tables.table([figures], digits=2))
    with traced(output.trace):
        for name, (tokens, way) in ways.items() if output.trace is not None else ():
            with record_function(name):
                way(min(tokens, 1 if name == "recompute" else SHORT // 4))
    calibrated = model.quiet_star.entropy_threshold is not None
    finish("generate", args, where, rows, output, costs=card, calibrated=calibrated, **figures)
    return 0


def checked_ways(
    model: QuietStarForCausalLM, ids: Tensor, args: GenerationBenchArguments, sizes: Sizes, bar: tqdm
) -> tuple[dict[str, Way], dict[str, Any]]:
    """Run every way once: ways and what they wrote, by name. Raises WrongResultError when they differ in a
    token."""
    T, k, new = ids.shape[1], sizes.thought_length, sizes.new
    options = {"eos_token_id": None, "pad_token_id": 0, "thought_temperature": 0.0, "thought_length": k}

    def run(tokens: int, **how):
        return model.generate(ids, max_new_tokens=tokens, return_dict_in_generate=True, **options, **how)

    limit = model.quiet_star.entropy_threshold
    if limit is None:
        limit = threshold_of(model, run(new, think="never").sequences, args.thinking_share)
    ways: dict[str, Way] = {
        "plain": (new, lambda n: run(n, think="never")),
        "adaptive": (new, lambda n: run(n, think="adaptive", entropy_threshold=limit)),
        "speculative": (new, lambda n: run(n)),
        "sequential": (sizes.sequential, lambda n: run(n, draft_length=0)),
    }
    outputs: dict[str, Any] = {}
    for name, (tokens, way) in ways.items():
        outputs[name] = way(tokens)
        bar.update()
    written = outputs["speculative"].sequences
    few = sizes.recompute
    places = sorted({T + round(i * (new - 1) / max(1, few - 1)) for i in range(few)})
    ways["recompute"] = len(places), lambda n: [recompute(model, written[:, :i], k) for i in places[:n]]
    outputs["recompute"] = ways["recompute"][1](len(places))
    bar.update()
    sequential = outputs["sequential"].sequences
    if not torch.equal(sequential, written[:, : sequential.shape[1]]):
        raise WrongResultError("sequential does not write the tokens of speculative, no time is shown")
    if outputs["recompute"] != written[0, places].tolist():
        raise WrongResultError("recompute does not write the tokens of speculative, no time is shown")
    return ways, outputs


def ratios(times: dict[str, list[float]], outputs: dict[str, Any], new: int) -> dict[str, float]:
    """Compute the run's figures: medians of the rounds' ratios, and what was drafted, accepted and
    thought."""
    counts = outputs["speculative"].counts

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(times[above], times[below]))

    return {
        "speedup_vs_sequential": ratio("sequential", "speculative"),
        "speedup_vs_recompute": ratio("recompute", "speculative"),
        "adaptive_vs_plain": ratio("adaptive", "plain"),
        "acceptance_rate": counts["accepted"] / max(1, counts["tested"]),
        "steps_per_token": counts["model_steps"] / new,
        "adaptive_thinking_share": outputs["adaptive"].counts["thoughts"] / new,
    }


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
