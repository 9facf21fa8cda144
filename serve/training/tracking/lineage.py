"""The record of runs and artifacts in SQL: written with a job's success; its page and trackers read it.

An artifact is a type, a name and a digest; the digests under one name are numbered v0, v1, ... as they first appear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from serve.database.connection import NUMBERING_LOCK, read_clock_ms, take_lock
from serve.database.tables import ArtifactRow, RunArtifactRow, RunRow
from serve.types import Artifact, Run

_ORDER = ("raw-dataset", "train-dataset", "pretrained-model", "finetuned-model")


# --- Writing ------------------------------------------------------------------------------------------------


def record_runs(session: Session, job_id: str, runs: Sequence[Run]) -> None:
    """Puts a job's runs in place of those recorded of it before; recording the same twice changes nothing."""
    take_lock(session, NUMBERING_LOCK)
    now = read_clock_ms(session) // 1000
    for run in runs:
        assert run.job_id == job_id, "the run of another job"
        row = _run_row(session, run)
        session.execute(delete(RunArtifactRow).where(RunArtifactRow.run_seq == row.seq))
        for is_output, artifacts in ((False, run.inputs), (True, run.outputs)):
            for artifact in dict.fromkeys(_find_or_add(session, artifact, now) for artifact in artifacts):
                session.add(RunArtifactRow(run_seq=row.seq, artifact_seq=artifact, is_output=is_output))
    session.flush()


def _run_row(session: Session, run: Run) -> RunRow:
    row = session.scalars(select(RunRow).where(RunRow.job_id == run.job_id, RunRow.job_type == run.job_type)).first()
    if row is None:
        row = RunRow(id=run_id(run), job_id=run.job_id, job_type=run.job_type)
        session.add(row)
    row.name, row.started_at, row.finished_at = run.name, run.started_at, run.finished_at
    row.config, row.summary = dict(run.config), dict(run.summary)
    row.history, row.tables = dict(run.history), dict(run.tables)
    session.flush()
    return row


def _find_or_add(session: Session, artifact: Artifact, now: int) -> int:
    """The `seq` of its row."""
    assert artifact.digest, f"{artifact.type} without a digest"
    same_name = (ArtifactRow.type == artifact.type, ArtifactRow.name == artifact.name)
    found = session.scalars(select(ArtifactRow).where(*same_name, ArtifactRow.digest == artifact.digest)).first()
    if found is None:
        newest = session.scalars(select(func.max(ArtifactRow.version)).where(*same_name)).one()
        found = ArtifactRow(
            id=f"{artifact.type}/{artifact.name}@{artifact.digest}",
            type=artifact.type,
            name=artifact.name,
            version=0 if newest is None else newest + 1,
            digest=artifact.digest,
            created_at=now,
            data=dict(artifact.data),
        )
        session.add(found)
        session.flush()
    return found.seq


# --- Reading ------------------------------------------------------------------------------------------------


def run_id(run: Run) -> str:
    """The same for the same job: a run that is told again replaces itself."""
    return f"{run.job_id}-{run.job_type}"


def read_runs(session: Session, job_id: str) -> tuple[Run, ...]:
    """Preprocess, then train; nothing where the job has not ended well."""
    rows = session.scalars(select(RunRow).where(RunRow.job_id == job_id).order_by(RunRow.job_type)).all()
    return tuple(_to_run(session, row) for row in rows)


def _to_run(session: Session, row: RunRow) -> Run:
    query = (
        select(ArtifactRow, RunArtifactRow.is_output)
        .join(RunArtifactRow, RunArtifactRow.artifact_seq == ArtifactRow.seq)
        .where(RunArtifactRow.run_seq == row.seq)
        .order_by(ArtifactRow.name)
    )
    rows = sorted(session.execute(query), key=lambda found: _ORDER.index(found[0].type))
    artifacts = [(_to_artifact(artifact), is_output) for artifact, is_output in rows]
    return Run(
        job_id=row.job_id,
        job_type=cast(Any, row.job_type),
        name=row.name,
        started_at=row.started_at,
        finished_at=row.finished_at,
        config=row.config,
        summary=row.summary,
        history=row.history,
        tables=row.tables,
        inputs=tuple(artifact for artifact, is_output in artifacts if not is_output),
        outputs=tuple(artifact for artifact, is_output in artifacts if is_output),
    )


def _to_artifact(row: ArtifactRow) -> Artifact:
    return Artifact(cast(Any, row.type), row.name, row.digest, row.version, row.data)
