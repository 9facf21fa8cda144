"""The picture of an archive's owner, as bytes. Looked at no further than its first bytes; never decoded here."""

from __future__ import annotations

import contextlib

from serve.errors import BadUpload
from serve.training.archives.upload import Members

MAX_AVATAR_BYTES = 1_000_000
_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")


def read_picture(members: Members, name: str) -> bytes | None:
    """A PNG, JPEG, GIF or WebP of at most 1 MB, else None: an archive is as good without its ornament."""
    with contextlib.suppress(BadUpload), members.open_bytes(name) as stream:
        data = stream.read(MAX_AVATAR_BYTES + 1)
        return data if len(data) <= MAX_AVATAR_BYTES and _is_picture(data) else None
    return None


def _is_picture(data: bytes) -> bool:
    return data.startswith(_STARTS) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
