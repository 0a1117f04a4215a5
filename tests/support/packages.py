"""Read what setup.py asks to be installed, what a file imports, and which of our modules import which."""

import ast
import re
import sys
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# the folder of each import package -> its name, from the lowest floor to the highest
ROOMS = {"kernels/qstar_kernels": "qstar_kernels", "qstar": "qstar", "bench/qstar_bench": "qstar_bench"}
PROGRAMS = {"experiments": "experiments"}  # outside every package, above all three
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
    """Yield the modules that a file imports; with at_once only those that importing the file imports."""
    for node in _import_statements(path, at_once):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        else:
            yield node.module


def _import_statements(path: Path, at_once: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    open_nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        later = at_once and isinstance(node, ast.FunctionDef | ast.Lambda | ast.AsyncFunctionDef)
        open_nodes += [] if later else list(ast.iter_child_nodes(node))


def third_party(path: Path, at_once: bool = False) -> set[str]:
    """Return the packages of others that a file imports."""
    ours = {"qstar", "qstar_kernels", "qstar_bench"}
    return {name.split(".")[0] for name in imported(path, at_once)} - ours - set(sys.stdlib_module_names)


def modules() -> dict[str, Path]:
    """Map every module of the three packages and of the programs to its file."""
    found = {}
    for folder, package in (ROOMS | PROGRAMS).items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports_of(path: Path, ours: Collection[str]) -> set[str]:
    """Return which of our modules a file imports anywhere: at once, in functions, under TYPE_CHECKING.

    `from package import module` is an import of the module, not of the package's `__init__`.
    """
    found = set()
    for node in _import_statements(path):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        else:
            full = [f"{node.module}.{name.name}" for name in node.names]
            found |= {name if name in ours else node.module for name in full}
    return found & set(ours)


@cache
def import_graph() -> dict[str, set[str]]:
    """Map every module of ours to those that it imports."""
    files = modules()
    return {module: imports_of(path, files) for module, path in files.items()}
