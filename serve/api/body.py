"""Reading request bodies: JSON by raw bytes within a limit, uploads streamed to disk.

FastAPI's own JSON path answers 500 to NaN and lone surrogates and repeats bad input in its errors, and its
form parser has no limit on bytes; hence both are read here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar
from urllib.parse import parse_qs

import anyio
import anyio.to_thread
from fastapi import Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    RootModel,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.api.service import Limits, Service
from serve.api.status import BodyTooLarge, BodyTooSlow, UnsupportedMediaType, invalid
from serve.api.storage import check_room
from serve.errors import BadUpload, InvalidRequest, RookeryError, disk_error
from serve.metrics import Metrics

B = TypeVar("B", bound=BaseModel)

_MAX_PARTS = 64
_MAX_FIELDS = 10_000
_MAX_FIELD_BYTES = 64 << 10
# Of refused bodies, for metrics; a full disk is nobody's body's fault.
_REASONS: dict[type, str] = {
    BodyTooLarge: "too_large",
    BodyTooSlow: "too_slow",
    UnsupportedMediaType: "media_type",
    BadUpload: "bad_form",
    InvalidRequest: "invalid",
}
_WRITE_BYTES = 1 << 20  # a write to disk takes a thread hop; this much pays for it


class Body(BaseModel):
    """A JSON body: strict (no true for 1, no "3" for 3), finite numbers only, unknown keys ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


