"""Plan the memory of a training step, by category and phase, without weights and without a GPU."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from qstar_kernels.triton_tiles import CHIPS
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qstar import QuietStarConfig, QuietStarForCausalLM
from qstar.profiler_ranges import BLOCKS, ROLLOUT
from qstar.supported import text_body
from qstar_bench.kernels import workspace
from qstar_bench.memory import step_setup
from qstar_bench.memory.allocation_tracker import (
    BACKWARD,
    OPTIMISER,
    STEP_PHASES,
    KnownOperator,
    Log,
    Storage,
    Tracker,
)
from qstar_bench.memory.step_setup import MemoryStepArguments
from qstar_bench.model_shapes import base_config
from qstar_bench.torch_internals import fake_ranks

CATEGORIES = (
    "parameters",
    "gradients",
    "optimiser",
    "activations",
    "K/V",
    "logits",
    "thought blocks",
    "temporary",
)
PLANNED_CHUNKS = 3  # of block_chunk: those after them hold the same again
CHIP = CHIPS["sm_90"]  # whose tiles --device cuda plans


@dataclass(frozen=True)
class Timeline:
    """bytes [events, categories] after each event; phase [events]: an index into STEP_PHASES."""

    bytes: np.ndarray
    phase: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return self.bytes.sum(1)

    def peak(self, phase: str | None = None) -> dict[str, int]:
        """Give bytes by category at the highest moment, of a phase or of all."""
        inside = np.ones(len(self.phase), bool) if phase is None else self.phase == STEP_PHASES.index(phase)
        if not inside.any():
            return dict.fromkeys(CATEGORIES, 0)
        at = np.flatnonzero(inside)[self.total[inside].argmax()]
        return {name: int(n) for name, n in zip(CATEGORIES, self.bytes[at])}

    def phase_of_peak(self) -> str:
        return STEP_PHASES[self.phase[self.total.argmax()]]


@dataclass(frozen=True)
class MemoryPlan:
    """peak: bytes by category at the highest moment; phases: the same, at the highest moment of each."""

    timeline: Timeline
    parameters: int
    chunks: tuple[int, int] | None  # planned, of how many

    @property
    def peak(self) -> dict[str, int]:
        return self.timeline.peak()

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    @property
    def phases(self) -> dict[str, dict[str, int]]:
        return {phase: self.timeline.peak(phase) for phase in STEP_PHASES}


def plan(
    args: MemoryStepArguments, thinking: QuietStarConfig, layers: int | None = None, gpus: int = 1
) -> MemoryPlan:
    """Plan the memory of the CPU, or of each of `gpus` GPUs under FSDP2 (`shard`).

    layers: instead of the config's own. Raises ValueError for sizes that the step itself would refuse.
    """
    config = base_config(args.model, layers)
    step_setup.check_sizes(args, thinking, config)
    few, chunks = _few_chunks(args, thinking)
    few = replace(few, attention=_planned(thinking.attention))
    tracker = Tracker(2 if few.num_thoughts > 1 else 1, _operators(args.device), args.round_to)
    with fake_ranks(gpus), tracker:
        model = step_setup.build(args, few, config)
        parameters = sum(p.numel() for p in model.parameters())
        head_shape = tuple(model.get_output_embeddings().weight.shape)
        if gpus > 1:
            shard(model, gpus, args.precision)
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.see(_local(tensor), "parameters")
        optimiser = step_setup.ready(model)
        for parameter in model.parameters():
            if parameter.grad is not None:
                tracker.see(_local(parameter.grad), "gradients")
        for state in optimiser.state.values():
            for tensor in state.values():
                tracker.see(_local(tensor), "optimiser")
        tracker.head_shape = head_shape  # type: ignore[assignment]
        ids = step_setup.text(args, config, "cpu")
        began = tracker.log.events
        step_setup.step(model, optimiser, ids, args.precision)
    return MemoryPlan(_timeline(tracker.log, began), parameters, chunks)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _planned(attention: str) -> str:
    """Choose the attention to run: fake tensors are on the CPU, `_operators` says which kernels are
    planned."""
    if attention not in ("auto", "cpu", "triton", "reference"):
        raise ValueError(f"attention = {attention!r}: must be auto, cpu, triton or reference for a plan")
    return "reference" if attention == "reference" else "auto"


def shard(model: QuietStarForCausalLM, gpus: int, precision: str | None) -> None:
    """Shard by FSDP2 the layers and, as the root, all else. Layers compute in bf16 unless the precision is
    fp32, and gradients are reduced in fp32. In bf16 the new parts, which stay in fp32, are on every rank."""
    mesh = init_device_mesh("cpu", (gpus,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in text_body(model.base).layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy() if precision == "fp32" else half)
    ours = {*model.mixing.parameters(), *model.boundary.parameters()} if precision == "bf16" else None
    fully_shard(model, mesh=mesh, ignored_params=ours)


def _few_chunks(
    args: MemoryStepArguments, thinking: QuietStarConfig
) -> tuple[QuietStarConfig, tuple[int, int] | None]:
    """Think, with block chunks, at as many positions as PLANNED_CHUNKS hold."""
    each = thinking.chunk_positions
    if each is None:
        return thinking, None
    positions = max(1, int((args.tokens - 1) * thinking.thinking_fraction))
    chunks = -(-positions // each)
    if chunks <= PLANNED_CHUNKS:
        return thinking, (chunks, chunks)
    fraction = PLANNED_CHUNKS * each / (args.tokens - 1)
    kind = "random" if thinking.thinking_positions == "all" else thinking.thinking_positions
    fewer = replace(thinking, thinking_positions=kind, thinking_fraction=fraction)
    return fewer, (PLANNED_CHUNKS, chunks)


def _operators(device: str | None) -> dict[Any, KnownOperator]:
    """Describe the CPU's operators, which fake tensors call, with the figures of Triton's if planned for a
    GPU."""
    forward: Any = workspace.cpu_forward
    backward: Any = workspace.cpu_backward
    if device == "cuda":
        forward = partial(workspace.triton_forward, chip=CHIP)
        backward = partial(workspace.triton_backward, chip=CHIP)
    names = ("k", "v", "k_prefix", "v_prefix")
    return {
        torch.ops.qstar.thought_attention_cpu.default: KnownOperator(forward, names, keeps=device == "cuda"),
        torch.ops.qstar.thought_attention_cpu_no_grad.default: KnownOperator(forward, names),
        torch.ops.qstar.thought_attention_cpu_backward.default: KnownOperator(backward),
    }


def _category(storage: Storage, log: Log) -> str:
    """Categorise an allocation: freed in the named range that made it, it is temporary, otherwise kept."""
    if storage.category is not None:
        return "parameters" if storage.category == "casts" else storage.category
    number, name = storage.range
    if number:
        end = log.range_ends[number]
    else:  # between two ranges
        end = next((event for event, _ in log.phases if event > storage.born), log.events)
    if name in (BACKWARD, OPTIMISER) or (storage.died is not None and storage.died <= end):
        return "temporary"
    return "thought blocks" if name in (ROLLOUT, BLOCKS) else "activations"


def _timeline(log: Log, began: int) -> Timeline:
    changes = np.zeros((log.events + 1, len(CATEGORIES)), np.int64)
    for storage in log.storages:
        column = CATEGORIES.index(_category(storage, log))
        changes[storage.born, column] += storage.nbytes
        if storage.died is not None:
            changes[storage.died, column] -= storage.nbytes
    phase = np.zeros(log.events + 1, np.int64)
    for event, name in log.phases:
        phase[event:] = STEP_PHASES.index(name)
    return Timeline(changes.cumsum(0)[began:-1], phase[began:-1])


def describe(args: MemoryStepArguments, thinking: QuietStarConfig, gpus: int, parameters: int) -> str:
    """Describe the step in words."""
    where = f"one of {gpus} GPUs under FSDP2" if gpus > 1 else args.device
    ways = "gradient checkpointing, " if args.gradient_checkpointing else ""
    at_once = thinking.chunk_positions
    chunk = "all at once" if at_once is None else f"of {at_once} positions at a time"
    return (
        f"{args.model}, {parameters / 1e6:,.1f}M parameters with the thoughts' own, {args.strategy}, {ways}"
        f"{args.precision}, on {where}: T {args.tokens}, batch {args.batch}, k {thinking.thought_length}, "
        f"m {thinking.talk_length}, R {thinking.num_thoughts}, thoughts {chunk}"
    )


def assumptions(args: MemoryStepArguments, found: MemoryPlan) -> str:
    """State the assumptions behind the figures of a plan."""
    gpu = f"Triton's kernels with the tiles of {CHIP.name}, the CPU's choice of all other operators"
    kernels = gpu if args.device == "cuda" else "this machine's kernels"
    chunks = ""
    if found.chunks is not None and found.chunks[0] < found.chunks[1]:
        chunks = f"; {found.chunks[0]} of {found.chunks[1]} chunks planned, the others hold the same again"
    return f"A plan, not a measurement: {kernels}{chunks}."
