"""The front matter of a model's card, which a stranger wrote: reading it costs little, whatever it says.

What cannot be read, or has more in it than any card needs, counts as nothing.
"""

from __future__ import annotations

import json
import os
import re
from datetime import date
from functools import lru_cache
from typing import Any

import yaml  # type: ignore[import-untyped]

from serve.types import RepoFile

_MAX_BYTES = 16 << 10
_MAX_EVENTS = 500  # some two for each value; a card with measurements of several tasks has 200
_MAX_DEPTH = 20
_MAX_REMEMBERED = 256  # cards: the pages that are looked at again and again

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built


def read_card(file: RepoFile) -> dict[str, Any]:
    """As JSON knows it, from the file README.md. Nobody may change it: others are shown it too."""
    try:
        status = os.stat(file.location, follow_symlinks=False)
    except OSError:
        return {}
    return _read(file, (status.st_size, status.st_mtime_ns, status.st_ino))


@lru_cache(_MAX_REMEMBERED)
def _read(file: RepoFile, state: tuple[int, int, int]) -> dict[str, Any]:
    try:
        with open(file.open(), "rb") as opened:
            text = opened.read(_MAX_BYTES).decode(errors="replace")
    except OSError:
        return {}
    match = _FRONT_MATTER.match(text)
    return parse_front_matter(match[1]) if match else {}


def parse_front_matter(text: str) -> dict[str, Any]:
    """{} for what is no mapping, or refused."""
    try:
        _check(text)
        plain = json.loads(json.dumps(yaml.load(text, _LOADER), default=_plain))
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _check(text: str) -> None:
    """Before anything is built. A few lines of aliases can stand for more than fits into memory."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, _LOADER)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if number > _MAX_EVENTS or depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("no card")


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, date) else str(value)[:1000]
