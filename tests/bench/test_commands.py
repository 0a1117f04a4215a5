"""The tables of `qstar bench` and `qstar memory` name modules that can run, each with one line of help."""

import importlib

import pytest
from qstar_bench.commands import BENCH, MEMORY


@pytest.mark.parametrize("name", [*BENCH, *MEMORY])
def test_a_command_has_a_main_and_one_line_of_what_it_measures(name):
    module, measured = (BENCH | MEMORY)[name]
    assert callable(importlib.import_module(module).main)
    assert measured and "\n" not in measured


def test_no_command_of_one_group_hides_one_of_the_other():
    assert not BENCH.keys() & MEMORY.keys()
