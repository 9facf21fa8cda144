"""Reads every published revision again and again, and compares it with its hash: a disk's errors are found.

    <models>/.scrub.json     when this round began, and the model that was looked at last
    <models>/.scrub.lock     held by who looks, of all processes and machines

A round is spread evenly over its hours. A revision whose bytes are others than were published is marked, and from then
on not served. It does not know the Hub, or who has the model in memory: `on_damaged` does.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress

from serve.errors import StoreUnavailable
from serve.logs import get_logger
from serve.store.disk import forget_cached, is_shared, locked, replace_file, translated
from serve.store.integrity import is_intact
from serve.store.lookup import Revision
from serve.store.marks import DAMAGED, is_marked
from serve.store.model_files import model_files
from serve.store.revisions import Store

log = get_logger()

LOOK_EVERY_S = 60.0  # whether a model is due, where the next one is not due earlier
_NICENESS = 19  # of the thread: hashing 250 MB takes half a second of a core


class Scrub:
    """Looks at all of `store` once in `hours`; by several processes at once it is done once.

    `on_damaged` is called with each revision that is found to have changed, after it was marked. Methods block on disk.
    """

    def __init__(
        self,
        store: Store,
        hours: float,
        *,
        on_damaged: Callable[[Revision], None] = lambda found: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._round_s, self._on_damaged, self._clock = store, 3600 * hours, on_damaged, clock
        self._state, self._lock = store.models / ".scrub.json", store.models / ".scrub.lock"
        self._round: tuple[float, list[str]] | None = None  # when it began, and the models it is about
        self._unsaved: tuple[float, str] | None = None  # the state that a full disk did not take

    def start(self) -> None:
        """In a thread of its own, until the process ends."""
        threading.Thread(target=self._run, name="scrub", daemon=True).start()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            wait_s = LOOK_EVERY_S
            try:
                wait_s = self.step()
            except StoreUnavailable as exc:
                log.warning("scrub_failed", reason=exc.message)
            except Exception:  # whatever is wrong with one model, the others are looked at
                log.exception("scrub_failed")
            time.sleep(wait_s)

    def step(self) -> float:
        """Looks at the next model if it is due; in how many seconds to call again. Raises: StoreUnavailable."""
        with translated("look through the models"):
            try:
                with locked(self._lock, wait=False):
                    return self._step()
            except BlockingIOError:
                return LOOK_EVERY_S

    def _step(self) -> float:
        now = self._clock()
        began, last = self._read()
        if not now - 2 * self._round_s < began <= now:  # there was none, long ago, or before the clock was set back
            began, last = now, ""
        models = self._models_of(began)
        number = bisect_right(models, last)
        due = began + self._round_s * (number / len(models) if models else 1)
        if now < due:
            return min(due - now, LOOK_EVERY_S)
        if number >= len(models):
            self._write(now, "")
            return 0.0 if models else LOOK_EVERY_S
        self._write(began, models[number])  # first: a model that ends the process is not looked at for ever
        for found in self._store.published(models[number]):
            self._look_at(found)
        return 0.0

    def _models_of(self, began: float) -> list[str]:
        """Those that were here when the round began, or when this process came to it. What came later is new."""
        if self._round is None or self._round[0] != began:
            self._round = began, sorted(self._store.model_ids())
        return self._round[1]

    def _look_at(self, found: Revision) -> None:
        if is_marked(found.path, DAMAGED):
            return
        try:
            paths = list(model_files(found.path))
            for path in paths:
                forget_cached(path)
            has_changed = is_intact(found.path) is False
            for path in paths:  # what nobody uses should not stay in memory for having been looked at
                forget_cached(path)
        except FileNotFoundError:  # it has just been removed
            return
        except OSError as exc:
            log.warning("revision_unreadable", model=found.model_id, revision=found.revision, reason=exc.strerror)
            # A sector is lost. Where the disk is elsewhere, it may only be the way to it.
            has_changed = exc.errno == errno.EIO and not is_shared(found.path.stat().st_dev)
        if has_changed and found.path.is_dir():
            self._store.set_damaged(found)
            log.error("revision_damaged", model=found.model_id, revision=found.revision)
            self._on_damaged(found)

    def _read(self) -> tuple[float, str]:
        if self._unsaved is not None:
            return self._unsaved
        with suppress(OSError, ValueError, TypeError, KeyError):
            said = json.loads(self._state.read_bytes())
            return float(said["began"]), str(said["last"])
        return -1.0, ""

    def _write(self, began: float, last: str) -> None:
        self._unsaved = began, last
        with suppress(OSError):  # a full disk: the next process looks at it once more, this one does not
            replace_file(self._state, json.dumps({"began": began, "last": last}).encode())
            self._unsaved = None
