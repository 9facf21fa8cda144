"""What the folders of models say, kept in an SQLite file so that nobody has to look at all of them.

The folders are the truth; this is derived from them, and is made anew when it is missing, damaged or of another
version. A name comes in when its namespace is looked at, which opens no model; what the model says of itself follows
when somebody asks. An entry holds as long as the model's home has the time of change that it had then.

Readers need no lock of ours. Whoever writes holds the store's, or its own where the file is in another folder. It knows
no file of a model.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from serve.store.disk import locked
from serve.store.homes import NO_NAMESPACE, home_names
from serve.store.index_search import Filter, Place, select, walks
from serve.store.index_tables import (
    COLUMNS,
    FOLDERS,
    VERSION,
    Entry,
    add_folder,
    add_names,
    entry_of,
    namespace_of,
    note_folder,
    put,
    schema,
)
from serve.types import Viewer

T = TypeVar("T")

INDEX = f".index-{VERSION}.db"  # two releases may share a disk

_BUSY_S = 20.0
_MAX_TRIES = 3
_CACHE_KB, _WRITING_CACHE_KB = 1_000, 8_000
_CLOCK_GRAIN_NS = 2_000_000_000  # two changes of a folder within this may show the same time
_NAMES_AT_ONCE = 5000  # written in one transaction: readers wait while it ends
_LOOKS_PER_S = 1000  # how many names are compared where nothing says that they have changed, though they may have


class IndexUnavailable(Exception):
    """It can be neither read nor made: a disk that is read-only or full, or somebody who holds it very long."""


class IndexBusy(IndexUnavailable):
    """Another holds the store's lock, for which no reader waits: what is known already has to do."""


class IndexDamaged(IndexUnavailable):
    """It was damaged and is gone, or a new one that is not complete is there. It can be asked again."""


Describe: TypeAlias = Callable[[Sequence[str]], Iterable[Entry | None]]
"""The homes of these models as they are now; None for one that is not there."""


def despite_damage(look: Callable[[], T]) -> T:
    """What `look` finds in the index, or else in the one that comes after a damaged one."""
    for _ in range(_MAX_TRIES - 1):
        with suppress(IndexDamaged):
            return look()
    return look()


