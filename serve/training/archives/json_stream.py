"""Reads JSON values one at a time from a text stream: arrays, JSON Lines and X's JavaScript files.

Memory is bounded by one value, not by the file, nor by one object with all of a file in it. Knows nothing of tweets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TextIO

from serve.errors import BadUpload

_CHUNK_CHARS = 2**18
# One value: a tweet has a few KB, a page of the v2 API some 500. As objects it may take 25 times as many bytes.
MAX_VALUE_CHARS = 2**20
_MAX_DEPTH = 4  # how deep in objects larger than that: `{includes: {users: [...]}}`
# `window.YTD.tweets.part0 =` and its older forms; the length varies, so we look for the first `=`.
_MAX_ASSIGNMENT_CHARS = 4096

_decoder = json.JSONDecoder()
_BETWEEN = re.compile(r"[\s,;]*")  # a script may end in `;`
_TOO_LARGE = object()
_CLOSING = {"[": "]", "{": "}"}


def read_values(stream: TextIO, name: str, *, start: str = "") -> Iterator[Any]:
    """Values one after another, which JSON Lines are; of an array among them its items. `start`: text already read.

    An object too large to hold comes in parts: `{"data": [a, b], "meta": c}` as `{"data": [a]}`, `{"data": [b]}` and
    `{"meta": c}`.
    Raises: BadUpload on anything that is not JSON, is cut off, is too deep or too large.
    """
    reader = _Reader(stream, name, start)
    in_array = False
    while char := reader.peek():
        if char == ("]" if in_array else "["):
            reader.skip()
            in_array = not in_array
            continue
        value = reader.read()
        if value is _TOO_LARGE:
            yield from _parts(reader, _as_it_is, 1)
        else:
            yield value
    if in_array:
        raise BadUpload(f"{name} ends in the middle, after record {reader.num_values:,}.", param="file")


class _Reader:
    """A window on a stream that moves on from value to value."""

    def __init__(self, stream: TextIO, name: str, start: str) -> None:
        self._stream, self._name = stream, name
        self._buffer, self._position = start, 0
        self.num_values = 0

    def peek(self) -> str:
        """The next character that is no blank, comma or semicolon; empty at the end."""
        while True:
            self._position = _BETWEEN.match(self._buffer, self._position).end()  # type: ignore[union-attr]  # may be empty
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            self._buffer, self._position = self._stream.read(_CHUNK_CHARS), 0
            if not self._buffer:
                return ""

    def skip(self) -> None:
        """Goes past the character that `peek` gave."""
        self._position += 1

    def read(self) -> Any:
        """The value that begins here; `_TOO_LARGE`, still before it, where it has no end in sight."""
        while True:
            value, end = _decode(self._buffer, self._position, self._name)
            num_held = len(self._buffer) - self._position
            is_whole = end is not None and end < len(self._buffer)  # else it may go on in what is not read yet
            if is_whole or num_held > MAX_VALUE_CHARS:
                break
            more = self._stream.read(_CHUNK_CHARS)
            if not more:
                break
            self._buffer, self._position = self._buffer[self._position :] + more, 0
        if end is not None:
            self.num_values, self._position = self.num_values + 1, end
            return value
        if num_held > MAX_VALUE_CHARS:
            return _TOO_LARGE
        raise self.refusal()

    def refusal(self) -> BadUpload:
        return BadUpload(f"{self._name}: record {self.num_values + 1:,} is not JSON, or is cut off.", param="file")


def _parts(reader: _Reader, wrap: Callable[[Any], Any], depth: int) -> Iterator[Any]:
    """What is in the array or object that begins here, each part as if it were all that is there."""
    opening = reader.peek()
    if depth > _MAX_DEPTH or opening not in _CLOSING:
        raise reader.refusal()
    reader.skip()
    while (char := reader.peek()) != _CLOSING[opening]:
        if not char:
            raise reader.refusal()
        key = _read_key(reader) if opening == "{" else None
        value = reader.read()
        if value is _TOO_LARGE:
            yield from _parts(reader, partial(_wrap, wrap, key), depth + 1)
        else:
            yield _wrap(wrap, key, value)
    reader.skip()


def _as_it_is(part: Any) -> Any:
    return part


def _read_key(reader: _Reader) -> str:
    key = reader.read()
    if not isinstance(key, str) or reader.peek() != ":":
        raise reader.refusal()
    reader.skip()
    reader.peek()  # to the beginning of the value
    return key


def _wrap(wrap: Callable[[Any], Any], key: str | None, part: Any) -> Any:
    return wrap([part] if key is None else {key: part})


def _decode(buffer: str, position: int, name: str) -> tuple[Any, int | None]:
    try:
        return _decoder.raw_decode(buffer, position)
    except RecursionError as exc:
        raise BadUpload(f"{name} has JSON nested too deep to be a post.", param="file") from exc
    except ValueError:  # includes integers of more than 4,300 digits
        return None, None


def read_assigned_values(stream: TextIO, name: str) -> Iterator[Any]:
    """The items of `window.YTD.tweets.part0 = [ ... ]`, or the object after the `=`. Never evaluated.

    Raises: BadUpload.
    """
    start = stream.read(_MAX_ASSIGNMENT_CHARS)
    _, equals, rest = start.partition("=")
    if not equals:
        raise BadUpload(f"{name} does not begin with an assignment, like 'window.YTD.tweets.part0 = ['.", param="file")
    return read_values(stream, name, start=rest)


def as_mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is an object, else an empty one: records of strangers have any shape."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str | None:
    """The value if it is a string that is not empty; halves of surrogate pairs become U+FFFD."""
    if not isinstance(value, str) or not value:
        return None
    return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
