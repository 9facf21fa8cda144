"""How numbers and times are written on a page. Times are UTC, or how long ago they were."""

from __future__ import annotations

import time
from datetime import UTC, datetime

_UNITS = ((31_556_952, "year"), (2_629_746, "month"), (86_400, "day"), (3_600, "hour"), (60, "minute"))
_MAX_NUMBER = 10**18


def number(value: int | float | None) -> str:
    """ "1,234"; "–" for None, and for what counts nothing."""
    return f"{value:,.0f}" if value is not None and abs(value) < _MAX_NUMBER else "–"


def size(num_bytes: int | float) -> str:
    """ "17.3 MB"."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if num_bytes >= 10**power:
            return f"{num_bytes / 10**power:,.1f} {unit}"
    return f"{num_bytes:.0f} B"


def iso(seconds: int | float) -> str:
    """For the attribute of <time>."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def date(seconds: int | float | None) -> str:
    """ "21 November 2026"."""
    if seconds is None:
        return "–"
    day = datetime.fromtimestamp(seconds, UTC)
    return f"{day.day} {day:%B %Y}"


def ago(seconds: int | float, now: float | None = None) -> str:
    """ "3 hours ago", of Unix time."""
    past = (time.time() if now is None else now) - seconds
    for length, unit in _UNITS:
        if (count := int(past // length)) > 0:
            return f"{count} {unit}{'s' * (count != 1)} ago"
    return "just now"


def duration(seconds: int | float) -> str:
    """ "1:05"; "2:03:04"."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
