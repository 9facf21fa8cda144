"""One file on its way to a client: whole, a part of it, or its head. In constant memory, however slow the client.

It does not know what a model is; see `serve.api.hub_files` for who may have which file.
"""

from __future__ import annotations

import asyncio
import os
import re
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import anyio.to_thread
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.caching import is_known
from serve.api.generation import while_wanted

_PIECE_BYTES = 128 << 10
_MAX_PIECES = 4  # of one download that are under way: half a megabyte each
_STALL_S = 120.0  # a client that takes nothing for so long has gone away
_DEADLINE_S = 24 * 3600.0
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)


class UnsatisfiableRange(Exception):
    """The range begins behind the end of the file."""


def read_range(header: str | None, num_bytes: int) -> tuple[int, int] | None:
    """Where the asked part begins and ends; None for the whole file. Raises: UnsatisfiableRange.

    Several ranges in one header cost more than they bring: they get the whole file, as RFC 9110 allows.
    """
    match = _RANGE.fullmatch((header or "").strip().replace(" ", ""))
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        start, end = max(0, num_bytes - int(last)), num_bytes
    else:
        start, end = int(first), min(num_bytes, int(last) + 1 if last else num_bytes)
        if last and int(last) < int(first):
            return None
    if start >= end:
        raise UnsatisfiableRange
    return start, end


class FileReply(Response):
    """The open file `descriptor`, which it closes, sent or not; whoever deletes the file takes nothing from it.

    `headers` hold its ETag.
    """

    def __init__(self, descriptor: int, headers: Mapping[str, str]) -> None:
        super().__init__(None, 200, headers)
        del self.headers["content-length"]
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            part = self._begin(scope["method"], Headers(scope=scope))
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if part is None or scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                with suppress(ClientDisconnect):
                    async with while_wanted(receive, _DEADLINE_S):
                        await self._send_part(*part, send)
        finally:
            # NOTE: a read under way in a thread that was not waited for would read another file's bytes.
            self._close()

    def _begin(self, method: str, asked: Headers) -> tuple[int, int] | None:
        """Settles status and headers; the part of the file that follows them."""
        num_bytes = os.fstat(self._descriptor).st_size
        self.headers["accept-ranges"] = "bytes"
        etag = self.headers["etag"]
        if is_known(asked.get("if-none-match"), etag):
            self.status_code = 304
            return None
        part = 0, num_bytes
        if method == "GET" and asked.get("if-range", etag) == etag:
            try:
                wanted = read_range(asked.get("range"), num_bytes)
            except UnsatisfiableRange:
                self.status_code = 416
                self.headers["content-range"] = f"bytes */{num_bytes}"
                self.headers["content-length"] = "0"
                return None
            if wanted is not None:
                part = wanted
                self.status_code = 206
                self.headers["content-range"] = f"bytes {part[0]}-{part[1] - 1}/{num_bytes}"
        self.headers["content-length"] = str(part[1] - part[0])
        return part

    async def _send_part(self, start: int, end: int, send: Send) -> None:
        window = _Window(_MAX_PIECES)
        for offset in range(start, end, _PIECE_BYTES):
            await window.enter()
            content = await self._read(min(_PIECE_BYTES, end - offset), offset)
            message = {"type": "http.response.body", "body": _Piece(content, window.leave), "more_body": True}
            del content
            async with _patience():
                await send(message)
            del message
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _read(self, num_bytes: int, offset: int) -> bytes:
        # Waited for to its end even when the client leaves: the descriptor is closed after it.
        content = await anyio.to_thread.run_sync(os.pread, self._descriptor, num_bytes, offset)
        if len(content) != num_bytes:
            raise OSError("The file has become shorter while it was sent.")
        return content


class _Window:
    """How many pieces may be on their way. One counts until nobody holds it any more.

    A server that takes all it is given into a queue of its own, as Ray Serve's replicas do, would hold the file of
    each slow client in memory.
    """

    def __init__(self, num_pieces: int) -> None:
        self._free = asyncio.Semaphore(num_pieces)
        self._loop = asyncio.get_running_loop()

    async def enter(self) -> None:
        async with _patience():
            await self._free.acquire()

    def leave(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._free.release)


class _Piece(bytes):
    """Bytes that tell when they are let go of."""

    _on_end: Callable[[], None]

    def __new__(cls, content: bytes, on_end: Callable[[], None]) -> _Piece:
        piece = super().__new__(cls, content)
        piece._on_end = on_end
        return piece

    def __del__(self) -> None:
        self._on_end()

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (bytes(self),)  # in another process they are bytes and no more


def _patience() -> asyncio.Timeout:
    return asyncio.timeout(_STALL_S)
