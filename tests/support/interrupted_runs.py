"""Run examples, each time in a forked process: whole, terminated, or killed within a save.

    python interrupted_runs.py FOLDER EXAMPLE.py ...

The parent only imports, so a fork costs nothing and inherits no thread. The last line of stdout is a JSON
object: of each example a list of (name of a run, losses of its steps until it ended, those after it was run
again), in hexadecimal.
A run that leaves something of ours on a module or class of another library fails.
"""

import gc
import importlib.util
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_hook

from qstar import QuietStarForCausalLM

STEPS, SAVE_EVERY = 6, 2  # the examples' own
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def watch(losses: Path, changes: Path, terminate_in: int | None, kill_before: int | None) -> None:
    """Write down each loss, and each change to the file system between steps 4 and 5 (the second save).

    Terminate the process within step `terminate_in`, or kill it before change `kill_before`.
    """
    seen = {"steps": 0, "changes": 0}

    def on_forward(module, inputs, output) -> None:
        if isinstance(module, QuietStarForCausalLM) and module.training:
            seen["steps"] += 1
            os.write(loss_file, f"{output.loss.item().hex()}\n".encode())
            if seen["steps"] == terminate_in:
                os.kill(os.getpid(), signal.SIGTERM)

    def on_event(event: str, details: tuple) -> None:
        if seen["steps"] != 2 * SAVE_EVERY:
            return
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes and b"tfevents" not in os.fsencode(details[0])) or event in CHANGES:
            if seen["changes"] == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            seen["changes"] += 1
            os.write(change_file, f"{event} {details[0]}\n".encode())

    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    loss_file, change_file = os.open(losses, flags), os.open(changes, flags)
    register_module_forward_hook(on_forward)
    sys.addaudithook(on_event)


def patched() -> list[str]:
    """List what modules of others, or their classes, hold that was defined in ours or in the example."""

    def ours(name: object) -> bool:
        return str(name).split(".")[0] in ("__main__", "qstar", "qstar_kernels", "qstar_bench")

    found = []
    for module in list(sys.modules.values()):
        if module is None or ours(module.__name__):  # multiprocessing gives __main__ a second entry
            continue
        # of type itself: isinstance would ask some objects for their __class__, which warn
        classes = [x for x in vars(module).values() if issubclass(type(x), type) and not ours(x.__module__)]
        for holder in (module, *classes):
            for name, value in list(vars(holder).items()):
                if callable(value) and ours(getattr(value, "__module__", None)):
                    found.append(f"{holder.__name__}.{name}")
    return sorted(set(found))


def run(example: str, folder: Path, terminate_in: int | None = None, kill_before: int | None = None) -> list:
    """Run `python EXAMPLE.py FOLDER` in a process of its own and return its losses."""
    losses, changes = folder.with_suffix(".losses"), folder.with_suffix(".changes")
    losses.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        try:
            watch(losses, changes, terminate_in, kill_before)
            sys.argv = [example, str(folder)]
            runpy.run_path(example, run_name="__main__")
            if found := patched():
                raise AssertionError(f"it patched {found}")
        except BaseException as error:
            print(f"{folder.name}: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    ended = os.waitstatus_to_exitcode(status)
    if (terminate_in is None and kill_before is None) != (ended == 0):
        raise SystemExit(f"{folder.name}: ended with {ended}")
    return losses.read_text().split()


def interrupt(example: str, root: Path) -> list[tuple[str, list, list]]:
    root.mkdir()
    found = [("whole", run(example, root / "whole"), [])]
    changes = len((root / "whole.changes").read_text().splitlines())
    ways: dict[str, dict] = {"terminated": {"terminate_in": STEPS - 1}}
    for at in sorted({(changes - 1) // 2, changes - 1}):
        ways[f"killed-{at}-of-{changes}"] = {"kill_before": at}
    for name, way in ways.items():
        found.append((name, run(example, root / name, **way), run(example, root / name)))
    return found


def main(folder: str, *examples: str) -> None:
    for example in examples:
        spec = importlib.util.spec_from_file_location("example", example)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    gc.freeze()  # else the collector of every fork walks, and so copies, all that was imported
    print(json.dumps({path: interrupt(path, Path(folder, Path(path).stem)) for path in examples}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
