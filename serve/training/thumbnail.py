"""A picture for a bot whose owner's is not known: a pattern and a colour that its name decides, as a PNG.

Knows no fonts, no network and no model.
"""

from __future__ import annotations

import colorsys
import hashlib
import struct
import zlib

SIZE = 64  # pixels, both ways
_CELLS = 8  # a margin of one cell all around; the right half mirrors the left


def draw_thumbnail(name: str) -> bytes:
    """The same for the same name, in any case."""
    digest = hashlib.sha256(name.lower().encode()).digest()
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(digest[0] / 256, 0.45, 0.6))
    rows = b"".join(_row(digest, y * _CELLS // SIZE) for y in range(SIZE))
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 8, 3, 0, 0, 0)  # 8 bits a pixel, which number a palette's colours
    chunks = {b"IHDR": header, b"PLTE": bytes((240, 240, 240, red, green, blue)), b"IDAT": zlib.compress(rows, 9)}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in {**chunks, b"IEND": b""}.items())


def _row(digest: bytes, y: int) -> bytes:
    """One line of pixels behind its filter number (0: none)."""
    inside = 0 < y < _CELLS - 1
    cells = [inside and 0 < x < _CELLS - 1 and digest[y * 3 + min(x, _CELLS - 1 - x)] % 2 for x in range(_CELLS)]
    return b"\0" + b"".join(bytes([int(cell)]) * (SIZE // _CELLS) for cell in cells)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
