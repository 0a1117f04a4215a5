"""Parse a command's options from dataclasses and YAML.

Every mistake raises ValueError, which the command line shows in one line.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


class _Raises:
    """Raise ValueError where argparse would print all options and exit."""

    prog: str

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


class Parser(_Raises, argparse.ArgumentParser):
    """Parse the arguments of a command that has positional ones."""


class _DataclassParser(_Raises, HfArgumentParser):
    pass


def parse_options(types: Any, argv: list[str], prog: str) -> tuple:
    """Return one instance of each dataclass. Raises ValueError for an unknown, missing or bad option."""
    parser = _DataclassParser(types, prog=prog)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unknown options {unknown}; see {prog} --help")
    return tuple(parsed)


def with_config_file(argv: list[str]) -> list[str]:
    """Put the options of `--config file.yaml`, if given, before those of the command line, which win."""
    rest, given = list(argv), []
    for at, option in enumerate(argv):
        name, equals, path = option.partition("=")
        if name == "--config":
            if not equals and at + 1 == len(argv):
                raise ValueError("--config: needs a YAML file")
            del rest[at : at + (1 if equals else 2)]
            given = _yaml_options(path if equals else argv[at + 1])
            break
    return given + rest


def _yaml_options(path: str) -> list[str]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config = {path}: must be YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config = {path}: must hold 'option: value' lines")
    given: list[str] = []
    for name, value in values.items():
        if isinstance(value, list):
            given += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            given.append(f"--{name}={json.dumps(value)}")
        elif value is not None:
            given.append(f"--{name}={value}")
    return given
