"""Uploaded files and training jobs, as their users see them: create, look up, list, pause, cancel, delete.

Knows what makes a request for a job acceptable. Who works on a job is in `serve.training.jobs.queue`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import String, delete, func, select, update
from sqlalchemy import cast as cast_to
from sqlalchemy.orm import Session

from serve.database.connection import CREATION_LOCK, Database, read_clock_ms, take_lock
from serve.database.tables import (
    CheckpointRow,
    DeliveryRow,
    EventRow,
    FileRow,
    IdempotencyRow,
    JobLabelRow,
    JobRow,
    RunRow,
)
from serve.errors import Conflict, InvalidRequest, ModelNotFound, NotFound, Overloaded
from serve.store.disk import translated
from serve.training.archives.tweets import as_handle
from serve.training.dataset import NAMESPACE
from serve.training.jobs.rows import (
    OPEN_STATES,
    add_event,
    add_job,
    cancel_row,
    file_ids,
    find_by_key,
    find_open,
    find_row,
    forget_old_keys,
    jobs_of,
    new_id,
    of_viewer,
    page_of_rows,
    pause,
    to_checkpoint,
    to_event,
    to_job,
    turn_again,
)
from serve.training.jobs.uploads import ROWLESS_AFTER_S, make_private, sweep_uploads, take_over
from serve.training.preprocess import PARAM, VALIDATION_PARAM, preprocess
from serve.training.tracking.lineage import read_runs
from serve.training.tracking.outbox import WAITING
from serve.types import (
    ABANDONED_AFTER_S,
    ALL_SEEING,
    BOT_PURPOSE,
    MAX_ARCHIVES,
    MAX_BATCH_SIZE,
    Checkpoint,
    CheckRoom,
    FileRecord,
    Job,
    JobEvent,
    JobRequest,
    JobStatus,
    ModelId,
    Page,
    Run,
    Viewer,
    check_range,
)

MAX_OPEN_JOBS = 20_000  # of all callers
RETRY_AFTER_S = 60.0  # where there are too many
MAX_SEED = 2**32 - 1  # what numpy takes, and so whoever trains on with another program
# Archives up to this size are read while the caller waits (about 1 s for 64 MB of tweets), so that a file that
# is no archive, or has too few tweets, is refused at once; a job of larger ones fails later with the same words.
MAX_BYTES_READ_AT_ONCE = 64_000_000


class JobStore:
    """`Files` and `Jobs` over one database; the bytes of files lie in the folder `uploads`.

    `check_base` raises ModelNotFound for a base model that no job could find, `check_person` Erased for the handle of
    somebody of whom nothing may be learnt. `max_jobs_per_key`: that one owner may have open; None: any number.
    """

    def __init__(
        self,
        database: Database,
        uploads: Path,
        *,
        check_base: Callable[[str, Viewer], object] = lambda model_id, viewer: None,
        check_person: Callable[[str], object] = lambda handle: None,
        max_jobs_per_key: int | None = None,
    ) -> None:
        self._database = database
        self._uploads = uploads
        self._check_base, self._check_person = check_base, check_person
        self._max_jobs_per_key = max_jobs_per_key
        make_private(uploads)
        self.sweep()

    # --- Files --------------------------------------------------------------------------------------------

    def create_file(
        self, source: Path, filename: str, purpose: str, owner: str = "", *, check_room: CheckRoom | None = None
    ) -> FileRecord:
        """`stage_file` and `keep_files`, of one."""
        return self.keep_files([self.stage_file(source, filename, purpose, owner)], check_room=check_room)[0]

    def stage_file(self, source: Path, filename: str, purpose: str, owner: str = "") -> FileRecord:
        """`source` where it lies, with the id that it will have once it is kept."""
        return FileRecord(new_id("file"), filename, source.stat().st_size, 0, purpose, source, owner)

    def keep_files(
        self, staged: Sequence[FileRecord], *, check_room: CheckRoom | None = None
    ) -> tuple[FileRecord, ...]:
        """Takes them over (moves their bytes), all or none; they are one tenant's.

        `check_room` is told how many bytes the tenant's files have, and how many these; no others come meanwhile.
        Raises: StoreUnavailable, and what `check_room` raises.
        """
        with take_over(staged, self._uploads) as add_rows, self._database.write() as session:
            if check_room is not None:
                take_lock(session, CREATION_LOCK)
                _check_bytes(session, staged, check_room)
            return tuple(map(self._file, add_rows(session)))

    def get_file(self, file_id: str, viewer: Viewer = ALL_SEEING) -> FileRecord:
        """Raises: NotFound, also for a file that is not the viewer's."""
        with self._database.read() as session:
            return self._file(find_row(session, FileRow, file_id, *of_viewer(FileRow.owner, viewer)))

    def list_files(
        self,
        *,
        limit: int,
        after: str | None = None,
        purpose: str | None = None,
        newest_first: bool = True,
        viewer: Viewer = ALL_SEEING,
    ) -> Page[FileRecord]:
        """The viewer's. Raises: NotFound when there is no file `after`."""
        query = select(FileRow) if purpose is None else select(FileRow).where(FileRow.purpose == purpose)
        with self._database.read() as session:
            own = of_viewer(FileRow.owner, viewer)
            rows, has_more = page_of_rows(session, query, FileRow, limit, after, *own, newest_first=newest_first)
            return Page(tuple(map(self._file, rows)), has_more)

    def bytes_of(self, owner: str) -> int:
        """Of all of a tenant's files."""
        with self._database.read() as session:
            return _bytes_of(session, owner)

    def delete_file(self, file_id: str) -> None:
        """Raises: NotFound; Conflict while a job that has not ended needs the file."""
        with self._database.write() as session:
            row = find_row(session, FileRow, file_id)
            named = cast_to(JobRow.request, String).contains(row.id)  # few enough to look into
            for job in session.scalars(select(JobRow).where(JobRow.status.in_(OPEN_STATES), named)):
                if file_id in file_ids(job.request):
                    raise Conflict(
                        f"File '{file_id}' is needed by job '{job.id}', which is {job.status}: cancel the job first, "
                        "or delete the file when it has ended."
                    )
            session.delete(row)
        (self._uploads / file_id).unlink(missing_ok=True)

    def drop_archives(self, job: Job) -> None:
        """Deletes what was uploaded for this job alone. Other files are their uploader's to delete."""
        for file_id in file_ids(asdict(job.request)):
            with contextlib.suppress(NotFound, Conflict):
                if self.get_file(file_id).purpose == BOT_PURPOSE:
                    self.delete_file(file_id)

    def sweep(self) -> None:
        """Deletes archives of bots for which no job came in time, and bytes without a row that broken uploads left."""
        with self._database.read() as session:
            now = read_clock_ms(session) // 1000
            known = set(session.scalars(select(FileRow.id)))
            stale = now - ABANDONED_AFTER_S
            old = select(FileRow.id).where(FileRow.purpose == BOT_PURPOSE, FileRow.created_at < stale)
            forgotten = session.scalars(old).all()
        for file_id in forgotten:
            with contextlib.suppress(NotFound, Conflict):  # Conflict: its job has yet to end
                self.delete_file(file_id)
        sweep_uploads(self._uploads, known, now - ROWLESS_AFTER_S)

    def _file(self, row: FileRow) -> FileRecord:
        path = self._uploads / row.id
        return FileRecord(row.id, row.filename, row.num_bytes, row.created_at, row.purpose, path, row.owner)

    # --- Jobs ---------------------------------------------------------------------------------------------

    def create_job(
        self,
        request: JobRequest,
        *,
        idempotency_key: str | None = None,
        max_open: int | None = None,
        staged: Sequence[FileRecord] = (),
        check_room: CheckRoom | None = None,
    ) -> Job:
        """Checks the request, and the archives themselves where they are not too large to read at once.

        The same key from the same owner gives the job that it gave before, for a day. `staged`: files of the request
        that are not kept yet. They are, with a new job, as by `keep_files`; else they stay where they lie, or go.
        Raises: NotFound, ModelNotFound, BadUpload, TooFewTweets, InvalidRequest, Erased, Overloaded, StoreUnavailable;
        Conflict for a key that came with another request.
        """
        check_request(request)
        fresh = {file.id: file for file in staged}
        digest = self._digest(request, fresh) if idempotency_key else ""
        if idempotency_key:
            with self._database.read() as session:
                if (known := find_by_key(session, request.owner, idempotency_key, digest)) is not None:
                    return to_job(known)
        self._check_base(request.base_model, request.viewer)
        status, result, people = self._validate_files(request, fresh)
        with take_over(staged, self._uploads) as add_files, self._database.write() as session:
            take_lock(session, CREATION_LOCK)
            if idempotency_key:  # again: its twin may have been quicker
                if (known := find_by_key(session, request.owner, idempotency_key, digest)) is not None:
                    return to_job(known)
                forget_old_keys(session)
            self._check_room(session, request.owner, self._max_jobs_per_key if max_open is None else max_open)
            if check_room is not None:
                _check_bytes(session, staged, check_room)
            self._check_people(people)  # here, for they may have been erased while their posts were read
            add_files(session)
            row = add_job(session, request, status, result)
            if idempotency_key:
                session.add(
                    IdempotencyRow(
                        owner=request.owner,
                        key=idempotency_key,
                        request_sha256=digest,
                        job_id=row.id,
                        created_at=row.created_at,
                    )
                )
            return to_job(row)

    def _validate_files(
        self, request: JobRequest, fresh: Mapping[str, FileRecord]
    ) -> tuple[JobStatus, dict[str, Any], Collection[str | None]]:
        """The status and result that the new job begins with, and whose posts these are, as far as is known.

        `fresh`: by id, the files that are not kept yet.
        """

        def find(file_id: str, param: str = PARAM) -> FileRecord:
            return fresh.get(file_id) or self._training_file(file_id, request.viewer, param)

        files = [find(entry.file_id) for entry in request.files]
        validation = None if request.validation_file is None else find(request.validation_file, VALIDATION_PARAM)
        handles = [entry.handle for entry in request.files]
        self._check_people(handles)
        if sum(file.num_bytes for file in (*files, validation) if file) > MAX_BYTES_READ_AT_ONCE:
            return JobStatus.VALIDATING, {}, handles
        data = preprocess(list(zip(files, handles, strict=True)), suffix=request.suffix, validation=validation)
        return JobStatus.QUEUED, {"counts": data.counts, "handles": data.said}, (*handles, *data.sources)

    def _check_people(self, handles: Iterable[str | None]) -> None:
        with translated("look up who was erased"):
            for bare in filter(None, map(as_handle, handles)):
                self._check_person(bare)

    def _digest(self, request: JobRequest, fresh: Mapping[str, FileRecord]) -> str:
        """Of all that makes two requests the same. A bot's archives, sent anew with each request, count by content."""
        asked = asdict(request)
        for entry in asked["files"]:
            entry["file_id"] = self._identity(entry["file_id"], fresh)
        if asked["validation_file"] is not None:
            asked["validation_file"] = self._identity(asked["validation_file"], fresh)
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _identity(self, file_id: str, fresh: Mapping[str, FileRecord]) -> str:
        with contextlib.suppress(NotFound, FileNotFoundError):
            file = fresh.get(file_id) or self.get_file(file_id)
            if file.purpose == BOT_PURPOSE:
                with file.path.open("rb") as stream:
                    return hashlib.file_digest(stream, "sha256").hexdigest()
        return file_id

    def get_job(self, job_id: str, viewer: Viewer = ALL_SEEING) -> Job:
        """Raises: NotFound, also for a job that is not the viewer's."""
        with self._database.read() as session:
            return to_job(find_row(session, JobRow, job_id, *of_viewer(JobRow.tenant, viewer)))

    def check_job(self, job_id: str, viewer: Viewer) -> None:
        """Raises: NotFound where there is no such job of the viewer's."""
        with self._database.read() as session:
            find_row(session, JobRow, job_id, *of_viewer(JobRow.tenant, viewer))

    def list_jobs(
        self,
        *,
        limit: int,
        after: str | None = None,
        metadata: Mapping[str, str] | None = None,
        viewer: Viewer = ALL_SEEING,
    ) -> Page[Job]:
        """The viewer's, newest first; only those that carry all of `metadata`, or, for {}, those that carry none.

        Raises: NotFound when there is no job `after`.
        """
        query = select(JobRow)
        if metadata is not None and not metadata:
            query = query.where(JobRow.seq.not_in(select(JobLabelRow.job_seq)))
        for key, value in (metadata or {}).items():
            labelled = select(JobLabelRow.job_seq).where(JobLabelRow.key == key, JobLabelRow.value == value)
            query = query.where(JobRow.seq.in_(labelled))
        with self._database.read() as session:
            own = of_viewer(JobRow.tenant, viewer)
            rows, has_more = page_of_rows(session, query, JobRow, limit, after, *own, newest_first=True)
            return Page(tuple(map(to_job, rows)), has_more)

    def count_jobs(self) -> Mapping[JobStatus, int]:
        """How many there are of each status that any is in."""
        query = select(JobRow.status, func.count()).group_by(JobRow.status)
        with self._database.read() as session:
            return {JobStatus(status): count for status, count in session.execute(query)}

    def cancel_job(self, job_id: str) -> Job:
        """A waiting or paused job ends at once; a running one when its worker next asks (seconds).

        Raises: NotFound; Conflict when it has already ended.
        """
        with self._database.write() as session:
            row = find_open(session, job_id)
            cancel_row(session, row)
            job = to_job(row)
        if job.status.is_final:
            self.drop_archives(job)
        return job

    def pause_job(self, job_id: str) -> Job:
        """A waiting job pauses at once; a running one with its next checkpoint (seconds); one to be cancelled never.

        Raises: NotFound; Conflict when it has already ended.
        """
        with self._database.write() as session:
            row = find_open(session, job_id)
            if row.cancel_requested:
                pass
            elif row.status == JobStatus.RUNNING:
                if not row.pause_requested:
                    row.pause_requested = True
                    add_event(session, job_id, "Pausing was asked for.")
            elif row.status != JobStatus.PAUSED:
                pause(session, row)
            return to_job(row)

    def resume_job(self, job_id: str) -> Job:
        """Back to its turn in the queue or, if that has passed, the next; no pause at all where it has not begun.

        Raises: NotFound; Conflict when it is not paused.
        """
        with self._database.write() as session:
            take_lock(session, CREATION_LOCK)  # turns are given one after the other
            row = find_open(session, job_id)
            if row.status == JobStatus.PAUSED:
                row.turn = turn_again(session, row)
                row.status = JobStatus.QUEUED
            elif not row.pause_requested:
                raise Conflict(f"Job '{job_id}' is not paused: it is {row.status}.")
            row.pause_requested = False
            add_event(session, job_id, "The job goes on.")
            return to_job(row)

    def list_events(self, job_id: str, *, limit: int, after: str | None = None) -> Page[JobEvent]:
        """Newest first. Raises: NotFound."""
        query = select(EventRow).where(EventRow.job_id == job_id)
        with self._database.read() as session:
            find_row(session, JobRow, job_id)
            rows, has_more = page_of_rows(session, query, EventRow, limit, after, newest_first=True)
            return Page(tuple(map(to_event, rows)), has_more)

    def list_checkpoints(self, job_id: str, *, limit: int, after: str | None = None) -> Page[Checkpoint]:
        """Newest first. Raises: NotFound."""
        query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
        with self._database.read() as session:
            find_row(session, JobRow, job_id)
            rows, has_more = page_of_rows(session, query, CheckpointRow, limit, after, newest_first=True)
            return Page(tuple(map(to_checkpoint, rows)), has_more)

    def forget_checkpoints(self, job_id: str) -> None:
        """Their revisions are about to go."""
        with self._database.write() as session:
            session.execute(delete(CheckpointRow).where(CheckpointRow.job_id == job_id))

    def forget_earlier_checkpoints(self, model_id: str, own: str) -> tuple[str, ...]:
        """Those of the model that other jobs left which have ended; the ids of others that have begun and have not."""
        with self._database.write() as session:
            begun = select(JobRow.id).where(
                JobRow.status.in_(OPEN_STATES), JobRow.started_at.is_not(None), JobRow.id != own
            )
            going_on = tuple(session.scalars(begun))
            of_model = CheckpointRow.model_id.startswith(f"{model_id}@", autoescape=True)
            over = CheckpointRow.job_id.not_in((own, *going_on))
            session.execute(delete(CheckpointRow).where(of_model, over))
            return going_on

    def list_untidy(self) -> list[str]:
        """Ids of jobs that have ended and left something: checkpoints without a model, or the archives of a bot."""
        ended = JobRow.status.not_in(OPEN_STATES)
        with self._database.read() as session:
            checkpoints = select(JobRow.id).join(CheckpointRow, CheckpointRow.job_id == JobRow.id).distinct()
            found = set(session.scalars(checkpoints.where(ended, JobRow.status != JobStatus.SUCCEEDED)))
            archives = set(session.scalars(select(FileRow.id).where(FileRow.purpose == BOT_PURPOSE)))
            if archives:  # those of earlier jobs go in time, see `sweep`
                since = read_clock_ms(session) // 1000 - ABANDONED_AFTER_S
                lately = select(JobRow.id, JobRow.request).where(ended, JobRow.finished_at >= since)
                found |= {id for id, request in session.execute(lately) if not archives.isdisjoint(file_ids(request))}
        return sorted(found)

    def forget_model(self, model_id: str) -> None:
        """The model was deleted: its jobs that have not ended are cancelled, and what they wrote of it is gone."""
        with self._database.write() as session:
            rows = jobs_of(session, model_id)
            ids = [row.id for row in rows]
            session.execute(delete(CheckpointRow).where(CheckpointRow.job_id.in_(ids)))
            waiting = (DeliveryRow.job_id.in_(ids), DeliveryRow.status == WAITING)
            session.execute(delete(DeliveryRow).where(*waiting))
            session.execute(update(RunRow).where(RunRow.job_id.in_(ids)).values(tables={}))
            with_texts = cast_to(EventRow.data, String).not_like('%"samples": []%')
            told = select(EventRow).where(EventRow.job_id.in_(ids), EventRow.type == "metrics", with_texts)
            for event in session.scalars(told):
                event.data = {**event.data, "samples": []}
            for row in rows:
                row.result = {name: value for name, value in row.result.items() if name != "samples"}
                if not JobStatus(row.status).is_final:
                    cancel_row(session, row)

    def list_runs(self, job_id: str) -> tuple[Run, ...]:
        """What is recorded of a job that has ended well; else nothing. Raises: NotFound."""
        with self._database.read() as session:
            find_row(session, JobRow, job_id)
            return read_runs(session, job_id)

    def _training_file(self, file_id: str, viewer: Viewer, param: str = PARAM) -> FileRecord:
        try:
            return self.get_file(file_id, viewer)
        except NotFound as exc:
            exc.param = param
            raise

    def _check_room(self, session: Session, owner: str, max_open: int | None) -> None:
        count = select(func.count()).select_from(JobRow).where(JobRow.status.in_(OPEN_STATES))
        num_open = session.scalar(count) or 0
        if num_open >= MAX_OPEN_JOBS:
            raise Overloaded(
                f"{num_open} training jobs are waiting, and {MAX_OPEN_JOBS} is the limit; try again in "
                f"{RETRY_AFTER_S:g} s.",
                retry_after_s=RETRY_AFTER_S,
            )
        if not max_open or num_open < max_open:
            return
        num_own = session.scalar(count.where(JobRow.owner == owner)) or 0
        if num_own >= max_open:
            raise Overloaded(
                f"You have {num_own} training jobs that have not ended, and {max_open} is the limit of "
                f"one key: wait for one to end or cancel one, then try again in {RETRY_AFTER_S:g} s.",
                retry_after_s=RETRY_AFTER_S,
            )


