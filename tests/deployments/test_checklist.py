"""What a checklist looks like where symbols can be shown, and where not."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deployments.checklist import Checklist


def checklist(*, is_terminal: bool) -> tuple[Checklist, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=200, color_system=None, _environ={"TERM": "xterm"})
    return Checklist(console), out


def test_without_a_terminal_it_is_ascii_words() -> None:
    made, out = checklist(is_terminal=False)
    with made.step("data folder") as said:
        said("here")
    made.line("note", "Hub", "not reachable\ncheck the network")
    assert out.getvalue().isascii()
    assert out.getvalue().splitlines() == [
        "ok      data folder    here",
        "note    Hub            not reachable",
        "                       check the network",
    ]


def test_a_terminal_shows_what_is_under_way_and_then_a_symbol() -> None:
    made, out = checklist(is_terminal=True)
    with made.step("Ray"):
        assert out.getvalue() == "… Ray\r"
    assert out.getvalue() == "… Ray\r✓ Ray\n"


def test_a_step_that_fails_says_so() -> None:
    made, out = checklist(is_terminal=False)
    with pytest.raises(OSError), made.step("database"):
        raise OSError
    assert out.getvalue() == "problem database\n"


def test_what_another_process_has_listed_is_shown_as_ones_own() -> None:
    words, out = checklist(is_terminal=False)
    words.line("ok", "versions", "Rookery 1, [Python] 3")
    words.line("problem", "a name that is long", "detail")
    symbols, shown = checklist(is_terminal=True)
    for line in [*out.getvalue().splitlines(), "(a remark of Ray's)", "okay", "", "ok"]:
        symbols.relay(line)
    assert shown.getvalue().splitlines() == ["✓ versions       Rookery 1, [Python] 3", "✗ a name that is long detail"]
    made, again = checklist(is_terminal=False)
    for line in out.getvalue().splitlines():
        made.relay(line)
    assert again.getvalue().splitlines()[0] == out.getvalue().splitlines()[0]
