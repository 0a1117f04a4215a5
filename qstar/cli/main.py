"""Find the command of `qstar COMMAND`; each lives in a module of its own, imported only when asked for."""

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
    "bench": ("qstar_bench.commands:BENCH", "measure, side by side with named baselines"),
    "memory": (
        "qstar_bench.commands:MEMORY",
        "what a training step needs, planned without a GPU or measured",
    ),
}
Commands = dict[str, tuple[str, str]]  # by name: (module, or module:table of a group, and one line)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for this process: by default it gives tensors of some size back to the
    system at once, and on a CPU every step pays for the same fresh pages again. Elsewhere it does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def main(argv: list[str] | None = None) -> int:
    """Run `qstar COMMAND ...`; return the exit status."""
    rest = sys.argv[1:] if argv is None else list(argv)
    if rest[:1] == ["help"]:
        rest = [*rest[1:], "--help"]
    prog, module, commands = "qstar", "", COMMANDS
    while commands:
        if not rest or rest[0] in ("-h", "--help"):
            print(_listed(prog, commands))
            return 0
        name, *rest = rest
        if name not in commands:
            print(f"{prog}: no command {name!r}; there are {', '.join(commands)}", file=sys.stderr)
            return 1
        prog, (module, _, table) = f"{prog} {name}", commands[name][0].partition(":")
        commands = getattr(importlib.import_module(module), table) if table else {}
    keep_freed_memory()
    prog = " ".join(prog.split()[:2])
    try:
        return importlib.import_module(module).main(rest) or 0
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # what a user can mend, in one line
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _listed(prog: str, commands: Commands) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in commands.items()]
    head = f"usage: {prog} COMMAND [options]; options of a command: {prog} COMMAND --help"
    return "\n".join([head, "", *lines])


if __name__ == "__main__":
    sys.exit(main())
