"""A program that kills itself, in every process, when its model is about to read the fourth batch.

killed_in_step_4.py PROGRAM.py ARGUMENTS
"""

import itertools
import os
import runpy
import signal
import sys

from torch.nn.modules.module import register_module_forward_pre_hook

from qstar import QuietStarForCausalLM

if __name__ == "__main__":
    step = itertools.count(1)

    def on_forward(module, inputs) -> None:
        if isinstance(module, QuietStarForCausalLM) and next(step) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    register_module_forward_pre_hook(on_forward)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
