"""Rows of jobs, files and events: made, found, paged, moved from state to state, in the caller's transaction.

Knows what the states of a job mean and whose turn it is. Knows no files, and nobody who works on a job.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, TypeVar, cast

from sqlalchemy import ColumnElement, Select, String, delete, false, func, or_, select
from sqlalchemy import cast as cast_to
from sqlalchemy.orm import InstrumentedAttribute, Session

from serve.database.connection import read_clock_ms
from serve.database.tables import (
    CheckpointRow,
    EventRow,
    FileRow,
    IdempotencyRow,
    JobLabelRow,
    JobRow,
)
from serve.errors import Conflict, NotFound
from serve.types import (
    ALL_SEEING,
    Checkpoint,
    Hyperparameters,
    Integration,
    Job,
    JobEvent,
    JobRequest,
    JobStatus,
    TrainingFile,
    Viewer,
    Visibility,
)

KEY_LIFETIME_S = 24 * 3600  # of an idempotency key
WAITING_STATES = (JobStatus.VALIDATING, JobStatus.QUEUED)
OPEN_STATES = (*WAITING_STATES, JobStatus.RUNNING, JobStatus.PAUSED)
_Row = TypeVar("_Row", FileRow, JobRow, EventRow, CheckpointRow)


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


def of_viewer(column: InstrumentedAttribute[str], viewer: Viewer) -> list[ColumnElement[bool]]:
    """What holds of rows that are theirs. `column`: the tenant whose a row is."""
    if viewer.sees_all:
        return []
    return [column == viewer.tenant] if viewer.tenant else [false()]


def file_ids(request: Mapping[str, Any]) -> list[str]:
    """All files that a stored request names."""
    validation = request.get("validation_file")
    return [entry["file_id"] for entry in request["files"]] + ([validation] if validation else [])


def add_job(session: Session, request: JobRequest, status: JobStatus, result: dict[str, Any]) -> JobRow:
    row = JobRow(
        id=new_id("ftjob"),
        request=asdict(request),
        status=status,
        created_at=read_clock_ms(session) // 1000,
        seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
        result=result,
        owner=request.owner,
        tenant=request.viewer.tenant,
        priority=request.priority,
        turn=_next_turn(session, request),
    )
    session.add(row)
    session.flush()
    labels = request.metadata.items()
    session.add_all(JobLabelRow(job_seq=row.seq, key=key, value=value) for key, value in labels)
    add_event(session, row.id, "The job was created.")
    return row


def _next_turn(session: Session, request: JobRequest) -> int:
    """After the job last begun, and after its owner's other jobs: so callers take turns, however many jobs each has.

    Source: start-time fair queuing (Goyal, Vin and Cheng, 1996), each job of cost one. Each priority has turns of its
    own.
    """
    of_owner = (JobRow.owner == request.owner, JobRow.status.in_(OPEN_STATES))
    turns = select(JobRow.turn).where(JobRow.priority == request.priority, *of_owner)
    own = session.scalar(turns.order_by(JobRow.turn.desc()).limit(1)) or 0
    return max(_turn_begun(session, request.priority), own) + 1


def turn_again(session: Session, row: JobRow) -> int:
    """The first from its own on that is to come and that no waiting job of its owner has: a pause saves none up."""
    first = max(row.turn, _turn_begun(session, row.priority) + 1)
    same = (JobRow.priority == row.priority, JobRow.owner == row.owner, JobRow.turn >= first)
    taken = set(
        session.scalars(select(JobRow.turn).where(*same, JobRow.status.in_(WAITING_STATES), JobRow.seq != row.seq))
    )
    return next(turn for turn in itertools.count(first) if turn not in taken)


def _turn_begun(session: Session, priority: int) -> int:
    """Of the job last begun. Those that were given back wait for their turn again."""
    begun = (JobRow.started_at.is_not(None), JobRow.status.not_in((*WAITING_STATES, JobStatus.PAUSED)))
    turns = select(JobRow.turn).where(JobRow.priority == priority, *begun).order_by(JobRow.turn.desc()).limit(1)
    return session.scalar(turns) or 0


def jobs_of(session: Session, model_id: str) -> list[JobRow]:
    """All that made it, or would have: jobs say so when they have read their archives."""
    named = func.lower(cast_to(JobRow.result, String)).contains(model_id.lower(), autoescape=True)
    query = select(JobRow).where(or_(func.lower(JobRow.fine_tuned_model) == model_id.lower(), named))
    rows = session.scalars(query.with_for_update()).all()
    return [row for row in rows if model_id.lower() == (row.fine_tuned_model or row.result.get("model_id", "")).lower()]


def cancel_row(session: Session, row: JobRow) -> None:
    if row.status == JobStatus.RUNNING or row.publication is not None:
        row.cancel_requested = True
        if row.status == JobStatus.PAUSED:
            row.status = JobStatus.QUEUED  # its last worker may have published: one more attempt finds out
        add_event(session, row.id, "Cancelling was asked for.")
    else:
        end_job(session, row, JobStatus.CANCELLED, "The job was cancelled.")


def find_by_key(session: Session, owner: str, key: str, digest: str) -> JobRow | None:
    """Raises: Conflict when the key came with another request."""
    query = select(IdempotencyRow).where(IdempotencyRow.owner == owner, IdempotencyRow.key == key)
    known = session.scalars(query).first()
    if known is None or known.created_at <= _oldest_key(session):
        return None
    if known.request_sha256 != digest:
        raise Conflict(
            "This Idempotency-Key has already come with another request, which made job "
            f"'{known.job_id}': send a new key with a new request. Keys are remembered for {KEY_LIFETIME_S // 3600} h."
        )
    return find_row(session, JobRow, known.job_id)


def forget_old_keys(session: Session) -> None:
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at <= _oldest_key(session)))


def _oldest_key(session: Session) -> int:
    return read_clock_ms(session) // 1000 - KEY_LIFETIME_S


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


def pause(session: Session, row: JobRow) -> None:
    """Nobody works on it any more, and nobody will until its owner says so."""
    row.status = JobStatus.PAUSED
    row.pause_requested = False
    row.fence += 1  # NOTE: `publication` stays, for the next attempt to settle
    row.worker = row.estimated_finish = None
    add_event(session, row.id, "The job is paused.")


def _to_request(stored: Mapping[str, Any]) -> JobRequest:
    return JobRequest(
        base_model=stored["base_model"],
        files=tuple(TrainingFile(**entry) for entry in stored["files"]),
        hyperparameters=Hyperparameters(**stored["hyperparameters"]),
        suffix=stored["suffix"],
        seed=stored["seed"],
        metadata=stored["metadata"],
        # Jobs of the first release lack what follows.
        validation_file=stored.get("validation_file"),
        integrations=tuple(
            Integration(**{**entry, "tags": tuple(entry["tags"])}) for entry in stored.get("integrations", ())
        ),
        priority=stored.get("priority", 0),
        owner=stored.get("owner", ""),
        viewer=Viewer(**stored["viewer"]) if "viewer" in stored else ALL_SEEING,
        visibility=Visibility(stored.get("visibility", Visibility.PUBLIC)),
    )


def to_event(row: EventRow) -> JobEvent:
    level = cast(Literal["info", "warn", "error"], row.level)
    kind = cast(Literal["message", "metrics"], row.type)
    return JobEvent(row.id, row.job_id, row.created_at, level, row.message, kind, row.data)


def to_checkpoint(row: CheckpointRow) -> Checkpoint:
    return Checkpoint(row.id, row.job_id, row.created_at, row.step, row.model_id, row.metrics)


def find_open(session: Session, job_id: str) -> JobRow:
    """Raises: NotFound; Conflict."""
    row = find_row(session, JobRow, job_id, lock=True)
    if JobStatus(row.status).is_final:
        raise Conflict(f"Job '{job_id}' has already ended: it is {row.status}.")
    return row


def find_row(
    session: Session,
    kind: type[_Row],
    row_id: str,
    *conditions: ColumnElement[bool],
    lock: bool = False,
    param: str | None = None,
) -> _Row:
    """Raises: NotFound, also where it does not meet the conditions."""
    query = select(kind).where(kind.id == row_id, *conditions)
    row = session.scalars(query.with_for_update() if lock else query).first()
    if row is None:
        noun = {FileRow: "file", JobRow: "job", EventRow: "event", CheckpointRow: "checkpoint"}[kind]
        raise NotFound(f"There is no {noun} of that id.", param=param)
    return row


def page_of_rows(
    session: Session,
    query: Select[_Row],
    kind: type[_Row],
    limit: int,
    after: str | None,
    *conditions: ColumnElement[bool],
    newest_first: bool,
) -> tuple[list[_Row], bool]:
    """`after`: a row that meets the conditions, as all do that are given. Raises: NotFound."""
    query = query.where(*conditions)
    if after is not None:
        seq = find_row(session, kind, after, *conditions, param="after").seq
        query = query.where(kind.seq < seq if newest_first else kind.seq > seq)
    ordered = query.order_by(kind.seq.desc() if newest_first else kind.seq).limit(limit + 1)
    rows = list(session.scalars(ordered))
    return rows[:limit], len(rows) > limit