def _as_texts(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    return [str(one).lower() if isinstance(one, bool) else one for one in values]


_Texts = Annotated[list[str], BeforeValidator(_as_texts)]


class _Fields(RootModel[dict[str, _Texts]]):
    pass


def expected(what: str) -> WrapValidator:
    """One clear sentence for a field of many shapes, whatever pydantic found; keys of a dict are not repeated."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("expected", "Input should be {what}", {"what": what}) from None

    return WrapValidator(check)


async def read_json(request: Request, kind: type[B], service: Service) -> B:
    """The body as `kind`. Raises: InvalidRequest, UnsupportedMediaType, BodyTooLarge, BodyTooSlow."""
    with _refusals_counted(service.metrics):
        _check_json_type(request)
        raw = await _read_whole(request, service.limits)
        try:
            return kind.model_validate_json(raw)
        except ValidationError as exc:
            raise invalid(exc) from exc


async def _read_whole(request: Request, limits: Limits) -> bytes:
    raw = bytearray()
    try:
        async with asyncio.timeout(limits.json_read_s):
            async for chunk in _chunks(request, limits.json_bytes, limits.read_s):
                raw += chunk
    except TimeoutError as exc:
        raise BodyTooSlow(f"The body did not arrive within {limits.json_read_s:g} s.") from exc
    return bytes(raw)


async def read_fields(request: Request, service: Service) -> dict[str, list[str]]:
    """A small form of names and values, each as often as it was sent, or a JSON object of texts and lists of them.

    Raises: InvalidRequest, UnsupportedMediaType, BodyTooLarge, BodyTooSlow.
    """
    kind, _ = parse_options_header(request.headers.get("content-type"))
    if kind != b"application/x-www-form-urlencoded":
        return (await read_json(request, _Fields, service)).root
    with _refusals_counted(service.metrics):
        raw = await _read_whole(request, service.limits)
        try:
            return parse_qs(raw.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS)
        except ValueError as exc:
            raise InvalidRequest(f"The form cannot be read, or has more than {_MAX_FIELDS} fields.") from exc


@contextlib.contextmanager
def _refusals_counted(metrics: Metrics) -> Iterator[None]:
    try:
        yield
    except RookeryError as exc:
        if reason := next((_REASONS[kind] for kind in type(exc).__mro__ if kind in _REASONS), None):
            metrics.body_rejections.labels(reason).inc()
        raise


def _check_json_type(request: Request) -> None:
    kind, options = parse_options_header(request.headers.get("content-type"))
    subtype = kind.partition(b"/")[2]
    charset = options.get(b"charset", b"utf-8").lower()
    is_json = kind.startswith(b"application/") and (subtype == b"json" or subtype.endswith(b"+json"))
    if not is_json or charset not in (b"utf-8", b"utf8", b"us-ascii"):
        raise UnsupportedMediaType("The body must be JSON in UTF-8, with 'Content-Type: application/json'.")


async def _chunks(request: Request, limit: int, pause_s: float) -> AsyncIterator[bytes]:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("Compressed request bodies are not read; send the body as it is.")
    too_large = BodyTooLarge(f"The body is larger than {limit} bytes, the most that is taken here.")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    received = 0
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(pause_s):
                chunk = await anext(stream, None)
        except TimeoutError as exc:
            raise BodyTooSlow(f"Nothing more of the body arrived for {pause_s:g} s.") from exc
        if chunk is None:
            return
        received += len(chunk)
        if received > limit:
            raise too_large
        yield chunk


# --- Uploads ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Part:
    """One part of a form: a file on disk (`path`) or a small value."""

    name: str
    filename: str | None = None
    path: Path | None = None
    value: str = ""


class Form:
    """The parts of a multipart body in the order they came."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    def files(self, name: str) -> list[Part]:
        """Raises: BadUpload when a part of that name is not a file."""
        found = [part for part in self.parts if part.name == name]
        if any(part.path is None for part in found):
            raise BadUpload(f"'{name}' must be a file part, with a filename.", param=name)
        return found

    def values(self, name: str) -> list[str]:
        return [part.value for part in self.parts if part.name == name and part.path is None]

    def value(self, name: str) -> str | None:
        """The last value of that name."""
        return next(reversed(self.values(name)), None)


@asynccontextmanager
async def read_form(request: Request, service: Service, *, keeps: bool = True) -> AsyncIterator[Form]:
    """Streams a multipart body to files in the service's folder; those not moved away are removed at the end.

    `keeps`: some of them will be moved away, for which there has to be room, as far as is known before they are read;
    who keeps them asks again. Raises: QuotaExceeded, BadUpload, InvalidRequest, UnsupportedMediaType, BodyTooLarge,
    BodyTooSlow, StoreUnavailable.
    """
    if keeps:
        await check_room(service, request, _announced_bytes(request))
    reader = _FormReader(service.upload_dir)
    try:
        with _refusals_counted(service.metrics):
            await _read_parts(request, reader, service.limits)
        yield Form(reader.parts)
    finally:
        if reader.has_written:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(reader.close)  # a disk that is busy lets who removes a file wait


def _announced_bytes(request: Request) -> int:
    """Of the body; 0 where nobody said."""
    said = request.headers.get("content-length", "")
    return int(said) if said.isascii() and said.isdigit() else 0


async def _read_parts(request: Request, reader: _FormReader, limits: Limits) -> None:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise UnsupportedMediaType("The body must be a form with files, 'Content-Type: multipart/form-data'.")
    try:
        parser = MultipartParser(options.get(b"boundary", b""), reader.callbacks())  # type: ignore[arg-type]
        async for chunk in _chunks(request, limits.upload_bytes, limits.read_s):
            parser.write(chunk)
            if reader.pending_bytes >= _WRITE_BYTES:
                await anyio.to_thread.run_sync(reader.flush)
        if reader.pending:
            await anyio.to_thread.run_sync(reader.flush)
        parser.finalize()
    except FormParserError as exc:
        raise BadUpload("The form cannot be read: its parts do not follow multipart/form-data.") from exc
    if not reader.ended:
        raise BadUpload("The form ended before its last part was complete.")


class _FormReader:
    """What the parser's callbacks build; bytes of files wait in memory until `flush`."""

    def __init__(self, folder: Path) -> None:
        self.parts: list[Part] = []
        self.pending_bytes = 0
        self.ended = False
        self._folder = folder
        self._header = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._value = bytearray()
        self.pending: list[tuple[Path, bytes]] = []
        self._open: dict[Path, IO[bytes]] = {}

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._headers.clear,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def flush(self) -> None:
        """Writes what waits. Blocks on disk. Raises: StoreUnavailable."""
        try:
            for path, data in self.pending:
                if path not in self._open:
                    self._open[path] = path.open("xb")
                self._open[path].write(data)
            for file in self._open.values():
                file.flush()
        except OSError as exc:
            raise disk_error("keep an upload", exc) from exc
        self.pending.clear()
        self.pending_bytes = 0

    @property
    def has_written(self) -> bool:
        return bool(self._open)

    def close(self) -> None:
        """Closes all files and removes those that nobody took over. Blocks on disk."""
        for file in self._open.values():
            with contextlib.suppress(OSError):  # what could not be written was told by `flush`
                file.close()
        for part in self.parts:
            if part.path is not None:
                with contextlib.suppress(OSError):
                    part.path.unlink()

    def _on_header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def _on_headers_finished(self) -> None:
        if len(self.parts) >= _MAX_PARTS:
            raise BadUpload(f"A form may have at most {_MAX_PARTS} parts.")
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        part = Part(_text(options.get(b"name", b"")))
        if (filename := options.get(b"filename")) is not None:
            part.filename = _file_name(filename)
            part.path = self._folder / f"upload-{secrets.token_hex(16)}"
            self.pending.append((part.path, b""))  # an empty file is a file too
        self._value.clear()
        self.parts.append(part)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self.parts[-1]
        if part.path is not None:
            self.pending.append((part.path, data[start:end]))
            self.pending_bytes += end - start
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidRequest(f"A field of a form may have at most {_MAX_FIELD_BYTES} bytes; this one has more.")

    def _on_part_end(self) -> None:
        self.parts[-1].value = _text(bytes(self._value))

    def _on_end(self) -> None:
        self.ended = True


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def _file_name(raw: bytes) -> str:
    """The user's own name for a file, for display only: never a path of ours."""
    name = os.path.basename(_text(raw).replace("\\", "/"))
    return "".join(char for char in name if char.isprintable())[:255] or "upload"
