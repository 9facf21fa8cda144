"""Who works on which training job: leases, attempts and fencing tokens.

A claim is a lease with a number that only rises. Every later call shows that number, so a worker that was
stopped, replaced and woken again is told so (Conflict) before it can change anything. Knows nothing of
training or processes.

Leases are kept by the database's clock, which may jump as any clock: a worker is taken for dead only when whoever wants
its job has also seen it silent, by a clock that does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import and_, false, or_, select, tuple_
from sqlalchemy.orm import Session

from serve.database.connection import Database, patiently, read_clock_ms
from serve.database.tables import CheckpointRow, DeliveryRow, FileRow, JobRow
from serve.errors import Conflict
from serve.training.jobs.rows import add_event, end_job, new_id, pause, to_job
from serve.training.jobs.uploads import move_durably
from serve.training.tracking.lineage import record_runs
from serve.types import RESULTS_PURPOSE, Job, JobStatus, Run

T = TypeVar("T")

Wish = Literal["cancel", "pause"]
"""What a job's owner wants of whoever works on it: to stop and `release` it, which then does what is wanted."""

MAX_ATTEMPTS = 3  # without progress
MAX_CHECKPOINTS = 3  # of one job that are kept
# No delay is longer. A job that is to wait longer than this met a clock that has jumped back since, and need not.
_MAX_DELAY_MS = 600_000
_NOTHING: Mapping[str, Mapping[str, Any]] = {}


