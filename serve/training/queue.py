"""Who works on which training job: leases, attempts and fencing tokens.

A claim is a lease with a number that only rises. Every later call shows that number, so a worker that was
stopped, replaced and woken again is told so (Conflict) before it can change anything. Knows nothing of
training or processes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from serve.errors import Conflict
from serve.training.database import Database, JobRow, read_clock_ms
from serve.training.jobs import add_event, end_job, to_job
from serve.types import Job, JobStatus

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Publication:
    """What an attempt is about to publish, said before it does: the folder `stage` becomes this revision."""

    stage: Path
    model_id: str
    revision: str


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on `job`, until the lease ends or somebody holds a higher `fence`."""

    job: Job
    fence: int
    attempt: int  # 1 for the first
    pending: Publication | None = None  # what the attempt before may have published, or may yet


class JobQueue:
    """The worker's side of the job table. All methods but `claim` raise Conflict once the claim is lost."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(self, worker: str, lease_s: float) -> Claim | None:
        """The oldest job that waits or whose worker has gone silent; None when there is none.

        A job that was tried `MAX_ATTEMPTS` times ends here as failed ('poison_job').
        """
        with self._database.write() as session:
            now = read_clock_ms(session)
            while (row := _next_row(session, now)) is not None:
                if not _end_if_due(session, row, "its worker fell silent"):
                    return _take(session, row, worker, now, lease_s)
                session.flush()
        return None

    def resume(self, job_id: str, fence: int) -> Claim:
        """The claim that another process of the same worker took."""
        with self._database.read() as session:
            row = _held(session, job_id, fence)
            return Claim(to_job(row), row.fence, row.attempt, _publication(row))

    def heartbeat(self, claim: Claim, lease_s: float) -> bool:
        """Extends the lease; whether the job's owner wants it cancelled."""
        with self._database.write() as session:
            row = _held(session, claim.job.id, claim.fence)
            row.lease_until_ms = read_clock_ms(session) + int(lease_s * 1000)
            return row.cancel_requested

    def add_event(
        self,
        claim: Claim,
        message: str,
        *,
        level: Literal["info", "warn", "error"] = "info",
        metrics: Mapping[str, Any] | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Tells the job's followers something; `seconds_left` moves its estimated finish."""
        with self._database.write() as session:
            row = _held(session, claim.job.id, claim.fence)
            if seconds_left is not None:
                row.estimated_finish = int(read_clock_ms(session) / 1000 + seconds_left)
            add_event(session, row.id, message, level=level, metrics=metrics)

    def set_publication(self, claim: Claim, publication: Publication | None) -> None:
        """Before publishing: from now on, the next attempt settles this publication before all else."""
        with self._database.write() as session:
            row = _held(session, claim.job.id, claim.fence)
            row.publication = None if publication is None else _stored(publication)

    def check(self, claim: Claim) -> None:
        """Only raises Conflict or does not."""
        with self._database.read() as session:
            _held(session, claim.job.id, claim.fence)

    def finish(self, claim: Claim, *, model_id: str, trained_tokens: int, result: Mapping[str, Any]) -> None:
        with self._database.write() as session:
            row = _held(session, claim.job.id, claim.fence)
            row.fine_tuned_model = model_id
            row.trained_tokens = trained_tokens
            row.result = {**(row.result or {}), **result}
            end_job(session, row, JobStatus.SUCCEEDED, f"The model '{model_id}' is ready.")

    def fail(self, claim: Claim, *, code: str, message: str, param: str | None = None) -> None:
        with self._database.write() as session:
            row = _held(session, claim.job.id, claim.fence)
            row.error_code, row.error_message, row.error_param = code, message, param
            end_job(session, row, JobStatus.FAILED, message)

    def release(self, claim: Claim) -> JobStatus:
        """Stopped without fault: back to the queue, the attempt not counted; or cancelled if that was asked."""
        with self._database.write() as session:
            row = _held(session, claim.job.id, claim.fence)
            row.attempt -= 1
            if not _end_if_due(session, row, "its worker was shut down"):
                _requeue(session, row, "The worker is shutting down; the job waits for another one.")
            return JobStatus(row.status)

    def abandon(self, claim: Claim, reason: str, delay_s: float = 0.0, *, code: str = "poison_job") -> JobStatus:
        """This attempt died of `reason`: back to the queue after `delay_s`, or failed as `code` if it was the last."""
        with self._database.write() as session:
            row = _held(session, claim.job.id, claim.fence)
            if not _end_if_due(session, row, reason, code):
                row.not_before_ms = read_clock_ms(session) + int(delay_s * 1000)
                _requeue(session, row, f"Attempt {row.attempt} of {MAX_ATTEMPTS} ended early: {reason}.", level="warn")
            return JobStatus(row.status)


def _stored(publication: Publication) -> dict[str, str]:
    return {"stage": str(publication.stage), "model_id": publication.model_id, "revision": publication.revision}


def _publication(row: JobRow) -> Publication | None:
    stored = row.publication
    return Publication(Path(stored["stage"]), stored["model_id"], stored["revision"]) if stored else None


def _next_row(session: Session, now: int) -> JobRow | None:
    waiting = and_(JobRow.status.in_((JobStatus.VALIDATING, JobStatus.QUEUED)), JobRow.not_before_ms <= now)
    silent = and_(JobRow.status == JobStatus.RUNNING, JobRow.lease_until_ms < now)
    query = select(JobRow).where(or_(waiting, silent)).order_by(JobRow.seq).limit(1)
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


def _end_if_due(session: Session, row: JobRow, reason: str, code: str = "poison_job") -> bool:
    """Ends a job that nobody works on and that should not be tried (again): cancelled, or tried too often."""
    if row.publication is not None and row.attempt <= MAX_ATTEMPTS + 1:
        return False  # its last worker may have published already: one more attempt finds out
    if row.cancel_requested:
        end_job(session, row, JobStatus.CANCELLED, "The job was cancelled.")
    elif row.attempt >= MAX_ATTEMPTS:
        row.error_code = code
        row.error_message = (
            f"Training was tried {MAX_ATTEMPTS} times and never came to an end; the last time, {reason}."
        )
        end_job(session, row, JobStatus.FAILED, row.error_message)
    return JobStatus(row.status).is_final
