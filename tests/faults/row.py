"""The table of faults: a row is a function that does something to the running system and says what came of it.

A module of `tests.faults.rows` holds the rows of one area. `python -m tests.faults` runs them; see its README.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Needs = Literal["", "root", "postgres", "cuda", "libfaketime"]
_ID = re.compile(r"[FB][1-9][0-9]?[a-z]?")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a row has shown. `figure`: in the words of `expected`, with the numbers of this run."""

    figure: str
    holds: bool
    details: Mapping[str, Any] = field(default_factory=dict)  # JSON; for the record


@dataclass(frozen=True, slots=True)
class Row:
    """`measure(folder, share)` may write into `folder`, which is empty; it ends all that it starts.

    `share`: of the full number of cases, 0 < share <= 1; the figure tells how many there were.
    """

    id: str
    did: str  # to what, by what: "kill -9 of a generator every 10 s, 1,000 requests"
    expected: str
    measure: Callable[[Path, float], Measured]
    minutes: float  # about, on 2 cores, with share 1
    needs: Needs = ""


ROWS: dict[str, Row] = {}


def row(
    row_id: str, *, did: str, expected: str, minutes: float, needs: Needs = ""
) -> Callable[[Callable[[Path, float], Measured]], Callable[[Path, float], Measured]]:
    """Makes the function below it the row `row_id`, such as F1 or B3, or F1b where one fault has two sides."""
    if not _ID.fullmatch(row_id) or row_id in ROWS:
        raise ValueError(f"{row_id} is no id of a row, or there are two of it")

    def add(measure: Callable[[Path, float], Measured]) -> Callable[[Path, float], Measured]:
        ROWS[row_id] = Row(row_id, did, expected, measure, minutes, needs)
        return measure

    return add
