"""What the house promises as a whole: import costs nothing, floors hold, files stay short."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packages import EXTRAS, OPTIONAL, REQUIRED, ROOT, imported, third_party
from tiny_models import base_model, thinking_model, tokens, write

ROOMS = {"kernels/qstar_kernels": "qstar_kernels", "qstar": "qstar", "bench/qstar_bench": "qstar_bench"}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]

MEASURE = """
import json, socket, sys, time
import torch, transformers
def refuse(*_, **__): raise AssertionError("the network was touched")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
import os
before, environment = set(sys.modules), dict(os.environ)
began = time.perf_counter()
import qstar, qstar_kernels
seconds = time.perf_counter() - began
print(json.dumps({
    "seconds": seconds,
    "cuda": torch.cuda.is_initialized(),
    "environment": dict(os.environ) == environment,
    "optional": sorted({"datasets", "matplotlib", "pandas", "flash_attn"} & (set(sys.modules) - before)),
}))
"""


@pytest.fixture(scope="module")
def imports():
    """Three imports, each in a process of its own."""
    command = [sys.executable, "-c", MEASURE]
    return [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]


def test_import_takes_under_0_3_seconds_more_than_torch_and_transformers(imports):
    assert min(found["seconds"] for found in imports) < 0.3


def test_import_touches_neither_network_nor_cuda_nor_environment_nor_an_optional_package(imports):
    for found in imports:  # the network raises in there
        assert not found["cuda"] and found["environment"] and found["optional"] == []


def test_the_folder_of_the_operators_does_not_shadow_the_package_kernels(tmp_path, monkeypatch):
    ours = (str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench"))
    for path in ours:
        monkeypatch.syspath_prepend(path)
    sys.modules.pop("kernels", None)
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # somebody's package, later on the path
    importlib.invalidate_caches()
    found = importlib.util.find_spec("kernels").origin
    assert found is not None and not Path(found).is_relative_to(ROOT)


FORBIDDEN = {
    "kernels/qstar_kernels": {"qstar", "qstar_bench", "transformers", "accelerate", "datasets"},
    "qstar": {"qstar_bench"},
    "bench/qstar_bench": set(),
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_the_floors_below(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert not {name.split(".")[0] for name in imported(path)} & FORBIDDEN[room], path


def test_only_the_command_line_names_the_floor_above_and_by_a_string():
    naming = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "qstar").rglob("*.py")
        if any(
            isinstance(node, ast.Constant) and isinstance(node.value, str) and "qstar_bench" in node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]
    assert naming == ["qstar/cli/main.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_at_once_what_is_always_installed_and_later_what_an_extra_has(path):
    plugin = path.relative_to(ROOT).as_posix() == "qstar/evaluation/harness.py"  # a class of lm_eval's own
    assert third_party(path, at_once=True) <= REQUIRED | ({"lm_eval"} if plugin else set())
    assert third_party(path) <= REQUIRED | OPTIONAL


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_package_of_an_extra_has_a_user(extra):
    files = [*FILES, *(ROOT / "examples").glob("*.py"), *(ROOT / "bench" / "suite").glob("*.py")]
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


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "examples").glob("*.py"))], ids=lambda p: p.stem)
def test_no_file_and_no_example_patches_another_library(path):
    assert list(patches(path.read_text(encoding="utf-8"))) == []


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


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda p: p.stem)
def test_no_file_is_over_600_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


@torch.no_grad()
def test_suppressed_tokens_never_occur_in_a_thought_and_are_suppressed_nowhere_else():
    suppressed = list(range(2, 50))
    ids = tokens(2, 14)  # many of these are in the text
    assert set(ids.flatten().tolist()) & set(suppressed)
    model = thinking_model(thought_length=6, suppressed_tokens=suppressed, thought_temperature=5.0)
    free = thinking_model(thought_length=6, suppressed_tokens=[], thought_temperature=5.0)
    thoughts = torch.randint(50, 61, (2, 13, 2, 6))
    found = model(ids, thoughts=thoughts).metrics, free(ids, thoughts=thoughts).metrics
    for name in ("base_nll", "mixed_nll", "mixed_nll_1", "mixed_nll_2", "reward_mean"):
        assert torch.equal(found[0][name], found[1][name]), name
    assert not torch.equal(found[0]["policy_loss"], found[1]["policy_loss"])
    log_p = base_model()(input_ids=ids).logits[:, :-1].log_softmax(-1)
    base_nll = -log_p.gather(-1, ids[:, 1:, None]).mean()
    assert torch.allclose(found[0]["base_nll"], base_nll, rtol=1e-5)

    written = write(model, ids, max_new_tokens=20, generator=torch.Generator().manual_seed(0))
    assert not set(written.thoughts.flatten().tolist()) & set(suppressed)
    assert set(written.new_tokens.flatten().tolist()) & set(suppressed)
    unbound = write(free, ids, max_new_tokens=20, generator=torch.Generator().manual_seed(0))
    assert set(unbound.thoughts.flatten().tolist()) & set(suppressed)


def test_by_default_the_special_tokens_are_suppressed():
    assert thinking_model().quiet_star.suppressed_tokens == [0, 1]  # bos and eos of the tiny models
