"""What a key is made of, and what is kept of it: never the key, but its hash under a secret of the server's own.

Whoever reads the database finds nothing there that a server would take, nor anything that guesses could be tried on.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from hashlib import scrypt
from pathlib import Path

from serve.errors import disk_error
from serve.store.disk import make_folder, sync

FILE = ".key-secret"  # in the data folder; without it none of the keys in the database is known any more
_PREFIX = "rk"  # by which a key in the wrong place is known for what it is
_ID_BYTES = 6
_SECRET_BYTES = 32
_WRITTEN = re.compile(rf"{_PREFIX}-([0-9a-f]{{{2 * _ID_BYTES}}})-([A-Za-z0-9_-]{{43}})", re.ASCII)
_NAME_BYTES = 8


def new_id() -> str:
    """A name for a key, which may be shown and logged."""
    return f"key-{secrets.token_hex(_ID_BYTES)}"


def new_secret() -> str:
    """256 random bits."""
    return secrets.token_urlsafe(_SECRET_BYTES)


def as_text(key_id: str, secret: str) -> str:
    """The key as it is sent: ``rk-<id>-<secret>``."""
    return f"{_PREFIX}-{key_id.removeprefix('key-')}-{secret}"


def take_apart(sent: str) -> tuple[str, str]:
    """The id and the secret of a key; ("", "") where the text is none."""
    found = _WRITTEN.fullmatch(sent)
    return (f"key-{found[1]}", found[2]) if found else ("", "")


def name_of(key: str) -> str:
    """An id for a key that came with none. Slow on purpose (some 30 ms): nobody shall try guesses on it."""
    return f"key-{scrypt(key.encode(), salt=b'rookery', n=1 << 13, r=8, p=1, dklen=_NAME_BYTES).hex()}"


def hash_of(text: str, secret: bytes) -> str:
    """HMAC-SHA256, in hex. A text of 256 random bits needs no slow hash."""
    return hmac.digest(secret, text.encode(errors="surrogatepass"), "sha256").hex()


def read_server_secret(setting: str, folder: Path) -> bytes:
    """The setting, or what is in the folder's file, which is made where there is none. Raises: StoreUnavailable.

    Several processes may be first at the same time: one's file is linked into place, and all read that.
    """
    if setting:
        return setting.encode()
    path, fresh = folder / FILE, folder / f"{FILE}.{secrets.token_hex(4)}"
    try:
        if not path.exists():
            make_folder(folder)
            _write_durably(fresh, secrets.token_hex(_SECRET_BYTES))
            try:
                os.link(fresh, path)
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
            sync(folder)
        return path.read_bytes()
    except OSError as exc:
        raise disk_error(f"read the secret of the keys, {FILE}", exc) from exc


def _write_durably(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
