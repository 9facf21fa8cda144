"""Result files: a header, then a line of JSON for each record, written as they come.

A field that has its default is left out of its line. It knows nothing of what the numbers mean.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, get_args

from loadtest.checks import Check, Unfit, number, one_of, text, truth, whole
from loadtest.results.record import Header, Kind, Outcome, Record, Run

FORMAT = "rookery-loadtest/1"
_END = "run_ended_s"
_MOST_S = 10**9  # 32 years
_MOST_LINE = 16 * 2**20  # bytes
_SHOWN = 60  # characters of a wrong value in a message
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode  # `json.dumps` makes one for each call


class BadResult(ValueError):
    """A file that is no result of a load test: its name, the line, and why."""

    def __init__(self, path: Path, line: int, why: str) -> None:
        super().__init__(f"{path}, line {line}: {why}")
        self.path, self.line, self.why = path, line, why


class Writer:
    """Appends records to a new file; each is on its way to the disk when `append` returns.

    Left without an exception it notes that the run went to its end.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._path = path
        self._header = header
        self._last_s = 0.0

    def __enter__(self) -> Writer:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8", buffering=1)  # flushed at the end of each line
        self._write({"format": FORMAT, **asdict(self._header)})
        return self

    def append(self, record: Record) -> None:
        self._last_s = max(self._last_s, record.ended_s)
        self._write(_to_json(record))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write({_END: round(self._last_s, 6)})
        finally:
            self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(_encode(line) + "\n")


def write(path: Path, run: Run) -> None:
    """Writes a whole run; one that was stopped stays so."""
    try:
        with Writer(path, run.header) as writer:
            for record in run.records:
                writer.append(record)
            if run.stopped_s is not None:
                raise _Stopped
    except _Stopped:
        pass


def read(path: Path) -> Run:
    """The run in a file, of which a line at a time is held. A last line that was cut is left out; `notes` says so.

    Raises: BadResult, which names the file and the line; OSError where there is no such file.
    """
    records: list[Record] = []
    header: Header | None = None
    is_ended = False
    notes: list[str] = []
    for at, content, is_cut in _lines(path):
        if is_ended:
            raise BadResult(path, at, "a line after the one that ends the run; are these two files in one?")
        try:
            line = _parse(path, at, content)
        except BadResult:
            if header is None or not is_cut:
                raise
            notes.append(f"The file's last line ({at}) was cut and is left out.")
            break
        if header is None:
            header = _header(path, line)
        elif _END in line:
            _checked(path, at, line, {_END: _seconds}, {_END})
            is_ended = True
        else:
            records.append(Record(**_checked(path, at, line, _RECORD_CHECKS, _RECORD_NEEDED)))
    if header is None:
        raise BadResult(path, 1, "the file is empty; a result begins with a header")
    stopped_s = None if is_ended else max((record.ended_s for record in records), default=0.0)
    return Run(header, tuple(records), stopped_s, tuple(notes))


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Its number, its bytes, and whether it was cut: whoever ended a line wrote its newline."""
    with path.open("rb") as file:
        for at, content in enumerate(iter(lambda: file.readline(_MOST_LINE), b""), start=1):
            if len(content) == _MOST_LINE:
                raise BadResult(path, at, f"longer than {_MOST_LINE:,} bytes")
            yield at, content, not content.endswith(b"\n")


class _Stopped(Exception):
    """Leaves a Writer as a run does that is stopped."""


def _to_json(record: Record) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = getattr(record, name)
        if value == default:
            continue
        if name == "gaps_s":
            line[name] = [round(gap, 6) for gap in value]
        else:
            line[name] = round(value, 6) if isinstance(value, float) else value
    return line


def _parse(path: Path, at: int, content: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        line = json.loads(content.decode("utf-8"), parse_constant=refuse)
        if b"\\ud" in content.lower():  # maybe half of a pair, which nothing can print
            line = json.loads(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError) as exc:
        raise BadResult(path, at, f"not a line of JSON: {exc}") from exc
    if not isinstance(line, dict):
        raise BadResult(path, at, f"an object was expected, not {type(line).__name__}")
    return line


def _header(path: Path, line: dict[str, Any]) -> Header:
    found = line.pop("format", None)
    if found != FORMAT:
        raise BadResult(path, 1, f"not a result of a load test: 'format' is {_shown(found)}, expected {FORMAT!r}")
    return Header(**_checked(path, 1, line, _HEADER_CHECKS, _HEADER_NEEDED))


def _checked(
    path: Path, at: int, line: dict[str, Any], checks: Mapping[str, Check], needed: set[str]
) -> dict[str, Any]:
    if missing := needed - line.keys():
        raise BadResult(path, at, f"{', '.join(sorted(missing))} missing")
    for name, value in line.items():
        if (check := checks.get(name)) is None:
            raise BadResult(path, at, f"unknown field {_shown(name)}")
        try:
            line[name] = check(value)
        except Unfit as exc:
            raise BadResult(path, at, f"{name} is {_shown(value)}, expected {exc}") from exc
    return line


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"


def _seconds(value: Any) -> float:
    if not 0 <= (found := number(value)) <= _MOST_S:  # nan is not either
        raise Unfit(f"seconds, from 0 to {_MOST_S:,}")
    return found


def _said(value: Any) -> float | None:
    """What a server says of itself is kept as it was said, but for what overflows in milliseconds."""
    if value is not None and not math.isfinite(1000 * number(value)):
        raise Unfit("a finite number")
    return None if value is None else float(value)


def _count(value: Any) -> int:
    if not 0 <= (found := whole(value)) <= 2**53:
        raise Unfit("a whole number from 0 to 2^53")
    return found


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unfit("an object")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Unfit("a list")
    return value


def _often(value: Any) -> str:
    """A text that many lines have in common, held once."""
    return sys.intern(text(value))


_CHECKS: dict[str, Check] = {
    "float": _seconds,
    "float | None": lambda value: None if value is None else _seconds(value),
    "int": _count,
    "str": text,
    "bool": truth,
    "Sequence[float]": lambda value: [_seconds(item) for item in _list(value)],
    "tuple[str, ...]": lambda value: tuple([text(item) for item in _list(value)]),
    "Mapping[str, Any]": _object,
    "Mapping[str, str]": lambda value: {name: text(item) for name, item in _object(value).items()},
    "Outcome": one_of(get_args(Outcome)),
    "Kind": one_of(get_args(Kind)),
}
_DEFAULTS = {item.name: item.default for item in fields(Record)}
_RECORD_CHECKS = {item.name: _CHECKS[str(item.type)] for item in fields(Record)}
_RECORD_CHECKS |= {"load_s": _said} | dict.fromkeys(("flow", "model", "error", "tier"), _often)
_HEADER_CHECKS = {item.name: _CHECKS[str(item.type)] for item in fields(Header)}


def _needed(kind: type[Record] | type[Header]) -> set[str]:
    return {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}


_RECORD_NEEDED = _needed(Record)
_HEADER_NEEDED = _needed(Header)
