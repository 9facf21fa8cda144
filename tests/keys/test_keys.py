"""Keys in a real database: made, found, given up, and known by nothing that could be used."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from serve.database.connection import Database
from serve.errors import Conflict, InvalidRequest, NotFound
from serve.keys.secret import FILE, as_text, new_id, new_secret, read_server_secret
from serve.keys.store import OPERATOR, KeyStore
from serve.keys.table import KeyTable
from serve.types import KeyLimits, Scope

SECRET = b"the server's own"
READ = frozenset({Scope.READ})


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def table(database: Database) -> KeyTable:
    return KeyTable(database, SECRET)


def wait_until(is_so: Callable[[], bool], at_most_s: float) -> None:
    deadline = time.monotonic() + at_most_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {at_most_s} s"
        time.sleep(0.01)


def test_a_key_is_found_by_its_whole_text_alone(database: Database, table: KeyTable) -> None:
    limits = KeyLimits(requests_per_s=2.5, storage_bytes=10)
    key, sent = table.create("shop", scopes=READ, tenant="ada", limits=limits, expires_in_s=60)
    other, _ = table.create("", scopes={Scope.ADMIN})
    store = KeyStore(database, SECRET)
    assert store.find(sent) == key and (key.tenant, key.scopes, key.limits) == ("ada", READ, limits)
    assert other.tenant == other.id and store.list_keys() == [key, other]
    changed = [sent[:-1] + ("A" if sent[-1] != "A" else "B"), sent[:-1], sent + "A", sent.upper(), "", " " + sent]
    secret_of_another = as_text(other.id, sent.rpartition(f"{key.id.removeprefix('key-')}-")[2])
    for wrong in (*changed, secret_of_another, as_text(new_id(), new_secret()), "k" * (1 << 20), "\ud800", "\x00"):
        assert store.find(wrong) is None


def test_the_database_knows_no_key_and_another_servers_secret_opens_nothing(
    database: Database, table: KeyTable
) -> None:
    key, sent = table.create("shop", scopes=READ)
    with database.read() as session:
        row = str(session.execute(text("SELECT * FROM api_keys")).mappings().one())
    assert key.id in row and sent.rpartition("-")[2] not in row and sent not in row
    assert KeyStore(database, b"another").find(sent) is None


def test_a_revoked_key_is_dead_within_a_second_wherever_it_is_asked_for(database: Database, table: KeyTable) -> None:
    key, sent = table.create("shop", scopes=READ)
    stores = [KeyStore(database, SECRET).follow() for _ in range(2)]
    try:
        assert all(store.find(sent) for store in stores)
        revoked = table.revoke(key.id)
        wait_until(lambda: not any(store.find(sent) for store in stores), at_most_s=1.0)
        assert all(store.are_needed for store in stores)
        assert revoked.revoked_at and table.revoke(key.id) == revoked
    finally:
        for store in stores:
            store.close()


def test_a_rotated_key_has_two_secrets_for_a_time(database: Database, table: KeyTable) -> None:
    key, old = table.create("shop", scopes=READ)
    rotated, new = table.rotate(key.id, grace_s=3600)
    store = KeyStore(database, SECRET)
    assert rotated == key and store.find(old) and store.find(new)
    _, newest = table.rotate(key.id, grace_s=0)
    store.refresh()
    assert store.find(newest) and not store.find(old) and not store.find(new)
    with database.write() as session:
        session.execute(text("UPDATE api_keys SET previous_hash = hash, previous_until = 1000, hash = 'none'"))
    store.refresh()
    assert not store.find(newest)
    table.revoke(key.id)
    with pytest.raises(Conflict):
        table.rotate(key.id, grace_s=0)


def test_a_key_ends_when_it_was_to_end(database: Database, table: KeyTable) -> None:
    _, sent = table.create("shop", scopes=READ, expires_in_s=0)
    assert KeyStore(database, SECRET).find(sent) is None


@pytest.mark.parametrize("wrong", [{"name": "x" * 101}, {"name": "a\nb"}, {"tenant": "\x1b[0m"}, {"scopes": []}])
def test_what_a_key_cannot_be_is_refused(table: KeyTable, wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        table.create(**{"name": "", "scopes": READ, **wrong})  # type: ignore[arg-type]
    assert table.read() == []


def test_a_key_that_never_was_cannot_be_changed(table: KeyTable) -> None:
    with pytest.raises(NotFound):
        table.revoke("key-000000000000")
    with pytest.raises(NotFound):
        table.rotate("key-000000000000", 0)


def test_texts_of_the_environment_are_keys_that_may_do_everything(database: Database) -> None:
    store = KeyStore(database, SECRET, ["sk-old", "with blank"])
    first, second = store.find("sk-old"), store.find("with blank")
    assert first and second and first.id != second.id and "old" not in first.id
    assert first.scopes == {Scope.ADMIN} and first.tenant == second.tenant == OPERATOR
    assert store.are_needed and store.find("sk-ol") is None
    assert KeyStore(database, SECRET, ["with blank", "sk-old"]).find("sk-old") == first


def test_no_key_is_needed_until_there_was_one(database: Database, table: KeyTable) -> None:
    store = KeyStore(database, SECRET)
    assert not store.are_needed
    key, _ = table.create("shop", scopes=READ)
    table.revoke(key.id)
    store.refresh()
    assert store.are_needed


def test_uses_are_noted_to_the_minute_and_not_at_each(database: Database, table: KeyTable) -> None:
    key, sent = table.create("shop", scopes=READ)
    store, other = KeyStore(database, SECRET), KeyStore(database, SECRET)
    before = int(time.time()) // 60 * 60
    store.find(sent)
    assert table.read()[0].key.last_used_at is None
    store.close()
    noted = table.read()[0].key.last_used_at
    assert noted is not None and noted % 60 == 0 and noted >= before
    table.note_uses({key.id: noted - 60})
    assert table.read()[0].key.last_used_at == noted
    other.close()


def test_while_the_database_is_away_keys_go_on_to_hold(database: Database, table: KeyTable) -> None:
    _, sent = table.create("shop", scopes=READ)
    store = KeyStore(database, SECRET).follow()
    with database.write() as session:
        session.execute(text("ALTER TABLE api_keys RENAME TO gone"))
    time.sleep(0.6)  # longer than it waits between two reads
    assert store.find(sent)
    with database.write() as session:
        session.execute(text("UPDATE gone SET revoked_at = 1"))
        session.execute(text("ALTER TABLE gone RENAME TO api_keys"))
    wait_until(lambda: not store.find(sent), at_most_s=1.0)
    store.close()


def test_processes_that_start_at_once_share_one_secret(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: read_server_secret("", folder), range(16)))
    assert len(found) == 1 and len(found.pop()) == 64
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert stat.S_IMODE((folder / FILE).stat().st_mode) == 0o600
    assert read_server_secret("set", folder) == b"set"
