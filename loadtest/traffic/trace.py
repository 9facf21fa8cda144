"""Recorded traffic: a file with a line of JSON for each request, in order of time.

    {"at_s": 0.25, "model": 17, "prompt_tokens": 4, "output_tokens": 40}

`at_s` counts from the beginning of the flow. What a line leaves out is drawn as the flow says; `model` is a rank, from
0, among the flow's models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from loadtest.traffic.plan import BadPlan

Ints: TypeAlias = NDArray[np.int64]

NOT_SAID = -1
_KEYS = ("model", "prompt_tokens", "output_tokens")
_MOST = 10_000_000


@dataclass(frozen=True, slots=True)
class Trace:
    """Columns of equal length; `NOT_SAID` where a line does not say."""

    at_s: NDArray[np.float64]
    model: Ints
    prompt_tokens: Ints
    output_tokens: Ints


@lru_cache(maxsize=4)  # a plan is checked and then played; read-only, as its arrays are shared
def read_trace(path: Path) -> Trace:
    """Raises: BadPlan naming the line, or what hinders reading."""
    try:
        return _read(path)
    except OSError as exc:
        raise BadPlan(f"{path}: cannot be read: {exc.strerror}") from exc


def _read(path: Path) -> Trace:
    times: list[float] = []
    columns: dict[str, list[int]] = {key: [] for key in _KEYS}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                at_s, rest = _read_line(line, f"{path}, line {number}")
                if times and at_s < times[-1]:
                    raise BadPlan(f"{path}, line {number}: at_s = {at_s:g} is before the line above; sort the file")
                times.append(at_s)
                for key, value in zip(_KEYS, rest, strict=True):
                    columns[key].append(value)
    if not times:
        raise BadPlan(f"{path}: a trace without a request")
    trace = Trace(np.array(times), *(np.array(columns[key], dtype=np.int64) for key in _KEYS))
    for array in (trace.at_s, trace.model, trace.prompt_tokens, trace.output_tokens):
        array.flags.writeable = False
    return trace


def _read_line(line: bytes, where: str) -> tuple[float, list[int]]:
    try:
        entry = json.loads(line)
    except ValueError as exc:
        raise BadPlan(f"{where}: not JSON: {exc}") from exc
    if not isinstance(entry, dict) or not {"at_s"} <= entry.keys() <= {"at_s", *_KEYS}:
        raise BadPlan(f"{where}: must be an object with at_s, and maybe {', '.join(_KEYS)}")
    at_s = entry["at_s"]
    if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not 0 <= at_s <= _MOST:
        raise BadPlan(f"{where}: at_s = {at_s!r}: must be a number of seconds, at least 0 and at most {_MOST:,}")
    for key in entry.keys() & set(_KEYS):
        value, least = entry[key], int(key == "output_tokens")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
            raise BadPlan(f"{where}: {key} = {value!r}: must be a whole number, at least {least}")
    return float(at_s), [entry.get(key, NOT_SAID) for key in _KEYS]
