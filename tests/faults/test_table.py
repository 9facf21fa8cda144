"""The table of faults: it is whole, and says what was measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.faults.__main__ import measure
from tests.faults.row import Row
from tests.faults.table import (
    README,
    Result,
    line,
    load_rows,
    picked,
    read_results,
    render,
    save_result,
    with_table,
)

ALL = {*(f"F{number}" for number in range(1, 31)), *(f"B{number}" for number in range(1, 15))}


def _row(row_id: str) -> Row:
    return Row(row_id, "kill -9", "0 lost", lambda folder, share: pytest.fail("not to be run"), 1)


def _result(figure: str, *, holds: bool = True, share: float = 1.0) -> Result:
    return Result(figure, holds, share, 3.2, "2026-11-22", 2, "some CPU", {"lost": []})


def test_every_fault_has_a_row() -> None:
    assert ALL - {row.id for row in load_rows()} == set()


def test_the_readme_shows_what_was_measured() -> None:
    rows, text = load_rows(), README.read_text(encoding="utf-8")
    assert text == with_table(text, render(rows, read_results()))
    assert set(read_results()) <= {row.id for row in rows}


def test_rows_are_picked_with_their_other_sides() -> None:
    rows = [_row(row_id) for row_id in ("F1", "F1b", "F10", "B1")]
    assert [row.id for row in picked(rows, ["F1"])] == ["F1", "F1b"]
    assert [row.id for row in picked(rows, ["F1b", "B1"])] == ["F1b", "B1"]
    assert picked(rows, []) == rows
    with pytest.raises(ValueError, match="F3"):
        picked(rows, ["F1", "F3"])


def test_a_saved_result_replaces_its_own_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text("{}")
    for row_id, result in [("F10", _result("a")), ("F2", _result("b")), ("F10", _result("c"))]:
        save_result(row_id, result, path)
    assert read_results(path) == {"F2": _result("b"), "F10": _result("c")}
    assert list(read_results(path)) == ["F2", "F10"]


def test_the_table_tells_what_failed_what_was_partial_and_what_is_missing() -> None:
    results = {"F1": _result("3 lost", holds=False), "F2": _result("0 lost", share=0.1)}
    table = render([_row("F1"), _row("F2"), _row("F3")], results)
    assert "| F1 | kill -9 | 0 lost | 3 lost | **no** |" in table
    assert "| F2 | kill -9 | 0 lost | 0 lost (10% of the cases) | yes |" in table
    assert "| F3 | kill -9 | 0 lost | not measured yet |  |" in table
    assert "2 rows measured 2026-11-22 to 2026-11-22 on 2 cores of some CPU." in table


def test_a_cell_cannot_break_the_table() -> None:
    assert line(_row("F1"), "a|b\nc", "yes") == "| F1 | kill -9 | 0 lost | a\\|b c | yes |"


@pytest.mark.slow  # imports all that any row does, in a process of its own
def test_a_row_that_raises_does_not_hold() -> None:
    unknown = dataclasses.replace(_row("F1"), id="F99")
    result = measure(unknown, 0.5)
    assert not result.holds
    assert result.figure == "error: KeyError: 'F99'"
