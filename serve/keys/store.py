"""Which key a text is, from what was read of the database in the last second."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from hmac import compare_digest

from serve.database.connection import Database
from serve.errors import StoreUnavailable
from serve.keys.secret import hash_of, name_of, take_apart
from serve.keys.table import KeyTable, StoredKey
from serve.logs import get_logger
from serve.types import ApiKey, Scope

log = get_logger()

OPERATOR = "operator"  # the tenant of the keys in ROOKERY_API_KEYS
MAX_CHARS = 4096  # of a key; what is longer is none
_READ_EVERY_S = 0.5
_NOTE_EVERY_S = 60.0
_NOBODY = "0" * 64  # as long as a hash, and none


class KeyStore:
    """The `Keys` of a server: those in its database, and `env_keys`, any texts, each of which may do everything.

    It is read when made and by `refresh`; after `follow` again and again, so that a key that was revoked is known to be
    so within a second. While the database is away, what was read last goes on to hold, however long: serving goes on,
    and nothing can be revoked then either. Any thread. Raises: StoreUnavailable where it cannot be read at first.
    """

    def __init__(self, database: Database, secret: bytes, env_keys: Collection[str] = ()) -> None:
        self._secret = secret
        self._table = KeyTable(database, secret)
        self._env_keys = [(hash_of(text, secret), _env_key(text)) for text in env_keys]
        self._keys: dict[str, StoredKey] = {}
        self._used_at: dict[str, int] = {}  # since they were last noted
        self._noted = time.monotonic()
        self._closed = threading.Event()
        self._follower: threading.Thread | None = None
        self.refresh()

    @property
    def are_needed(self) -> bool:
        return bool(self._env_keys or self._keys)

    def find(self, sent: str) -> ApiKey | None:
        """Takes as long whatever is sent: every text is hashed, and compared as often."""
        sent = sent if len(sent) <= MAX_CHARS else ""
        found = self._find_env_key(sent)
        key_id, secret = take_apart(sent)
        stored, now = self._keys.get(key_id), int(time.time())
        hashed = hash_of(secret, self._secret)
        is_current = compare_digest(hashed, stored.hash if stored else _NOBODY)
        is_previous = compare_digest(hashed, stored and stored.previous_hash or _NOBODY)
        if found or stored is None:
            return found
        key = stored.key
        is_known = is_current or (is_previous and now < stored.previous_until)
        if not is_known or key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now):
            return None
        self._used_at[key.id] = now // 60 * 60
        return key

    def list_keys(self) -> Sequence[ApiKey]:
        """Those in the database."""
        return [stored.key for stored in self._keys.values()]

    def refresh(self) -> None:
        """Raises: StoreUnavailable."""
        self._keys = {stored.key.id: stored for stored in self._table.read()}

    def follow(self) -> KeyStore:
        """From now on it is read every half a second, until `close`; uses are noted once a minute."""
        self._follower = threading.Thread(target=self._follow, name="keys", daemon=True)
        self._follower.start()
        return self

    def close(self) -> None:
        self._closed.set()
        if self._follower is not None:
            self._follower.join()
        self._note_uses()

    def _find_env_key(self, sent: str) -> ApiKey | None:
        hashed, found = hash_of(sent, self._secret), None
        for known, key in self._env_keys:  # each is compared, whichever fits
            found = key if compare_digest(hashed, known) else found
        return found

    def _follow(self) -> None:
        is_away = False
        while not self._closed.wait(_READ_EVERY_S):
            try:
                self.refresh()
                if time.monotonic() - self._noted >= _NOTE_EVERY_S:
                    self._note_uses()
                is_away = False
            except StoreUnavailable as exc:
                if not is_away:
                    log.warning("keys_not_read", error=exc.code)
                is_away = True
            except Exception:  # a thread that ends would let revoked keys live on
                log.exception("keys_not_read")

    def _note_uses(self) -> None:
        self._noted = time.monotonic()
        used_at, self._used_at = self._used_at, {}
        fresh = {
            key_id: at
            for key_id, at in used_at.items()
            if (stored := self._keys.get(key_id)) and at > (stored.key.last_used_at or 0)
        }
        if fresh:
            self._table.note_uses(fresh)


def _env_key(text: str) -> ApiKey:
    name = name_of(text)
    return ApiKey(id=name, name=name, tenant=OPERATOR, scopes=frozenset({Scope.ADMIN}), created_at=0)
