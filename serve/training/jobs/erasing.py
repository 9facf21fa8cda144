"""Takes what jobs wrote of a person out of the database, in the caller's transaction.

That a job was, when, and how it ended stays on record: whoever follows one still learns of its end.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from serve.database.tables import (
    ArtifactRow,
    CheckpointRow,
    EventRow,
    FileRow,
    IdempotencyRow,
    JobLabelRow,
    JobRow,
    RunArtifactRow,
    RunRow,
)
from serve.training.jobs.rows import add_event, cancel_row, end_job
from serve.types import JobStatus

ERASED = "What this job had learnt from was erased."
_KEPT_RESULT = ("num_parameters", "duration_s")


def cancel(session: Session, job_ids: Collection[str]) -> set[str]:
    """Those that are open; the models that they were making, as far as they have said."""
    making = set[str]()
    for row in _rows(session, job_ids):
        if not JobStatus(row.status).is_final:
            making.add((row.result or {}).get("model_id") or "")
            if not row.cancel_requested:
                cancel_row(session, row)
    return making - {""}


def open_among(session: Session, job_ids: Collection[str]) -> list[str]:
    """Those that have not ended."""
    return [row.id for row in _rows(session, job_ids) if not JobStatus(row.status).is_final]


def end(session: Session, job_ids: Collection[str]) -> None:
    """Cuts off whoever still works on them."""
    for row in _rows(session, job_ids):
        if not JobStatus(row.status).is_final:
            end_job(session, row, JobStatus.CANCELLED, "The job was cancelled.")


def erase(session: Session, job_ids: Collection[str]) -> int:
    """The texts, names and numbers of these jobs, which have ended; about how many bytes they were.

    Not what trackers were told of them, see `serve.training.tracking.forgetting`.
    """
    rows = _rows(session, job_ids)
    runs = session.scalars(select(RunRow).where(RunRow.job_id.in_(job_ids))).all()
    events = session.scalars(select(EventRow).where(EventRow.job_id.in_(job_ids))).all()
    num_bytes = sum(len(json.dumps([row.request, row.result])) for row in rows)
    num_bytes += sum(len(json.dumps([run.config, run.summary, run.history, run.tables])) for run in runs)
    num_bytes += sum(len(event.message) + len(json.dumps(event.data)) for event in events)
    _drop_runs(session, [run.seq for run in runs])
    for kind in (EventRow, CheckpointRow, IdempotencyRow):
        session.execute(delete(kind).where(kind.job_id.in_(job_ids)))
    session.execute(delete(JobLabelRow).where(JobLabelRow.job_seq.in_([row.seq for row in rows])))
    for row in rows:
        row.request = {**row.request, "files": [], "validation_file": None, "suffix": None, "metadata": {}}
        row.request = {**row.request, "integrations": [], "base_model": ""}  # it may be a bot of theirs
        row.result = {name: row.result[name] for name in _KEPT_RESULT if name in (row.result or {})}
        row.fine_tuned_model = row.error_message = row.error_param = row.publication = None
        add_event(session, row.id, ERASED)
    return num_bytes


def drop_files(session: Session, file_ids: Collection[str]) -> None:
    """Their rows; the bytes are the caller's."""
    session.execute(delete(FileRow).where(FileRow.id.in_(file_ids)))


def _drop_runs(session: Session, seqs: Sequence[int]) -> None:
    """With the artifacts that no other run has used or made."""
    links = select(RunArtifactRow.artifact_seq).where(RunArtifactRow.run_seq.in_(seqs))
    artifacts = set(session.scalars(links))
    session.execute(delete(RunArtifactRow).where(RunArtifactRow.run_seq.in_(seqs)))
    session.execute(delete(RunRow).where(RunRow.seq.in_(seqs)))
    shared = select(RunArtifactRow.artifact_seq).where(RunArtifactRow.artifact_seq.in_(artifacts))
    session.execute(delete(ArtifactRow).where(ArtifactRow.seq.in_(artifacts - set(session.scalars(shared)))))


def _rows(session: Session, job_ids: Collection[str]) -> Sequence[JobRow]:
    return session.scalars(select(JobRow).where(JobRow.id.in_(job_ids)).with_for_update()).all()
