"""What the program says while a block of a test runs; afterwards it says as little as before."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from structlog import DropEvent
from structlog.testing import LogCapture
from structlog.typing import EventDict

from serve import logs
from serve.settings import Settings


@contextmanager
def captured_lines() -> Iterator[list[MutableMapping[str, Any]]]:
    """Events with their fields, from level `info` on, as they were said."""
    before, capture = list(logs._PROCESSORS), LogCapture()
    logs._PROCESSORS[:] = [_from_info_on, capture]
    try:
        yield capture.entries
    finally:
        logs._PROCESSORS[:] = before


def _from_info_on(_logger: Any, method: str, event: EventDict) -> EventDict:
    if method == "debug":
        raise DropEvent
    return event


@contextmanager
def logging_to(path: Path, settings: Settings | None = None, **fields: str) -> Iterator[None]:
    """`serve.logs.configure` for this block alone."""
    before, root, environ = list(logs._PROCESSORS), logging.getLogger(), dict(os.environ)
    handlers, level = list(root.handlers), root.level
    logs.configure(replace(settings or Settings(), log_file=str(path)), **{"part": "test", **fields})
    try:
        yield
    finally:
        logs._PROCESSORS[:] = before
        root.handlers[:] = handlers
        root.setLevel(level)
        os.environ.clear()
        os.environ.update(environ)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Of a log file; raises where a line is not one JSON object."""
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert all(isinstance(line, dict) for line in lines)
    return lines
