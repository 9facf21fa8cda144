"""Uploaded files and training jobs, as their users see them: create, look up, list, cancel, delete.

Knows what makes a request for a job acceptable. Who works on a job is in `serve.training.queue`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from serve.errors import Conflict, InvalidRequest, ModelNotFound, NotFound, Overloaded, StoreUnavailable, disk_error
from serve.training.database import (
    Database,
    EventRow,
    FileRow,
    JobLabelRow,
    JobRow,
    read_clock_ms,
)
from serve.training.dataset import NAMESPACE
from serve.training.preprocess import PARAM, preprocess
from serve.types import (
    BOT_PURPOSE,
    MAX_ARCHIVES,
    MAX_BATCH_SIZE,
    FileRecord,
    Hyperparameters,
    Job,
    JobEvent,
    JobRequest,
    JobStatus,
    ModelId,
    Page,
    TrainingFile,
    check_range,
)

MAX_OPEN_JOBS = 1_000
MAX_SEED = 2**32 - 1  # numpy's limit, which transformers seeds too
# Archives up to this size are read while the caller waits (about 1 s for 64 MB of tweets), so that a file that
# is no archive, or has too few tweets, is refused at once; a job of larger ones fails later with the same words.
MAX_BYTES_READ_AT_ONCE = 64_000_000

_STALE_AFTER_S = 24 * 3600

_OPEN = (JobStatus.VALIDATING, JobStatus.QUEUED, JobStatus.RUNNING)
_Row = TypeVar("_Row", FileRow, JobRow, EventRow)


class JobStore:
    """`Files` and `Jobs` over one database; the bytes of files lie in the folder `uploads`.

    `check_base` raises ModelNotFound for a base model that no job could find.
    """

    def __init__(
        self, database: Database, uploads: Path, *, check_base: Callable[[str], object] = lambda model_id: None
    ) -> None:
        self._database = database
        self._uploads = uploads
        self._check_base = check_base
        uploads.mkdir(parents=True, exist_ok=True)
        self._sweep()

    # --- Files --------------------------------------------------------------------------------------------

    def create_file(self, source: Path, filename: str, purpose: str) -> FileRecord:
        """Takes `source` over (moves it). Raises: StoreUnavailable."""
        file_id = new_id("file")
        num_bytes = source.stat().st_size
        _move_durably(source, self._uploads / file_id)
        try:
            with self._database.write() as session:
                now = read_clock_ms(session) // 1000
                row = FileRow(id=file_id, filename=filename, num_bytes=num_bytes, created_at=now, purpose=purpose)
                session.add(row)
                return self._file(row)
        except StoreUnavailable:
            (self._uploads / file_id).unlink(missing_ok=True)
            raise

    def get_file(self, file_id: str) -> FileRecord:
        """Raises: NotFound."""
        with self._database.read() as session:
            return self._file(_find(session, FileRow, file_id))

    def list_files(
        self, *, limit: int, after: str | None = None, purpose: str | None = None, newest_first: bool = True
    ) -> Page[FileRecord]:
        """Raises: NotFound when there is no file `after`."""
        query = select(FileRow) if purpose is None else select(FileRow).where(FileRow.purpose == purpose)
        with self._database.read() as session:
            rows, has_more = _page(session, query, FileRow, limit, after, newest_first=newest_first)
            return Page(tuple(map(self._file, rows)), has_more)

    def delete_file(self, file_id: str) -> None:
        """Raises: NotFound; Conflict while a job that has not ended needs the file."""
        with self._database.write() as session:
            row = _find(session, FileRow, file_id)
            for job in session.scalars(select(JobRow).where(JobRow.status.in_(_OPEN))):
                if any(entry["file_id"] == file_id for entry in job.request["files"]):
                    raise Conflict(
                        f"File '{file_id}' is needed by job '{job.id}', which is {job.status}: cancel the job first, "
                        "or delete the file when it has ended."
                    )
            session.delete(row)
        (self._uploads / file_id).unlink(missing_ok=True)

    def drop_archives(self, job: Job) -> None:
        """Deletes what was uploaded for this job alone. Other files are their uploader's to delete."""
        for entry in job.request.files:
            with contextlib.suppress(NotFound, Conflict):
                if self.get_file(entry.file_id).purpose == BOT_PURPOSE:
                    self.delete_file(entry.file_id)

    def _sweep(self) -> None:
        """What processes that died have left: archives of bots without a job to come, and bytes without a row."""
        with self._database.read() as session:
            stale = read_clock_ms(session) // 1000 - _STALE_AFTER_S
            known = set(session.scalars(select(FileRow.id)))
            old = select(FileRow.id).where(FileRow.purpose == BOT_PURPOSE, FileRow.created_at < stale)
            forgotten = session.scalars(old).all()
        for file_id in forgotten:
            with contextlib.suppress(NotFound, Conflict):  # Conflict: its job has yet to end
                self.delete_file(file_id)
        for path in self._uploads.iterdir():
            is_ours = path.name.startswith(("upload-", "file-")) and path.name not in known
            with contextlib.suppress(FileNotFoundError):  # somebody else was quicker
                if is_ours and path.stat().st_ctime < stale:  # of the last rename
                    path.unlink()

    def _file(self, row: FileRow) -> FileRecord:
        return FileRecord(row.id, row.filename, row.num_bytes, row.created_at, row.purpose, self._uploads / row.id)

    # --- Jobs ---------------------------------------------------------------------------------------------

    def create_job(self, request: JobRequest) -> Job:
        """Checks the request, and the archives themselves where they are not too large to read at once.

        Raises: NotFound, ModelNotFound, BadUpload, TooFewTweets, InvalidRequest, Overloaded, StoreUnavailable.
        """
        check_request(request)
        self._check_base(request.base_model)
        files = [self._training_file(entry.file_id) for entry in request.files]
        result: dict[str, Any] = {}
        status = JobStatus.VALIDATING
        if sum(file.num_bytes for file in files) <= MAX_BYTES_READ_AT_ONCE:
            handles = [entry.handle for entry in request.files]
            result["counts"] = preprocess(list(zip(files, handles, strict=True)), suffix=request.suffix).counts
            status = JobStatus.QUEUED
        with self._database.write() as session:
            self._check_room(session)
            row = JobRow(
                id=new_id("ftjob"),
                request=asdict(request),
                status=status,
                created_at=read_clock_ms(session) // 1000,
                seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
                result=result,
            )
            session.add(row)
            session.flush()
            labels = request.metadata.items()
            session.add_all(JobLabelRow(job_seq=row.seq, key=key, value=value) for key, value in labels)
            add_event(session, row.id, "The job was created.")
            return to_job(row)

    def get_job(self, job_id: str) -> Job:
        """Raises: NotFound."""
        with self._database.read() as session:
            return to_job(_find(session, JobRow, job_id))

    def list_jobs(
        self, *, limit: int, after: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> Page[Job]:
        """Newest first; only those that carry all of `metadata`. Raises: NotFound when there is no job `after`."""
        query = select(JobRow)
        for key, value in (metadata or {}).items():
            labelled = select(JobLabelRow.job_seq).where(JobLabelRow.key == key, JobLabelRow.value == value)
            query = query.where(JobRow.seq.in_(labelled))
        with self._database.read() as session:
            rows, has_more = _page(session, query, JobRow, limit, after, newest_first=True)
            return Page(tuple(map(to_job, rows)), has_more)

    def cancel_job(self, job_id: str) -> Job:
        """A waiting job ends at once; a running one when its worker next asks (seconds).

        Raises: NotFound; Conflict when it has already ended.
        """
        with self._database.write() as session:
            row = _find(session, JobRow, job_id, lock=True)
            if JobStatus(row.status).is_final:
                raise Conflict(f"Job '{job_id}' has already ended: it is {row.status}.")
            if row.status == JobStatus.RUNNING:
                row.cancel_requested = True
                add_event(session, job_id, "Cancelling was asked for.")
            else:
                end_job(session, row, JobStatus.CANCELLED, "The job was cancelled.")
            job = to_job(row)
        if job.status.is_final:
            self.drop_archives(job)
        return job

    def list_events(self, job_id: str, *, limit: int, after: str | None = None) -> Page[JobEvent]:
        """Newest first. Raises: NotFound."""
        query = select(EventRow).where(EventRow.job_id == job_id)
        with self._database.read() as session:
            _find(session, JobRow, job_id)
            rows, has_more = _page(session, query, EventRow, limit, after, newest_first=True)
            return Page(tuple(map(_to_event, rows)), has_more)

    def _training_file(self, file_id: str) -> FileRecord:
        try:
            return self.get_file(file_id)
        except NotFound as exc:
            exc.param = PARAM
            raise

    def _check_room(self, session: Session) -> None:
        num_open = session.scalar(select(func.count()).select_from(JobRow).where(JobRow.status.in_(_OPEN))) or 0
        if num_open >= MAX_OPEN_JOBS:
            raise Overloaded(
                f"{num_open} training jobs are waiting, and {MAX_OPEN_JOBS} is the limit; try again in 60 s.",
                retry_after_s=60.0,
            )


def check_request(request: JobRequest) -> None:
    """Everything that can be said without opening a file. Raises: InvalidRequest."""
    if not 1 <= len(request.files) <= MAX_ARCHIVES:
        raise InvalidRequest(f"A job learns from 1 to {MAX_ARCHIVES} archives, not {len(request.files)}.", param=PARAM)
    if len({entry.file_id for entry in request.files}) < len(request.files):
        raise InvalidRequest("The same file is named twice in this job: name each file once.", param=PARAM)
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


# --- Rows -------------------------------------------------------------------------------------------------


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def to_job(row: JobRow) -> Job:
    return Job(
        id=row.id,
        request=_to_request(row.request),
        status=JobStatus(row.status),
        created_at=row.created_at,
        seed=row.seed,
        started_at=row.started_at,
        finished_at=row.finished_at,
        estimated_finish=row.estimated_finish,
        fine_tuned_model=row.fine_tuned_model,
        trained_tokens=row.trained_tokens,
        error_code=row.error_code,
        error_message=row.error_message,
        error_param=row.error_param,
        result=dict(row.result or {}),
    )


def add_event(
    session: Session,
    job_id: str,
    message: str,
    *,
    level: Literal["info", "warn", "error"] = "info",
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """One line of the job's history, in the caller's transaction; with `metrics`, an event of that type."""
    session.add(
        EventRow(
            id=new_id("ftevent"),
            job_id=job_id,
            created_at=read_clock_ms(session) // 1000,
            level=level,
            message=message,
            type="message" if metrics is None else "metrics",
            data=dict(metrics or {}),
        )
    )


def end_job(session: Session, row: JobRow, status: JobStatus, message: str) -> None:
    """The one way into a final state. Raising the fence cuts off whoever still works on the job."""
    assert status.is_final and not JobStatus(row.status).is_final
    row.status = status
    row.finished_at = read_clock_ms(session) // 1000
    row.estimated_finish = None
    row.fence += 1
    row.worker = row.publication = None
    add_event(session, row.id, message, level="error" if status is JobStatus.FAILED else "info")


def _to_request(stored: Mapping[str, Any]) -> JobRequest:
    return JobRequest(
        base_model=stored["base_model"],
        files=tuple(TrainingFile(**entry) for entry in stored["files"]),
        hyperparameters=Hyperparameters(**stored["hyperparameters"]),
        suffix=stored["suffix"],
        seed=stored["seed"],
        metadata=stored["metadata"],
    )


def _to_event(row: EventRow) -> JobEvent:
    level = cast(Literal["info", "warn", "error"], row.level)
    kind = cast(Literal["message", "metrics"], row.type)
    return JobEvent(row.id, row.job_id, row.created_at, level, row.message, kind, row.data)


def _find(session: Session, kind: type[_Row], row_id: str, *, lock: bool = False, param: str | None = None) -> _Row:
    query = select(kind).where(kind.id == row_id)
    row = session.scalars(query.with_for_update() if lock else query).first()
    if row is None:
        noun = {FileRow: "file", JobRow: "job", EventRow: "event"}[kind]
        raise NotFound(f"There is no {noun} '{row_id[:64]}'.", param=param)
    return row


def _page(
    session: Session, query: Select[_Row], kind: type[_Row], limit: int, after: str | None, *, newest_first: bool
) -> tuple[list[_Row], bool]:
    if after is not None:
        seq = _find(session, kind, after, param="after").seq
        query = query.where(kind.seq < seq if newest_first else kind.seq > seq)
    ordered = query.order_by(kind.seq.desc() if newest_first else kind.seq).limit(limit + 1)
    rows = list(session.scalars(ordered))
    return rows[:limit], len(rows) > limit


def _move_durably(source: Path, target: Path) -> None:
    """Rename, or copy across file systems; on disk when it returns. Raises: StoreUnavailable."""
    part = target.with_name(target.name + ".part")
    try:
        try:
            os.replace(source, part)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            shutil.copyfile(source, part)
            source.unlink()
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as exc:
        part.unlink(missing_ok=True)
        raise disk_error("keep an upload", exc) from exc
