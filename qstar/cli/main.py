"""`qstar COMMAND`: finds the command; each lives in its own module and is imported only when asked for."""

from __future__ import annotations

import ctypes
import importlib
import sys

COMMANDS = {
    "train": ("qstar.cli.train", "teach a language model to think, with the Hugging Face Trainer"),
    "generate": ("qstar.cli.generate", "continue prompts, thinking before the tokens"),
    "eval": ("qstar.cli.eval", "does it think? questions or text in every condition, with intervals"),
    "lm_eval": ("qstar.cli.lm_eval", "lm-evaluation-harness, with --model qstar"),
    "calibrate": ("qstar.cli.calibrate", "find where thinking pays, for generate --think adaptive"),
    "score": ("qstar.cli.score", "every token of a text: NLL with and without a thought, and the thought"),
    "look": ("qstar.cli.look", "a text as one HTML page in which one sees the model think"),
    "demo": ("qstar.cli.demo", "the whole story on an embedded tiny model, in minutes"),
    "bench": ("qstar_bench.commands", "measure, side by side with named baselines"),
    "memory": (
        "qstar_bench.commands",
        "what a training step needs: a plan without a GPU, or measured",
    ),
}


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for this process: by default it gives tensors of some size back to the
    system at once, and on a CPU every step pays for the same fresh pages again. Elsewhere it does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: qstar COMMAND [options]; options of a command: qstar COMMAND --help\n")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:10} {what}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"qstar: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 1
    keep_freed_memory()
    try:
        module = importlib.import_module(COMMANDS[name][0])
        if name in ("bench", "memory"):
            group = getattr(module, name.upper())
            if not rest or rest[0] not in group:
                raise ValueError(f"{' '.join(rest[:1]) or '(nothing)'}: must be one of {', '.join(group)}")
            module = importlib.import_module(group[rest.pop(0)][0])
        return module.main(rest) or 0
    except KeyboardInterrupt:
        print(f"\nqstar {name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # what a user can mend, in one line
        print(f"qstar {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
