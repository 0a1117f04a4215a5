"""Reach what torch keeps private, in one place: tests/bench/test_torch_internals.py fails, by name, for each
that a new torch takes away or changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.fsdp  # registers torch.ops.fsdp
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only

without_modes = _disable_current_modes
aten = torch.ops.aten
# what torch.profiler.record_function calls; the first argument of the former is the range's name
RANGE_ENTER = torch.ops.profiler._record_function_enter_new.default
RANGE_EXIT = torch.ops.profiler._record_function_exit._RecordFunction
# indexing by a boolean mask
BY_MASK = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# namespaces of the operators around which FSDP2 empties and refills the storages of gathered weights
COLLECTIVES = ("fsdp", "c10d", "_c10d_functional")
FSDP_GATHER = torch.ops.fsdp.split_with_sizes_copy.default  # writes gathered weights into its argument `out`


def storage_key(x: Tensor) -> int:
    """Identify the storage of x, which views share, while it lives."""
    return x.untyped_storage()._cdata


def argument_names(operator: Any) -> list[str]:
    """Name the arguments of an operator, in order."""
    return [argument.name for argument in operator._schema.arguments]


def writes_to_first(operator: Any) -> bool:
    """Tell whether an operator writes into its first argument."""
    first = operator._schema.arguments[:1]
    return bool(first) and first[0].alias_info is not None and first[0].alias_info.is_write


def profiler_events(log: profile) -> list[Any]:
    """Give every event of a finished profile, with allocations (named "[memory]") and time in ns."""
    recorded: Any = log.profiler.kineto_results  # type: ignore[union-attr]
    return recorded.events()


@contextmanager
def fake_ranks(gpus: int) -> Iterator[None]:
    """Enter a process group of `gpus` ranks of which only this one exists; for one rank, enter none."""
    if gpus == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def record_history(max_entries: int | None) -> None:
    """Keep so many of a GPU's newest allocations for a snapshot; None: stop."""
    if max_entries is None:
        torch.cuda.memory._record_memory_history(enabled=None)
    else:
        torch.cuda.memory._record_memory_history(max_entries=max_entries)


def dump_snapshot(path: str) -> None:
    """Write the recorded history for https://pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(path)


def keep_busy(cycles: int) -> None:
    """Occupy the GPU for so many cycles, so that launches queue up behind."""
    torch.cuda._sleep(cycles)