class Index:
    """Of the models under `root`. `lock` is the store's own, held by whoever changes anything.

    With `cache`, a folder of this machine's own, the file is there, and a lock for those who write to it: each machine
    that shares `root` follows the folders by itself.
    """

    def __init__(self, root: Path, lock: Path, cache: Path | None = None) -> None:
        self._root, self._path = root, (cache or root) / INDEX
        self._lock, self._clock = cache / ".lock" if cache else lock, lock
        self._not_before: dict[str, float] = {}  # folder -> when it may be looked at again, if nothing else says so
        self._reader: sqlite3.Connection | None = None
        self._known = 0, 0  # process and inode of which it is
        self._hidden_after = 0
        self._now_ns = 0  # of whoever writes
        self._guard = threading.Lock()

    # --- Reading ---------------------------------------------------------------------------------------------

    def spellings(self, namespace: str | None, lower_id: str) -> list[str]:
        """The ids of homes that are `lower_id`, in this namespace, but for their case: lower case first."""
        with suppress(IndexBusy):
            self.catch_up(namespace or NO_NAMESPACE)
        sql = "SELECT id FROM models WHERE lower_id = ? ORDER BY namespace DESC, id DESC"
        with self._reading() as db:
            self._check_complete(db, (namespace or NO_NAMESPACE).lower())
            return [model_id for (model_id,) in db.execute(sql, (lower_id,))]

    def entries(
        self, wanted: Filter, after: Place | None, limit: int, *, newest_first: bool, is_described: bool
    ) -> list[Entry]:
        """The next `limit` models after `after`; one that has not been described is taken for a public model."""
        with self._reading() as db:
            self._check_complete(db, is_described=is_described)
            return select(db, wanted, after, limit, newest_first)

    def _check_complete(
        self, db: sqlite3.Connection, lower_namespace: str | None = None, *, is_described: bool = False
    ) -> None:
        """The file may be another than the one that has caught up. Raises: IndexDamaged."""
        compared = "SELECT 1 FROM folders WHERE name = '' AND mtime_ns IS NOT NULL"
        missing = "SELECT 1 FROM folders WHERE mtime_ns IS NULL AND (?1 IS NULL OR lower_name = ?1) LIMIT 1"
        undescribed = "SELECT 1 FROM models WHERE mtime_ns IS NULL LIMIT 1"
        is_complete = db.execute(compared).fetchone() and not db.execute(missing, (lower_namespace,)).fetchone()
        if not is_complete or (is_described and db.execute(undescribed).fetchone()):
            self._not_before.pop(_ALL, None)
            raise IndexDamaged("not complete")

    def count(self, hidden_ids: Sequence[str], viewer: Viewer) -> int:
        """How many are listed, but for these ids in lower case; one that has not been described is taken for public."""
        hidden, num_models = json.dumps(hidden_ids), 0
        with self._reading() as db:
            self._check_complete(db)
            for walk in walks(viewer):
                where = " AND ".join(walk.where)
                listed = f"SELECT count(*) FROM models AS m INDEXED BY {walk.listing} WHERE {where}"
                unlisted = f"SELECT count(*) FROM models AS m WHERE {where} AND m.lower_id IN"
                [num_listed] = db.execute(listed, walk.values).fetchone()
                [num_hidden] = db.execute(
                    f"{unlisted} (SELECT value FROM json_each(?))", (*walk.values, hidden)
                ).fetchone()
                num_models += num_listed - num_hidden
        return num_models

    def hidden(self, limit: int) -> list[Entry]:
        """Homes in which no model was served when they were described: each time the next, where there are many."""
        sql = f"SELECT m.key, {COLUMNS} FROM models AS m WHERE m.is_shown = 0 AND m.key > ? ORDER BY m.key LIMIT ?"
        rows = self._query(sql, (self._hidden_after, limit))
        self._hidden_after = rows[-1][0] if len(rows) == limit else 0
        return [entry_of(row[1:]) for row in rows]

    def undescribed(self, limit: int) -> list[str]:
        """Ids of homes of which no more than the name is known."""
        return [one for (one,) in self._query("SELECT id FROM models WHERE mtime_ns IS NULL LIMIT ?", (limit,))]

    def owned(self, owner: str) -> list[Entry]:
        """This tenant's models, as far as they have been described."""
        rows = self._query(f"SELECT {COLUMNS} FROM models AS m WHERE owner = ? AND owner != ''", (owner,))
        return [entry_of(row) for row in rows]

    def fetched_bytes(self) -> int:
        """Of all that `fetched` tells of."""
        return int(self._query("SELECT coalesce(sum(num_bytes), 0) FROM fetched")[0][0])

    def fetched(self, after: tuple[str, str], limit: int) -> list[tuple[str, str, int, int]]:
        """(model id, revision, bytes, its home's time) of revisions from a Hub: the next after an (id, revision)."""
        sql = (
            "SELECT f.id, f.revision, f.num_bytes, m.mtime_ns FROM fetched AS f JOIN models AS m USING (id)"
            " WHERE (f.id, f.revision) > (?, ?) ORDER BY f.id, f.revision LIMIT ?"
        )
        return [(one[0], one[1], one[2], one[3]) for one in self._query(sql, (*after, limit))]

    # --- Following the folders -------------------------------------------------------------------------------

    def catch_up(self, namespace: str | None = None) -> None:
        """Sees which homes others have put there or taken away: in all namespaces, or in one, in any case.

        Raises: IndexBusy. It waits for the lock only where all names are asked for and were never all compared.
        """
        if namespace is None and not self._is_due(_ALL):
            return
        wait = namespace is None and not self._is_complete()
        self._compare_namespaces(wait)
        where, values = ("name != ''", ()) if namespace is None else ("lower_name = ?", (namespace.lower(),))
        found = self._query(f"{FOLDERS} WHERE {where}", values)
        if namespace is None:
            self._spare(_ALL, len(found))
        for row in found:
            if self._has_changed(row):
                self._compare_names(row[0], wait)

    def _is_complete(self) -> bool:
        if not self._path.exists():
            return False
        with suppress(IndexDamaged), self._reading() as db:
            self._check_complete(db)
            return True
        return False

    def _has_changed(self, row: tuple[str, int | None, int]) -> bool:
        name, mtime_ns, is_settled = row
        return _mtime_ns(self._root / name) != mtime_ns or (not is_settled and self._is_due(name))

    def _compare_namespaces(self, wait: bool) -> None:
        known = self._query(f"{FOLDERS} WHERE name = ''") if self._path.exists() else []
        if known and not self._has_changed(known[0]):
            return
        with self.writing(wait=wait) as db:
            mtime_ns = os.stat(self._root).st_mtime_ns
            there = set(home_names(self._root))
            gone = [name for (name,) in db.execute("SELECT name FROM folders WHERE name != ''") if name not in there]
            for name in gone:
                _in_steps(
                    db, "DELETE FROM models WHERE key IN (SELECT key FROM models WHERE namespace = ? LIMIT ?)", name
                )
                db.execute("DELETE FROM folders WHERE name = ?", (name,))
            for name in there:
                add_folder(db, name)
            note_folder(db, "", mtime_ns, is_settled=self._is_old(mtime_ns))
        self._spare("", len(there))

    def _compare_names(self, namespace: str, wait: bool) -> None:
        """The names of one namespace, as they are now."""
        folder, prefix = self._root / namespace, "" if namespace == NO_NAMESPACE else f"{namespace}/"
        with self.writing(wait=wait) as db:
            mtime_ns = _mtime_ns(folder)
            db.execute("CREATE TEMP TABLE seen(id TEXT PRIMARY KEY) WITHOUT ROWID")
            ids = ((prefix + name,) for name in home_names(folder, namespace))
            db.executemany("INSERT OR IGNORE INTO seen VALUES (?)", ids)
            gone = "SELECT key FROM models WHERE namespace = ? AND id NOT IN (SELECT id FROM seen) LIMIT ?"
            _in_steps(db, f"DELETE FROM models WHERE key IN ({gone})", namespace)
            db.execute("DELETE FROM seen WHERE id IN (SELECT id FROM models)")
            while db.execute("SELECT 1 FROM seen LIMIT 1").fetchone():
                add_names(db, namespace, f"SELECT id FROM seen ORDER BY id LIMIT {_NAMES_AT_ONCE}", ())
                db.execute(f"DELETE FROM seen WHERE id IN (SELECT id FROM seen ORDER BY id LIMIT {_NAMES_AT_ONCE})")
                _begin_again(db)
            if mtime_ns is None:
                db.execute("DELETE FROM folders WHERE name = ?", (namespace,))
            else:
                note_folder(db, namespace, mtime_ns, is_settled=self._is_old(mtime_ns))
            [(num_names,)] = db.execute("SELECT count(*) FROM models WHERE namespace = ?", (namespace,))
        self._spare(namespace, num_names)

    def refresh(self, model_ids: Sequence[str], describe: Describe, *, wait: bool = False) -> None:
        """Describes models that others may have changed; one without a home is removed. Raises: IndexBusy."""
        with self.writing(wait=wait) as db:
            self._put_seen(db, model_ids, describe)

    def describe_some(self, limit: int, describe: Describe) -> bool:
        """Describes models of which no more than the name is known; False when there are none.

        Raises: IndexBusy, where fewer than `limit` are left; for many it waits.
        """
        num_left = len(self.undescribed(limit))
        if num_left == 0:
            return False
        with self.writing(wait=num_left == limit) as db:
            self._put_seen(db, self.undescribed(limit), describe)
        return True

    def _put_seen(self, db: sqlite3.Connection, model_ids: Sequence[str], describe: Describe) -> None:
        """What is there now. It is not believed the next time if it may change without showing another time."""
        for model_id, entry in zip(model_ids, describe(model_ids), strict=True):
            put(db, model_id, entry, is_trusted=entry is not None and self._is_old(entry.mtime_ns))

    @contextmanager
    def following(self, model_id: str, describe: Describe) -> Iterator[None]:
        """Around a change of one home by who holds the lock. Where the index cannot follow, it will be seen later."""
        folder = self._root / namespace_of(model_id)
        before = _mtime_ns(folder)
        try:
            yield
        finally:
            with suppress(IndexUnavailable, OSError), self.writing() as db:
                for entry in describe([model_id]):
                    put(db, model_id, entry, is_trusted=True)
                known = db.execute("SELECT mtime_ns FROM folders WHERE name = ?", (folder.name,)).fetchone()
                after = _mtime_ns(folder)
                if after is not None and after != before and (known[0] if known else None) == before:
                    note_folder(db, folder.name, after, is_settled=False)

    # --- The file --------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, *, wait: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, under the lock of those who write to this file. Raises: IndexUnavailable, IndexBusy."""
        with self._translated(), locked(self._lock, wait=wait):
            self._make_if_missing()
            self._clock.touch()
            self._now_ns = os.stat(self._clock).st_mtime_ns  # as the disk has it, which another machine may keep
            with closing(self._connect()) as db, db:
                db.execute(f"PRAGMA cache_size = -{_WRITING_CACHE_KB}")
                db.execute("PRAGMA cache_spill = OFF")  # it would lock readers out before the transaction ends
                db.execute("BEGIN IMMEDIATE")
                yield db

    def _query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._reading() as db:
            return db.execute(sql, values).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to the file that is there now. All threads share it: to open one costs more than a query."""
        with self._translated():
            if not self._path.exists():
                # NOTE: never while holding `_guard`, which those who hold the lock may want.
                with locked(self._lock, wait=False):
                    self._make_if_missing()
            with self._guard:
                known = os.getpid(), os.stat(self._path).st_ino
                if self._reader is None or known != self._known:
                    self._reader, self._known = self._connect(), known
                yield self._reader

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as exc:  # the latter: what an error says of damaged tables
            if not _is_damage(exc):
                raise IndexUnavailable(str(exc)) from exc
            with suppress(OSError), locked(self._lock, wait=False):
                self._remove()
            raise IndexDamaged(str(exc)) from exc
        except BlockingIOError as exc:
            raise IndexBusy(str(exc)) from exc
        except OSError as exc:
            raise IndexUnavailable(str(exc)) from exc

    def _connect(self) -> sqlite3.Connection:
        uri = f"{self._path.as_uri()}?mode=rw"
        db = sqlite3.connect(uri, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            db.text_factory = _text  # damaged bytes must not be an error
            db.execute(f"PRAGMA cache_size = -{_CACHE_KB}")
            # The journal stays, empty: its coming and going would change the time of the folder they are in.
            db.execute("PRAGMA journal_mode = TRUNCATE")
            db.execute("PRAGMA secure_delete = ON")  # it holds a text of each model: with the model it goes
            if db.execute("PRAGMA user_version").fetchone() != (VERSION,):
                raise _NotOurs("another version")
            return db
        except BaseException:
            db.close()
            raise

    def _make_if_missing(self) -> None:
        """Holding the lock."""
        try:
            self._connect().close()
        except sqlite3.Error as exc:
            if not self._path.exists() or _is_damage(exc):
                self._remove()
                self._make()

    def _make(self) -> None:
        with closing(sqlite3.connect(self._path, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = TRUNCATE")
            db.executescript("BEGIN;" + schema() + "COMMIT;")

    def _remove(self) -> None:
        for path in (self._path, self._path.with_name(f"{self._path.name}-journal")):
            path.unlink(missing_ok=True)

    def _is_old(self, mtime_ns: int) -> bool:
        return abs(self._now_ns - mtime_ns) > _CLOCK_GRAIN_NS  # in the future: the clock has been set back

    # --- What a look costs -----------------------------------------------------------------------------------

    def _is_due(self, what: str) -> bool:
        return time.monotonic() >= self._not_before.get(what, 0.0)

    def _spare(self, what: str, num_names: int) -> None:
        if num_names > _LOOKS_PER_S:
            self._not_before[what] = time.monotonic() + num_names / _LOOKS_PER_S


_ALL = "*"  # no folder's name that is of interest


def _in_steps(db: sqlite3.Connection, sql: str, value: str) -> None:
    """Until it changes nothing more; `sql` takes `value` and how many rows at most."""
    while db.execute(sql, (value, _NAMES_AT_ONCE)).rowcount:
        _begin_again(db)


def _begin_again(db: sqlite3.Connection) -> None:
    db.execute("COMMIT")
    db.execute("BEGIN IMMEDIATE")


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _mtime_ns(folder: Path) -> int | None:
    try:
        return os.stat(folder).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None


class _NotOurs(sqlite3.DatabaseError):
    """Not the file that we made under this name."""


def _is_damage(exc: Exception) -> bool:
    """Whether another file would be better. All else is the disk's, another process's, or the question's."""
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    lacks_tables = code == sqlite3.SQLITE_ERROR and str(exc).startswith("no such ")
    return (
        isinstance(exc, _NotOurs | UnicodeDecodeError)
        or lacks_tables
        or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    )
