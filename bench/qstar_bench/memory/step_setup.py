"""The training step that `qstar memory` plans and measures: which model, which strategy, which precision."""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.profiler import record_function
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.supported import context_length
from qstar_bench.memory.allocation_tracker import BACKWARD, OPTIMISER
from qstar_bench.model_shapes import EMBEDDED, SHAPES
from qstar_bench.torch_internals import without_modes

ON_CPU = (EMBEDDED, "smollm2-135m")  # small enough to be trained there
STRATEGIES = ("full", "lora")
PRECISIONS = ("fp32", "bf16-mixed", "bf16")


@dataclass
class MemoryStepArguments:
    """One training step: forward, backward and AdamW, as in every step after the first, with the gradients of
    an earlier micro-batch present."""

    model: str = field(
        default=EMBEDDED,
        metadata={"help": f"A folder with a config.json, {EMBEDDED}, or {', '.join(SHAPES)}."},
    )
    tokens: int = field(default=256, metadata={"help": "T: tokens of a row."})
    batch: int = field(default=1, metadata={"help": "B: rows."})
    strategy: str = field(
        default="full", metadata={"help": "full: all weights learn; lora: adapters (peft) and the new parts."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters, on every linear layer."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "The model's own: layers are computed again in backward."}
    )
    precision: str | None = field(
        default=None,
        metadata={
            "help": "fp32; bf16-mixed: autocast, weights in fp32; bf16: weights too. Default: fp32 on a CPU, "
            "bf16-mixed on a GPU."
        },
    )
    device: str | None = field(
        default=None, metadata={"help": f"cpu or cuda; default: cpu for folders, {' and '.join(ON_CPU)}."}
    )

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, allowed: str) -> None:
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be {allowed}")

        for name, least in (("tokens", 2), ("batch", 1), ("lora_rank", 1)):
            require(name, getattr(self, name) >= least, f"at least {least}")
        require("strategy", self.strategy in STRATEGIES, f"one of {', '.join(STRATEGIES)}")
        if self.strategy == "lora" and importlib.util.find_spec("peft") is None:
            raise ValueError("strategy = 'lora': peft is not installed; pip install 'qstar[bench]'")
        if self.device is None:
            self.device = "cuda" if self.model in SHAPES and self.model not in ON_CPU else "cpu"
        require("device", self.device in ("cpu", "cuda"), "cpu or cuda")
        if self.precision is None:
            self.precision = "fp32" if self.device == "cpu" else "bf16-mixed"
        require("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")

    @property
    def round_to(self) -> int:
        """Bytes that an allocation is a multiple of: 512 on a GPU."""
        return 512 if self.device == "cuda" else 1


def check_sizes(args: MemoryStepArguments, thinking: QuietStarConfig, config: PreTrainedConfig) -> None:
    """Check the sizes. Raises ValueError for a step that forward would refuse."""
    if thinking.talk_length >= args.tokens:
        raise ValueError(f"tokens = {args.tokens}: must be more than talk_length = {thinking.talk_length}")
    context = context_length(config)
    if context is not None and args.tokens - 1 + thinking.slots > context:
        raise ValueError(
            f"tokens = {args.tokens}: with {thinking.slots} slots for a thought and its talk tokens they "
            f"exceed the model's context of {context}"
        )


def build(
    args: MemoryStepArguments,
    thinking: QuietStarConfig,
    config: PreTrainedConfig,
    weights: Path | None = None,
) -> QuietStarForCausalLM:
    """Build the model of the step on the default device; its weights random, or those of a folder."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    base: PreTrainedModel
    if weights is None:
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        base = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype)
    if args.strategy == "lora":
        _adapt(base, args.lora_rank, dtype)
    if thinking.suppressed_tokens is None:
        thinking = replace(thinking, suppressed_tokens=[config.vocab_size - 1])  # which `text` never has
    model = QuietStarForCausalLM(base, thinking).train()
    if args.gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in every version we support
            model.gradient_checkpointing_enable({"use_reentrant": False})
    # at w = 0 the rewards are rounding errors, and how many thoughts gain is chance
    torch.nn.init.normal_(model.mixing.layers[-1].weight, std=0.01)  # type: ignore[arg-type]
    return model


def _adapt(base: PreTrainedModel, rank: int, dtype: torch.dtype) -> None:
    """Put random adapters on every linear layer but the head, in place, and freeze all else."""
    from peft import LoraConfig, inject_adapter_in_model

    base_weights = set(base.parameters())
    with without_modes():  # peft moves what it made by Module.to, which fake tensors refuse
        inject_adapter_in_model(LoraConfig(r=rank, target_modules="all-linear"), base)
    device = base.get_input_embeddings().weight.device
    for module in list(base.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in base_weights:
                made = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
                setattr(module, name, torch.nn.init.normal_(made, std=0.02))


def ready(model: QuietStarForCausalLM) -> AdamW:
    """Make the optimiser of a run that is under way: with its state, and with gradients (zeros)."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimiser = AdamW(learning, lr=1e-6, weight_decay=0.0, fused=True)  # the Trainer's default
    optimiser.step()
    return optimiser


def text(args: MemoryStepArguments, config: PreTrainedConfig, device: str) -> Tensor:
    """Draw random ids [B, T]."""
    return torch.randint(0, config.vocab_size - 1, (args.batch, args.tokens), device=device)


def step(model: QuietStarForCausalLM, optimiser: Optimizer, ids: Tensor, precision: str | None) -> None:
    """Run forward, backward and update in named ranges."""
    with _quiet(), torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        loss = model(ids).loss
    with record_function(BACKWARD):
        loss.backward()
    with record_function(OPTIMISER):
        optimiser.step()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the model's advice against bf16 weights, which the user asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the base model's parameters are torch.bfloat16")
        yield
