"""Check the shapes, candidates and passes of `qstar bench attention` before anything is
measured."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from qstar_kernels import cpu_native, resolve_impl

from qstar.reporting.benchmark_record import check_device
from qstar_bench.attention.attention_problem import PASSES, Shape
from qstar_bench.attention.candidates import BASELINES, can, impl_of
from qstar_bench.timing import DTYPES

SMALL = Shape(T=256, L=14, R=1, Hq=8, Hkv=2, D=64)
MISTRAL = Shape(T=256, L=14, R=1, Hq=32, Hkv=8, D=128)  # of Mistral-7B, the paper's model
# name: (shapes, baselines)
PRESETS: dict[str, tuple[list[Shape], tuple[str, ...]]] = {
    "cpu-small": ([SMALL.at(T=T) for T in (256, 512, 1024)], ("causal", "dense", "flex")),
    "paper": ([MISTRAL.at(T=T) for T in (256, 1024, 4096)], ("causal", "flex", "flash")),
    "sweep-context": ([SMALL.at(T=T) for T in (64, 128, 256, 512, 1024, 2048)], ("causal",)),
    "sweep-length": ([SMALL.at(T=T, L=L) for T in (64, 256, 1024, 2048) for L in (1, 2, 4, 8, 16, 32)], ()),
}
SIZES = {"tokens": "T", "slots": "L", "num_thoughts": "R", "heads": "Hq", "kv_heads": "Hkv", "width": "D"}


@dataclass
class AttentionArguments:
    """A preset, or one shape of your own (by default that of cpu-small at T 256)."""

    preset: str | None = field(default=None, metadata={"help": f"One of {', '.join(PRESETS)}."})
    tokens: int | None = field(default=None, metadata={"help": "T: prefix keys; a block at each. [256]"})
    slots: int | None = field(default=None, metadata={"help": "L: slots of a block. [14]"})
    num_thoughts: int | None = field(default=None, metadata={"help": "R: blocks at each token. [1]"})
    heads: int | None = field(default=None, metadata={"help": "Query heads. [8]"})
    kv_heads: int | None = field(default=None, metadata={"help": "Key/value heads. [2]"})
    width: int | None = field(default=None, metadata={"help": "D: head width. [64]"})
    dtype: str = field(default="float32", metadata={"help": f"One of {', '.join(DTYPES)}."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    impl: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={"help": "Implementations; the first is 'ours' in the ratios, the others 'impl=NAME'."},
    )
    baseline: list[str] | None = field(
        default=None,
        metadata={"help": f"Of {', '.join(BASELINES)}; default: the preset's, or all."},
    )
    passes: list[str] = field(
        default_factory=lambda: list(PASSES), metadata={"help": f"Of {', '.join(PASSES)}."}
    )
    rounds: int = field(default=7, metadata={"help": "Alternating rounds after the warm-up."})
    plot: str | None = field(
        default=None, metadata={"help": "Draw time and memory over the slots as this PNG."}
    )


@dataclass(frozen=True)
class Request:
    """names: of the candidates; runs: what computes each that is an implementation of ours; remarks: what a
    reader of the figures must know: which are slow, and what was left out."""

    shapes: list[Shape]
    names: tuple[str, ...]
    passes: tuple[str, ...]
    dtype: torch.dtype
    runs: dict[str, str]
    remarks: list[str]


def plan(args: AttentionArguments) -> Request:
    """Turn the arguments into a request. Raises ValueError for an unknown name, a bad size, and what cannot
    run here."""
    names: list[tuple[str, str, Iterable[str]]] = [
        ("preset", args.preset or "cpu-small", PRESETS),
        ("dtype", args.dtype, DTYPES),
        *(("baseline", x, BASELINES) for x in args.baseline or ()),
        *(("passes", x, PASSES) for x in args.passes),
    ]
    for name, given, allowed in names:
        if given not in allowed:
            raise ValueError(f"{name} = {given}: must be one of {', '.join(allowed)}")
    if args.rounds < 1:
        raise ValueError(f"rounds = {args.rounds}: must be at least 1")
    for name, several in (("impl", args.impl), ("baseline", args.baseline or ())):
        if len(set(several)) < len(several):
            raise ValueError(f"{name} = {' '.join(several)}: each at most once")
    check_device(args.device)
    dtype = DTYPES[args.dtype]
    shapes, baselines = _shapes(args)
    remarks, kept = [], []
    for name in baselines if args.baseline is None else args.baseline:
        reason = _unsupported_reason(name, args, dtype, shapes)
        if reason is None:
            kept.append(name)
        elif args.baseline is not None:
            raise ValueError(f"baseline = {name}: {reason}")
        else:
            remarks.append(f"left out: {name}, {reason}")
    ours = ["ours", *(f"impl={name}" for name in args.impl[1:])]
    runs = {}
    for name in ours:
        what, slow = _what_runs(impl_of(name, args.impl[0]), args.device, dtype, shapes)
        runs[name] = what
        if slow:
            remarks.append(f"SLOW: {name} is {what}: no figures to judge the operator by")
    for name in (*ours, *(args.baseline or ())):
        possible = can(name, args.impl[0], args.device)
        if not set(args.passes) & set(possible):
            raise ValueError(f"passes = {' '.join(args.passes)}: {name} has only {', '.join(possible)} here")
    passes = tuple(x for x in PASSES if x in args.passes)
    return Request(shapes, (*ours, *kept), passes, dtype, runs, remarks)


def _shapes(args: AttentionArguments) -> tuple[list[Shape], tuple[str, ...]]:
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    for name, size in given.items():
        if args.preset is not None:
            raise ValueError(f"{name} = {size}: preset = {args.preset} has shapes of its own")
        if size < 1:
            raise ValueError(f"{name} = {size}: must be at least 1")
    if args.preset is not None:
        return PRESETS[args.preset]
    shape = SMALL.at(**{SIZES[name]: size for name, size in given.items()})
    if shape.Hq % shape.Hkv:
        raise ValueError(f"heads = {shape.Hq}: must be a multiple of kv_heads = {shape.Hkv}")
    return [shape], BASELINES


def _unsupported_reason(
    name: str, args: AttentionArguments, dtype: torch.dtype, shapes: list[Shape]
) -> str | None:
    """Tell why a baseline is unsupported here, or None."""
    if name not in ("flex", "flash"):
        return None
    try:
        for shape in shapes:
            resolve_impl(name, args.device, dtype, shape.D)
    except ValueError as error:
        return str(error)
    return None


def _what_runs(impl: str, device: str, dtype: torch.dtype, shapes: list[Shape]) -> tuple[str, bool]:
    """Tell what computes `impl` for these shapes, and whether that is slow. Raises ValueError for one that
    cannot."""
    found = {resolve_impl(impl, device, dtype, shape.D) for shape in shapes}
    if found == {"cpu"}:
        for s in shapes:
            q, k = (torch.empty(1, 1, s.L, h, s.D, dtype=dtype, device="meta") for h in (s.Hq, s.Hkv))
            if not cpu_native.supports(q, k):
                built = cpu_native.built()
                reason = built if built.startswith("torch") else f"torch's operators: {s} is too large for it"
                return f"cpu (forward: {reason})", True
        return f"cpu (forward: {cpu_native.built()})", False
    return ", ".join(sorted(found)), "reference" in found
