"""The record of runs and artifacts in SQL: written with a job's success; its page, its model's and trackers read it.

An artifact is a type, a name and a digest; the digests under one name are numbered v0, v1, ... as they first appear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import delete, func, select, text
from sqlalchemy.orm import Session

from serve.database.connection import read_clock_ms
from serve.database.tables import ArtifactRow, RunArtifactRow, RunRow
from serve.types import Artifact, Run

_ORDER = ("raw-dataset", "train-dataset", "pretrained-model", "finetuned-model")
_NUMBERING_LOCK = 7_294_002  # any constant: PostgreSQL's advisory lock under which artifacts are numbered


@dataclass(frozen=True, slots=True)
class Node:
    """A run or an artifact. `type`: of an artifact, else the run's job type. `label` is shown: `dataset-ada:v0`."""

    id: str
    kind: str  # "run" | "artifact"
    type: str
    label: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """A graph without cycles; an edge leads from what was used to what used it, or from a run to what it made."""

    nodes: tuple[Node, ...]
    edges: tuple[tuple[str, str], ...]  # ids of nodes


# --- Writing ------------------------------------------------------------------------------------------------


def record_runs(session: Session, job_id: str, runs: Sequence[Run]) -> None:
    """Puts a job's runs in place of those recorded of it before; recording the same twice changes nothing."""
    _serialise(session)
    now = read_clock_ms(session) // 1000
    for run in runs:
        assert run.job_id == job_id, "the run of another job"
        row = _run_row(session, run)
        session.execute(delete(RunArtifactRow).where(RunArtifactRow.run_seq == row.seq))
        for is_output, artifacts in ((False, run.inputs), (True, run.outputs)):
            for artifact in dict.fromkeys(_find_or_add(session, artifact, now) for artifact in artifacts):
                session.add(RunArtifactRow(run_seq=row.seq, artifact_seq=artifact, is_output=is_output))
    session.flush()


def _serialise(session: Session) -> None:
    """Until the transaction ends, nobody else numbers artifacts. On SQLite whoever writes is alone anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _NUMBERING_LOCK})


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


def lineage_of(session: Session, name: str, digest: str | None = None) -> Lineage:
    """Of the model `name` (without its namespace): of that revision, or of the newest; empty for an unknown one."""
    query = (
        select(RunRow.job_id)
        .join(RunArtifactRow, RunArtifactRow.run_seq == RunRow.seq)
        .join(ArtifactRow, ArtifactRow.seq == RunArtifactRow.artifact_seq)
        .where(RunArtifactRow.is_output, ArtifactRow.type == "finetuned-model", ArtifactRow.name == name)
        .order_by(ArtifactRow.version.desc(), RunRow.seq.desc())
    )
    if digest is not None:
        query = query.where(ArtifactRow.digest == digest)
    job_id = session.scalars(query.limit(1)).first()
    return as_graph(() if job_id is None else read_runs(session, job_id))


def as_graph(runs: Sequence[Run]) -> Lineage:
    """The runs, and what they used and made, each once."""
    nodes: dict[str, Node] = {}
    edges: dict[tuple[str, str], None] = {}
    for run in runs:
        of_run = Node(run_id(run), "run", run.job_type, run.name)
        inputs, outputs = map(_to_node, run.inputs), map(_to_node, run.outputs)
        for node in inputs:
            nodes[node.id] = node
            edges[node.id, of_run.id] = None
        nodes[of_run.id] = of_run
        for node in outputs:
            nodes[node.id] = node
            edges[of_run.id, node.id] = None
    return Lineage(tuple(nodes.values()), tuple(edges))


def _to_node(artifact: Artifact) -> Node:
    label = f"{artifact.name}:v{artifact.version}"
    return Node(f"{artifact.type}/{label}", "artifact", artifact.type, label)


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
