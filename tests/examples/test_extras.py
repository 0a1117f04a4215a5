"""Every example names the extra it needs, imports no more than that brings, and names it again without it."""

import ast
import json
import re
import subprocess
import sys

import pytest
from packages import EXTRAS, OPTIONAL, REQUIRED, ROOT, third_party

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
WITHOUT = """
import json, runpy, sys
paths, packages = map(json.loads, sys.argv[1:])
sys.modules.update(dict.fromkeys(packages))  # what is None here cannot be imported
said = {}
for path in paths:
    try:
        runpy.run_path(path)
        said[path] = None
    except SystemExit as stopped:
        said[path] = stopped.code
print(json.dumps(said))
"""


def extra(path) -> str | None:
    """The extra that the docstring says to install."""
    found = re.findall(r"pip install 'qstar\[(\w+)\]'", ast.get_docstring(ast.parse(path.read_text())))
    return found[0] if found else None


def run_without_extras() -> dict[str, str | None]:
    """Import every example as after a bare `pip install qstar`; return what each says as it stops."""
    given = json.dumps([str(path) for path in EXAMPLES]), json.dumps(sorted(OPTIONAL))
    ran = subprocess.run([sys.executable, "-c", WITHOUT, *given], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.slow
def test_without_its_extra_an_example_names_it_in_one_line_and_without_one_it_needs_none():
    told = run_without_extras()
    assert len(told) == len(EXAMPLES)
    for path in EXAMPLES:
        name = extra(path)
        expected = f"this example needs {name}: pip install 'qstar[{name}]'" if name else None
        assert told[str(path)] == expected, path.stem


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_imports_only_what_a_bare_install_and_its_extra_bring(path):
    assert third_party(path) <= REQUIRED | EXTRAS.get(extra(path), set())
