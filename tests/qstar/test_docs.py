"""What the README and docs name is there: commands, options, make targets, imports, files, headings."""

import argparse
import ast
import importlib
import re
import shlex

import pytest
from packages import ROOT

from qstar.cli import options
from qstar.cli.main import COMMANDS, main

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ANOTHERS_OPTIONS = "lm_eval"  # its options are lm-evaluation-harness's


def commands(page):
    """Command lines: those of indented blocks, and those between backticks that do not run over a line."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^    ((?:qstar|make|python|torchrun|accelerate) .*)$", text, re.MULTILINE)
    return blocks + re.findall(r"`((?:qstar|make|python) [^`\n]*)`", text)


def words(command):
    return [word for word in shlex.split(command, comments=True) if word not in ("...", "WHAT", "COMMAND")]


QSTAR = sorted({c for page in PAGES for c in commands(page) if c.startswith("qstar ") and words(c)[1:]})
TARGETS = sorted({words(c)[1] for page in PAGES for c in commands(page) if c.startswith("make ")})
STUDIES = sorted({c for page in PAGES for c in commands(page) if c.startswith("python -m experiments.")})


class Reached(BaseException):
    """The command has got as far as its options."""


@pytest.fixture
def parser_of(monkeypatch):
    """The parser of a `qstar` command line, which then does not run."""

    def parse_known_args(self, *_, **__):
        raise Reached(self)

    for kind in (options.Parser, options._DataclassParser):
        monkeypatch.setattr(kind, "parse_known_args", parse_known_args)
    monkeypatch.setattr(options, "_yaml_options", lambda path: [])

    def find(arguments, run=main):
        with pytest.raises(Reached) as reached:
            run(arguments)
        return reached.value.args[0]

    return find


def unknown_options(parser: argparse.ArgumentParser, arguments):
    given = [word.partition("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)]
    return [name for name in given if name not in {*parser._option_string_actions, "--config"}]


@pytest.mark.parametrize("command", QSTAR)
def test_every_command_line_of_the_docs_names_a_command_and_options_that_are_there(command, parser_of):
    name, *rest = words(command)[1:]
    assert name in COMMANDS
    if name == ANOTHERS_OPTIONS or (name in ("bench", "memory") and not rest):
        return
    assert unknown_options(parser_of([name, *rest]), rest) == []


def test_an_option_that_is_not_there_would_be_found(parser_of):
    arguments = ["train", "--model", "x", "--thoughts", "3", "--seed=1"]
    assert unknown_options(parser_of(arguments), arguments) == ["--thoughts"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_of_the_docs_is_there(target):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("command", STUDIES)
def test_every_study_of_the_docs_is_there_and_takes_these_options(command, parser_of):
    module, *rest = words(command)[2:]
    run = importlib.import_module(f"{module}.__main__").main
    assert unknown_options(parser_of(rest, run), rest) == []


def imports(page):
    """Every `from qstar... import name` of a page's Python blocks, as (module, name)."""
    for block in re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    ):
        for line in re.findall(r"^(?:from qstar\S* import .*)$", block, re.MULTILINE):
            (found,) = ast.parse(line).body
            yield from ((found.module, name.name) for name in found.names)


@pytest.mark.parametrize("page", [page for page in PAGES if any(imports(page))], ids=lambda page: page.name)
def test_every_name_that_a_page_imports_is_there(page):
    missing = [(of, name) for of, name in imports(page) if not hasattr(importlib.import_module(of), name)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_is_there(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    here = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in here if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_gives_to_a_command_is_there(page):
    paths = {word for command in commands(page) for word in words(command) if "/" in word}
    ours = [path for path in paths if path.split("/")[0] in ("examples", "recipes", "bench", "docs")]
    assert [path for path in ours if not (ROOT / path).exists()] == []


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_heading_that_a_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^):\s]*\.md)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if link[1] not in anchors(page.parent / link[0])] == []


def test_the_front_page_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_line_of_text_has_at_most_120_characters(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    text = [line for line in lines if not line.lstrip().startswith("|") and not line.startswith("    ")]
    assert [line for line in text if len(line) > 120] == []
