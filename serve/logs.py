"""What every process of ours says to whoever runs it: one line an event, JSON or text, by structlog.

A line has `timestamp` (UTC), `level`, `event` (a name in snake_case), the `part` and `replica` that say it, what
`bound` put around it (request_id, job_id, model) and the event's own fields. It never holds what people wrote or
keep secret: ids, counts, names and times are all that is passed here, and of a foreign error only its kind and place
are told, because its message may quote what it choked on. Of what another library logs, its text without the arguments
is told, for the same reason; what the library has put into the text itself is its own affair.

Before `configure`, warnings go to standard error as text. structlog's own configuration is never touched: a program
that imports us may have its own.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from serve.errors import RookeryError
from serve.settings import PREFIX, Settings

MAX_FILE_BYTES = 100_000_000  # a longer log makes room; the one before it is kept as .1
_LOOK_EVERY_S = 1.0  # whether it is too long, or another process has made room
_MAX_CHARS = 2000  # of one field
_MAX_FRAMES = 12
_LEVELS: dict[str, int] = {
    name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")
}
# Errors of Python and torch that tell of sizes and states, never of texts.
_TELLING = (RookeryError, RuntimeError, MemoryError, ArithmeticError)
_PLAIN = re.compile(r"[\w./:@+-]+", re.ASCII)
# Libraries that write to standard error by handlers of their own.
_WITH_OWN_HANDLERS = ("huggingface_hub", "uvicorn", "uvicorn.access", "uvicorn.error", "alembic")

# What a line goes through, of all our loggers, which are made at import: `configure` exchanges it for all of them.
_PROCESSORS: list[Processor] = []
_LOGGER = cast(
    FilteringBoundLogger,
    structlog.wrap_logger(
        object(),  # never called: the last processor writes
        processors=_PROCESSORS,
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        context_class=dict,
    ).bind(),
)


def get_logger() -> FilteringBoundLogger:
    """`log.info("model_loaded", model=..., bytes=...)`; usable at import, before `configure`."""
    return _LOGGER


def bound(**fields: Any) -> AbstractContextManager[Any]:
    """The same, within a block."""
    return structlog.contextvars.bound_contextvars(**fields)


def bind(**fields: str) -> None:
    """From here on each line of this task, and of those it starts, has these fields too."""
    structlog.contextvars.bind_contextvars(**fields)


def ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def configure(settings: Settings, *, part: str, **fields: str) -> None:
    """How this process logs from now on, and all that it starts, which finds it in its environment.

    `part`: gateway, generator, trainer, ...; each line has it, and `fields`. Records of other libraries take the same
    way from "warning" on, and from "info" on where the level is "debug". Where the file cannot be opened, standard
    error is written to instead.
    """
    path = Path(settings.log_file).absolute() if settings.log_file else None
    told = {"LOG_FORMAT": settings.log_format, "LOG_LEVEL": settings.log_level, "LOG_FILE": str(path or "")}
    os.environ.update({PREFIX + name: value for name, value in told.items()})
    write, refused = _open(path)
    is_text = settings.log_format == "text" or (settings.log_format == "auto" and path is None and _is_terminal(2))
    level = _LEVELS[settings.log_level]
    _set_up(_Output(_as_text if is_text else _as_json, write), level, {"part": part, **fields})
    _take_over(logging.INFO if level == logging.DEBUG else max(level, logging.WARNING))
    if refused is not None:
        _LOGGER.warning("log_file_unusable", path=path, reason=refused.strerror)


def _open(path: Path | None) -> tuple[Callable[[bytes], None], OSError | None]:
    """What writes to the file, or to standard error: a log that is not to be had must not stop what it tells of."""
    try:
        return _File(path).write if path else _to_stderr, None
    except OSError as exc:
        return _to_stderr, exc


def _set_up(output: _Output, level: int, fields: Mapping[str, str]) -> None:
    def heed_level(_logger: Any, method: str, event: EventDict) -> EventDict:
        if _LEVELS[method] < level:
            raise structlog.DropEvent
        return event

    def say_who(_logger: Any, method: str, event: EventDict) -> EventDict:
        return {"level": method, **fields, **event}

    _PROCESSORS[:] = [heed_level, structlog.contextvars.merge_contextvars, say_who, _tell_error, _clean, output]


def _take_over(level: int) -> None:
    """Records of other libraries, from `level` on."""
    root = logging.getLogger()
    root.handlers[:] = [*(one for one in root.handlers if not isinstance(one, _Foreign)), _Foreign()]
    root.setLevel(level)
    for name in _WITH_OWN_HANDLERS:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


class _Foreign(logging.Handler):
    """Records of other libraries become events of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        level = max((one for one in _LEVELS.values() if one <= record.levelno), default=logging.DEBUG)
        # What follows its first line is left out: asyncio quotes objects there.
        said = record.msg.partition("\n")[0] if isinstance(record.msg, str) else type(record.msg).__name__
        place = f"{record.pathname}:{record.lineno}"
        _LOGGER.log(level, "library_said", logger=record.name, message=said, place=place, exc_info=record.exc_info)


