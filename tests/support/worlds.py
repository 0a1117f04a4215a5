"""Run a Python program in several processes, as torchrun would start them but forked from one process that
has imported everything: starting Python with torch costs more than these runs.

    python worlds.py PROGRAM.py '[[2, ["ARGUMENT", ...]], [1, [...]]]'

The runs go one after the other. The last line of stdout is a JSON list of what rank 0 printed in each.
"""

import gc
import importlib.util
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

SECONDS, PAUSE = 300, 0.02


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a process."""
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "worlds"}
    return ranks | sizes | address


def run(program: str, processes: int, arguments: list[str]) -> str:
    """Return what rank 0 printed. Raises SystemExit when a rank fails or the run takes too long."""
    with socket.socket() as free, tempfile.TemporaryFile("w+") as printed:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        ranks = {}
        for rank in range(processes):
            if (process := os.fork()) == 0:
                os.environ.update(environment(rank, processes, port))
                os.dup2(printed.fileno() if rank == 0 else sys.stderr.fileno(), 1)
                sys.argv = [program, *arguments]
                try:
                    runpy.run_path(program, run_name="__main__")
                    sys.stdout.flush()
                except BaseException:  # of a forked process nothing may reach the parent's code
                    sys.excepthook(*sys.exc_info())
                    os._exit(1)
                os._exit(0)  # not destroy_process_group: it joins gloo's threads, which may wait for the GIL
            ranks[process] = rank
        wait(ranks)
        printed.seek(0)
        return printed.read()


def wait(ranks: dict[int, int]) -> None:
    pauses = 0  # counted, for a machine may stop us all for minutes
    while ranks:
        process, status = os.waitpid(-1, os.WNOHANG)
        rank = ranks.pop(process, None)
        if status or pauses * PAUSE > SECONDS:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(f"rank {rank}: ended with {status}" if status else f"over {SECONDS} s")
        if not process:
            time.sleep(PAUSE)
            pauses += 1


def main(program: str, runs: str) -> None:
    spec = importlib.util.spec_from_file_location("program", program)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    sys.path.insert(0, str(Path(program).parent))
    gc.freeze()  # else the collector of every fork walks, and so copies, all that was imported
    print(json.dumps([run(program, *one) for one in json.loads(runs)]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
