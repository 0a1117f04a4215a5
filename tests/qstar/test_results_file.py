"""The one file of results that a later run goes on with."""

import json
from operator import itemgetter

import pytest

from qstar.reporting.results_file import ResultsFile

ROWS = [{"seed": 0, "kind": "é\u2028", "right": 1}, {"seed": 1, "kind": "b", "right": 2}]


def opened(path, settings=None, columns=("right",)):
    return ResultsFile(path, "those of a test", itemgetter("seed", "kind"), columns, settings)


@pytest.mark.parametrize("settings", [None, {"steps": (1, 2)}], ids=["no settings", "settings"])
def test_a_later_run_finds_the_rows_in_order_and_adds_none_twice(tmp_path, settings):
    path = tmp_path / "rows.jsonl"
    for _ in range(2):
        file = opened(path, settings)
        for row in ROWS:
            file.add(row)
        assert file.rows == ROWS and (1, "b") in file and (1, "c") not in file
        assert file.get((1, "b")) == ROWS[1] and file.get((1, "c")) is None
    first = [] if settings is None else [{"settings": {"steps": [1, 2]}}]
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [*first, *ROWS]


def test_a_crash_at_any_byte_loses_no_more_than_the_row_it_was_writing(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = opened(path, {"steps": 1})
    for row in ROWS:
        file.add(row)
    whole = path.read_bytes()
    ends = [i + 1 for i, x in enumerate(whole) if x == ord("\n")]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = opened(path, {"steps": 1}).rows
        assert kept == ROWS[: max(0, sum(end <= size + 1 for end in ends) - 1)]
        assert path.read_bytes() == whole[: max(ends[0], *(end for end in [0, *ends] if end <= size + 1))]


@pytest.mark.parametrize(
    "content",
    [
        '{"seed": 0}\n',
        '{"seed": 0, "kind": "a"}\n',
        "notes",
        "notes\n",
        "5\n",
        '["seed"]\n',
        '{"seed": 0, x\n{"s',
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [None, {"steps": 1}], ids=["no settings", "settings"])
def test_a_file_of_something_else_is_refused_and_not_touched(tmp_path, content, settings):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(
        ValueError, match=r"^output = '.*rows\.jsonl': holds other lines than those of a test: "
    ):
        opened(path, settings)
    assert path.read_text() == content


def test_a_file_of_other_settings_is_refused_and_not_touched(tmp_path):
    path = tmp_path / "rows.jsonl"
    opened(path, {"steps": 1, "rate": 2}).add(ROWS[0])
    path.write_bytes(content := path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"^output = '.*': is of a run with other rate, seeds$"):
        opened(path, {"steps": 1, "rate": 3, "seeds": 0})
    assert path.read_bytes() == content


def test_without_a_path_rows_are_kept_in_memory_alone_and_a_path_needs_its_folder(tmp_path):
    file = opened(None, {"steps": 1})
    file.add(ROWS[0])
    assert file.rows == ROWS[:1]
    with pytest.raises(ValueError, match=r"^output = .*: its folder does not exist$"):
        opened(tmp_path / "none" / "rows.jsonl")
