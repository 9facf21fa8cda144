"""How models are found in the index: by a walk in order where many are meant, else by fetching and sorting the few."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.store.homes import NO_NAMESPACE
from serve.store.index_tables import COLUMNS, Entry, entry_of, listing_name, own_listing_name
from serve.types import ALL_SEEING, ModelInfo, Viewer, Visibility

_FEW = 1000  # that are fetched and sorted
_MAX_INT = 2**63 - 1
_PART_OF_ID = re.compile(r"[a-z0-9._/-]{1,500}")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which models to list."""

    query: str = ""
    owner: str | None = None
    tags: tuple[str, ...] = ()
    viewer: Viewer = ALL_SEEING

    def admits(self, info: ModelInfo) -> bool:
        """What the index is asked for, of one model."""
        namespace = info.model_id.partition("/")[0] if "/" in info.model_id else NO_NAMESPACE
        return (
            self.query.lower() in info.model_id.lower()
            and (self.owner is None or self.owner.lower() == namespace.lower())
            and set(self.tags) <= set(info.tags)
            and self.viewer.may_see(info.owner, is_private=info.visibility is not Visibility.PUBLIC)
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model stands in a listing; `created_at` counts in one by age alone."""

    model_id: str
    created_at: int = 0

    @classmethod
    def after(cls, said: tuple[int, str] | None) -> Place | None:
        """As a caller says it: SQLite takes neither every number nor, from JSON or HTTP, halves of characters."""
        if said is None:
            return None
        created_at, model_id = said
        return cls(_utf8(model_id), max(-_MAX_INT, min(created_at, _MAX_INT)))


@dataclass(frozen=True, slots=True)
class Walk:
    """One way through the models in order: an index, and what holds of those in it that are meant."""

    listing: str
    where: tuple[str, ...] = ("m.is_shown = 1",)
    values: tuple[str, ...] = ()


def walks(viewer: Viewer, *, by_age: bool = False, by_owner: bool = False) -> list[Walk]:
    """Which lead past all models that the viewer meets, and past no others: of those there may be many."""
    if viewer.sees_all:
        return [Walk(listing_name(by_age, by_owner, public=False))]
    public = Walk(listing_name(by_age, by_owner, public=True), ("m.is_shown = 1", "m.is_public = 1"))
    if not viewer.tenant:
        return [public]
    own = Walk(own_listing_name(by_age), ("m.is_shown = 1", "m.is_public = 0", "m.owner = ?"), (viewer.tenant,))
    return [public, own]


def select(db: sqlite3.Connection, wanted: Filter, after: Place | None, limit: int, newest_first: bool) -> list[Entry]:
    """The next `limit` models that stand behind `after`."""
    where, values = _conditions(wanted)
    if after is not None:
        where.append("(m.created_at, m.id) < (?, ?)" if newest_first else "m.id > ?")
        values += [after.created_at, after.model_id] if newest_first else [after.model_id]
    if newest_first:
        where.append("m.created_at IS NOT NULL")
    order = "m.created_at DESC, m.id DESC" if newest_first else "m.id"
    few, found = _few(db, wanted), list[Entry]()
    for walk in walks(wanted.viewer, by_age=newest_first, by_owner=wanted.owner is not None):
        source, among = f"models AS m INDEXED BY {walk.listing}", list[Any]()
        if few is not None:
            source, among = "json_each(?) AS one CROSS JOIN models AS m ON m.key = one.value", [json.dumps(few)]
        said = " AND ".join([*walk.where, *where])
        sql = f"SELECT {COLUMNS} FROM {source} WHERE {said} ORDER BY {order} LIMIT ?"
        found += map(entry_of, db.execute(sql, (*_sayable([*among, *walk.values, *values]), limit)).fetchall())
    if newest_first:
        return sorted(found, key=lambda one: (one.indexed_at, one.model_id), reverse=True)[:limit]
    return sorted(found, key=lambda one: one.model_id)[:limit]


def _conditions(wanted: Filter) -> tuple[list[str], list[Any]]:
    where, values = list[str](), list[Any]()
    if wanted.owner is not None:
        where.append("m.lower_namespace = ?")
        values.append(wanted.owner.lower())
    if wanted.query:
        where.append("instr(lower(m.id), ?) > 0")
        values.append(wanted.query.lower())
    if wanted.tags:
        has_tag = "EXISTS (SELECT 1 FROM tags WHERE tags.tag = tag.value AND tags.model = m.key)"
        where.append(f"NOT EXISTS (SELECT 1 FROM json_each(?) AS tag WHERE NOT {has_tag})")
        values.append(json.dumps(_sayable(wanted.tags)))
    return where, values


def _few(db: sqlite3.Connection, wanted: Filter) -> list[int] | None:
    """The keys of all models that may be meant, where one condition leaves few. None: a walk meets them soon."""
    narrowings = [("SELECT model FROM tags WHERE tag = ?", [tag]) for tag in wanted.tags]
    if wanted.query:
        narrowings += _narrowed_by_query(db, wanted.query.lower())
    for sql, values in narrowings:
        found = [key for (key,) in db.execute(f"SELECT * FROM ({sql}) LIMIT {_FEW + 1}", _sayable(values))]
        if len(found) <= _FEW:
            return found
    return None


def _narrowed_by_query(db: sqlite3.Connection, query: str) -> list[tuple[str, list[Any]]]:
    """SQL for the keys of models whose id contains `query`, which is a part of the namespace, of the name, or both."""
    if not _PART_OF_ID.fullmatch(query):
        return [("SELECT key FROM models WHERE FALSE", [])]
    if "/" in query:
        return _narrowed_by_border(db, *query.split("/", 1))
    if len(query) < 3:  # too short for trigrams, and nearly always common
        return []
    in_owner = (
        "SELECT key FROM folders CROSS JOIN models ON namespace = folders.name WHERE instr(folders.lower_name, ?)"
    )
    in_name = "SELECT rowid FROM names WHERE names MATCH ?"
    return [(f"{in_owner} UNION ALL {in_name}", [query, f'"{query}"'])]


def _narrowed_by_border(db: sqlite3.Connection, owner_end: str, name_start: str) -> list[tuple[str, list[Any]]]:
    """Of a query with a "/": namespaces that end so, and in them names that begin so."""
    owners = {name for (name,) in db.execute("SELECT lower_name FROM folders") if name.endswith(owner_end)}
    starts = [f"{owner}/{name_start}" for owner in owners]
    sql = (
        "SELECT models.key FROM json_each(?) AS bounds CROSS JOIN models INDEXED BY models_by_lower_id"
        " ON lower_id >= bounds.value ->> 0 AND lower_id < bounds.value ->> 1"
    )
    return [(sql, [json.dumps([[start, f"{start}\x7f"] for start in starts])])]


def _sayable(values: Sequence[Any]) -> list[Any]:
    """As SQLite takes them: HTTP and JSON can spell halves of characters."""
    return [_utf8(value) if isinstance(value, str) else value for value in values]


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
