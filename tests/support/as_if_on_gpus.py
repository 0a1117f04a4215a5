"""A program under accelerate's FSDP, which accelerate runs on no CPU: it is told that it has GPUs, and goes
on with gloo on the CPU. `accelerate launch` with use_cpu starts it.

    as_if_on_gpus.py PROGRAM.py ARGUMENTS
"""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType


def tell(state: PartialState) -> None:
    state.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    tell(PartialState(cpu=True))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
