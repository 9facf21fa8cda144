"""Erases a person: tombstones first, then their jobs, models, uploads, checkpoints and records, then the free pages.

    <data>/erasures/<id>.json     receipts, for a day; whoever asked for one keeps it

What is theirs is found anew each time, by what it says itself: see `serve.training.belongings`. So whatever cuts an
erasure off, it is done again from the start, and what it is found by goes last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serve.database.connection import Database
from serve.errors import Conflict, InvalidRequest, ModelNotFound, NotFound, NotOwner, StoreUnavailable
from serve.store.disk import locked, replace_file, translated
from serve.store.revisions import Store
from serve.store.tombstones import Why
from serve.training.archives.tweets import as_handle
from serve.training.belongings import Finder
from serve.training.dataset import NAMESPACE
from serve.training.jobs import erasing
from serve.training.jobs.options import RunOptions
from serve.training.tracking.forgetting import forget_jobs
from serve.types import Belongings, Erasure, Removed, Share, Viewer

JOBS_END_S = 40.0  # a job asks whether it is cancelled after each step, its supervisor every 5 s
RECEIPT_LIFETIME_S = 24 * 3600
SILENT_S = 90.0  # after which nobody works on an erasure any more; who does, beats more often

_POLL_S = 0.2
_ID = re.compile(r"erasure-[0-9a-f]{24}")


class PersonEraser:
    """The `Eraser` of the models in `store` and of the jobs in `database`; `options` say where their files are."""

    def __init__(self, store: Store, database: Database, options: RunOptions) -> None:
        self._store, self._database, self._options = store, database, options
        self._finder = Finder(store, database, options.uploads)
        self._receipts = options.data_dir / "erasures"

    def find(self, handle: str, viewer: Viewer) -> Belongings:
        return self._finder.find(_checked(handle), viewer)

    # --- Erasing --------------------------------------------------------------------------------------------

    def begin(self, handle: str, by: str, viewer: Viewer) -> Belongings:
        name = _checked(handle)
        bury = self._store.burials.bury
        # Who does not run the server deletes what is their own: it closes no name, and nobody, to others.
        why, person = _why(viewer), f"@{name}" if viewer.sees_all else ""
        with translated("erase a person"):
            if person:
                bury(person, why, by=by)
            found = self.find(name, viewer)
            named = f"{NAMESPACE}/{name}"
            is_free = bool(person) and self._store.main_of(named) is None  # else what it has recorded decides
            for model_id in {*found.models, *([named] if is_free else [])}:
                bury(model_id, why, by=by, person=person)
            with self._database.write() as session:
                making = erasing.cancel(session, found.jobs)
            for model_id in making:
                with suppress(NotOwner):
                    self._store.check_name(model_id, viewer)
                    bury(model_id, "deleted", by=by)
        return found

    def finish(self, handle: str, begun: Belongings, by: str, viewer: Viewer) -> Removed:
        self._end_jobs(begun.jobs)
        found = begun | self.begin(handle, by, viewer)  # a job may have made its model, or been made, just before
        self._end_jobs(found.jobs)
        tiers: dict[str, Share] = {}
        unreached: list[str] = []
        message = ""
        try:
            self._remove(found, by, viewer, tiers, unreached)
        except StoreUnavailable as exc:  # the receipt says what has gone before it
            message = exc.message
        return Removed(found, {name: share for name, share in tiers.items() if share.count}, tuple(unreached), message)

    def _remove(
        self, found: Belongings, by: str, viewer: Viewer, tiers: dict[str, Share], unreached: list[str]
    ) -> None:
        """Tells of what has gone as it goes. Raises: StoreUnavailable."""
        tiers["models"] = self._drop_models(found.models, by, viewer)
        tiers["uploads"] = self._drop_files(found.files)
        tiers["checkpoints"] = _drop_folders(self._options.work_of(job_id) for job_id in found.jobs)
        num_told, elsewhere = forget_jobs(self._database, self._options.data_dir, found.jobs)
        tiers["trackers"] = Share(num_told)
        unreached += elsewhere
        with self._database.write() as session:
            num_bytes = erasing.erase(session, found.jobs)
        tiers["records"] = Share(len(found.jobs), num_bytes)
        self._store.sweep()
        if not self._database.scrub():
            unreached.append("The database is busy: what was deleted is overwritten as its free pages are used again.")

    def _end_jobs(self, job_ids: tuple[str, ...]) -> None:
        """Lets them stop by themselves; after `JOBS_END_S` they are cut off."""
        deadline = time.monotonic() + JOBS_END_S
        while True:
            with self._database.read() as session:
                if not erasing.open_among(session, job_ids):
                    return
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        with self._database.write() as session:
            erasing.end(session, job_ids)

    def _drop_models(self, model_ids: tuple[str, ...], by: str, viewer: Viewer) -> Share:
        count = num_bytes = 0
        for model_id in model_ids:
            home = self._store.models / model_id if "/" in model_id else self._store.models / "_" / model_id
            size = _size_of(home)
            with suppress(ModelNotFound, NotOwner, Conflict):  # it has just been deleted, and maybe made by another
                self._store.delete_model(model_id, viewer, by=by, why=_why(viewer))
                count, num_bytes = count + 1, num_bytes + size
        return Share(count, num_bytes)

    def _drop_files(self, ids: tuple[str, ...]) -> Share:
        paths = [path for file_id in ids if (path := self._options.uploads / file_id).is_file()]
        share = Share(len(paths), sum(path.stat().st_size for path in paths))
        with self._database.write() as session:
            erasing.drop_files(session, ids)
        with translated("erase a person"):
            for path in paths:
                path.unlink(missing_ok=True)
        self._finder.forget(ids)
        return share

    def lift(self, handle: str) -> bool:
        name = _checked(handle)
        with translated("lift an erasure"):
            return self._store.burials.lift(f"@{name}")

    # --- Receipts -------------------------------------------------------------------------------------------

    def save(self, erasure: Erasure) -> None:
        with translated("keep the receipt of an erasure"):
            self._receipts.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self._path(erasure.id), json.dumps(asdict(erasure)).encode())

    def load(self, erasure_id: str) -> Erasure:
        if not _ID.fullmatch(erasure_id):
            raise NotFound("There is no such erasure.")
        try:
            said: dict[str, Any] = json.loads(self._path(erasure_id).read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise _too_old() from exc
        tiers = {name: Share(**share) for name, share in said.pop("tiers").items()}
        said |= {name: tuple(said[name]) for name in ("models", "jobs", "files", "unreached")}
        if "viewer" in said:
            said["viewer"] = Viewer(**said["viewer"])
        erasure = Erasure(**said, tiers=tiers)
        if _is_old(erasure):
            raise _too_old()
        return erasure

    def beat(self, erasure_id: str) -> None:
        with translated("keep the receipt of an erasure"):
            os.utime(self._path(erasure_id))

    def take_up(self) -> list[Erasure]:
        """Receipts of a day ago go on the way: they name who is gone."""
        taken = []
        with translated("look for erasures that were cut off"):
            if not self._receipts.is_dir():
                return []
            with locked(self._receipts / ".lock"):
                for part in self._receipts.glob("*.part"):  # of a writer that was killed: it names who is gone, too
                    if part.stat().st_mtime < time.time() - SILENT_S:
                        part.unlink(missing_ok=True)
                for path in self._receipts.glob("*.json"):
                    try:
                        erasure = self.load(path.stem)
                    except NotFound:
                        path.unlink(missing_ok=True)
                        continue
                    if erasure.status == "running" and path.stat().st_mtime < time.time() - SILENT_S:
                        self.beat(erasure.id)
                        taken.append(erasure)
        return taken

    def _path(self, erasure_id: str) -> Path:
        return self._receipts / f"{erasure_id}.json"


def _is_old(erasure: Erasure) -> bool:
    """Not one that still goes on, however long that takes."""
    return erasure.finished_at is not None and erasure.finished_at < time.time() - RECEIPT_LIFETIME_S


def _too_old() -> NotFound:
    return NotFound("There is no such erasure, or it ended more than a day ago.")


def _why(viewer: Viewer) -> Why:
    return "erased" if viewer.sees_all else "deleted"


def _checked(handle: str) -> str:
    """In lower case, without '@'. Raises: InvalidRequest."""
    bare = as_handle(handle)
    if bare is None:
        raise InvalidRequest(
            "A handle is made of ASCII letters, digits, '_', '.', '-' and '@', such as '@ada'.", param="handle"
        )
    return bare.lower()


def _drop_folders(folders: Iterator[Path]) -> Share:
    there = [folder for folder in folders if folder.is_dir()]
    share = Share(len(there), sum(map(_size_of, there)))
    for folder in there:
        shutil.rmtree(folder, ignore_errors=True)
    return share


def _size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
    return total
