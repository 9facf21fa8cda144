"""Erases a person: tombstones first, then their jobs, models, uploads, checkpoints and records, then the free pages.

    <data>/erasures/<id>.json     receipts, for a day; whoever asked for one keeps it

Whose something is, is known by what it says itself: whom a model learnt from, whose archives a job was given, and what
an archive holds.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import select

from serve.database.connection import Database
from serve.database.tables import FileRow, JobRow
from serve.errors import BadUpload, Conflict, InvalidRequest, ModelNotFound, NotFound
from serve.store.burials import handles_in_name
from serve.store.disk import sync, translated
from serve.store.revisions import Store
from serve.training.archives import read_archive
from serve.training.archives.tweets import as_handle
from serve.training.jobs import erasing
from serve.training.jobs.options import RunOptions
from serve.training.jobs.rows import file_ids
from serve.training.tracking.forgetting import forget_jobs
from serve.types import BOT_PURPOSE, TRAINING_PURPOSE, Belongings, Erasure, ModelInfo, Removed, Share

JOBS_END_S = 40.0  # a job asks whether it is cancelled after each step, its supervisor every 5 s
RECEIPT_LIFETIME_S = 24 * 3600

_POLL_S = 0.2
_PAGE = 1000
_ID = re.compile(r"erasure-[0-9a-f]{24}")


class PersonEraser:
    """The `Eraser` of the models in `store` and of the jobs in `database`; `options` say where their files are."""

    def __init__(self, store: Store, database: Database, options: RunOptions) -> None:
        self._store, self._database, self._options = store, database, options
        self._receipts = options.data_dir / "erasures"

    # --- What belongs to whom -------------------------------------------------------------------------------

    def find(self, handle: str) -> Belongings:
        name = _checked(handle)
        models = {info.model_id: info.owner for info in self._models() if _is_of(info, name)}
        lower_ids = {model_id.lower() for model_id in models}
        with self._database.read() as session:
            jobs = list(erasing.jobs_about(session, {name}, lower_ids))
            others = set(session.scalars(select(JobRow.id))) - {job.id for job in jobs}
            used_by_others = self._files_of(session.scalars(select(JobRow).where(JobRow.id.in_(others))))
            read = {
                entry["file_id"]: entry["handle"].lower() if entry["handle"] else None
                for job in jobs
                for entry in job.request["files"]
            }
            made = {file_id for job in jobs for file_id in (job.result or {}).get("result_files", ())}
            made |= {job.request["validation_file"] for job in jobs if job.request.get("validation_file")}
            files = [file for file in session.scalars(select(FileRow)) if file.id not in used_by_others]
            own = [file for file in files if file.id in made or self._is_theirs(file, name, read)]
            owners = {*models.values(), *(job.tenant for job in jobs), *(file.owner for file in own)}
            return Belongings(
                tuple(sorted(models)), tuple(job.id for job in jobs), tuple(file.id for file in own), frozenset(owners)
            )

    def _models(self) -> Iterator[ModelInfo]:
        after: str | None = None
        while True:
            page = self._store.list_models(limit=_PAGE, after=after)
            yield from (info for info in page.items if not info.is_embedded)
            if not page.has_more:
                return
            after = page.items[-1].model_id

    def _files_of(self, jobs: Iterator[JobRow]) -> set[str]:
        return {file_id for job in jobs for file_id in file_ids(job.request)}

    def _is_theirs(self, file: FileRow, name: str, read: Mapping[str, str | None]) -> bool:
        """By who uploaded it, else by the archive itself; what says nothing is theirs whose job has read it."""
        if said := read.get(file.id):
            return said == name
        if file.purpose not in (TRAINING_PURPOSE, BOT_PURPOSE):
            return False
        says = None
        with suppress(BadUpload, OSError):
            says = read_archive(self._options.uploads / file.id, filename=file.filename).handle
        return file.id in read if says is None else says.lower() == name

    # --- Erasing --------------------------------------------------------------------------------------------

    def begin(self, handle: str, by: str) -> Belongings:
        name = _checked(handle)
        with translated("erase a person"):
            self._store.burials.bury(f"@{name}", "erased", by=by)
        found = self.find(name)
        with translated("erase a person"):
            for model_id in found.models:
                self._store.burials.bury(model_id, "erased", by=by)
        with self._database.write() as session:
            erasing.cancel(session, found.jobs)
        return found

    def finish(self, handle: str, begun: Belongings, by: str) -> Removed:
        self._end_jobs(begun.jobs)
        found = begun | self.find(handle)  # a job may have made its model just before
        tiers = {"models": self._drop_models(found.models, by)}
        tiers["uploads"] = self._drop_files(found.files)
        tiers["checkpoints"] = _drop_folders(self._options.work_of(job_id) for job_id in found.jobs)
        num_told, unreached = forget_jobs(self._database, self._options.data_dir, found.jobs)
        tiers["trackers"] = Share(num_told)
        with self._database.write() as session:
            num_bytes = erasing.erase(session, found.jobs)
        tiers["records"] = Share(len(found.jobs), num_bytes)
        self._store.sweep()
        if not self._database.scrub():
            unreached.append("The database is busy: what was deleted is overwritten as its free pages are used again.")
        return Removed(found, {name: share for name, share in tiers.items() if share.count}, tuple(unreached))

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

    def _drop_models(self, model_ids: tuple[str, ...], by: str) -> Share:
        count = num_bytes = 0
        for model_id in model_ids:
            home = self._store.models / model_id if "/" in model_id else self._store.models / "_" / model_id
            size = _size_of(home)
            with suppress(ModelNotFound, Conflict):  # it has just been deleted, or comes with the program
                self._store.delete_model(model_id, by=by, why="erased")
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
        return share

    def lift(self, handle: str) -> bool:
        name = _checked(handle)
        with translated("lift an erasure"):
            return self._store.burials.lift(f"@{name}")

    # --- Receipts -------------------------------------------------------------------------------------------

    def save(self, erasure: Erasure) -> None:
        with translated("keep the receipt of an erasure"):
            self._receipts.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep()
            part = self._path(erasure.id).with_suffix(".part")
            part.write_text(json.dumps(asdict(erasure)), encoding="utf-8")
            sync(part)
            part.replace(self._path(erasure.id))

    def load(self, erasure_id: str) -> Erasure:
        if not _ID.fullmatch(erasure_id):
            raise NotFound("There is no such erasure.")
        try:
            said: dict[str, Any] = json.loads(self._path(erasure_id).read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise NotFound("There is no such erasure, or it ended more than a day ago.") from exc
        tiers = {name: Share(**share) for name, share in said.pop("tiers").items()}
        said |= {name: tuple(said[name]) for name in ("models", "jobs", "files", "unreached")}
        return Erasure(**said, tiers=tiers)

    def _path(self, erasure_id: str) -> Path:
        return self._receipts / f"{erasure_id}.json"

    def _sweep(self) -> None:
        """They name who is gone."""
        oldest = time.time() - RECEIPT_LIFETIME_S
        for path in self._receipts.iterdir():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()


def _checked(handle: str) -> str:
    """In lower case, without '@'. Raises: InvalidRequest."""
    bare = as_handle(handle)
    if bare is None:
        raise InvalidRequest(
            "A handle is made of ASCII letters, digits, '_', '.', '-' and '@', such as '@ada'.", param="handle"
        )
    return bare.lower()


def _is_of(info: ModelInfo, name: str) -> bool:
    """Where nobody recorded whom it learnt from, its name tells: huggingtweets' own are called so."""
    known = {handle.lower() for handle in info.handles}
    return name in (known or handles_in_name(info.model_id))


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
