"""The picture is a PNG that others can open, and each name has its own."""

from __future__ import annotations

import struct
import zlib

from serve.training.thumbnail import SIZE, draw_thumbnail


def test_picture_is_a_png_of_its_size_with_true_checksums() -> None:
    data = draw_thumbnail("huggingtweets/ada")
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + content),)
        chunks[kind], at = content, at + 12 + length
    assert list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    assert struct.unpack_from(">II", chunks[b"IHDR"]) == (SIZE, SIZE)
    rows = zlib.decompress(chunks[b"IDAT"])
    assert len(rows) == SIZE * (SIZE + 1) and set(rows) == {0, 1}


def test_each_name_has_its_own_picture_in_any_case() -> None:
    assert draw_thumbnail("ada") == draw_thumbnail("Ada")
    assert len({draw_thumbnail(f"bot{i}") for i in range(100)}) == 100
