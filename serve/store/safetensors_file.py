"""Reads and writes the header of a ``.safetensors`` file: a length, a JSON table, then the bytes of the tensors.

Knows the format and its rules (no holes, no overlaps, nothing after the last tensor); does not know torch or GPT-2.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from serve.errors import ModelUnusable

# GPT-2 xl with its 48 masks has about 700 tensors, under 100 bytes each.
MAX_HEADER_BYTES = 1_000_000

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies. `start` and `end` count from the beginning of the file."""

    name: str
    dtype: str  # safetensors' own words: "F32", "BF16", ...
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[TensorEntry, ...]:
    """All tensors of a file, in the order of their bytes. Raises: ModelUnusable when the file breaks a rule."""
    with path.open("rb") as file:
        return parse_header(file)


def parse_header(file: BinaryIO) -> tuple[TensorEntry, ...]:
    """As `read_header`, of a file that is open at its beginning."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise _damaged(f"it ends after {size} bytes")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise _damaged(f"its header claims {length} bytes")
    table = _parse(file.read(length))
    _check_metadata(table.pop("__metadata__", {}))
    entries = [_entry(name, value, 8 + length) for name, value in table.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_layout(entries, 8 + length, size)
    return tuple(entries)


def encode_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The beginning of a file that holds these (name, dtype, shape), their bytes to follow in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + prod(shape) * ITEM_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _parse(header: bytes) -> dict[str, Any]:
    # Not left to `json` alone: it takes UTF-16, a byte order mark, NaN and -0, at which other readers stop.
    if not header.startswith(b"{"):
        raise _damaged("its header is not a table")
    try:
        table: dict[str, Any] = json.loads(
            header.decode(), object_pairs_hook=_unique, parse_int=_count, parse_constant=_count
        )
    except (ValueError, RecursionError) as exc:
        raise _damaged("its header is not JSON") from exc
    return table


def _count(digits: str) -> int:
    if not digits.isdecimal() or len(digits) > 20:
        raise ValueError("not a count of anything in a file")
    return int(digits)


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged("its metadata is not a table of texts")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("duplicate key")
    return table


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if (
            dtype in ITEM_BYTES and all(type(size) is int and size < 2**40 for size in [*shape, start, end])
        ):
            if len(shape) > 8 or end - start != prod(shape) * ITEM_BYTES[dtype]:
                raise _damaged(f"tensor {name[:60]!r} does not have the bytes its shape needs")
            return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + end)
    raise _damaged(f"the entry of tensor {name[:60]!r} is not readable")


def _check_layout(entries: list[TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for entry in entries:
        if entry.start != position:
            raise _damaged(f"there is a hole or an overlap before tensor {entry.name[:60]!r}")
        position = entry.end
    if position != size:
        raise _damaged(f"it has {size} bytes, its header describes {position}")


def _damaged(how: str) -> ModelUnusable:
    return ModelUnusable(f"The weights file is damaged: {how}. Fetch or make the model again.")
