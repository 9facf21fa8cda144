"""Takes jobs out of the trackers' folders here, and says which trackers elsewhere were told of them.

Trackio keeps all runs of a project in one file, and both keep what artifacts hold by its hash, shared by runs. But all
that they have here comes from our own record: so a tracker's folder goes as a whole, and it is told of the other jobs
again, from the outbox.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from serve.database.connection import Database
from serve.database.tables import DeliveryRow
from serve.errors import StoreUnavailable
from serve.store.disk import translated
from serve.training.tracking.deliver import alone
from serve.training.tracking.outbox import DONE, WAITING

PATIENCE_S = 10.0  # with who is telling a tracker at this moment
_POLL_S = 0.2


def forget_jobs(database: Database, data_dir: Path, job_ids: Collection[str]) -> tuple[int, list[str]]:
    """How many tellings went, and a sentence for each that is elsewhere.

    Raises: StoreUnavailable, also while a tracker is told of anything: by what stays then, they are found again.
    """
    own = DeliveryRow.job_id.in_(job_ids)
    with database.write() as session:  # nobody begins to tell these any more; who has begun has counted a try
        session.execute(delete(DeliveryRow).where(own, DeliveryRow.tries == 0))
        if session.scalars(select(DeliveryRow.job_id).where(own).limit(1)).first() is None:
            return 0, []
    with _while_nobody_tells(data_dir):
        with database.read() as session:
            told = list(session.scalars(select(DeliveryRow).where(own).order_by(DeliveryRow.job_id)))
            folders = {row.tracker: data_dir.absolute() / "trackers" / row.tracker for row in told}
            local = {tracker for tracker, folder in folders.items() if folder.is_dir()}
            unreached = [sentence for row in told if (sentence := _where(row, row.tracker in local))]
            num_local = sum(row.tracker in local for row in told)
        with translated("forget what a tracker was told"):
            for tracker in local:
                shutil.rmtree(folders[tracker])
        with database.write() as session:
            session.execute(delete(DeliveryRow).where(own))
            _tell_again(session, local)
    return num_local, unreached


def _where(row: DeliveryRow, is_local: bool) -> str:
    """What is elsewhere of a telling that was tried; "" where nothing is."""
    outcome = row.outcome or ""
    if outcome.startswith("http") or (row.status == DONE and not is_local):
        return f"{row.tracker} was told of it: {outcome}."
    if row.status != DONE:  # nothing says how far it came, or where it was sent
        return f"{row.tracker} may have been told a part of job {row.job_id}."
    return ""


@contextmanager
def _while_nobody_tells(data_dir: Path) -> Iterator[None]:
    """Raises: StoreUnavailable."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with alone(data_dir) as is_alone:
            if is_alone:
                yield
                return
        if time.monotonic() > deadline:
            raise StoreUnavailable(
                "A tracker is being told at this moment; what it has of these jobs stays until this is asked for again."
            )
        time.sleep(_POLL_S)


def _tell_again(session: Session, trackers: Collection[str]) -> None:
    """Of all jobs whose telling lay here."""
    here = (DeliveryRow.tracker.in_(trackers), DeliveryRow.status == DONE, DeliveryRow.outcome.not_like("http%"))
    values = {"status": WAITING, "tries": 0, "not_before_ms": 0}
    session.execute(update(DeliveryRow).where(*here).values(values))
