"""What can go wrong with an answer, and how an answer goes over a socket with it or without."""

from __future__ import annotations

import gzip
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Literal

from tests.fakes.hub.messages import Answer, Request

Pace = tuple[int, float]  # so many bytes at a time, and so many seconds after each


@dataclass(frozen=True)
class Fault:
    """What the Hub does instead, where the request's path begins and ends so; `path` None: any end.

    Status 200 leaves the answer's own. Faults of the body befall only answers to GET that have one, so that the
    redirect to a large file does not use them up.
    """

    status: int = 200
    path: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)  # in place of the answer's own
    body: bytes | None = None  # sent in place of the file, its other headers unchanged
    truncate: bool = False  # send half of what Content-Length says, and close
    times: int = 10**9
    prefix: str = "/"  # "/storage/": only where the bytes of large files are; "/api/": only what is told of them
    method: str | None = None
    reset: Literal["before", "middle"] | None = None  # RST before the first byte, or after half of the body
    pace: Pace | None = None  # of the body
    head_pace: Pace | None = None  # of status line and headers
    silent_s: float = 0.0  # nothing after the headers for so long, then the end
    extra: bytes = b""  # after the body
    is_unsized: bool = False  # no Content-Length: the end is the connection's
    is_gzipped: bool = False

    @property
    def is_of_body(self) -> bool:
        in_body = (self.body is not None, self.truncate, self.reset == "middle", self.pace, self.silent_s)
        return self.status == 200 and (any(in_body) or bool(self.extra) or self.is_unsized or self.is_gzipped)

    def befalls(self, request: Request, answer: Answer) -> bool:
        fits = request.path.endswith(self.path or "") and request.path.startswith(self.prefix)
        if not fits or self.method not in (None, request.method):
            return False
        return not self.is_of_body or (request.method == "GET" and answer.status < 300 and bool(answer.body))

    def spoil(self, answer: Answer) -> Answer:
        """The answer as it is said; what happens on its way is `send`'s."""
        if self.status != 200:
            return Answer(self.status, self.body if self.body is not None else b"{}", self.headers)
        headers = dict(answer.headers)
        if self.body is not None:
            answer = replace(answer, body=self.body)
            if self.body.startswith(b"<"):
                headers["Content-Type"] = "text/html"
        if self.is_gzipped:
            answer = replace(answer, body=gzip.compress(answer.body))
            headers["Content-Encoding"] = "gzip"
        return Answer(answer.status, answer.body + self.extra, headers | dict(self.headers))


def send(
    connection: socket.socket,
    answer: Answer,
    fault: Fault | None,
    *,
    with_body: bool,
    stopped: threading.Event,
    count: Callable[[int], None],
) -> bool:
    """Whether the connection may be used again. `count` is told of the body's bytes as they go."""
    fault = fault or Fault()
    if fault.reset == "before":
        _reset(connection)
        return False
    if not _write(connection, _head(answer, fault.is_unsized), fault.head_pace, stopped) or not with_body:
        return not fault.head_pace
    if fault.silent_s:
        stopped.wait(fault.silent_s)
        return False
    is_cut = fault.truncate or fault.reset == "middle"
    body = answer.body[: len(answer.body) // 2] if is_cut else answer.body
    _write(connection, body, fault.pace, stopped, count)
    if fault.reset == "middle":
        _reset(connection)
    return not is_cut and not fault.is_unsized


def _head(answer: Answer, is_unsized: bool) -> bytes:
    length = {"Connection": "close"} if is_unsized else {"Content-Length": str(len(answer.body))}
    lines = [f"HTTP/1.1 {answer.status} {_phrase(answer.status)}"]
    lines += [f"{name}: {value}" for name, value in (length | dict(answer.headers)).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Unknown"


def _write(
    connection: socket.socket,
    content: bytes,
    pace: Pace | None,
    stopped: threading.Event,
    count: Callable[[int], None] = lambda _: None,
) -> bool:
    """Whether all of it went out before the Hub was stopped."""
    size, wait_s = pace or (2**20, 0.0)
    for start in range(0, len(content), size):
        if stopped.is_set():
            return False
        chunk = content[start : start + size]
        connection.sendall(chunk)
        count(len(chunk))
        if wait_s and start + size < len(content):
            stopped.wait(wait_s)
    return True


def _reset(connection: socket.socket) -> None:
    """What is unread on either side is dropped, and the other one gets ECONNRESET when the socket is closed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
