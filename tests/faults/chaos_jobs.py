"""Kills trainings at random moments and looks whether every job still ends once, with one model.

    python -m tests.faults.chaos_jobs --kills 200 --db sqlite|postgres

Supervisors and trainings are real processes, on a base model small enough to train in seconds; leases, heartbeats and
checkpoints are shorter than in service by the same measure. A kill is one of: SIGKILL of a training; of a supervisor,
with which its training dies; of everything at once; SIGSTOP of a supervisor, or of both, for longer than its lease, a
zombie. It comes at any moment, or just when a training begins to publish. Between kills, jobs are paused, resumed and
cancelled. A job is spared that was killed twice since its last checkpoint: once more, and it would rightly fail as
poison. So every job must succeed that was not cancelled, or it counts as lost. Ends with one JSON line, and status 0 if
nothing was lost and nothing doubled.

`max_lost_work_s`: of all kills, the longest that was trained since the last checkpoint (or since the process began, its
imports included), in the seconds that service would have lost: with a checkpoint every 45 s, not every CHECKPOINT_S.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from sqlalchemy import select

from serve.database.tables import JobRow
from serve.errors import Conflict, StoreUnavailable
from serve.store.revisions import Store
from serve.training.jobs.options import RunOptions
from serve.training.jobs.queue import MAX_ATTEMPTS
from serve.types import Hyperparameters, JobRequest, JobStatus, TrainingFile
from tests.faults.invariants import check_jobs, check_leftovers
from tests.faults.supervise import LEASE_S
from tests.postgres import PostgresServer
from tests.training.making import BASE, Training

CHECKPOINT_S = 1.0
SERVED_CHECKPOINT_S = RunOptions("", Path()).checkpoint_every_s
NUM_SUPERVISORS = 2
NUM_EPOCHS = 12
# What is killed, and how often. A zombie costs more than a lease, so there are fewer.
KINDS = {"training": 0.5, "supervisor": 0.3, "everything": 0.12, "zombie": 0.08}
LATE_SHARE = 0.25  # of kills, that wait for a training to publish, which takes it a fraction of a second
PAUSE_SHARE, CANCEL_SHARE = 0.08, 0.02  # of the moments between kills
DRAIN_TIMEOUT_S = 600.0
_ENDED = [status for status in JobStatus if status.is_final]


# --- What kills them ----------------------------------------------------------------------------------------


@dataclass
class Chaos:
    """A data folder, its supervisors, and what was done to them."""

    training: Training
    log: Path
    random: random.Random
    supervisors: list[subprocess.Popen[bytes]] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    job_ids: list[str] = field(default_factory=list)
    lost_s: list[float] = field(default_factory=list)

    def start(self) -> None:
        """As many supervisors as there should be."""
        self.supervisors = [process for process in self.supervisors if process.poll() is None]
        while len(self.supervisors) < NUM_SUPERVISORS:
            command = [sys.executable, "-m", "tests.faults.supervise"]
            with self.log.open("ab") as log:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
            assert process.stdin is not None
            process.stdin.write(self.training.options.to_json().encode())
            process.stdin.close()
            self.supervisors.append(process)

    def add_job(self) -> None:
        """Of a handle of its own, so that a model has as many revisions as its job has published."""
        number = len(self.job_ids)
        file = self.training.upload(number=150, seed=number)
        request = JobRequest(
            base_model=BASE,
            files=(TrainingFile(file.id, f"bot{number}"),),
            hyperparameters=Hyperparameters(n_epochs=NUM_EPOCHS),
            seed=number,
            owner=f"owner-{number % 3}",
        )
        while True:  # as a client does: with a key, again and again until it is answered
            with contextlib.suppress(StoreUnavailable):
                job = self.training.jobs.create_job(request, idempotency_key=f"key-{number}")
                self.job_ids.append(job.id)
                return

    def wait_for_publisher(self, timeout_s: float) -> int | None:
        """The process that has written all of a model, and is about to publish it."""
        staging = self.training.options.data_dir / "models" / ".staging"
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            living = {child for process in self.supervisors for child in _children(process.pid)}
            for path in staging.glob("*/README.md"):  # the last file to be written
                pid = int(path.parent.name.rpartition(":")[2].split(".")[0])
                if pid in living:
                    time.sleep(self.random.uniform(0, 0.15))
                    return pid
            time.sleep(0.005)
        return None

    def kill(self, kind: str, victim: int | None = None) -> bool:
        """`victim`: a training. False where there is nothing of that kind to kill, or nothing that may be."""
        with self.training.database.write() as session:
            # While they are locked no job is begun, so that what is spared here is spared.
            running = session.scalars(select(JobRow).where(JobRow.status.not_in(_ENDED)).with_for_update()).all()
            spared = {_worker_pid(row) for row in running if row.attempt >= MAX_ATTEMPTS}
            trainings = {child: process for process in self.supervisors for child in _children(process.pid)}
            child = victim if victim in trainings else self.random.choice(sorted(trainings) or [None])
            supervisor = self.random.choice(self.supervisors) if child is None else trainings[child]
            hit = self.supervisors if kind == "everything" else [supervisor]
            if (child is None and kind in ("training", "zombie")) or spared & {process.pid for process in hit}:
                return False
            self._note_loss([pid for process in hit for pid in _children(process.pid)], is_late=child == victim)
            stopped = self._strike(kind, child, hit)
        for pid in stopped:
            time.sleep(LEASE_S * self.random.uniform(1.2, 2.5) if pid == stopped[0] else 0)
            _send(pid, signal.SIGCONT)
        self.kills[kind] += 1
        self.start()
        return True

    def _strike(self, kind: str, child: int | None, hit: list[subprocess.Popen[bytes]]) -> list[int]:
        """Those that were only stopped."""
        pids = [process.pid for process in hit]
        if kind == "training":
            _send(child, signal.SIGKILL)
        elif kind == "zombie":
            stopped = [*pids, *([child] if child and self.random.random() < 0.5 else [])]
            for pid in stopped:
                _send(pid, signal.SIGSTOP)
            return stopped
        else:
            trainings = [child for pid in pids for child in _children(pid)] if kind == "everything" else []
            for pid in (*pids, *trainings):
                _send(pid, signal.SIGKILL)
            for process in hit:
                process.wait()
        return []

    def disturb(self) -> None:
        """As users do: now and then, pauses a job, resumes it later, or cancels one."""
        jobs = self.training.jobs
        paused = self._paused()
        drawn, chosen = self.random.random(), self.random.choice(self.job_ids[-NUM_SUPERVISORS - 1 :])
        with contextlib.suppress(Conflict, StoreUnavailable):
            if paused and drawn < 0.3:
                jobs.resume_job(paused[0])
            elif drawn > 1 - PAUSE_SHARE:
                jobs.pause_job(chosen)
            elif drawn > 1 - PAUSE_SHARE - CANCEL_SHARE:
                jobs.cancel_job(chosen)

    def _paused(self) -> list[str]:
        with self.training.database.read() as session:
            return list(session.scalars(select(JobRow.id).where(JobRow.status == JobStatus.PAUSED)))

    def _note_loss(self, victims: list[int], *, is_late: bool) -> None:
        now = time.time()
        for pid in victims:
            job_id, began = _job_of(pid), _started_at(pid)
            if job_id is None or began is None:
                continue
            saved = [path.stat().st_mtime for path in self._checkpoints(job_id)]
            is_first = not saved or max(saved) < began
            self.phases["publishing" if is_late else "before a checkpoint" if is_first else "after one"] += 1
            self.lost_s.append(now - max([began, *saved]))

    def _checkpoints(self, job_id: str) -> Iterator[Path]:
        yield from self.training.options.work_of(job_id).glob("*/checkpoint-*/COMPLETE")

    def num_open(self) -> int:
        with self.training.database.read() as session:
            return len(session.scalars(select(JobRow.id).where(JobRow.status.not_in(_ENDED))).all())

    def drain(self) -> None:
        """Waits, without further kills, until every job has ended, and every supervisor too."""
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while self.num_open() and time.monotonic() < deadline:
            for job_id in self._paused():
                self.training.jobs.resume_job(job_id)
            time.sleep(0.2)
        self.close()
        # What the last to die have left is swept by the next to start.
        self.start()
        while any(self.training.options.work_of("").glob("*")) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.close()

    def close(self) -> None:
        for process in self.supervisors:
            _send(process.pid, signal.SIGCONT)
            process.terminate()
        for process in self.supervisors:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                _end(process)
        self.supervisors = []


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _send(pid: int | None, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid is not None:
            os.kill(pid, number)


def _worker_pid(row: JobRow) -> int | None:
    return int(row.worker.rpartition(":")[2]) if row.worker else None


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _job_of(pid: int) -> str | None:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return None
    return arguments[arguments.index("--job") + 1] if "--job" in arguments else None


def _started_at(pid: int) -> float | None:
    """Unix seconds."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


