"""What the table of faults says: the rows in their order, what they showed last, and the README that tells of both."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests import postgres
from tests.faults import rows
from tests.faults.row import ROWS, Needs, Row

MEASURED = Path(__file__).with_name("measured.json")
README = Path(__file__).with_name("README.md")
_BEGIN, _END = "<!-- the table: written by `make faults SAVE=1` -->\n", "<!-- the end of the table -->\n"


@dataclass(frozen=True, slots=True)
class Result:
    """What a row showed, when, and on what machine."""

    figure: str
    holds: bool
    share: float  # of the full number of cases
    seconds: float
    date: str
    cores: int
    cpu: str
    details: Mapping[str, Any] = field(default_factory=dict)


def load_rows() -> list[Row]:
    """Of all modules of `tests.faults.rows`: F1, F1b, F2, …, B1, …"""
    for module in pkgutil.iter_modules(rows.__path__):
        importlib.import_module(f"{rows.__name__}.{module.name}")
    return sorted(ROWS.values(), key=lambda row: _order(row.id))


def _order(row_id: str) -> tuple[bool, int, str]:
    digits = row_id[1:].rstrip("abcdefghijklmnopqrstuvwxyz")
    return row_id[0] == "B", int(digits), row_id[1 + len(digits) :]


def picked(rows: list[Row], ids: Collection[str]) -> list[Row]:
    """Those of these ids; F1 also picks F1b. All, where none is named.

    Raises: ValueError: there is no such row.
    """
    if not ids:
        return rows
    chosen = [row for row in rows if {row.id, row.id.rstrip("abcdefghijklmnopqrstuvwxyz")} & set(ids)]
    unknown = set(ids) - {row.id for row in chosen} - {row.id.rstrip("abcdefghijklmnopqrstuvwxyz") for row in chosen}
    if unknown:
        raise ValueError(f"there is no row {', '.join(sorted(unknown))}")
    return chosen


def missing(needs: Needs) -> str:
    """Why a row that needs this cannot be measured here; empty: it can."""
    match needs:
        case "root":
            return "" if os.geteuid() == 0 else "needs root"
        case "postgres":
            return "" if postgres.is_installed() else "needs PostgreSQL"
        case "cuda":
            return "" if torch.cuda.is_available() else "needs a CUDA device"
        case "libfaketime":
            return "" if shutil.which("faketime") else "needs libfaketime"
    return ""


def read_results(path: Path = MEASURED) -> dict[str, Result]:
    return {row_id: Result(**result) for row_id, result in json.loads(path.read_text(encoding="utf-8")).items()}


def save_result(row_id: str, result: Result, path: Path = MEASURED) -> None:
    """Puts it among those of the other rows, at once: what a later row does cannot lose it."""
    results = {**read_results(path), row_id: result}
    ordered = {one: asdict(results[one]) for one in sorted(results, key=_order)}
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def line(row: Row, measured: str, holds: str, *, seconds: float | None = None) -> str:
    """A row of the table, as Markdown."""
    cells = [row.id, row.did, row.expected, measured, holds, *([f"{seconds:.0f} s"] if seconds is not None else [])]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def render(rows: list[Row], results: Mapping[str, Result]) -> str:
    """The table, and below it where and when it was measured."""
    lines = ["| | What was done | Expected | Measured | Holds |", "|---|---|---|---|---|"]
    for row in rows:
        result = results.get(row.id)
        if result is None:
            lines.append(line(row, "not measured yet", ""))
        else:
            part = "" if result.share == 1 else f" ({result.share:.0%} of the cases)"
            lines.append(line(row, result.figure + part, "yes" if result.holds else "**no**"))
    shown = [results[row.id] for row in rows if row.id in results]
    return "\n".join([*lines, "", *_machines(shown)]) + "\n"


def _machines(results: list[Result]) -> Iterator[str]:
    for cores, cpu in sorted({(one.cores, one.cpu) for one in results}):
        dates = sorted(one.date for one in results if (one.cores, one.cpu) == (cores, cpu))
        yield f"{len(dates)} rows measured {dates[0]} to {dates[-1]} on {cores} cores of {cpu}."


def with_table(readme: str, table: str) -> str:
    """The README with this table in the place of its own."""
    before, rest = readme.split(_BEGIN)
    return before + _BEGIN + "\n" + table + "\n" + _END + rest.split(_END)[1]


def write_readme(rows: list[Row]) -> None:
    README.write_text(with_table(README.read_text(encoding="utf-8"), render(rows, read_results())), encoding="utf-8")
