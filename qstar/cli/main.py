"""`qstar COMMAND`: finds the command; each lives in its own module and is imported only when asked for."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": ("qstar.cli.train", "teach a language model to think, with the Hugging Face Trainer"),
    "generate": ("qstar.cli.generate", "continue a prompt, thinking before every token"),
    "demo": ("qstar.cli.demo", "the whole story on an embedded tiny model, in minutes"),
    "bench": ("qstar_bench.cli", "measure, side by side with named baselines"),
}


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
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest) or 0
    except (ValueError, OSError) as error:  # what a user can mend, in one line
        print(f"qstar {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
