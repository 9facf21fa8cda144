"""Text that was UTF-8 and was read as Latin-1 or Windows-1252: `cafÃ©`, `donâ€™t`. Meta's exports are full of it.

Whether a file is so is for its reader to say; see `Collector`.
"""

from __future__ import annotations

import codecs

# Character -> the byte that it was read from. Windows-1252 leaves five bytes undefined; there Latin-1 counts.
_BYTES = {byte: byte for byte in range(256)} | {
    ord(bytes([byte]).decode("cp1252", "replace")): byte for byte in range(128, 160)
}
_BYTES.pop(0xFFFD, None)


def repair(text: str) -> str:
    """The text as it was before; the same text where it cannot have been so."""
    try:
        return codecs.charmap_encode(text, "strict", _BYTES)[0].decode("utf-8")
    except UnicodeError:
        return text
