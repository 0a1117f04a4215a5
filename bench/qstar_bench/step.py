"""`qstar bench step`: seconds and peak memory of one training step, ours beside the dense-mask path.

Both run the same step on the same random model and text; only the implementation of thought attention
differs: `reference` scores every slot against all T prefix keys under a dense mask. Each implementation runs
in processes of its own, so that peak resident memory is its own; their rounds alternate, so that a busy
machine hurts both.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial

import torch
from qstar_kernels import resolve_impl
from tqdm.auto import tqdm
from transformers import MistralConfig, MistralForCausalLM

from qstar import QuietStarConfig, QuietStarForCausalLM, report
from qstar.cli.options import parse_options
from qstar_bench.timing import timed


@dataclass
class StepArguments:
    """The 19.4M-parameter configuration that the authors' code was measured on, by default."""

    tokens: int = field(default=256, metadata={"help": "T: tokens of the text."})
    batch: int = field(default=1, metadata={"help": "B: rows."})
    thought_length: int = field(default=9, metadata={"help": "k; the authors' n_ahead is k + 3."})
    talk_length: int = field(default=4, metadata={"help": "m."})
    num_thoughts: int = field(default=2, metadata={"help": "R."})
    width: int = field(default=256, metadata={"help": "Model width."})
    layers: int = field(default=4, metadata={"help": "Layers."})
    heads: int = field(default=8, metadata={"help": "Query heads."})
    kv_heads: int = field(default=2, metadata={"help": "Key/value heads."})
    mlp: int = field(default=704, metadata={"help": "MLP width."})
    vocabulary: int = field(default=32_000, metadata={"help": "V."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    autocast: str | None = field(
        default=None, metadata={"help": "bfloat16 or float16: products in it, weights in fp32."}
    )
    impl: list[str] = field(
        default_factory=lambda: ["auto", "reference"],
        metadata={"help": "Implementations of thought attention."},
    )
    steps: int = field(default=3, metadata={"help": "Timed steps of a round, after one warm-up step."})
    rounds: int = field(default=1, metadata={"help": "Alternating rounds."})
    json: bool = field(default=False, metadata={"help": "Print only the JSON document."})
    worker: str | None = field(default=None, metadata={"help": "Run one round of this implementation here."})


def build(args: StepArguments, impl: str) -> tuple[QuietStarForCausalLM, torch.Tensor]:
    """A random Mistral with thoughts on the chosen device, in fp32, and one batch of random text [B, T]."""
    torch.manual_seed(0)
    shape = MistralConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.tokens + 256,
        sliding_window=None,
    )
    with torch.device(args.device):
        base = MistralForCausalLM(shape)
    config = QuietStarConfig(
        thought_length=args.thought_length,
        talk_length=args.talk_length,
        num_thoughts=args.num_thoughts,
        attention=impl,
    )
    model = QuietStarForCausalLM.from_base(base, config).to(args.device).train()
    torch.nn.init.normal_(model.mixing.layers[-1].weight, std=0.01)  # w = 0 would leave most gradients zero
    text = torch.randint(3, args.vocabulary, (args.batch, args.tokens), device=args.device)
    return model, text


def work(args: StepArguments, impl: str) -> dict:
    """One round in this process: warm-up apart, every step's seconds, and the peak memory in GiB."""
    model, text = build(args, impl)
    dtype = getattr(torch, args.autocast or "float32")

    def one(step: int) -> None:
        with torch.autocast(args.device, dtype=dtype, enabled=args.autocast is not None):
            loss = model(text, generator=torch.Generator(args.device).manual_seed(step)).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    seconds = [timed(partial(one, step), args.device)[0] for step in range(args.steps + 1)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else _resident_gib()
    return {"impl": impl, "warm_up_s": seconds[0], "step_s": seconds[1:], "peak_gib": peak}


def _resident_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def card(args: StepArguments) -> dict:
    """What a step needs, before any measurement: counted, not timed."""
    T, k, m, R = args.tokens, args.thought_length, args.talk_length, args.num_thoughts
    slots, blocks = k + m + 1, (T - 1) * R
    model, _ = build(replace(args, device="meta"), "reference")
    prefix_cells = R * T * (T - 1) // 2 * slots
    own_cells = blocks * slots * (slots + 1) // 2
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "blocks": args.batch * blocks,
        "slots": args.batch * blocks * slots,
        "attention_cells_needed": args.batch * (prefix_cells + own_cells),
        "attention_cells_dense": args.batch * blocks * slots * (T + slots),
    }


def main(argv: list[str]) -> int:
    (args,) = parse_options(StepArguments, argv, prog="qstar bench step")
    if args.worker is not None:
        print(json.dumps(work(args, args.worker)))
        return 0
    if args.autocast not in (None, "bfloat16", "float16"):
        raise ValueError(f"autocast = {args.autocast}: must be bfloat16 or float16")
    names = {impl: f"{impl} ({resolve_impl(impl, device=args.device)})" for impl in args.impl}
    rounds: dict[str, list[dict]] = {impl: [] for impl in args.impl}
    for _ in tqdm(range(args.rounds), desc="rounds", disable=args.json):
        for impl in args.impl:
            rounds[impl].append(_in_a_process(args, impl))
    median = {
        impl: statistics.median(s for r in found for s in r["step_s"]) for impl, found in rounds.items()
    }
    results = [
        {
            "thought attention": names[impl],
            "warm-up s": rounds[impl][0]["warm_up_s"],
            "median s a step": median[impl],
            "thoughts/s": args.batch * (args.tokens - 1) * args.num_thoughts / median[impl],
            "peak GiB": max(r["peak_gib"] for r in rounds[impl]),
            f"times {args.impl[0]}": median[impl] / median[args.impl[0]],
        }
        for impl in args.impl
    ]
    costs = card(args)
    if not args.json:
        print(report.table([costs], digits=0))
        print(report.table(results, digits=2))
        precision = "fp32" if args.autocast is None else f"autocast to {args.autocast}"
        print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}")
    report.last_line({"arguments": asdict(args), "costs": costs, "results": results})
    return 0


def _in_a_process(args: StepArguments, impl: str) -> dict:
    options = []
    for option in fields(StepArguments):
        value = getattr(args, option.name)
        if option.name not in ("impl", "json", "worker", "rounds") and value is not None:
            options += [f"--{option.name}", str(value)]
    command = [sys.executable, "-m", "qstar.cli.main", "bench", "step", *options, "--worker", impl]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
