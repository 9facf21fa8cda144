"""What must be true when all is over, whatever was done to the service. Each gives sentences: what is not so.

- What was accepted has ended once.
- What was published loads, and hashes to its name.
- What was deleted is on no disk, and in no memory.
- Nothing temporary is left: no staged folder, no part of an upload or of a fetch, no slot, no lease, no process.
- Metrics and log have counted the same.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select

from serve.database.connection import Database
from serve.database.tables import EventRow, FileRow, JobRow
from serve.errors import ModelNotFound, RookeryError
from serve.hub.claims import Claims
from serve.store.model_files import content_hash
from serve.store.revisions import Store
from serve.store.validate import WEIGHTS, check_finite, check_folder
from serve.training.jobs.uploads import sweep_uploads
from serve.types import JobStatus
from tests.faults.traffic import Outcome

_LAST_WORDS = ("is ready.", "was cancelled.")
_FINAL = [status for status in JobStatus if status.is_final]
_UNTOLD_ROUTES = ("/healthz", "/readyz", "/health", "/metrics")  # in the log only where they fail


# --- Accepted: ended once -------------------------------------------------------------------------------------


def check_jobs(
    database: Database, store: Store, accepted: Mapping[str, str], *, may_fail: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Of the jobs that were accepted (id -> the model it makes, of a name of its own) the lost and the doubled ones.

    One that has neither succeeded nor was cancelled is lost, but for what failed with a code of `may_fail`.
    """
    lost, doubled = [], []
    with database.read() as session:
        rows = {row.id: row for row in session.scalars(select(JobRow))}
    for job_id, model_id in accepted.items():
        row = rows.get(job_id)
        excused = row is not None and row.status == JobStatus.FAILED and row.error_code in may_fail
        if row is None or (row.status not in (JobStatus.SUCCEEDED, JobStatus.CANCELLED) and not excused):
            lost.append(f"{job_id}: {row.status if row else 'gone'}: {row.error_message if row else ''}")
            continue
        ends = _ends(database, job_id)
        if len(ends) != 1:
            doubled.append(f"{job_id}: ended {len(ends)} times: {ends}")
        revisions = _finished_revisions(store, model_id)
        wanted = 1 if row.status == JobStatus.SUCCEEDED else 0
        if len(revisions) > wanted:
            doubled.append(f"{job_id}: {row.status} with revisions {revisions}")
        elif len(revisions) < wanted:
            lost.append(f"{job_id}: succeeded without a model")
        elif wanted and store.resolve(row.fine_tuned_model or "").revision != row.result["revision"]:
            lost.append(f"{job_id}: 'main' is not its revision")
    if len(rows) != len(accepted):
        doubled.append(f"{len(rows)} jobs of {len(accepted)} requests")
    return lost, doubled


def _ends(database: Database, job_id: str) -> list[str]:
    """The events that tell of an end."""
    with database.read() as session:
        events = session.scalars(select(EventRow).where(EventRow.job_id == job_id).order_by(EventRow.seq)).all()
    assert events and events[0].message == "The job was created.", job_id
    ends = [e.message for e in events if e.level == "error" or e.message.endswith(_LAST_WORDS)]
    if not ends or events[-1].message != ends[-1]:
        ends.append(f"and then: {events[-1].message}")
    return ends


def _finished_revisions(store: Store, model_id: str) -> list[str]:
    """Those that are no checkpoint from the middle of a training."""
    try:
        return [found.revision for found in store.list_revisions(model_id) if found.step is None]
    except ModelNotFound:
        return []


# --- Published: whole -----------------------------------------------------------------------------------------


def check_models(store: Store, fetched: Mapping[str, Path]) -> list[str]:
    """Every revision that the store lists. `fetched`: of those from the Hub, model id -> the folder that it serves."""
    broken = []
    for model_id in _all_models(store):
        for info in store.list_revisions(model_id):
            name = f"{model_id}@{info.revision}"
            try:
                folder = store.resolve(name).path
                check_folder(folder)
                check_finite(folder)
            except RookeryError as exc:
                broken.append(f"{name}: {exc.message}")
                continue
            if (source := fetched.get(model_id)) is not None:
                is_same = _sha256(folder / WEIGHTS) == _sha256(source / WEIGHTS)
            else:
                is_same = content_hash(folder) == info.revision
            if not is_same:
                broken.append(f"{name}: its bytes are others")
    return broken


