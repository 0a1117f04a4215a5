"""The ways to run a training step that `qstar bench step` compares, and one round of each.

- ours: QuietStarForCausalLM as a trainer calls it;
- dense: the same with thought attention under a dense mask (impl="reference");
- published: the published way (published.py): sequential passes, a growing mask, all logits, no packing;
- plain: language-model training of the base model on the same text: the price of thinking is over this.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.reporting.benchmark_record import WrongResultError, check_device
from qstar.reporting.profiling import traced
from qstar_bench.memory.memory_peaks import peak_bytes, resident_peak_bytes
from qstar_bench.model_shapes import EMBEDDED, SHAPES, base_config, weights_of
from qstar_bench.timing import DTYPES, PhaseClock, timed
from qstar_bench.training_step.published_step import published_step

WAYS = ("ours", "dense", "published", "plain")
PRESETS: dict[str, dict[str, Any]] = {
    "authors-cpu": {
        "model": "authors-19m",
        "way": ["ours", "published", "plain"],
        "dtype": ["float32", "bfloat16"],
    }
}
CHECKED_TOKENS = 12  # of the text on which all ways must agree


@dataclass
class StepBenchArguments:
    """A preset, or a model and the sizes of a step."""

    preset: str | None = field(default=None, metadata={"help": f"One of {', '.join(PRESETS)}."})
    model: str = field(
        default="authors-19m",
        metadata={"help": f"Folder of a base model, {EMBEDDED}, or a shape: {', '.join(SHAPES)}."},
    )
    tokens: int = field(default=256, metadata={"help": "T: tokens of a text."})
    batch: int = field(default=1, metadata={"help": "B: texts of a step."})
    thought_length: int = field(default=9, metadata={"help": "k; the authors' n_ahead is k + 3."})
    talk_length: int = field(default=4, metadata={"help": "m."})
    num_thoughts: int = field(default=2, metadata={"help": "R."})
    block_chunk: int | None = field(default=None, metadata={"help": "Slots computed at once."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    way: list[str] = field(
        default_factory=lambda: ["ours", "plain"], metadata={"help": f"Of {', '.join(WAYS)}."}
    )
    dtype: list[str] = field(
        default_factory=lambda: ["float32"],
        metadata={"help": "float32, bfloat16 or float16: autocast to it, weights in fp32."},
    )
    impl: str = field(default="auto", metadata={"help": "Thought attention of ours."})
    steps: int = field(
        default=3, metadata={"help": "Timed steps of a round, after a warm-up; of slow ways one."}
    )
    rounds: int = field(default=2, metadata={"help": "Alternating rounds."})
    worker: str | None = field(default=None, metadata={"help": "Run one round of this way:dtype here."})

    def __post_init__(self) -> None:
        if self.preset is not None:
            if self.preset not in PRESETS:
                raise ValueError(f"preset = {self.preset}: must be one of {', '.join(PRESETS)}")
            for name, value in PRESETS[self.preset].items():
                setattr(self, name, value)
        for name, allowed in (("way", WAYS), ("dtype", DTYPES)):
            for given in getattr(self, name):
                if given not in allowed:
                    raise ValueError(f"{name} = {given}: must be one of {', '.join(allowed)}")
        for name in ("batch", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.tokens <= max(self.talk_length, 1):
            raise ValueError(f"tokens = {self.tokens}: must exceed talk_length = {self.talk_length}")
        check_device(self.device)
        if "published" in self.way and self.thought_length < 1:
            raise ValueError("thought_length = 0: the published way needs at least 1")
        self.config("ours")  # raises for knobs of the method that cannot be

    def config(self, way: str) -> QuietStarConfig:
        return QuietStarConfig(
            thought_length=self.thought_length,
            talk_length=self.talk_length,
            num_thoughts=self.num_thoughts,
            attention="reference" if way == "dense" else self.impl,
            block_chunk=self.block_chunk if way == "ours" else None,
        )


def build(
    args: StepBenchArguments, way: str, device: str | None = None, small: bool = False
) -> tuple[QuietStarForCausalLM, Tensor]:
    """Build a model with thoughts in fp32, its mixing head not zero (w = 0 would leave most gradients zero),
    and one batch of random text [B, T]. A folder's own weights, a shape's random ones; small: random ones of
    the same architecture with fewer layers and tokens."""
    device = device or args.device
    torch.manual_seed(0)
    with torch.device(device):
        shape, weights = base_config(args.model), weights_of(args.model)
        if small:
            shape = base_config(args.model, layers=min(2, shape.num_hidden_layers))
            shape.vocab_size = min(1024, shape.vocab_size)
        if small or weights is None or device == "meta":
            base = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        else:
            base = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
        model = QuietStarForCausalLM.from_base(base, args.config(way)).to(device).train()
        torch.nn.init.normal_(model.mixing.layers[-1].weight, std=0.01)
        text = torch.randint(3, base.config.vocab_size, (args.batch, args.tokens))
    model.check_length(args.tokens, "tokens")
    return model, text


def loss_of(way: str, model: QuietStarForCausalLM, text: Tensor, seed: int) -> Tensor:
    if way == "plain":
        return model.base(input_ids=text, labels=text, use_cache=False).loss
    if way == "published":
        torch.manual_seed(seed)
        return published_step(model, text)[0]
    return model(text, generator=torch.Generator(text.device).manual_seed(seed)).loss


def check(args: StepBenchArguments) -> float:
    """Compute the largest relative difference of loss and gradients between the ways, for the same thoughts,
    on a short text and a small model of the same architecture; in fp64, on a GPU (whose kernels have none) in
    fp32. Raises WrongResultError when they disagree."""
    dtype, allowed = (torch.float64, 1e-6) if args.device == "cpu" else (torch.float32, 1e-4)
    short = replace(args, preset=None, tokens=max(CHECKED_TOKENS, args.talk_length + 2), batch=1)
    # the published way cannot be given thoughts, so its own are the others' too: it is first
    ways = sorted((way for way in short.way if way != "plain"), key=lambda way: way != "published")
    found: dict[str, dict[str, Tensor]] = {}
    thoughts = None
    for way in ways:
        model, text = build(short, way, small=True)
        model = model.to(dtype)
        if way == "published":
            torch.manual_seed(0)
            loss, thoughts = published_step(model, text)
        else:
            if thoughts is None:
                size = (1, short.tokens - 1, short.num_thoughts, short.thought_length)
                thoughts = torch.randint(3, len(model.linear_head().weight), size, device=text.device)
            loss = model(text, thoughts=thoughts).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[way] = {"loss": loss.detach(), **gradients}
    worst = 0.0
    for way in ways[1:]:
        for name, expected in found[ways[0]].items():
            difference = float((found[way][name] - expected).norm() / expected.norm().clamp(min=1e-300))
            worst = max(worst, difference)
            if not difference <= allowed:
                raise WrongResultError(
                    f"way = {way}: its {name} differs from that of {ways[0]} by {difference:.1e}"
                )
    return worst


def work(args: StepBenchArguments, way: str, dtype: str, trace: str | None = None) -> dict:
    """Run one round in this process: seconds of the warm-up and of every step, of each phase in one more
    step, and the peak memory of one more: of tensors (what the step adds and what is there before) and
    resident."""
    model, text = build(args, way)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    precise = dtype == "float32"

    def step(seed: int) -> None:
        with torch.autocast(args.device, dtype=DTYPES[dtype], enabled=not precise):
            loss = loss_of(way, model, text, seed)
        with torch.profiler.record_function("qstar.backward"):
            loss.backward()
        with torch.profiler.record_function("qstar.optimiser"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    count = args.steps if way in ("ours", "plain") else 1
    seconds = [timed(lambda seed=seed: step(seed), args.device)[0] for seed in range(count + 1)]  # type: ignore[misc]
    resident = resident_peak_bytes()
    with PhaseClock(args.device) as clock:
        step(0)
    state = [x for entry in optimizer.state.values() for x in entry.values()]
    held = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers(), *state))
    added = peak_bytes(lambda: step(0), args.device)
    if trace is not None:
        with traced(trace):
            step(0)
    return {
        "warm_up_s": seconds[0],
        "step_s": seconds[1:],
        "phases": clock.seconds,
        "peak_bytes": held + added,
        "resident_bytes": resident,
    }
