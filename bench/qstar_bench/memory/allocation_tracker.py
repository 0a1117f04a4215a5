"""Run a training step without its numbers: record what it allocates, when, and what for.

`Tracker` is a TorchDispatchMode under which new floating tensors are fake (torch's FakeTensorMode: shapes and
dtypes, no memory), and so is all that is computed from them, while integer and bool tensors are real: the
step's shapes depend on them, on which positions think and which targets count. A mask that comes out of fake
numbers (`advantage > 0`) is a real one with a given share of True. Every storage, fake or real, is written
down at its birth and at its death.

torch's own MemTracker has neither these phases and categories nor a timeline, and cannot run this step: of
plain fake tensors `mask.any()` and `x[mask]` have no value.
"""

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qstar.profiler_ranges import PHASES
from qstar_bench.torch_internals import (
    BY_MASK,
    COLLECTIVES,
    FSDP_GATHER,
    RANGE_ENTER,
    RANGE_EXIT,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    argument_names,
    storage_key,
    tree_leaves,
    tree_map_only,
    writes_to_first,
)

aten = torch.ops.aten
BACKWARD, OPTIMISER = "qstar.backward", "qstar.optimiser"
STEP_PHASES = (*PHASES, BACKWARD, OPTIMISER)


@dataclass(frozen=True)
class KnownOperator:
    """State what the shapes of an operator's results do not say.

    workspace: of those of its arguments that this function names, by their names -> bytes held besides the
    results while it runs; keys_values: its arguments that are K/V; keeps: whether its backward reads its
    results too, so that they stay as long as its first operand.
    """

    workspace: Callable[..., int]
    keys_values: tuple[str, ...] = ()
    keeps: bool = False


@dataclass
class Storage:
    """Describe one allocation. born and died count events (died None: there at the end); range: the number
    and name of the innermost named range it was made in, number 0 between two; category: None where only its
    lifetime tells (see planned_step.py)."""

    nbytes: int
    born: int
    range: tuple[int, str]
    category: str | None = None
    died: int | None = None


@dataclass
class Log:
    """Collect every allocation of a step; (event, name) at which each phase began, in order; and the event at
    which each named range, by its number, ended."""

    storages: list[Storage] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)
    range_ends: dict[int, int] = field(default_factory=dict)
    events: int = 0


