"""The tables of the index: what is known of each model, and how it is written and read."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from serve.store.homes import NO_NAMESPACE
from serve.types import ModelInfo, Visibility

VERSION = 3  # of the tables, and of what is in `info`
UNTRUSTED = 0  # a time that no home has
FOLDERS = "SELECT name, mtime_ns, is_settled FROM folders"
COLUMNS = "m.id, m.mtime_ns, m.info, m.created_at"  # of an entry
_INFO_FIELDS = tuple(field.name for field in fields(ModelInfo))

_SCHEMA = f"""
CREATE TABLE folders(  -- namespaces, and '', in which they are
    name TEXT PRIMARY KEY, lower_name TEXT NOT NULL,
    mtime_ns INTEGER,  -- when its names were compared; NULL: never
    is_settled INTEGER NOT NULL DEFAULT 0  -- a change since would show another time
) WITHOUT ROWID;
CREATE INDEX folders_by_lower_name ON folders(lower_name);
CREATE INDEX folders_uncompared ON folders(lower_name) WHERE mtime_ns IS NULL;
CREATE TABLE models(
    key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, lower_id TEXT NOT NULL, namespace TEXT NOT NULL,
    lower_namespace TEXT NOT NULL, name TEXT NOT NULL,
    mtime_ns INTEGER,  -- of its home when it was described; NULL: never
    is_shown INTEGER NOT NULL DEFAULT 1, is_public INTEGER NOT NULL DEFAULT 1,
    owner TEXT NOT NULL DEFAULT '',  -- the tenant whose it is
    created_at INTEGER, info TEXT
);
CREATE INDEX models_by_lower_id ON models(lower_id);
CREATE INDEX models_by_namespace ON models(namespace, id);
CREATE INDEX models_undescribed ON models(key) WHERE mtime_ns IS NULL;
CREATE INDEX models_by_owner ON models(owner) WHERE owner != '';
CREATE INDEX models_hidden ON models(key) WHERE is_shown = 0;
{{listings}}
CREATE TABLE tags(tag TEXT, model INTEGER, PRIMARY KEY(tag, model)) WITHOUT ROWID;
CREATE INDEX tags_by_model ON tags(model);
CREATE TABLE fetched(id TEXT, revision TEXT, num_bytes INTEGER, PRIMARY KEY(id, revision)) WITHOUT ROWID;
CREATE VIRTUAL TABLE names USING fts5(name, content='models', content_rowid='key', tokenize='trigram');
CREATE TRIGGER model_added AFTER INSERT ON models BEGIN
    INSERT INTO names(rowid, name) VALUES (new.key, new.name);
END;
CREATE TRIGGER model_removed AFTER DELETE ON models BEGIN
    INSERT INTO names(names, rowid, name) VALUES ('delete', old.key, old.name);
    DELETE FROM tags WHERE model = old.key;
    DELETE FROM fetched WHERE id = old.id;
END;
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one home. `info` is None where no model is served: only checkpoints, or none of ours."""

    model_id: str
    mtime_ns: int  # of the home, before the rest was read
    info: ModelInfo | None
    is_by_hand: bool = False  # its files may change without the home
    fetched: tuple[tuple[str, int], ...] = ()  # (revision, bytes) of those from a Hub that may go
    indexed_at: int = 0  # the `created_at` by which the index lists it


def schema() -> str:
    """SQL that makes all tables."""
    return _SCHEMA.format(listings=_listings())


def _listings() -> str:
    """One index for each order in which all, or the public, models of all, or of one owner, are walked."""
    sql = ""
    for by_age in (False, True):
        for by_owner in (False, True):
            for public in (False, True):
                columns = ["lower_namespace"] * by_owner + ["created_at"] * by_age + ["id"]
                name, where = listing_name(by_age, by_owner, public), "is_shown = 1" + " AND is_public = 1" * public
                where += " AND created_at IS NOT NULL" * by_age
                sql += f"CREATE INDEX {name} ON models({', '.join(columns)}) WHERE {where};\n"
        columns, where = ["owner"] + ["created_at"] * by_age + ["id"], "is_shown = 1 AND is_public = 0"
        where += " AND created_at IS NOT NULL" * by_age
        sql += f"CREATE INDEX {own_listing_name(by_age)} ON models({', '.join(columns)}) WHERE {where};\n"
    return sql


def listing_name(by_age: bool, by_owner: bool, public: bool) -> str:
    """Of the index in which to walk."""
    return f"listed_by_{'age' if by_age else 'id'}{'_owner' * by_owner}{'_public' * public}"


def own_listing_name(by_age: bool) -> str:
    """Of the index in which to walk a tenant's own models that are not public."""
    return f"own_by_{'age' if by_age else 'id'}"


