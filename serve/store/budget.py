"""Room on the disk for what is fetched from a Hub: the least recently used of it goes first.

When a revision was last used is the access time of its weights, set here by those who use it: no reader's own access
changes it where disks are mounted so. Only what can be fetched again is ever removed, and never in vain.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from serve.errors import DiskFull
from serve.logs import get_logger
from serve.store.revisions import Fetched, Revision, Store, last_use
from serve.store.validate import WEIGHTS

log = get_logger()

RESERVE_BYTES = 2**28  # left to others on the disk, whatever is fetched
IN_USE_S = 180.0  # what was used within this may be about to be loaded: longer than anybody waits for that
TOUCH_EVERY_S = 60.0  # at most half of IN_USE_S: what is in use always looks so
_MAX_TOUCHED = 10_000

Reason = Literal["budget", "space"]
"""Why a revision had to go: more bytes from Hubs than allowed, or too little room on the disk."""


class DiskBudget:
    """At most `limit_bytes` of `store`'s models are from a Hub (0: any), and the disk keeps a reserve.

    `other_bytes` count as well: what fetches have left. `free_more` removes what can be missed of that before any model
    goes. Methods block on disk; safe to use from many threads and processes. Fetches under way at the same time do not
    know of each other's bytes: the next sets right what they overshoot.
    """

    def __init__(
        self,
        store: Store,
        limit_bytes: int = 0,
        *,
        in_use_s: float = IN_USE_S,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
        free_more: Callable[[], None] = lambda: None,
        other_bytes: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.time,
        on_evict: Callable[[Reason], None] = lambda reason: None,
    ) -> None:
        self._store, self._limit_bytes, self._in_use_s = store, limit_bytes, in_use_s
        self._free_bytes, self._free_more, self._other_bytes = free_bytes, free_more, other_bytes
        self._clock, self._on_evict = clock, on_evict
        self._touched: dict[Path, float] = {}

    def touch(self, revision: Revision) -> None:
        """Remembers that the revision is used now; asks the disk once a minute.

        Not of a folder that was put there by hand: it never goes, and whether its files change must not be hidden.
        """
        if revision.path.name != revision.revision:
            return
        now = self._clock()
        if now - self._touched.get(revision.path, 0.0) < TOUCH_EVERY_S:
            return
        if len(self._touched) >= _MAX_TOUCHED:
            self._touched = {}
        self._touched[revision.path] = now
        weights = revision.path / WEIGHTS
        with suppress(OSError):  # just removed, or a disk that is not ours to write on
            os.utime(weights, ns=(int(now * 1e9), weights.stat().st_mtime_ns))

    def make_room(self, name: str, num_bytes: int, *, working_bytes: int, folder: Path) -> None:
        """For a model of `num_bytes` that takes `working_bytes` while it is made, on the disk of `folder`.

        Raises: DiskFull, before anything is removed, when removing all that may be would not do.
        """
        over = self._over(num_bytes, working_bytes, folder)
        if max(over) > 0:
            self._free_more()
            over = self._over(num_bytes, working_bytes, folder)
        if max(over) <= 0:
            return
        kept = list(self._store.fetched())  # as it is now, which may be less than was counted
        over = self._over(num_bytes, working_bytes, folder, sum(one.num_bytes for one in kept))
        candidates = self._least_recently_used(kept)
        if sum(one.fetched.num_bytes for one in candidates) >= max(over):
            over = self._evict(candidates, over)
        if max(over) > 0:
            by_limit = over.limit > over.space
            raise self._refusal(name, num_bytes if by_limit else working_bytes, by_limit)

    def _over(self, num_bytes: int, working_bytes: int, folder: Path, kept_bytes: int | None = None) -> _Over:
        over_limit = 0
        if self._limit_bytes:
            kept_bytes = self._store.fetched_bytes() if kept_bytes is None else kept_bytes
            over_limit = kept_bytes + self._other_bytes() + num_bytes - self._limit_bytes
        return _Over(over_limit, working_bytes + RESERVE_BYTES - self._free_bytes(folder))

    def _least_recently_used(self, kept: Sequence[Fetched]) -> list[_Candidate]:
        candidates = []
        for one in kept:
            with suppress(FileNotFoundError):  # removed since
                used_at = last_use(one.path)
                if used_at < self._clock() - self._in_use_s:
                    candidates.append(_Candidate(used_at, one))
        return sorted(candidates, key=lambda candidate: candidate.used_at)

    def _evict(self, candidates: Sequence[_Candidate], over: _Over) -> _Over:
        """What is still too much: some candidates may have been used, or kept, meanwhile."""
        for used_at, one in candidates:
            if max(over) <= 0:
                break
            reason: Reason = "space" if over.space > 0 else "budget"
            is_ours = self._store.drop_revision(one.model_id, one.revision, unused_since=used_at)
            if is_ours or not one.path.exists():  # another process was quicker
                over = _Over(over.limit - one.num_bytes, over.space - one.num_bytes)
            if is_ours:
                self._on_evict(reason)
                log.info(
                    "model_evicted_from_disk",
                    model=one.model_id,
                    revision=one.revision,
                    bytes=one.num_bytes,
                    idle_s=round(self._clock() - used_at),
                    reason=reason,
                )
        return over

    def _refusal(self, name: str, num_bytes: int, by_limit: bool) -> DiskFull:
        needs = f"'{name}' needs {num_bytes / 2**20:.0f} MiB"
        if by_limit:
            limit = f"ROOKERY_HUB_BYTES allows models from the Hub {self._limit_bytes / 2**20:.0f} MiB"
            return DiskFull(f"{needs}, {limit}, and the others are kept or in use; raise it.", retry_after_s=60)
        return DiskFull(f"{needs} of disk, more than can be freed; delete a model first.", retry_after_s=60)


class _Candidate(NamedTuple):
    used_at: float
    fetched: Fetched


class _Over(NamedTuple):
    """By how many bytes too much it would be."""

    limit: int
    space: int
