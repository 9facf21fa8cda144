"""The models as the catalogue lists them, in pages whose cost does not depend on how many there are.

The index says which models come next; each is then compared with its home, so that what is listed is what is there.
Where there can be no index, as on a read-only disk, all homes are looked at.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from itertools import chain
from pathlib import Path

from serve.store.describe import describe, is_from_hub, size_of
from serve.store.homes import Homes
from serve.store.index import Index, IndexBusy, IndexUnavailable, despite_damage
from serve.store.index_search import Filter, Place
from serve.store.index_tables import Entry
from serve.store.lookup import Lookup, Revision
from serve.store.marks import KEPT, is_marked
from serve.types import ModelId, ModelInfo, Page, Viewer

_BATCH = 2000
_SMALL_BATCH, _PAUSE_S = 100, 0.05  # so that others need not wait for the lock, nor for a core
_MANY, _NUM_READERS = 200, 4  # the first look at a folder waits for the disk, many times


class Listing:
    """Of the models that `lookup` finds."""

    def __init__(self, homes: Homes, lookup: Lookup, index: Index) -> None:
        self._homes, self._lookup, self._index = homes, lookup, index

    def page(self, wanted: Filter, *, limit: int, after: Place | None, newest_first: bool) -> Page[ModelInfo]:
        """Those behind `after`, by id or by age."""
        try:
            infos = despite_damage(lambda: self._from_index(wanted, after, limit + 1, newest_first))
        except IndexUnavailable:
            infos = list(self._from_disk(wanted))
        infos += [info for info in self._embedded if wanted.admits(info)]
        infos = [info for info in infos if after is None or _is_after(info, after, newest_first)]
        infos.sort(key=_by_age if newest_first else _by_id, reverse=newest_first)
        return Page(tuple(infos[:limit]), has_more=len(infos) > limit)

    def count(self, viewer: Viewer) -> int | None:
        """Of those in all pages, by the index; None where there can be none."""
        with suppress(IndexUnavailable):
            return despite_damage(lambda: self._count(viewer)) + len(self._embedded)
        return None

    def _count(self, viewer: Viewer) -> int:
        self._catch_up(describe_all=False)
        return self._index.count([info.model_id.lower() for info in self._embedded], viewer)

    def bytes_of(self, owner: str) -> int:
        """Of a tenant's models, as they are now; 0 where there can be no index."""
        with suppress(IndexUnavailable):
            return despite_damage(lambda: self._bytes_of(owner))
        return 0

    def _bytes_of(self, owner: str) -> int:
        undescribed = self._as_they_are(self._catch_up(describe_all=True), Filter())
        infos = chain(undescribed, self._up_to_date(self._index.owned(owner), Filter()))
        return sum(info.num_bytes for info in infos if info.owner == owner)

    def describe_slowly(self) -> None:
        """What every model says, bit by bit: the first who asks for an order that needs it should not have to wait."""
        with suppress(IndexUnavailable):
            self._index.catch_up()
            while self._index.describe_some(_SMALL_BATCH, self._describe_all):
                time.sleep(_PAUSE_S)

    def is_any_fetched(self) -> bool:
        """Of the models that have been described."""
        try:
            return bool(despite_damage(lambda: self._index.fetched(("", ""), 1)))
        except IndexUnavailable:
            return False

    def fetched_bytes(self) -> int:
        """Of all that came from a Hub and may go; what others have just removed is still counted."""
        try:
            despite_damage(lambda: self._catch_up(describe_all=True))
            return self._index.fetched_bytes()
        except IndexUnavailable:
            return sum(num_bytes for _, _, num_bytes in self.fetched())

    def fetched(self) -> Iterator[tuple[str, str, int]]:
        """(model id, revision, bytes) of what came from a Hub and may be removed to make room, as it is now."""
        last = ("", "")
        try:
            despite_damage(lambda: self._catch_up(describe_all=True))
            while found := self._fetched_after(last):
                yield from found
                last = found[-1][:2]
        except IndexUnavailable:
            for model_id in self._homes.ids():
                entry = self.describe(model_id)
                yield from ((model_id, *one) for one in (entry.fetched if entry else ()) if (model_id, one[0]) > last)

    def _fetched_after(self, last: tuple[str, str]) -> list[tuple[str, str, int]]:
        checked = set[str]()
        while True:
            found = self._index.fetched(last, _BATCH)
            changed = {one[0] for one in found if not self._has_time(one[0], one[3])} - checked
            if not changed:
                return [one[:3] for one in found]
            self._index.refresh(sorted(changed), self._describe_all, wait=True)
            checked |= changed

    def forget(self, wanted: ModelId) -> None:
        """Looks again at a model that another machine has changed, in whatever case it is spelled."""
        with suppress(IndexUnavailable):
            spelled = self._index.spellings(wanted.namespace, str(wanted).lower())
            self._index.refresh(spelled, self._describe_all, wait=True)

    def following(self, home: Path) -> AbstractContextManager[None]:
        """Around each change of a home, under the lock."""
        return self._index.following(self._homes.id_of(home), self._describe_all)

    def describe(self, model_id: str) -> Entry | None:
        """A home as it is now; None where there is none."""
        home = self._homes.of(ModelId.parse(model_id))
        try:
            mtime_ns = os.stat(home).st_mtime_ns
            main = self._lookup.main_in(home)
            info = describe_found(main) if main else None
            revisions = () if is_marked(home, KEPT) else self._lookup.revisions_in(home)
            fetched = tuple(_fetched(info, revisions))
            return Entry(model_id, mtime_ns, info, main is not None and main.path == home, fetched)
        except FileNotFoundError:  # removed, or changed at this moment
            return Entry(model_id, 0, None) if home.is_dir() else None
        except OSError:  # not readable; perhaps it is the next time
            return Entry(model_id, 0, None)

    # --- By the index ----------------------------------------------------------------------------------------

    def _from_index(self, wanted: Filter, after: Place | None, limit: int, newest_first: bool) -> list[ModelInfo]:
        """`limit` models or more that stand behind `after`, or all that do."""
        left = self._catch_up(describe_all=newest_first or bool(wanted.tags))
        is_described = (newest_first or bool(wanted.tags)) and not left
        found = {one.model_id: one for one in self._as_they_are(left, wanted)}
        end, batch, num_known = after, limit, 0
        while num_known < limit:
            entries = self._index.entries(wanted, end, batch, newest_first=newest_first, is_described=is_described)
            for info in self._up_to_date(entries, wanted):
                found[info.model_id] = info
                num_known += 1
            if len(entries) < batch:
                return list(found.values())
            end = Place(entries[-1].model_id, entries[-1].indexed_at)
            batch = min(2 * batch, max(batch, _BATCH))
        # One that has just got another age may stand behind some that have not been met yet.
        return [info for info in found.values() if end is None or not _is_after(info, end, newest_first)]

    def _up_to_date(self, entries: Sequence[Entry], wanted: Filter) -> Iterator[ModelInfo]:
        """The models of entries as their homes are now, of which the index is told if nobody is writing."""
        changed = {entry.model_id for entry in entries if not self._holds(entry)}
        yield from self._as_they_are(sorted(changed), wanted)
        for entry in entries:
            if entry.info and entry.model_id not in changed and not self._is_hidden(entry.model_id):
                yield entry.info

    def _as_they_are(self, model_ids: Sequence[str], wanted: Filter) -> list[ModelInfo]:
        """The wanted ones of these models, as they are now."""
        entries = list[Entry | None]()

        def look(model_ids: Sequence[str]) -> list[Entry | None]:
            entries.extend(self._describe_all(model_ids))
            return entries

        if model_ids:
            try:
                self._index.refresh(model_ids, look)
            except IndexBusy:
                look(model_ids)
        infos = [entry.info for entry in entries if entry and entry.info and not self._is_hidden(entry.model_id)]
        return [info for info in infos if wanted.admits(info)]

    def _catch_up(self, *, describe_all: bool) -> list[str]:
        """With what others have done to the folders. What every model says is needed only by some orders.

        Models that nobody could describe because another is writing.
        """
        with suppress(IndexBusy):
            self._index.catch_up()
        with suppress(IndexBusy):
            if changed := [entry.model_id for entry in self._index.hidden(_SMALL_BATCH) if not self._holds(entry)]:
                self._index.refresh(changed, self._describe_all)
        try:
            while describe_all and self._index.describe_some(_BATCH, self._describe_all):
                pass
        except IndexBusy:
            return self._index.undescribed(_BATCH)
        return []

    def _holds(self, entry: Entry) -> bool:
        """Whether the home is as it was when it was described."""
        if entry.is_by_hand:
            now = self.describe(entry.model_id)
            return now is not None and now.info == entry.info
        return self._has_time(entry.model_id, entry.mtime_ns)

    def _has_time(self, model_id: str, mtime_ns: int | None) -> bool:
        try:
            return os.stat(self._homes.of(ModelId.parse(model_id))).st_mtime_ns == mtime_ns
        except OSError:
            return False

    def _describe_all(self, model_ids: Sequence[str]) -> list[Entry | None]:
        if len(model_ids) < _MANY:
            return [self.describe(model_id) for model_id in model_ids]
        with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="describe") as threads:
            return list(threads.map(self.describe, model_ids))

    # --- By the disk -----------------------------------------------------------------------------------------

    def _from_disk(self, wanted: Filter) -> Iterator[ModelInfo]:
        for model_id in self._homes.ids():
            entry = None if self._is_hidden(model_id) else self.describe(model_id)
            if entry is not None and entry.info is not None and wanted.admits(entry.info):
                yield entry.info

    # --- What both need --------------------------------------------------------------------------------------

    @cached_property
    def _embedded(self) -> list[ModelInfo]:
        return [describe_found(found) for found in self._lookup.embedded()]

    def _is_hidden(self, model_id: str) -> bool:
        return self._lookup.is_embedded(ModelId.parse(model_id))


def describe_found(found: Revision) -> ModelInfo:
    """The catalogue's entry for it. Raises: OSError."""
    return describe(
        *(found.model_id, found.revision, found.path),
        visibility=found.visibility,
        owner=found.owner,
        is_embedded=found.is_embedded,
    )


def _fetched(main: ModelInfo | None, revisions: Iterable[Revision]) -> Iterator[tuple[str, int]]:
    for found in revisions:
        if main is not None and main.revision == found.revision:
            is_fetched, num_bytes = main.from_hub, main.num_bytes
        else:
            is_fetched, num_bytes = is_from_hub(found.path), size_of(found.path)
        if is_fetched and found.path.name == found.revision:  # what was put there by hand stays
            yield found.revision, num_bytes


def _by_id(info: ModelInfo) -> tuple[int, str]:
    return 0, info.model_id


def _by_age(info: ModelInfo) -> tuple[int, str]:
    return info.created_at, info.model_id


def _is_after(info: ModelInfo, place: Place, newest_first: bool) -> bool:
    if newest_first:
        return _by_age(info) < (place.created_at, place.model_id)
    return info.model_id > place.model_id
