"""Check options; each error is a ValueError that names the option, its value and what is allowed."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any


def check_least(options: Any, **least: float) -> None:
    """Raise for an attribute of `options` that is below its least value; None is not checked."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and not value >= smallest:
            raise ValueError(f"{name} = {value}: must be at least {smallest}")


def check_choice(options: Any, **allowed: Collection[str]) -> None:
    """Raise for an attribute of `options` that is none of its allowed values."""
    for name, values in allowed.items():
        if getattr(options, name) not in values:
            raise ValueError(f"{name} = {getattr(options, name)!r}: must be one of {', '.join(values)}")


def check_folder(name: str, path: str | os.PathLike | None) -> None:
    """Raise for an output file in a folder that does not exist: before hours of work, not after them."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{name} = {path}: its folder does not exist")