def add_names(db: sqlite3.Connection, namespace: str, ids: str, values: Sequence[Any]) -> None:
    """Rows for `ids`, which is SQL, of which no more is known."""
    start = 1 if namespace == NO_NAMESPACE else len(namespace) + 2
    db.execute(
        "INSERT INTO models(id, lower_id, namespace, lower_namespace, name)"
        f" SELECT id, lower(id), ?, lower(?), lower(substr(id, {start})) FROM ({ids}) ORDER BY id",
        (namespace, namespace, *values),
    )


def add_folder(db: sqlite3.Connection, namespace: str) -> None:
    """A search goes by these rows, so there is one even if its names have never been compared."""
    sql = "INSERT OR IGNORE INTO folders(name, lower_name) VALUES (?, ?)"
    db.execute(sql, (namespace, namespace.lower()))


def note_folder(db: sqlite3.Connection, namespace: str, mtime_ns: int, *, is_settled: bool) -> None:
    """When the names of a namespace were compared."""
    sql = "INSERT OR REPLACE INTO folders(name, lower_name, mtime_ns, is_settled) VALUES (?, ?, ?, ?)"
    db.execute(sql, (namespace, namespace.lower(), mtime_ns, is_settled))


def put(db: sqlite3.Connection, model_id: str, entry: Entry | None, *, is_trusted: bool) -> None:
    """Writes what is known of a home now, or that there is none."""
    if entry is None:
        db.execute("DELETE FROM models WHERE id = ?", (model_id,))
        return
    namespace, info = namespace_of(model_id), entry.info
    add_names(db, namespace, "SELECT ? AS id WHERE ? NOT IN (SELECT id FROM models)", (model_id, model_id))
    add_folder(db, namespace)
    [(key,)] = db.execute("SELECT key FROM models WHERE id = ?", (model_id,))
    mtime_ns, created_at = entry.mtime_ns if is_trusted else UNTRUSTED, info.created_at if info else 0
    is_public, owner = (info.visibility is Visibility.PUBLIC, info.owner) if info else (True, "")
    # Three steps, since an index is written whenever a column of its is named, whether or not it changes.
    db.execute("UPDATE models SET mtime_ns = ?, info = ? WHERE key = ?", (mtime_ns, _pack(entry), key))
    db.execute("UPDATE models SET created_at = ?1 WHERE key = ?2 AND created_at IS NOT ?1", (created_at, key))
    db.execute(
        "UPDATE models SET is_shown = ?1, is_public = ?2, owner = ?3"
        " WHERE key = ?4 AND (is_shown, is_public, owner) != (?1, ?2, ?3)",
        (info is not None, is_public, owner, key),
    )
    db.execute("DELETE FROM tags WHERE model = ?", (key,))
    db.executemany("INSERT OR IGNORE INTO tags VALUES (?, ?)", ((tag, key) for tag in (info.tags if info else ())))
    db.execute("DELETE FROM fetched WHERE id = ?", (model_id,))
    db.executemany("INSERT INTO fetched VALUES (?, ?, ?)", ((model_id, *one) for one in entry.fetched))


def _pack(entry: Entry) -> str:
    said = {name: getattr(entry.info, name) for name in _INFO_FIELDS} if entry.info else None
    return json.dumps([entry.is_by_hand, said], separators=(",", ":"))


def entry_of(row: tuple[Any, ...]) -> Entry:
    """Of the `COLUMNS` of a row."""
    model_id, mtime_ns, packed, indexed_at = row
    indexed_at = indexed_at if isinstance(indexed_at, int) else 0
    try:
        is_by_hand, said = json.loads(packed)
        given = {"handles": tuple(said["handles"]), "tags": tuple(said["tags"])}
        info = ModelInfo(**{**said, **given, "visibility": Visibility(said["visibility"])})
        return Entry(model_id, mtime_ns, info, is_by_hand, indexed_at=indexed_at)
    except (TypeError, ValueError, KeyError):  # never described, or damaged
        return Entry(model_id, UNTRUSTED, None, indexed_at=indexed_at)


def namespace_of(model_id: str) -> str:
    """The folder in which the home is."""
    return model_id.partition("/")[0] if "/" in model_id else NO_NAMESPACE
