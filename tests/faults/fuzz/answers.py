"""Reading answers off a socket byte by byte, as no HTTP client does: several of them, broken ones, none."""

from __future__ import annotations

import re
from dataclasses import dataclass

_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: [^\r\n]*)?")
_BODILESS = (204, 304)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `is_whole` is False while bytes of it are missing. Names of headers are lower-case."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    is_whole: bool

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key == name), b"")


class NoAnswer(Exception):
    """Bytes came that are no answer in HTTP/1."""


def read_answers(raw: bytes, *, is_head: bool, is_closed: bool) -> list[Answer]:
    """The final answers in what has come so far, without 1xx. Raises: NoAnswer."""
    found: list[Answer] = []
    while raw:
        answer, raw = _read_one(raw, is_head=is_head, is_closed=is_closed)
        if answer is None:
            break
        if answer.status >= 200:
            found.append(answer)
    return found


def _read_one(raw: bytes, *, is_head: bool, is_closed: bool) -> tuple[Answer | None, bytes]:
    head, end, rest = raw.partition(b"\r\n\r\n")
    if not end:
        if not b"HTTP/1.".startswith(raw[:7]) or is_closed:
            raise NoAnswer(repr(raw[:80]))
        return None, b""
    first, *lines = head.split(b"\r\n")
    status = _STATUS.fullmatch(first)
    if status is None:
        raise NoAnswer(repr(first[:80]))
    pairs = (line.partition(b":") for line in lines)
    headers = tuple((name.strip().lower(), value.strip()) for name, _, value in pairs)
    answer = Answer(int(status[1]), headers, b"", True)
    # HAProxy answers to a HEAD that it cannot read with a body.
    is_head = is_head and (not rest or rest.startswith(b"HTTP/1."))
    if answer.status < 200 or answer.status in _BODILESS or is_head:
        return answer, rest
    if b"chunked" in answer.header(b"transfer-encoding").lower():
        body, is_whole, rest = _read_chunks(rest)
    elif length := answer.header(b"content-length"):
        body, is_whole, rest = rest[: int(length)], len(rest) >= int(length), rest[int(length) :]
    else:
        body, is_whole, rest = rest, is_closed, b""
    return Answer(answer.status, headers, body, is_whole), rest


def _read_chunks(raw: bytes) -> tuple[bytes, bool, bytes]:
    """The body so far, whether it is whole, and what comes after it."""
    body = b""
    while True:
        size, end, rest = raw.partition(b"\r\n")
        if not end:
            return body, False, b""
        length = int(size.partition(b";")[0], 16)
        if length == 0:
            return (body, True, rest[2:]) if rest.startswith(b"\r\n") else (body, False, b"")
        if len(rest) < length + 2:
            return body + rest[:length], False, b""
        body, raw = body + rest[:length], rest[length + 2 :]
