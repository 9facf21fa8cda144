"""How models are found in the index: by a walk in order where many are meant, else by fetching and sorting the few."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.store.homes import NO_NAMESPACE
from serve.store.index_tables import COLUMNS, Entry, entry_of, listing_name
from serve.types import ModelInfo

_FEW = 1000  # that are fetched and sorted
_MAX_INT = 2**63 - 1
_PART_OF_ID = re.compile(r"[a-z0-9._/-]{1,500}")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which models to list."""

    query: str = ""
    owner: str | None = None
    tags: tuple[str, ...] = ()
    with_private: bool = True

    def admits(self, info: ModelInfo) -> bool:
        """What the index is asked for, of one model."""
        namespace = info.model_id.partition("/")[0] if "/" in info.model_id else NO_NAMESPACE
        return (
            self.query.lower() in info.model_id.lower()
            and (self.owner is None or self.owner.lower() == namespace.lower())
            and set(self.tags) <= set(info.tags)
            and (self.with_private or not info.is_private)
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


def select(db: sqlite3.Connection, wanted: Filter, after: Place | None, limit: int, newest_first: bool) -> list[Entry]:
    """The next `limit` models that stand behind `after`."""
    where, values = _conditions(wanted)
    if after is not None:
        where.append("(m.created_at, m.id) < (?, ?)" if newest_first else "m.id > ?")
        values += [after.created_at, after.model_id] if newest_first else [after.model_id]
    if newest_first:
        where.append("m.created_at IS NOT NULL")
    order = "m.created_at DESC, m.id DESC" if newest_first else "m.id"
    few = _few(db, wanted)
    if few is None:
        listing = listing_name(newest_first, wanted.owner is not None, not wanted.with_private)
        source = f"models AS m INDEXED BY {listing}"
    else:
        source, values = "json_each(?) AS one CROSS JOIN models AS m ON m.key = one.value", [json.dumps(few), *values]
    sql = f"SELECT {COLUMNS} FROM {source} WHERE {' AND '.join(where)} ORDER BY {order} LIMIT ?"
    return [entry_of(row) for row in db.execute(sql, (*_sayable(values), limit)).fetchall()]


def _conditions(wanted: Filter) -> tuple[list[str], list[Any]]:
    where, values = ["m.is_shown = 1"], list[Any]()
    if not wanted.with_private:
        where.append("m.is_private = 0")
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