# --- Lines ----------------------------------------------------------------------------------------------------


def _as_json(event: EventDict) -> bytes:
    head = {"timestamp": _now(), "level": event.pop("level"), "event": event.pop("event")}
    return _encode({**head, **event}).encode("ascii")


def _as_text(event: EventDict) -> bytes:
    """For people: the same on one line, `name=value`."""
    head = f"{_now()} {event.pop('level'):7} {_value(event.pop('event'))}"
    told = [f"{_value(name)}={_value(value)}" for name, value in event.items()]
    return " ".join([head, *told]).encode("ascii", "backslashreplace")


def _value(value: Any) -> str:
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else _encode(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ASCII alone: nothing that a terminal or a reader of lines takes for an end or a command, surrogates included.
_encode = json.JSONEncoder(separators=(",", ":"), default=lambda value: type(value).__name__).encode


def _clean(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """What is None or "" is not said; nothing makes a line long, or no JSON."""
    return {name: _cut(value) for name, value in event.items() if value is not None and value != ""}


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= _MAX_CHARS else value[:_MAX_CHARS] + "..."
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)  # JSON knows neither NaN nor infinity
    if isinstance(value, Mapping):
        return {str(name): _cut(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_cut(one) for one in value]
    return _cut(str(value)) if isinstance(value, Path) else type(value).__name__


def _tell_error(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """`exc_info` as fields: which error, where, and its message if it is of a kind that never quotes."""
    given = event.pop("exc_info", None)
    error = given[1] if isinstance(given, tuple) else sys.exc_info()[1] if given is True else given
    if not isinstance(error, BaseException):
        return event
    event["error"] = type(error).__name__
    if (cause := error.__cause__ or error.__context__) is not None:
        event["cause"] = type(cause).__name__
    if isinstance(error, _TELLING):
        event["reason"] = str(error)
    elif isinstance(error, OSError):
        event["reason"] = error.strerror
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    event["trace"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
    return event


# --- Where they go --------------------------------------------------------------------------------------------


class _Output:
    """The last step of a line: it is rendered and written, or missing, but never stops what it tells of."""

    def __init__(self, render: Callable[[EventDict], bytes], write: Callable[[bytes], None]) -> None:
        self._render, self._write = render, write
        self._lock = threading.RLock()  # a signal, or what is freed meanwhile, may have something to say too
        self._start = b""

    def __call__(self, _logger: Any, _method: str, event: EventDict) -> NoReturn:
        line = self._render(event) + b"\n"
        with self._lock:
            try:
                self._write(self._start + line)
                self._start = b""
            except (OSError, ValueError):
                self._start = b"\n"  # a disk may be full in the middle of a line, of this process or another
        raise structlog.DropEvent


def _to_stderr(line: bytes) -> None:
    """The descriptor itself: in a replica Ray puts an object of its own in the place of `sys.stderr`."""
    _write_all(2, line)


def _by_python(line: bytes) -> None:
    sys.stderr.write(line.decode("ascii"))


class _File:
    """A file that all processes of a machine append to, each line by one write."""

    def __init__(self, path: Path, max_bytes: int = MAX_FILE_BYTES) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._descriptor = self._open()
        self._looked_at = time.monotonic()

    def write(self, line: bytes) -> None:
        """By one thread at a time."""
        if time.monotonic() - self._looked_at > _LOOK_EVERY_S:
            with suppress(OSError):  # where no new file can be made, the old one goes on
                self._look()
        _write_all(self._descriptor, line)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)  # of all that hold this very file one moves it; others see it gone
        try:
            if self._is_current() and os.fstat(self._descriptor).st_size > self._max_bytes:
                self._path.replace(self._path.with_name(self._path.name + ".1"))
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        if not self._is_current():
            old, self._descriptor = self._descriptor, self._open()
            os.close(old)

    def _is_current(self) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        return False


def _is_terminal(descriptor: int) -> bool:
    with suppress(OSError):
        return os.isatty(descriptor)
    return False


def _write_all(descriptor: int, line: bytes) -> None:
    while line:
        line = line[os.write(descriptor, line) :]


# For whoever imports us without a service around: as `logging` does, warnings on standard error.
_set_up(_Output(_as_text, _by_python), logging.WARNING, {})
