"""The project as a whole: pins, names, sizes, no lines that stand twice, no patched library."""

import ast
import re
from collections import defaultdict

import pytest
from packages import EXTRAS, PROGRAMS, ROOMS, ROOT, modules

FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
PROGRAM_FILES = [path for folder in PROGRAMS for path in sorted((ROOT / folder).rglob("*.py"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_package_of_an_extra_has_a_user(extra):
    files = [*FILES, *EXAMPLES, *(ROOT / "bench" / "suite").glob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert [name for name in sorted(EXTRAS[extra]) if not re.search(rf"\b{name}\b", text)] == []


def test_make_compat_pins_the_packages_of_make_test_and_the_oldest_that_setup_allows():
    pins = {}
    for name in ("constraints.txt", "constraints-compat.txt"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        pins[name] = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins["constraints.txt"].keys() == pins["constraints-compat.txt"].keys()
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for name in ("torch", "triton", "transformers"):
        assert f'"{name}>={pins["constraints-compat.txt"][name].removesuffix(".0")}' in setup


def written(node):
    """The expressions that a node sets, changes or deletes."""
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("setattr", "delattr"):
        return [ast.Attribute(node.args[0], getattr(node.args[1], "value", ""))]
    else:
        return []
    flat = [x for target in targets for x in getattr(target, "elts", [target])]
    return [x for x in flat if isinstance(x, ast.Attribute | ast.Subscript)]


def patches(source):
    """The lines of a source that write to a module or class it imports, to a type(...), or to a `forward`."""
    nodes = list(ast.walk(ast.parse(source)))
    named = [name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names]
    names = {(name.asname or name.name).split(".")[0] for name in named}
    for node in nodes:
        for target in written(node):
            root = target
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            if ast.unparse(target) == "sys.argv":  # this process's own, which some libraries' mains read
                continue
            of_type = isinstance(root, ast.Call) and getattr(root.func, "id", None) == "type"
            if of_type or getattr(root, "id", None) in names or getattr(target, "attr", None) == "forward":
                yield node.lineno


def test_no_file_and_no_example_patches_another_library():
    for path in [*FILES, *EXAMPLES]:
        assert list(patches(path.read_text(encoding="utf-8"))) == [], path


@pytest.mark.parametrize(
    "line",
    [
        "Trainer.compute_loss = f",
        "torch.nn.Linear.forward, x = f, 1",
        "setattr(t.Trainer, 'log', f)",
        "del torch.nn.functional.relu",
        "torch.backends.flags['x'] += 1",
        "type(model).__call__ = f",
        "model.forward = f",
    ],
)
def test_a_patch_would_be_found(line):
    assert list(patches(f"import torch.nn\nimport transformers as t\nfrom trl import Trainer\n{line}")) == [4]


def test_no_file_is_over_600_lines():
    for path in [*FILES, *PROGRAM_FILES, *EXAMPLES, *sorted((ROOT / "tests").rglob("*.py"))]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, path


def twice(places):
    """Return the names that stand for more than one place, of pairs (name, place)."""
    found = defaultdict(list)
    for name, place in places:
        found[name].append(place)
    return {name: where for name, where in found.items() if len(where) > 1}


def public_classes(module, path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, module


def test_no_two_files_have_one_name():
    stems = ((path.stem, module) for module, path in modules().items())
    assert twice(x for x in stems if x[0] not in ("__init__", "__main__", "conftest")) == {}


def test_no_two_public_classes_have_one_name():
    assert twice(x for module, path in modules().items() for x in public_classes(module, path)) == {}


SHARED = 12  # lines


def code_lines(text):
    """Return the lines of a source, stripped, without blank ones, comments, imports and docstrings."""
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        is_string = isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)
        if is_string or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= {*range(node.lineno, node.end_lineno + 1)}
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [x for x in lines if x[1] and not x[1].startswith("#") and x[0] not in left_out]


def shared(sources):
    """Return every run of SHARED lines of code that stands at more than one place of {name: source}."""
    lines = {name: code_lines(text) for name, text in sources.items()}
    runs = (
        ("\n".join(line for _, line in at[n : n + SHARED]), f"{name}:{at[n][0]}")
        for name, at in lines.items()
        for n in range(len(at) - SHARED + 1)
    )
    return list(twice(runs).values())


def test_no_two_places_share_twelve_lines():
    assert shared({str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}) == []


def test_two_names_and_twelve_lines_that_are_shared_would_be_found():
    assert twice([("runs", "qstar.a"), ("runs", "qstar.b"), ("run", "qstar.c")]) == {
        "runs": ["qstar.a", "qstar.b"]
    }
    block = "".join(f"x{n} = {n}\n" for n in range(SHARED))
    indented = "def f():\n    import os\n" + "".join(f"    {x}\n\n    # why\n" for x in block.splitlines())
    assert shared({"a": block, "b": indented}) == [["a:1", "b:3"]]
    assert shared({"a": block, "b": block.replace("x5", "y")}) == []
