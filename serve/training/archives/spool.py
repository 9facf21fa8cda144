"""Sequences larger than memory: rows in a private database on disk, read again each time they are gone through.

The database has no name: SQLite removes its file on opening it, so nothing is left behind whatever ends the process,
and a small one never leaves memory. Knows neither posts nor rules.
"""

from __future__ import annotations

import errno
import operator
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar, overload

from serve.errors import StoreUnavailable, disk_error

_CACHE_KIB = 4096  # of each database, and of each sort in it; the rest lies on disk
_T = TypeVar("_T")


class Spool:
    """A database for one process and one task. Not for several threads at the same time."""

    def __init__(self, schema: str) -> None:
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._connection.executescript(f"PRAGMA journal_mode = OFF; PRAGMA cache_size = -{_CACHE_KIB}; {schema}; BEGIN")

    def run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """Raises: StoreUnavailable."""
        try:
            return self._connection.execute(statement, values)
        except sqlite3.OperationalError as exc:
            raise _translated(exc) from exc

    def stream(self, query: str, *values: Any) -> Iterator[Any]:
        """Rows as they are wanted. Raises: StoreUnavailable."""
        try:
            yield from self._connection.execute(query, values)
        except sqlite3.OperationalError as exc:
            raise _translated(exc) from exc

    def define(self, name: str, function: Callable[[str], str]) -> None:
        """Makes a pure function of one text callable in statements."""
        self._connection.create_function(name, 1, function, deterministic=True)


def _translated(exc: sqlite3.OperationalError) -> StoreUnavailable:
    number = errno.ENOSPC if exc.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
    return disk_error("keep an archive's posts in a temporary file", OSError(number, os.strerror(number)))


class Rows(Sequence[_T]):
    """What a query gives, as a sequence that is never whole in memory. Its table must not change any more."""

    def __init__(self, spool: Spool, query: str, make: Callable[..., _T]) -> None:
        self.spool, self._query, self._make = spool, query, make
        [[self._length]] = spool.run(f"SELECT count(*) FROM ({query})").fetchall()

    def __len__(self) -> int:
        return int(self._length)

    def __iter__(self) -> Iterator[_T]:
        make = self._make
        for row in self.spool.stream(self._query):
            yield make(*row)

    def __eq__(self, other: object) -> bool:
        """As sequences, a tuple included."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[_T, ...]: ...
    def __getitem__(self, index: int | slice) -> _T | tuple[_T, ...]:
        """A slice is a tuple, and in memory."""
        if isinstance(index, int):
            place = range(len(self))[index]
            return next(islice(self, place, None))
        places = range(len(self))[index]
        if places.step < 0:
            return self[places[-1] : places[0] + 1 : -places.step][::-1] if places else ()
        return tuple(islice(self, places.start, places.stop, places.step))


class Texts(Rows[str]):
    """Texts in the order in which they came."""

    def __init__(self, texts: Iterable[str]) -> None:
        spool = Spool("CREATE TABLE texts (seq INTEGER PRIMARY KEY, text TEXT)")
        for text in texts:
            spool.run("INSERT INTO texts (text) VALUES (?)", text)
        super().__init__(spool, "SELECT text FROM texts ORDER BY seq", str)

    def sorted(self) -> Iterator[str]:
        """By code point: SQLite compares bytes of UTF-8, whose order is the same."""
        for (text,) in self.spool.stream("SELECT text FROM texts ORDER BY text"):
            yield text