@dataclass(frozen=True, slots=True)
class Publication:
    """What an attempt is about to publish, said before it does: the folder `stage` becomes this revision."""

    stage: Path
    model_id: str
    revision: str
    main_before: str | None = None  # the revision that `main` named then, if any


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on `job`, until the lease ends or somebody holds a higher `fence`."""

    job: Job
    fence: int
    attempt: int  # 1 for the first since the job last made progress
    pending: Publication | None = None  # what the attempt before may have published, or may yet


@dataclass(frozen=True, slots=True)
class _Watched:
    """A lease as it was first seen, and when, by a clock that only goes forward."""

    fence: int
    lease_until_ms: int
    since: float


class JobQueue:
    """The worker's side of the job table. All methods but `claim` raise Conflict once the claim is lost.

    `patience_s`: how long those whose loss would cost work wait for a database that cannot be used; the others raise
    StoreUnavailable at once. `confirm_s`: how long this object itself must have seen a worker silent before it gives
    the job to another. `on_set_aside` is told of each job that `claim` ended or paused, whose worker cannot.
    """

    def __init__(
        self,
        database: Database,
        *,
        patience_s: float = 0.0,
        confirm_s: float = 0.0,
        on_set_aside: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self._database = database
        self._patience_s = patience_s
        self._confirm_s = confirm_s
        self._on_set_aside = on_set_aside
        self._watched: dict[int, _Watched] = {}  # by `seq` of the job

    def claim(self, worker: str, lease_s: float) -> Claim | None:
        """The job whose turn it is, of those that wait or whose worker has gone silent; None when there is none.

        A job that was tried `MAX_ATTEMPTS` times without progress ends here as failed ('poison_job').
        """
        claim, set_aside = None, []
        with self._database.write() as session:
            now = read_clock_ms(session)
            silent = self._find_silent(session, now, lease_s)
            while claim is None and (row := _next_row(session, now, silent)) is not None:
                if _set_aside(session, row, "its worker fell silent"):
                    session.flush()
                    set_aside.append(to_job(row))
                else:
                    claim = _take(session, row, worker, now, lease_s)
        for job in set_aside:  # now that it is sure
            self._on_set_aside(job)
        return claim

    def _find_silent(self, session: Session, now: int, lease_s: float) -> list[tuple[int, int, int]]:
        """(seq, fence, lease_until_ms) of the jobs whose worker is dead.

        1. Its lease has ended, and it was seen like that for `confirm_s`: after a jump of the clock, it would have
           sent a heartbeat meanwhile.
        2. It was seen unchanged for a whole lease: the clock has jumped back, or the lease would have ended.
        """
        columns = select(JobRow.seq, JobRow.fence, JobRow.lease_until_ms)
        running = session.execute(columns.where(JobRow.status == JobStatus.RUNNING)).all()
        at = time.monotonic()
        watched = {}
        for seq, fence, lease_until_ms in running:
            old = self._watched.get(seq)
            same = old is not None and (old.fence, old.lease_until_ms) == (fence, lease_until_ms)
            watched[seq] = old if old and same else _Watched(fence, lease_until_ms, at)
        self._watched = watched
        return [
            (seq, lease.fence, lease.lease_until_ms)
            for seq, lease in watched.items()
            if (lease.lease_until_ms < now and at - lease.since >= self._confirm_s) or at - lease.since > lease_s > 0
        ]

    def resume(self, job_id: str, fence: int) -> Claim:
        """The claim that another process of the same worker took."""

        def read() -> Claim:
            with self._database.read() as session:
                row = _held(session, job_id, fence)
                return Claim(to_job(row), row.fence, row.attempt, _publication(row))

        return patiently(read, self._patience_s)

    def check(self, claim: Claim) -> None:
        """Only raises Conflict or does not."""
        self.resume(claim.job.id, claim.fence)

    def outcome(self, claim: Claim) -> Job | None:
        """The job as the attempt has left it; None where another worker had taken it before, or it is deleted.

        To be asked soon after the end: when others have worked on the job since, it cannot be told any more.
        """
        with self._database.read() as session:
            row = session.scalars(select(JobRow).where(JobRow.id == claim.job.id)).first()
            if row is None:
                return None
            job, num_changes = to_job(row), row.fence - claim.fence  # of hands: each raises the fence
        if num_changes == 2 and job.status is JobStatus.RUNNING:  # it went back to the queue and was taken at once
            return replace(job, status=JobStatus.QUEUED)
        return job if num_changes == 1 and job.status is not JobStatus.RUNNING else None

    def _change(self, claim: Claim, change: Callable[[Session, JobRow], T], *, patience_s: float | None = None) -> T:
        """In one transaction, if the claim holds."""

        def attempt() -> T:
            with self._database.write() as session:
                return change(session, _held(session, claim.job.id, claim.fence))

        return patiently(attempt, self._patience_s if patience_s is None else patience_s)

    # --- While it works -----------------------------------------------------------------------------------

    def heartbeat(self, claim: Claim, lease_s: float) -> Wish | None:
        """Extends the lease; what the job's owner wants. Does not wait for the database."""

        def beat(session: Session, row: JobRow) -> Wish | None:
            row.lease_until_ms = read_clock_ms(session) + int(lease_s * 1000)
            return _wish(row)

        return self._change(claim, beat, patience_s=0)

    def read_wish(self, claim: Claim) -> Wish | None:
        """What the job's owner wants, for who cannot wait until its supervisor hears of it."""
        return self._change(claim, lambda _session, row: _wish(row))

    def add_event(
        self,
        claim: Claim,
        message: str,
        *,
        level: Literal["info", "warn", "error"] = "info",
        metrics: Mapping[str, Any] | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Tells the job's followers something; `seconds_left` moves its estimated finish.

        Metrics do not wait for the database: further ones come soon, and training goes on.
        """

        def tell(session: Session, row: JobRow) -> None:
            if seconds_left is not None:
                row.estimated_finish = int(read_clock_ms(session) / 1000 + seconds_left)
            add_event(session, row.id, message, level=level, metrics=metrics)

        self._change(claim, tell, patience_s=None if metrics is None else 0)

    def set_progress(self, claim: Claim, step: int) -> None:
        """All up to `step` is on the disk: where it never was before, attempts count anew. Does not wait."""

        def advance(_session: Session, row: JobRow) -> None:
            if step > row.progress:
                row.progress, row.attempt = step, 1

        self._change(claim, advance, patience_s=0)

    def add_result(self, claim: Claim, result: Mapping[str, Any]) -> None:
        """What is known of the job's outcome before its end."""

        def add(_session: Session, row: JobRow) -> None:
            row.result = {**(row.result or {}), **result}

        self._change(claim, add)

    def record_checkpoint(
        self, claim: Claim, *, step: int, model_id: str, metrics: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """`model_id`, which names a revision, can be used. Said again of a step, it replaces what was said before.

        The last `MAX_CHECKPOINTS` of a job count, as OpenAI has it: all that do, newest first.
        """

        def record(session: Session, row: JobRow) -> tuple[str, ...]:
            own = select(CheckpointRow).where(CheckpointRow.job_id == row.id)
            found = session.scalars(own.where(CheckpointRow.step == step)).first()
            if found is not None:
                found.model_id, found.metrics = model_id, dict(metrics)
            else:
                now = read_clock_ms(session) // 1000
                identity = {"id": new_id("ftckpt"), "job_id": row.id, "created_at": now, "step": step}
                session.add(CheckpointRow(**identity, model_id=model_id, metrics=dict(metrics)))
                add_event(session, row.id, f"Checkpoint '{model_id}' is ready, of step {step}.")
            session.flush()
            newest_first = list(session.scalars(own.order_by(CheckpointRow.step.desc())))
            for old in newest_first[MAX_CHECKPOINTS:]:
                session.delete(old)
            return tuple(checkpoint.model_id for checkpoint in newest_first[:MAX_CHECKPOINTS])

        return self._change(claim, record)

    def add_result_file(self, claim: Claim, uploads: Path, source: Path, filename: str) -> str:
        """Takes `source` over (moves it) as the job's result file of that name; its id. Another attempt's goes.

        Raises: Conflict, StoreUnavailable.
        """
        file_id, num_bytes = new_id("file"), source.stat().st_size
        move_durably(source, uploads / file_id)

        def name(session: Session, row: JobRow) -> list[str]:
            if session.scalar(select(FileRow.id).where(FileRow.id == file_id)):
                return []  # said again, for it was not heard that it had been done
            earlier = list((row.result or {}).get("result_files", ()))
            same = select(FileRow).where(FileRow.id.in_(earlier), FileRow.filename == filename)
            replaced = list(session.scalars(same))
            for file in replaced:
                session.delete(file)
            now = read_clock_ms(session) // 1000
            named = {"filename": filename, "purpose": RESULTS_PURPOSE, "owner": row.tenant}
            session.add(FileRow(id=file_id, num_bytes=num_bytes, created_at=now, **named))
            gone = [file.id for file in replaced]
            row.result = {**(row.result or {}), "result_files": [id for id in earlier if id not in gone] + [file_id]}
            return gone

        try:
            gone = self._change(claim, name)
        except Conflict:
            (uploads / file_id).unlink(missing_ok=True)
            raise
        for old in gone:
            (uploads / old).unlink(missing_ok=True)
        return file_id

    def set_publication(self, claim: Claim, publication: Publication | None) -> None:
        """Before publishing: from now on, the next attempt settles this publication before all else."""

        def announce(_session: Session, row: JobRow) -> None:
            row.publication = None if publication is None else _stored(publication)

        self._change(claim, announce)

    # --- Ends ---------------------------------------------------------------------------------------------

    def finish(
        self,
        claim: Claim,
        *,
        model_id: str,
        trained_tokens: int,
        result: Mapping[str, Any],
        runs: Sequence[Run] = (),
        deliveries: Mapping[str, Mapping[str, Any]] = _NOTHING,
    ) -> None:
        """The job has succeeded. `runs` are recorded with it; `deliveries`: tracker to be told of them -> options."""

        def end(session: Session, row: JobRow) -> None:
            row.fine_tuned_model = model_id
            row.trained_tokens = trained_tokens
            row.result = {**(row.result or {}), **result}
            record_runs(session, row.id, runs)
            for tracker, options in deliveries.items():
                session.add(DeliveryRow(job_id=row.id, tracker=tracker, status="waiting", options=dict(options)))
            end_job(session, row, JobStatus.SUCCEEDED, f"The model '{model_id}' is ready.")

        self._change(claim, end)

    def fail(self, claim: Claim, *, code: str, message: str, param: str | None = None) -> None:
        def end(session: Session, row: JobRow) -> None:
            row.error_code, row.error_message, row.error_param = code, message, param
            end_job(session, row, JobStatus.FAILED, message)

        self._change(claim, end)

    def release(self, claim: Claim) -> JobStatus:
        """Stopped without fault, the attempt not counted: cancelled or paused if that was asked, else to the queue."""

        def give_back(session: Session, row: JobRow) -> JobStatus:
            row.attempt -= 1
            if not _set_aside(session, row, "its worker was shut down"):
                _requeue(session, row, "The worker is shutting down; the job waits for another one.")
            return JobStatus(row.status)

        return self._change(claim, give_back)

    def abandon(self, claim: Claim, reason: str, delay_s: float = 0.0, *, code: str = "poison_job") -> JobStatus:
        """This attempt died of `reason`: back to the queue after `delay_s`, or failed as `code` if it was the last."""
        assert delay_s * 1000 <= _MAX_DELAY_MS

        def give_back(session: Session, row: JobRow) -> JobStatus:
            if not _set_aside(session, row, reason, code):
                row.not_before_ms = read_clock_ms(session) + int(delay_s * 1000)
                _requeue(session, row, f"Attempt {row.attempt} of {MAX_ATTEMPTS} ended early: {reason}.", level="warn")
            return JobStatus(row.status)

        return self._change(claim, give_back)


def _wish(row: JobRow) -> Wish | None:
    return "cancel" if row.cancel_requested else "pause" if row.pause_requested else None


def _stored(publication: Publication) -> dict[str, str]:
    said = {"stage": str(publication.stage), "model_id": publication.model_id, "revision": publication.revision}
    return {**said, "main_before": publication.main_before} if publication.main_before else said


def _publication(row: JobRow) -> Publication | None:
    stored = row.publication
    return Publication(**{**stored, "stage": Path(stored["stage"])}) if stored else None  # type: ignore[arg-type]


def _next_row(session: Session, now: int, silent: Sequence[tuple[int, int, int]]) -> JobRow | None:
    delayed = and_(JobRow.not_before_ms > now, JobRow.not_before_ms <= now + _MAX_DELAY_MS)
    waiting = and_(JobRow.status.in_((JobStatus.VALIDATING, JobStatus.QUEUED)), ~delayed)
    # NOTE: the lease is compared again, for PostgreSQL looks once more at a row that has changed since.
    columns = tuple_(JobRow.seq, JobRow.fence, JobRow.lease_until_ms)
    orphaned = and_(JobRow.status == JobStatus.RUNNING, columns.in_(silent)) if silent else false()
    query = select(JobRow).where(or_(waiting, orphaned))
    query = query.order_by(JobRow.priority.desc(), JobRow.turn, JobRow.seq).limit(1)
    return session.scalars(query.with_for_update(skip_locked=True)).first()  # SQLite: the whole file is locked


def _take(session: Session, row: JobRow, worker: str, now: int, lease_s: float) -> Claim:
    row.status = JobStatus.RUNNING
    row.started_at = row.started_at or now // 1000
    row.worker = worker
    row.fence += 1
    row.attempt += 1
    row.lease_until_ms = now + int(lease_s * 1000)
    again = "" if row.attempt == 1 else f" (attempt {row.attempt} of {MAX_ATTEMPTS})"
    add_event(session, row.id, f"The job has started{again}.")
    return Claim(to_job(row), row.fence, row.attempt, _publication(row))


def _held(session: Session, job_id: str, fence: int) -> JobRow:
    query = select(JobRow).where(JobRow.id == job_id, JobRow.fence == fence, JobRow.status == JobStatus.RUNNING)
    row = session.scalars(query.with_for_update()).first()
    if row is None:
        raise Conflict(f"Job '{job_id}' is no longer this worker's: it has ended, or another worker took it over.")
    return row


def _requeue(session: Session, row: JobRow, message: str, level: Literal["info", "warn"] = "info") -> None:
    row.status = JobStatus.QUEUED
    row.fence += 1  # NOTE: `publication` stays, for the next attempt to settle
    row.worker = row.estimated_finish = None
    add_event(session, row.id, message, level=level)


def _set_aside(session: Session, row: JobRow, reason: str, code: str = "poison_job") -> bool:
    """Ends or pauses a job that nobody works on and that should not be tried (again) now."""
    unsettled = row.publication is not None and row.attempt <= MAX_ATTEMPTS + 1
    if row.cancel_requested and not unsettled:
        end_job(session, row, JobStatus.CANCELLED, "The job was cancelled.")
    elif row.attempt >= MAX_ATTEMPTS and not unsettled:
        row.error_code = code
        row.error_message = (
            f"Training was tried {MAX_ATTEMPTS} times and never came to an end; the last time, {reason}."
        )
        end_job(session, row, JobStatus.FAILED, row.error_message)
    elif row.pause_requested and not row.cancel_requested:
        pause(session, row)
    else:
        return False  # where `unsettled`, its last worker may have published already: one more attempt finds out
    return True
