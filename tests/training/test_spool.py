"""Sequences on disk against the same ones in memory."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import DiskFull
from serve.training.archives.spool import Rows, Spool, Texts

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=12)


@settings(max_examples=100)
@given(TEXTS, st.slices(12))
def test_texts_on_disk_are_those_that_came_in_any_part_and_order(texts: list[str], part: slice) -> None:
    spooled = Texts(texts)
    assert (len(spooled), list(spooled), list(spooled)) == (len(texts), texts, texts)
    assert spooled[part] == tuple(texts[part])
    assert list(spooled.sorted()) == sorted(texts)
    assert spooled == tuple(texts)


def test_an_index_is_that_of_a_list() -> None:
    spooled = Texts(["a", "b", "c"])
    assert (spooled[0], spooled[-1]) == ("a", "c")
    assert spooled != ["a", "b"] and spooled != 7
    with pytest.raises(IndexError):
        spooled[3]


def test_two_readers_do_not_disturb_each_other() -> None:
    spooled = Texts(map(str, range(100)))
    assert list(zip(spooled, spooled, strict=True)) == [(str(number),) * 2 for number in range(100)]


def test_what_does_not_fit_in_memory_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    spooled = Texts(random.Random(number).randbytes(5_000).hex() for number in range(2_000))
    assert len(spooled) == 2_000
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_so() -> None:
    spool = Spool("CREATE TABLE texts (text TEXT)")
    spool.run("PRAGMA max_page_count = 4")
    with pytest.raises(DiskFull, match="temporary file"):
        for _ in range(10):
            spool.run("INSERT INTO texts VALUES (?)", "x" * 4_000)


def test_rows_are_made_into_what_they_stand_for() -> None:
    spool = Spool("CREATE TABLE pairs (a INTEGER, b INTEGER)")
    spool.run("INSERT INTO pairs VALUES (?, ?)", 1, 2)
    assert Rows(spool, "SELECT a, b FROM pairs", complex) == (1 + 2j,)