def _bytes_of(session: Session, owner: str) -> int:
    return session.scalar(select(func.sum(FileRow.num_bytes)).where(FileRow.owner == owner)) or 0


def _check_bytes(session: Session, staged: Sequence[FileRecord], check_room: CheckRoom) -> None:
    for owner in {file.owner for file in staged}:
        check_room(_bytes_of(session, owner), sum(file.num_bytes for file in staged))


def check_request(request: JobRequest) -> None:
    """Everything that can be said without opening a file. Raises: InvalidRequest."""
    if not 1 <= len(request.files) <= MAX_ARCHIVES:
        raise InvalidRequest(f"A job learns from 1 to {MAX_ARCHIVES} archives, not {len(request.files)}.", param=PARAM)
    if len({entry.file_id for entry in request.files}) < len(request.files):
        raise InvalidRequest("The same file is named twice in this job: name each file once.", param=PARAM)
    if request.validation_file in {entry.file_id for entry in request.files}:
        raise InvalidRequest(
            "The same file cannot be learnt from and held out: name another one, or none to hold out a tenth.",
            param=VALIDATION_PARAM,
        )
    _check_id(request.base_model, "model")
    if request.suffix is not None:
        check_range("suffix length", len(request.suffix), 1, 64)
        _check_id(f"{NAMESPACE}/{request.suffix}", "suffix")
        if "@" in request.suffix or "/" in request.suffix:
            raise InvalidRequest("'suffix' is one name, without '/' and '@'.", param="suffix")
    if request.seed is not None:
        check_range("seed", request.seed, 0, MAX_SEED)
    wanted = request.hyperparameters
    ranges = {"n_epochs": (1, 50), "batch_size": (1, MAX_BATCH_SIZE), "learning_rate_multiplier": (0.001, 100)}
    for name, (low, high) in ranges.items():
        value = getattr(wanted, name)
        if value is not None:
            check_range(name, value, low, high)


def _check_id(text: str, param: str) -> None:
    try:
        ModelId.parse(text)
    except ModelNotFound as exc:
        raise InvalidRequest(
            f"'{param}' cannot be a model's name: use ASCII letters, digits, '.', '_' and '-', and begin with a "
            "letter or digit.",
            param=param,
        ) from exc
