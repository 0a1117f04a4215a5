"""What setup.py asks to be installed, and what a file imports, both by the names that Python imports."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORTED_AS = {"pyyaml": "yaml"}  # where it is not the package's own name


def _names(packages: list[str]) -> set[str]:
    found = [re.match(r"[\w-]+", package).group().replace("-", "_") for package in packages]
    return {IMPORTED_AS.get(name, name) for name in found}


def _declared() -> tuple[set[str], dict[str, set[str]]]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (extras,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    )
    (required,) = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    by_extra = {name: _names(packages) for name, packages in ast.literal_eval(extras).items()}
    return _names(ast.literal_eval(required)), by_extra


REQUIRED, EXTRAS = _declared()  # of a bare install; of each extra but dev, which has all of them
OPTIONAL = set().union(*EXTRAS.values()) - REQUIRED


def imported(path: Path, at_once: bool = False) -> Iterator[str]:
    """The modules that a file imports; at_once: only those that importing the file imports."""
    open_nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
        later = at_once and isinstance(node, ast.FunctionDef | ast.Lambda | ast.AsyncFunctionDef)
        open_nodes += [] if later else list(ast.iter_child_nodes(node))


def third_party(path: Path, at_once: bool = False) -> set[str]:
    """The packages of others that a file imports."""
    ours = {"qstar", "qstar_kernels", "qstar_bench"}
    return {name.split(".")[0] for name in imported(path, at_once)} - ours - set(sys.stdlib_module_names)