class Tracker(TorchDispatchMode):
    """Track allocations, as said above. one_in: of so many elements of a mask made from fake numbers one is
    True; operators: what is known of operators beyond their results; round_to: every allocation is a multiple
    of so many bytes.

    head_shape, set once it is known, is that of the head's weight [V, D]: floating tensors [..., V] are
    logits, and [V, D] that are no parameters sums of its gradient.
    """

    def __init__(
        self, one_in: int, operators: dict[Any, KnownOperator] | None = None, round_to: int = 1
    ) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.log = Log()
        self.head_shape: tuple[int, int] | None = None
        self._one_in, self._operators, self._round_to = one_in, operators or {}, round_to
        self._alive: dict[int, Storage] = {}
        self._gathered: dict[int, weakref.ref] = {}  # weights that FSDP gathered: it empties and refills them
        self._ranges: list[tuple[int, str]] = []  # number 0: a range of somebody else's
        self._numbers = itertools.count(1)
        self._phase = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with what this rank holds of it
        kwargs = kwargs or {}
        if func.namespace in COLLECTIVES or func in (RANGE_ENTER, RANGE_EXIT):
            self._measure_again()
        if func is RANGE_ENTER:
            self._enter(args[0])
        elif func is RANGE_EXIT:
            self._exit()
        result = self._run(func, args, kwargs)
        self._note(func, args, kwargs, result)
        return result

    # -- what runs

    def _run(self, func, args, kwargs):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(isinstance(x, FakeTensor) for x in inputs):
            return self._run_real(func, args, kwargs, inputs)
        if _writes_to_real(func, args):
            return args[0]  # of numbers that do not exist: what is there stays
        if func in BY_MASK:
            args = (args[0], _without_masks(args[1]), *args[2:])
        elif func is aten.masked_select.default:
            x, mask = torch.broadcast_tensors(args[0], args[1])
            func, args = aten.index.Tensor, (x, _without_masks([mask]))
        with self.fake:
            result = func(*args, **kwargs)
        return tree_map_only(FakeTensor, self._real_if_integer, result)

    def _run_real(self, func, args, kwargs, inputs):
        if not inputs and func.namespace == "aten":
            with self.fake:
                made = func(*args, **kwargs)
            if isinstance(made, Tensor) and made.dtype.is_floating_point:
                return made
        result = func(*args, **kwargs)
        if func.overloadpacket in (aten.empty, aten.empty_strided, aten.new_empty, aten.empty_like):
            result.zero_()  # token ids, of which some may never be written: see _writes_to_real
        return result

    def _real_if_integer(self, x: FakeTensor) -> Tensor:
        if x.dtype.is_floating_point:
            return x
        made = torch.zeros(x.shape, dtype=x.dtype)
        if x.dtype == torch.bool:
            made.view(-1)[self._one_in - 1 :: self._one_in] = True
        return made

    # -- what is written down

    def _enter(self, name: str) -> None:
        self._ranges.append((next(self._numbers) if name in STEP_PHASES else 0, name))
        self._begin_phase()

    def _exit(self) -> None:
        number, _ = self._ranges.pop()
        if number:
            self.log.range_ends[number] = self.log.events
        self._begin_phase()

    def _begin_phase(self) -> None:
        outermost = next((name for number, name in self._ranges if number), self._phase)
        if outermost != self._phase:  # what runs between two ranges belongs to the former
            self._phase = outermost
            self.log.phases.append((self.log.events, outermost))

    def see(self, x: Tensor, category: str | None = None) -> Storage | None:
        """Write down the storage of x, if it is new, and its category, if it has none. None: an empty one."""
        storage = x.untyped_storage()
        key = storage_key(x)
        known = self._alive.get(key)
        if known is None:
            nbytes = self._rounded(storage.nbytes())
            if not nbytes:
                return None
            known = self._born(nbytes)
            self._alive[key] = known
            weakref.finalize(storage, self._gone, key).atexit = False
        if known.category is None:
            known.category = category
        return known

    def _born(self, nbytes: int) -> Storage:
        inside = next((r for r in reversed(self._ranges) if r[0]), (0, self._phase))
        born = Storage(nbytes, self.log.events, inside)
        self.log.storages.append(born)
        self.log.events += 1
        return born

    def _gone(self, key: int) -> None:
        self._gathered.pop(key, None)
        self._dies(self._alive.pop(key))

    def _dies(self, storage: Storage) -> None:
        storage.died = self.log.events
        self.log.events += 1

    def _measure_again(self) -> None:
        """Log gathered weights again: FSDP resizes their storages in place, an allocation each time."""
        for key, reference in self._gathered.items():
            known, storage = self._alive[key], reference()
            nbytes = self._rounded(storage.nbytes())  # type: ignore[union-attr]
            if nbytes != known.nbytes:
                self._dies(known)
                self._alive[key] = self._born(nbytes)
                self._alive[key].category = "parameters"

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self._round_to) * self._round_to

    def _note(self, func, args, kwargs, result) -> None:
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.see(x, self._category(func, args, x))
        if func is FSDP_GATHER:
            for x in kwargs["out"]:
                self.see(x, "parameters")
                self._gathered[storage_key(x)] = weakref.ref(x.untyped_storage())
        operator = self._operators.get(func)
        if operator is None:
            return
        named = dict(zip(argument_names(func), args)) | kwargs
        asked = inspect.signature(operator.workspace).parameters
        held = self._born(operator.workspace(**{name: named[name] for name in asked if name in named}))
        held.category = "temporary"
        self._dies(held)
        for name in operator.keys_values:
            self.see(named[name], "K/V")
        if operator.keeps and args[0].untyped_storage().nbytes():
            kept = [x.untyped_storage() for x in tree_leaves(result)]
            weakref.finalize(args[0].untyped_storage(), kept.clear).atexit = False

    def _category(self, func, args, x: Tensor) -> str | None:
        if not x.dtype.is_floating_point or not x.ndim:
            return None
        if func is aten._to_copy.default and isinstance(args[0], Tensor):
            source = self._alive.get(storage_key(args[0]))
            if source is not None and source.category in ("parameters", "casts"):
                return "casts"
        if self.head_shape is not None:
            if x.shape == self.head_shape:
                return "gradients"
            if x.shape[-1] == self.head_shape[0]:
                return "logits"
        return None


def _writes_to_real(func, args) -> bool:
    """Tell whether an operator would write fake numbers into a real tensor."""
    return writes_to_first(func) and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor)


def _without_masks(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Give the same places as integers, because the number of elements that a fake mask chooses is
    unknown."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found
