"""Takes jobs out of the trackers' folders here, and says which trackers elsewhere were told of them.

Trackio keeps all runs of a project in one file, and both keep what artifacts hold by its hash, shared by runs. But all
that they have here comes from our own record: so a tracker's folder goes as a whole, and it is told of the other jobs
again, from the outbox.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from pathlib import Path

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from serve.database.connection import Database
from serve.database.tables import DeliveryRow
from serve.training.tracking.deliver import alone
from serve.training.tracking.outbox import DONE, WAITING

PATIENCE_S = 10.0  # with who is telling a tracker at this moment
_POLL_S = 0.2


def forget_jobs(database: Database, data_dir: Path, job_ids: Collection[str]) -> tuple[int, list[str]]:
    """How many tellings went, and a sentence for each that is elsewhere. Raises: StoreUnavailable."""
    with database.read() as session:
        query = select(DeliveryRow).where(DeliveryRow.job_id.in_(job_ids), DeliveryRow.tries > 0)
        told = [(row.tracker, row.outcome or "", row.status) for row in session.scalars(query)]
    folders = {tracker: data_dir.absolute() / "trackers" / tracker for tracker, _, _ in told}
    unreached = [
        f"{tracker} was told of it: {outcome}."
        for tracker, outcome, status in told
        if outcome.startswith("http") or (status == DONE and not folders[tracker].is_dir())
    ]
    local = {tracker: folder for tracker, folder in folders.items() if folder.is_dir()}
    if local and not _drop(data_dir, list(local.values())):
        unreached.append("A tracker is being told at this moment: erase again when it has been.")
        return 0, unreached
    with database.write() as session:
        _tell_again(session, list(local))
    return sum(tracker in local for tracker, _, _ in told), unreached


def _drop(data_dir: Path, folders: list[Path]) -> bool:
    """Whether it could be done, while nobody tells a tracker anything."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with alone(data_dir) as is_alone:
            if is_alone:
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)


def _tell_again(session: Session, trackers: Collection[str]) -> None:
    """Of all jobs whose telling lay here."""
    here = (DeliveryRow.tracker.in_(trackers), DeliveryRow.status == DONE, DeliveryRow.outcome.not_like("http%"))
    values = {"status": WAITING, "tries": 0, "not_before_ms": 0}
    session.execute(update(DeliveryRow).where(*here).values(values))
