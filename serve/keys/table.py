"""The keys in the database: made, revoked, given a new secret."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from serve.database.connection import Database, read_clock_ms
from serve.database.tables import ApiKeyRow
from serve.errors import Conflict, InvalidRequest, NotFound
from serve.keys.secret import as_text, hash_of, new_id, new_secret
from serve.types import ApiKey, KeyLimits, Scope

MAX_CHARS = 100  # of a name, of a tenant


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key, and by what its secrets are known."""

    key: ApiKey
    hash: str
    previous_hash: str | None  # good until `previous_until`, in Unix seconds
    previous_until: int


class KeyTable:
    """`secret`: the server's, under which the keys' own are hashed. All of it raises StoreUnavailable."""

    def __init__(self, database: Database, secret: bytes) -> None:
        self._database = database
        self._secret = secret

    def read(self) -> list[StoredKey]:
        """All that were ever made, the oldest first."""
        with self._database.read() as session:
            return [_stored(row) for row in session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.seq))]

    def create(
        self,
        name: str,
        *,
        scopes: Collection[Scope],
        tenant: str = "",
        limits: KeyLimits | None = None,
        expires_in_s: int | None = None,
    ) -> tuple[ApiKey, str]:
        """The key, and the text to be sent, which nobody can tell again. No tenant: one of its own.

        Raises: InvalidRequest.
        """
        key_id, secret = new_id(), new_secret()
        for field, text in (("name", name), ("tenant", tenant)):
            if len(text) > MAX_CHARS or not text.isprintable():
                raise InvalidRequest(f"'{field}' is at most {MAX_CHARS} printable characters.", param=field)
        if not scopes:
            raise InvalidRequest("A key needs at least one scope.", param="scopes")
        with self._database.write() as session:
            now = read_clock_ms(session) // 1000
            row = ApiKeyRow(
                id=key_id,
                name=name,
                tenant=tenant or key_id,
                scopes=sorted(scopes),
                limits={field: value for field, value in asdict(limits or KeyLimits()).items() if value is not None},
                created_at=now,
                expires_at=None if expires_in_s is None else now + expires_in_s,
                hash=hash_of(secret, self._secret),
            )
            session.add(row)
            session.flush()
            return _stored(row).key, as_text(key_id, secret)

    def revoke(self, key_id: str) -> ApiKey:
        """For good; a key that was revoked before stays so. Raises: NotFound."""
        with self._database.write() as session:
            row = _find(session, key_id)
            row.revoked_at = row.revoked_at or read_clock_ms(session) // 1000
            return _stored(row).key

    def rotate(self, key_id: str, grace_s: int) -> tuple[ApiKey, str]:
        """The key with a new secret; the old one is good for `grace_s` more. Raises: NotFound; Conflict if revoked."""
        secret = new_secret()
        with self._database.write() as session:
            row = _find(session, key_id)
            if row.revoked_at is not None:
                raise Conflict(f"Key '{key_id}' is revoked: create another one.")
            row.previous_hash = row.hash if grace_s > 0 else None
            row.previous_until = read_clock_ms(session) // 1000 + grace_s
            row.hash = hash_of(secret, self._secret)
            return _stored(row).key, as_text(key_id, secret)

    def note_uses(self, used_at: Mapping[str, int]) -> None:
        """When keys were last used, by their ids; what is known to be later stays."""
        with self._database.write() as session:
            for key_id, at in used_at.items():
                is_older = (ApiKeyRow.last_used_at.is_(None)) | (ApiKeyRow.last_used_at < at)
                session.execute(
                    update(ApiKeyRow).where(ApiKeyRow.id == key_id, is_older).values(last_used_at=at),
                    execution_options={"synchronize_session": False},
                )


def _find(session: Session, key_id: str) -> ApiKeyRow:
    row = session.scalars(select(ApiKeyRow).where(ApiKeyRow.id == key_id)).one_or_none()
    if row is None:
        raise NotFound(f"There is no key {key_id[:MAX_CHARS]!r}; 'rookery keys ls' lists those that there are.")
    return row


def _stored(row: ApiKeyRow) -> StoredKey:
    key = ApiKey(
        id=row.id,
        name=row.name,
        tenant=row.tenant,
        scopes=frozenset(map(Scope, row.scopes)),
        created_at=row.created_at,
        limits=KeyLimits(**row.limits),
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )
    return StoredKey(key, row.hash, row.previous_hash, row.previous_until or 0)
