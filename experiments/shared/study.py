"""Run a study from the command line, and check its options."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from qstar.cli.main import keep_freed_memory
from qstar.cli.options import parse_options, with_config_file


def run(
    name: str,
    options: Sequence[type],
    study: Callable[..., None],
    argv: list[str] | None = None,
    defaults: Sequence[str] = (),
) -> int:
    """Call a study with an instance of each dataclass of options, and return the exit status.

    argv: the command line, by default that of the process. defaults: options as on a command line, which
    those given override. A mistake in the options or a file is told in one line.
    """
    keep_freed_memory()
    try:
        given = with_config_file(sys.argv[1:] if argv is None else argv)
        parsed = parse_options(options, [*defaults, *given], prog=f"python -m experiments.{name}")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        study(*parsed)
        return 0
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def check_least(options: Any, **least: int) -> None:
    """Raise ValueError for an option smaller than its least value."""
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            raise ValueError(f"{name} = {getattr(options, name)}: must be at least {smallest}")


def check_different(options: Any, **least: int) -> None:
    """Raise ValueError for an option that is not one or more different numbers, each at least that."""
    for name, smallest in least.items():
        values = getattr(options, name)
        if not values or min(values) < smallest or len(set(values)) < len(values):
            raise ValueError(f"{name} = {values}: must be different numbers, each at least {smallest}")


def check_model(folder: str) -> None:
    """Raise ValueError where there is no such folder: nothing is downloaded."""
    if not Path(folder).is_dir():
        raise ValueError(f"model = {folder!r}: no such folder")


def verdict(holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"