def _all_models(store: Store) -> Iterator[str]:
    after: str | None = None
    while True:
        page = store.list_models(limit=100, after=after)
        yield from (info.model_id for info in page.items)
        if not page.has_more:
            return
        after = page.items[-1].model_id


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Deleted: gone --------------------------------------------------------------------------------------------


def check_gone(folders: Sequence[Path], marks: Mapping[bytes, str]) -> list[str]:
    """`marks`: bytes that only a deleted thing had -> its name."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return [f"{name} is still in {path}" for path in files for name in _found(path, marks)]


def _found(path: Path, marks: Mapping[bytes, str]) -> list[str]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [name for mark, name in marks.items() if content.find(mark) >= 0]


# --- Nothing is left ------------------------------------------------------------------------------------------


def check_leftovers(data: Path, database: Database) -> list[str]:
    """After the last process has ended, and a store was opened, which sweeps what the dead had."""
    models, uploads = data / "models", data / "uploads"
    Claims(models / ".fetching").sweep(0)  # what a fetch leaves for the next one is not lost room: it can be had back
    with database.read() as session:
        files = set(session.scalars(select(FileRow.id)))
    if uploads.is_dir():
        # As supervisors do, which wait for those that may still be written.
        sweep_uploads(uploads, files, time.time() + 1)
    with database.read() as session:
        held = session.scalars(
            select(JobRow.id).where(
                JobRow.status.in_(_FINAL), JobRow.worker.is_not(None) | JobRow.publication.is_not(None)
            )
        ).all()
    left = [
        *_in(models / ".staging"),
        *(path for path in _in(models / ".fetching") if path.name != "answered"),  # a mark of the data folder's own
        *_in(data / "training"),
        *(path for path in _in(uploads) if path.name not in files),
    ]
    return [f"left behind: {path.relative_to(data)}" for path in left] + [f"{job_id} is held" for job_id in held]


def _in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def check_idle(replicas: Sequence[Mapping[str, Any]], deleted: Collection[str]) -> list[str]:
    """What generators say (/v1/replicas) when nobody asks them for anything."""
    broken = []
    for replica in replicas:
        busy = {name: replica[name] for name in ("waiting", "queued", "running") if replica[name]}
        leased = [one["model"] for one in replica["residents"] if one["leases"]]
        kept = [one["model"] for one in replica["residents"] if one["model"] in deleted]
        if busy or leased or kept:
            broken.append(f"{replica['replica']}: {busy}, leased {leased}, deleted and in memory {kept}")
    return broken


# --- Counted the same -----------------------------------------------------------------------------------------


def check_counts(metrics: str, logs: Sequence[Path], *, slack: int) -> list[str]:
    """`slack`: processes that were killed: each may have died between its counter and its line."""
    counted, told = _counted(metrics), _told(logs)
    return [
        f"{' '.join(what)}: {counted[what]:.0f} by the metrics, {told[what]} in the log"
        for what in sorted(counted.keys() | told.keys())
        if abs(counted[what] - told[what]) > slack
    ]


def _counted(metrics: str) -> Counter[tuple[str, ...]]:
    counted = Counter[tuple[str, ...]]()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "rookery_requests_total" and sample.labels["route"] not in _UNTOLD_ROUTES:
                counted["request", sample.labels["route"], sample.labels["status"]] += int(sample.value)
            elif sample.name == "rookery_generations_total":
                counted["generated", sample.labels["outcome"]] += int(sample.value)
    return counted


def _told(logs: Sequence[Path]) -> Counter[tuple[str, ...]]:
    told = Counter[tuple[str, ...]]()
    for line in log_lines(logs):
        if line["event"] == "request" and line["route"] not in _UNTOLD_ROUTES:
            told["request", line["route"], str(line["status"])] += 1
        elif line["event"] == "generated":
            told["generated", line["outcome"]] += 1
    return told


def log_lines(logs: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in logs:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


# --- Answered -------------------------------------------------------------------------------------------------


def cut_by(outcomes: Sequence[Outcome], kills_s: Sequence[float], *, within_s: float = 2.0) -> list[Outcome]:
    """The streams that broke off when a gateway was killed that may have carried them. Times by `time.monotonic`."""
    return [
        one
        for one in outcomes
        if one.is_stream and one.ended == "cut"
        if any(one.began_s <= at + within_s and at <= one.ended_s <= at + within_s for at in kills_s)
    ]
