"""What a step really holds, by phase; and snapshots of a GPU's memory, as far as a fake GPU shows."""

import json
import mmap
import pickle
import types

import pytest
import qstar_bench
import torch
from qstar_bench.memory import memory_peaks
from qstar_bench.memory.allocation_tracker import STEP_PHASES
from qstar_bench.memory.memory_peaks import MeasuredMemory, memory_snapshot
from torch.profiler import record_function

from qstar.cli.main import main

OPTIONS = ["--tokens", "16", "--thought_length", "2", "--talk_length", "2"]
KIB = 1024


def kib(n: int) -> torch.Tensor:
    return torch.empty(n * KIB, dtype=torch.uint8)


def test_each_phase_has_its_own_peak_of_tensors_and_the_outermost_range_counts():
    with memory_snapshot(device="cpu", before=1000 * KIB) as found:
        with record_function("qstar.prefix"):
            kept = kib(100)
            del kept
            kept = kib(50)
        with record_function("qstar.backward"):
            with record_function("qstar.blocks"):
                inside = kib(300)
            del inside
            with record_function("somebody.else"):
                kib(10)
        with record_function("qstar.prefix"):
            again = kib(60)
        del kept, again
    expected = {"qstar.prefix": 1110, "qstar.backward": 1350}
    assert set(found.phases) == set(expected)
    for phase, held in expected.items():
        assert 0 <= found.phases[phase] - held * KIB < 2 * KIB, (
            phase
        )  # ranges have small tensors of their own
    assert found.peak_bytes == found.phases["qstar.backward"]


def test_resident_memory_is_sampled_by_phase():
    def fill(mib: int, seconds: float) -> mmap.mmap:
        made = mmap.mmap(-1, mib * KIB * KIB)  # fresh pages: tensors may get what earlier tests have freed
        for page in range(0, len(made), mmap.PAGESIZE):
            made[page] = 1
        memory_peaks.time.sleep(seconds)
        return made

    with memory_snapshot(device="cpu") as found:
        with record_function("qstar.prefix"):
            first = fill(1, 0.1)
        with record_function("qstar.loss"):
            second = fill(200, 0.3)
        del first, second
    assert found.resident["qstar.loss"] - found.resident["qstar.prefix"] > 150 * KIB * KIB


def test_a_step_is_measured_beside_its_plan(tmp_path, capsys):
    runs, trace = tmp_path / "runs.jsonl", tmp_path / "trace.json"
    assert main(["memory", "profile", *OPTIONS, "--append", str(runs), "--trace", str(trace)]) == 0
    out = capsys.readouterr().out
    assert "plan / measured" in out and "resident MiB" in out
    document = json.loads(out.splitlines()[-1])
    assert json.loads(runs.read_text()) == document and "qstar.rollout" in trace.read_text()
    by_phase = {row["phase"]: row for row in document["rows"]}
    assert set(by_phase) == {*STEP_PHASES, "peak"}
    assert all(0.75 < row["plan / measured"] < 1.25 for row in by_phase.values())
    assert 0.85 < by_phase["peak"]["plan / measured"] < 1.15


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "mistral-7b"], "device = 'cuda': torch sees no GPU"),
        (["--snapshot", "snapshot.pickle"], r"snapshot = snapshot\.pickle: must be left out on a CPU"),
        (
            ["--model", "/nowhere"],
            "model = /nowhere: must be a folder with a config.json, or one of embedded",
        ),
        (["--tokens", "3"], "tokens = 3: must be more than talk_length = 4"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_cannot_be_measured_is_said_in_one_line(options, reason, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["memory", "profile", *options]) == 1
    with pytest.raises(ValueError, match=reason):
        raise ValueError(capsys.readouterr().err.strip().splitlines()[-1])


class FakeGpu:
    """What of torch.cuda a snapshot calls, in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        figures = {"memory_allocated": 7, "max_memory_allocated": 90, "max_memory_reserved": 100}
        for name, figure in figures.items():
            monkeypatch.setattr(torch.cuda, name, lambda figure=figure: figure)
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: self.calls.append(name))
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", self.record)
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", self.dump)

    def record(self, enabled: str | None = "all", max_entries: int = 0) -> None:
        self.calls.append("record" if enabled else "stop")

    def dump(self, path: str) -> None:
        with open(path, "wb") as file:
            pickle.dump({"segments": []}, file)
        self.calls.append("dump")


def test_on_a_gpu_the_history_is_recorded_and_dumped_and_the_allocators_peaks_are_kept(monkeypatch, tmp_path):
    gpu = FakeGpu(monkeypatch)
    with memory_snapshot(tmp_path / "step.pickle", device="cuda") as found:
        gpu.calls.append("step")
    assert gpu.calls == [
        "synchronize",
        "reset_peak_memory_stats",
        "record",
        "step",
        "synchronize",
        "dump",
        "stop",
    ]
    assert found.before == 7 and found.allocator == {"allocated": 90, "reserved": 100}
    assert (tmp_path / "step.pickle").exists() and found.resident == {}


def test_without_a_path_no_history_is_recorded(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    with memory_snapshot(device="cuda"):
        pass
    assert not {"record", "dump", "stop"} & set(gpu.calls)


def test_out_of_memory_leaves_a_snapshot_and_is_raised_on(monkeypatch, tmp_path):
    gpu = FakeGpu(monkeypatch)
    with (
        pytest.raises(torch.OutOfMemoryError, match="80 GiB"),
        memory_snapshot(tmp_path / "oom.pickle", device="cuda"),
    ):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")
    assert gpu.calls[-2:] == ["dump", "stop"] and (tmp_path / "oom.pickle").exists()


def test_a_step_that_does_not_fit_is_one_line_with_its_plan_and_its_snapshot(monkeypatch, capsys):
    def too_much(*_):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr("qstar_bench.memory.profile_command.measure", too_much)
    assert main(["memory", "profile", *OPTIONS]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "ran out of memory: tried to allocate 80 GiB" in error and "planned at" in error


def test_only_allocations_of_the_device_count():
    def event(at: int, nbytes: int, device: str):
        kind = types.SimpleNamespace(name=device)
        return types.SimpleNamespace(
            name=lambda: "[memory]", start_ns=lambda: at, nbytes=lambda: nbytes, device_type=lambda: kind
        )

    events = [event(3, -5, "CUDA"), event(1, 8, "CUDA"), event(2, 100, "CPU"), event(4, 4, "CUDA")]
    log = types.SimpleNamespace(
        profiler=types.SimpleNamespace(kineto_results=types.SimpleNamespace(events=lambda: events))
    )
    assert memory_peaks._held(log, "cuda") == [(1, 8), (3, 3), (4, 7)]
    assert memory_peaks._held(log, "cpu") == [(2, 100)]


def test_snapshots_are_refused_where_they_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"snapshot = .*: its folder does not exist"):
        memory_snapshot(tmp_path / "none" / "x.pickle", device="cuda").__enter__()
    assert qstar_bench.memory_snapshot is memory_snapshot
    assert MeasuredMemory().peak_bytes == 0