# --- What must be true afterwards ---------------------------------------------------------------------------


def check(chaos: Chaos) -> tuple[list[str], list[str]]:
    """What was lost and what was doubled, a sentence each. The first also tells of what was left behind."""
    training = chaos.training
    store = Store(training.options.data_dir, embedded=training.options.embedded)  # opening it sweeps what the dead left
    accepted = {job_id: f"huggingtweets/bot{number}" for number, job_id in enumerate(chaos.job_ids)}
    lost, doubled = check_jobs(training.database, store, accepted)
    return lost + check_leftovers(training.options.data_dir, training.database), doubled


# --- The whole --------------------------------------------------------------------------------------------


def run(
    kills: int,
    db: str,
    seed: int,
    root: Path,
    database_url: str | None,
    *,
    pause_s: float | None = None,
    kinds: Mapping[str, float] = KINDS,
) -> dict[str, Any]:
    """Its figures; `broken` tells of each thing that went wrong. `pause_s`: None: half of what a job takes here.

    `kinds`: of those in KINDS, how often each.
    """
    training = Training(root, database_url, checkpoint_every_s=CHECKPOINT_S, retry_delay_s=0.2)
    chaos = Chaos(training, root / "supervisors.log", random.Random(seed))
    started = time.monotonic()
    try:
        chaos.start()
        if pause_s is None:
            chaos.add_job()
            while chaos.num_open():
                time.sleep(0.1)
            pause_s = (time.monotonic() - started) / 2
        while chaos.kills.total() < kills:
            while chaos.num_open() < NUM_SUPERVISORS + 1:
                chaos.add_job()
            chaos.disturb()
            victim = chaos.wait_for_publisher(4 * pause_s) if chaos.random.random() < LATE_SHARE else None
            if victim is None:
                time.sleep(chaos.random.uniform(0.1, 2 * pause_s))
            kind = chaos.random.choices(list(kinds), list(kinds.values()))[0]
            if chaos.kill(kind, victim) and chaos.kills.total() % 20 == 0:
                print(f"{chaos.kills.total()} kills, {len(chaos.job_ids)} jobs", file=sys.stderr, flush=True)
        chaos.drain()
        lost, doubled = check(chaos)
        with training.database.read() as session:
            statuses = Counter(session.scalars(select(JobRow.status)))
    finally:
        chaos.close()
        training.database.close()
    longest = max(chaos.lost_s, default=0.0)
    return {
        "kills": chaos.kills.total(),
        "jobs": len(chaos.job_ids),
        "lost": len(lost),
        "doubled": len(doubled),
        "max_lost_work_s": round(max(longest - CHECKPOINT_S, 0.0) + SERVED_CHECKPOINT_S, 1),
        "max_lost_work_here_s": round(longest, 1),
        "db": db,
        "seconds": round(time.monotonic() - started, 1),
        "kinds": dict(chaos.kills),
        "phases": dict(chaos.phases),
        "statuses": dict(statuses),
        "seed": seed,
        "broken": lost + doubled,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--db", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, help="seconds between two kills, on average")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through all that cleans up
    server = PostgresServer(fsync=True) if arguments.db == "postgres" else None
    with tempfile.TemporaryDirectory(prefix="rookery-chaos-") as folder:
        try:
            url = server.create_database() if server else None
            figures = run(arguments.kills, arguments.db, arguments.seed, Path(folder), url, pause_s=arguments.pause)
        finally:
            if server:
                server.close()
    print(json.dumps(figures))
    sys.exit(bool(figures["lost"] or figures["doubled"]))


if __name__ == "__main__":
    main()
