"""Works the outbox off: tells trackers of the jobs that have ended, in a process of its own, at the lowest priority.

    python -m serve.training.tracking.deliver [--database-url URL] [--data FOLDER] [--uploads texts,weights] [--retry]

One at a time for each data folder; each delivery runs in a further process, with a time limit after which it and all
that it started are killed. What failed is tried again, later and later. Supervisors start it by `Deliverer`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve.database.connection import Database
from serve.errors import StoreUnavailable
from serve.logs import configure, get_logger
from serve.settings import Settings
from serve.training.jobs.options import RunOptions
from serve.training.processes import adopt_orphans, end_descendants, tie_to_parent
from serve.training.tracking.lineage import read_runs
from serve.training.tracking.outbox import (
    Delivery,
    claim_delivery,
    has_due,
    reopen_failed,
    return_delivery,
    settle_delivery,
)
from serve.training.tracking.trackers import UPLOADS, Telling, tracker_environment

log = get_logger()

LIMIT_S = 300.0  # of one delivery; W&B takes 1 s offline, and some 10 s online
POLL_S = 120.0
STOP_GRACE_S = 5.0
NICENESS = 19


class Interrupted(Exception):
    """SIGTERM came."""


# --- One delivery -------------------------------------------------------------------------------------------


def deliver_all(database: Database, data_dir: Path, *, uploads: tuple[str, ...] = (), limit_s: float = LIMIT_S) -> int:
    """Everything that is due, one after the other; how many were tried. Raises: StoreUnavailable."""
    tried = 0
    while True:
        with database.write() as session:
            delivery = claim_delivery(session, limit_s)
        if delivery is None:
            return tried
        tried += 1
        try:
            done, outcome = _deliver(database, data_dir, delivery, uploads, limit_s)
        except Interrupted:
            with database.write() as session:
                return_delivery(session, delivery)
            raise
        with database.write() as session:
            settle_delivery(session, delivery, done=done, outcome=outcome)
        log.info(
            "delivery_ended",
            job_id=delivery.job_id,
            tracker=delivery.integration.tracker,
            tries=delivery.tries,
            done=done,
            outcome=outcome,
        )


def _deliver(
    database: Database, data_dir: Path, delivery: Delivery, uploads: tuple[str, ...], limit_s: float
) -> tuple[bool, str]:
    """(whether the tracker has it all, where it can be seen or why not)."""
    with database.read() as session:
        telling = Telling(read_runs(session, delivery.job_id), delivery.integration, data_dir, uploads)
    if not telling.runs:
        return False, "There is no record of the job's runs."
    with tempfile.TemporaryFile("w+") as question, tempfile.TemporaryFile("w+") as answer:  # nobody waits on a pipe
        question.write(telling.to_json())
        question.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-m", "serve.training.tracking.trackers", "--parent", str(os.getpid())],
            stdin=question,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            env=tracker_environment(data_dir, os.environ),
        )
        try:
            status = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return False, f"The tracker did not take it within {limit_s:g} s."
        finally:
            end_descendants()
            child.wait()
        answer.seek(0)
        return _read_answer(answer.read(), status)


def _read_answer(answer: str, status: int) -> tuple[bool, str]:
    try:
        said: dict[str, Any] = json.loads(answer.splitlines()[-1])
    except (IndexError, ValueError):
        return False, f"The tracker's process ended with status {status}."
    return "outcome" in said, said.get("outcome") or said["error"]


def _folder(data_dir: Path) -> Path:
    folder = data_dir.absolute() / "trackers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- Who starts it ------------------------------------------------------------------------------------------


class Deliverer:
    """Starts the delivering process whenever something is due. All its methods belong to one event loop."""

    def __init__(self, options: RunOptions, database: Database, *, poll_s: float = POLL_S) -> None:
        self._options = options
        self._database = database
        self._poll_s = poll_s
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """A job has ended: there may be something to tell."""
        self._woken.set()

    async def run_forever(self) -> None:
        """Until cancelled; then the process is gone as well. Raises nothing of its own."""
        while True:
            with contextlib.suppress(StoreUnavailable, OSError):
                if await asyncio.to_thread(_is_due, self._database):
                    await self._deliver()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):  # Python 3.11's wait_for loses a cancellation beside `wake`
                    await self._woken.wait()
            self._woken.clear()

    async def _deliver(self) -> None:
        child = await spawn_delivery(self._options)
        try:
            await child.wait()
        finally:
            if child.returncode is None:
                child.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(child.wait(), STOP_GRACE_S)
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)  # it leads a session of its own: the tracker's process too
                await child.wait()


async def spawn_delivery(options: RunOptions) -> asyncio.subprocess.Process:
    """Starts the process; it ends by itself when nothing is due, and with its parent."""
    # By the environment, which only this user may read: the URL may hold a password.
    settings = {"ROOKERY_DATABASE_URL": options.database_url, "ROOKERY_DATA": str(options.data_dir.absolute())}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "serve.training.tracking.deliver", "--parent", str(os.getpid())),
        stdin=subprocess.DEVNULL,
        env={**os.environ, **settings},
        start_new_session=True,
    )


def _is_due(database: Database) -> bool:
    with database.read() as session:
        return has_due(session)


# --- The process --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(data_dir: Path) -> Iterator[bool]:
    """Whether this is the only process that delivers from that folder."""
    with (_folder(data_dir) / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database-url", help="by default as ROOKERY_DATABASE_URL says")
    parser.add_argument("--data", type=Path, help="by default as ROOKERY_DATA says")
    parser.add_argument("--uploads", default="", help=f"what trackers get whole, with commas: {', '.join(UPLOADS)}")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds that one delivery may take")
    parser.add_argument("--retry", action="store_true", help="also what has failed for good")
    parser.add_argument("--parent", type=int, help="the process without which this one ends")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    if arguments.parent is not None:
        tie_to_parent(arguments.parent, signal.SIGTERM)
    os.nice(NICENESS)
    settings = Settings.from_env()
    configure(settings, part="deliverer")
    adopt_orphans()
    data_dir = arguments.data or settings.data
    uploads = tuple(name for name in arguments.uploads.split(",") if name)
    if unknown := set(uploads) - set(UPLOADS):
        parser.error(f"--uploads knows {' and '.join(UPLOADS)}, not {', '.join(sorted(unknown))}")
    with alone(data_dir) as is_alone, contextlib.suppress(Interrupted):
        if not is_alone:
            log.info("delivering_already", data=data_dir)
            return
        database = Database(arguments.database_url or settings.sql_url)
        if arguments.retry:
            with database.write() as session:
                reopen_failed(session)
        deliver_all(database, data_dir, uploads=uploads, limit_s=arguments.limit)


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted


if __name__ == "__main__":
    main()
