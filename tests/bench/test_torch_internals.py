"""What the bench needs of torch's private APIs: each test names what stops working when torch changes it."""

import inspect
import weakref

import pytest
import torch
from qstar_bench import torch_internals
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function


class Seen(torch_internals.TorchDispatchMode):
    """Collect (operator, arguments) of what runs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_phases_of_a_step_are_lost_unless_a_named_range_calls_these_two_operators():
    with Seen() as seen, record_function("qstar.test"):
        torch.ones(2)
    (entered, name), *_, (left, _) = [(func, args[:1]) for func, args in seen.calls]
    assert (entered, name) == (torch_internals.RANGE_ENTER, ("qstar.test",))
    assert left == torch_internals.RANGE_EXIT


def test_lora_cannot_be_planned_unless_modes_can_be_switched_off_inside():
    with Seen() as seen, torch_internals.without_modes():
        torch.ones(2)
    assert seen.calls == []


def test_a_plan_would_need_its_memory_unless_fake_tensors_have_shapes_and_no_numbers():
    with torch_internals.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = torch.empty(2**20, 2**20)
    assert isinstance(x, torch_internals.FakeTensor) and x.untyped_storage().nbytes() == 4 * 2**40
    with mode:
        assert (x @ torch.ones(2**20, 3)).shape == (2**20, 3)  # of a real tensor beside


def test_masks_cannot_be_planned_unless_indexing_by_one_is_one_of_these_operators():
    x, mask = torch.zeros(3), torch.tensor([True, False, True])
    with Seen() as seen:
        x[mask]
        x[mask] = torch.ones(2)
        torch.ops.aten.index_put(x, [mask], torch.ones(2))
        torch.ops.aten._index_put_impl_(x, [mask], torch.ones(2))
    assert {func for func, _ in seen.calls} >= torch_internals.BY_MASK


def test_allocations_are_counted_twice_unless_views_share_the_key_of_their_storage():
    x = torch.zeros(4, 4)
    assert torch_internals.storage_key(x[1:].T) == torch_internals.storage_key(x)
    assert torch_internals.storage_key(x.clone()) != torch_internals.storage_key(x)


def test_a_release_is_missed_unless_the_death_of_a_storage_can_be_watched():
    died = []
    x = torch.zeros(4)
    weakref.finalize(x.untyped_storage(), died.append, 1)
    view = x[1:]
    del x
    assert died == []
    del view
    assert died == [1]


def test_workspaces_get_wrong_sizes_unless_schemas_name_the_arguments_of_an_operator():
    assert torch_internals.argument_names(torch.ops.aten.mm.default) == ["self", "mat2"]


def test_fake_numbers_reach_real_tensors_unless_schemas_say_what_an_operator_writes():
    assert torch_internals.writes_to_first(torch.ops.aten.add_.Tensor)
    assert not torch_internals.writes_to_first(torch.ops.aten.add.Tensor)
    assert not torch_internals.writes_to_first(torch.ops.aten.view.default)  # it aliases


def test_no_memory_is_measured_unless_the_profiler_logs_allocations_with_bytes_time_and_device():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        with record_function("qstar.test"):
            kept = torch.empty(12345, dtype=torch.uint8)
        del kept
    events = torch_internals.profiler_events(log)
    memory = [event for event in events if event.name() == "[memory]" and abs(event.nbytes()) == 12345]
    assert [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())] == [12345, -12345]
    assert {event.device_type().name for event in memory} == {"CPU"}
    (inside,) = [event for event in events if event.name() == "qstar.test"]
    assert inside.start_ns() < min(event.start_ns() for event in memory) < inside.end_ns()


def test_fsdp_cannot_be_planned_on_one_machine_unless_ranks_can_be_faked():
    with torch_internals.fake_ranks(4):
        assert torch.distributed.get_world_size() == 4
    assert not torch.distributed.is_initialized()
    with torch_internals.fake_ranks(1):
        assert not torch.distributed.is_initialized()


def test_gathered_weights_are_missed_unless_fsdp_calls_this_operator_in_these_namespaces():
    with torch_internals.fake_ranks(2), Seen() as seen:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        layer = torch.nn.Linear(4, 4)
        torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
        assert isinstance(layer.weight, DTensor)
        layer(torch.zeros(1, 4))
    called = {func for func, _ in seen.calls}
    assert torch_internals.FSDP_GATHER in called
    assert torch_internals.argument_names(torch_internals.FSDP_GATHER)[-1] == "out"
    assert {"fsdp", "c10d"} <= {func.namespace for func in called} & set(torch_internals.COLLECTIVES)


def test_tensors_in_nested_results_are_missed_unless_pytree_finds_and_replaces_them():
    x = torch.zeros(2)
    assert torch_internals.tree_leaves([{"a": x}, (1, None)])[0] is x
    assert torch_internals.tree_map_only(int, lambda n: n + 1, [1, "a", (2,)]) == [2, "a", (3,)]


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (torch.cuda.memory._record_memory_history, {"enabled", "max_entries"}),
        (torch.cuda.memory._dump_snapshot, {"filename"}),
        (torch.cuda._sleep, {"cycles"}),
    ],
    ids=["the history of a snapshot", "the snapshot", "launches that queue up before a kernel is timed"],
)
def test_on_a_gpu_this_is_lost_unless_torch_cuda_has_the_function_with_these_parameters(function, wanted):
    assert wanted <= inspect.signature(function).parameters.keys()
