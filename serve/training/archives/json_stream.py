"""Reads JSON values one at a time from a text stream: arrays, JSON Lines and X's JavaScript files.

Memory is bounded by one value, not by the file. Knows nothing of tweets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from serve.errors import BadUpload

_CHUNK_CHARS = 2**20
# One value: a tweet has a few KB; a page of the v2 API, or several joined into one object, a few MB.
MAX_VALUE_CHARS = 32 * 2**20
# `window.YTD.tweets.part0 =` and its older forms; the length varies, so we look for the first `=`.
_MAX_ASSIGNMENT_CHARS = 4096

_decoder = json.JSONDecoder()
_BETWEEN = re.compile(r"[\s,]*")


def read_values(stream: TextIO, name: str, *, start: str = "") -> Iterator[Any]:
    """The items of an array, or values one after another, which JSON Lines are. `start`: text already read.

    Raises: BadUpload on anything that is not JSON, is cut off, is too deep or too large.
    """
    buffer, position = start, 0
    num_values, in_array = 0, False
    while True:
        position = _BETWEEN.match(buffer, position).end()  # type: ignore[union-attr]  # it matches the empty string
        if position == len(buffer):
            buffer, position = stream.read(_CHUNK_CHARS), 0
            if buffer:
                continue
            if in_array:
                raise BadUpload(f"{name} ends in the middle, after record {num_values:,}.", param="file")
            return
        if buffer[position] == "[" and num_values == 0 and not in_array:
            in_array, position = True, position + 1
            continue
        if buffer[position] == "]" and in_array:
            return
        value, end = _decode(buffer, position, name)
        if end is None or end == len(buffer):  # it may go on in what is not read yet
            more = stream.read(max(_CHUNK_CHARS, len(buffer) - position))  # doubling: the work stays linear
            if more and len(buffer) - position <= MAX_VALUE_CHARS:
                buffer, position = buffer[position:] + more, 0
                continue
            if end is None:
                raise BadUpload(f"{name}: record {num_values + 1:,} is not JSON, or is cut off.", param="file")
            buffer += more
        yield value
        num_values, position = num_values + 1, end


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
