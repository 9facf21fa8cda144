"""Clocks that jump under two supervisors and their trainings, by libfaketime, while leases are held.

Each supervisor reads its clock from a file, and SQLite's `now` in it is that clock too. Some jumps are of both, as on a
machine whose clock is set; others of one of them, as of two machines that disagree.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from sqlalchemy import select

from serve.database.tables import EventRow, JobRow
from serve.types import JobStatus
from tests.faults.supervise import LEASE_S
from tests.faults.supervisors import library_of_faketime, supervisors
from tests.training.making import Training

HOUR_S = 3600
TIMES = 3.0  # longer leases than elsewhere: a machine that is busy is not to be taken for a clock that jumps
PAUSE_S = (0.5 * TIMES * LEASE_S, 1.5 * TIMES * LEASE_S)
NUM_SUPERVISORS = 2
NUM_EPOCHS = 30
_JUMPS = (-HOUR_S, HOUR_S, -61, 61, -HOUR_S // 2, 1)  # 1: a leap second
_DRAIN_S = 300.0


def run(jumps: int, folder: Path, seed: int = 22) -> dict[str, Any]:
    """Jobs are added so that all supervisors work from the first jump to the last."""
    training, lot = Training(folder, checkpoint_every_s=1.0, retry_delay_s=0.2), random.Random(seed)
    clocks = [folder / f"clock-{number}" for number in range(NUM_SUPERVISORS)]
    offsets = [0] * NUM_SUPERVISORS
    _set(clocks, offsets)
    job_ids: list[str] = []
    try:
        with supervisors(training, *map(_environment, clocks), times=TIMES):
            while _count(training, JobStatus.RUNNING) < NUM_SUPERVISORS:
                _keep_busy(training, job_ids)
                time.sleep(0.1)
            for number in range(jumps):
                by = lot.choice(_JUMPS)
                both = number % 3 != 2
                moved = range(NUM_SUPERVISORS) if both else [lot.randrange(NUM_SUPERVISORS)]
                for one in moved:
                    offsets[one] = max(-HOUR_S, min(HOUR_S, offsets[one] + by))
                if both:  # they agree again
                    offsets = [offsets[0]] * NUM_SUPERVISORS
                _set(clocks, offsets)
                until = time.monotonic() + lot.uniform(*PAUSE_S)
                while time.monotonic() < until:
                    _keep_busy(training, job_ids)
                    time.sleep(0.1)
            deadline = time.monotonic() + _DRAIN_S
            while _num_open(training) and time.monotonic() < deadline:
                time.sleep(0.2)
        return {"jumps": jumps, "jobs": len(job_ids), **_verdict(training)}
    finally:
        training.close()


def _environment(clock: Path) -> dict[str, str]:
    return {
        "LD_PRELOAD": str(library_of_faketime()),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def _set(clocks: list[Path], offsets: list[int]) -> None:
    for clock, offset in zip(clocks, offsets, strict=True):
        new = clock.with_suffix(".new")
        new.write_text(f"{offset:+d}\n")
        new.replace(clock)


def _keep_busy(training: Training, job_ids: list[str]) -> None:
    while _num_open(training) <= NUM_SUPERVISORS:
        job_ids.append(training.create_job(f"bot{len(job_ids)}", n_epochs=NUM_EPOCHS).id)


def _count(training: Training, *statuses: JobStatus) -> int:
    counts = training.jobs.count_jobs()
    return sum(counts.get(status, 0) for status in statuses)


def _num_open(training: Training) -> int:
    return _count(training, *(status for status in JobStatus if not status.is_final))


def _verdict(training: Training) -> dict[str, Any]:
    """A job is claimed once, by one worker, or else a lease has ended early: nobody was killed."""
    with training.database.read() as session:
        rows = list(session.scalars(select(JobRow)))
        started = select(EventRow.job_id).where(EventRow.message.startswith("The job has started"))
        starts = list(session.scalars(started))
    again = [row.id for row in rows if starts.count(row.id) > 1]
    ready = select(EventRow.job_id).where(
        EventRow.message.endswith("is ready."), EventRow.message.startswith("The mod")
    )
    with training.database.read() as session:
        ends = list(session.scalars(ready))
    return {
        "early": len(again),
        "run_twice": sum(ends.count(row.id) > 1 for row in rows),
        "succeeded": sum(row.status == JobStatus.SUCCEEDED for row in rows),
        "again": again[:10],
        "statuses": sorted({row.status for row in rows}),
    }
