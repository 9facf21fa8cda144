"""Works the job queue off: claims a job, runs it in a process of its own, keeps its lease while that lives.

A process of its own, because training that crashes, leaks or swells must not take serving with it. At most one
at a time for each supervisor; any number of supervisors share one database. Knows nothing of training itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from serve.database.connection import Database, patiently
from serve.errors import Conflict, NotFound, StoreUnavailable
from serve.logs import bound, get_logger, ms
from serve.metrics import Metrics
from serve.store.revisions import Store
from serve.training.jobs.gauges import count_into
from serve.training.jobs.options import RunOptions
from serve.training.jobs.queue import Claim, JobQueue
from serve.training.jobs.store import JobStore
from serve.training.jobs.uploads import make_private
from serve.training.tracking.deliver import Deliverer
from serve.types import Job, JobStatus

log = get_logger()

T = TypeVar("T")

LEASE_S = 30.0
BEAT_S = 5.0
POLL_S = 1.0
# After SIGTERM a child ends at its next step; a step of GPT-2 with 1,024 tokens takes about 5 s on two cores.
STOP_GRACE_S = 15.0
# A child that has used no processor time for this long hangs, or was stopped; nothing it waits for takes as long.
STALL_S = 300.0
SWEEP_S = 60.0
COUNT_S = 5.0  # jobs, for metrics


class Supervisor:
    """Runs training jobs until stopped. All its methods belong to one event loop."""

    def __init__(
        self,
        options: RunOptions,
        *,
        worker: str | None = None,
        lease_s: float = LEASE_S,
        beat_s: float = BEAT_S,
        poll_s: float = POLL_S,
        stop_grace_s: float = STOP_GRACE_S,
        stall_s: float = STALL_S,
        sweep_s: float = SWEEP_S,
        count_s: float = COUNT_S,
        metrics: Metrics | None = None,
    ) -> None:
        assert beat_s < lease_s, "the lease would end between two heartbeats"
        self._options = options
        self._worker = worker or f"{socket.gethostname()}:{os.getpid()}"
        self._lease_s, self._beat_s, self._poll_s = lease_s, beat_s, poll_s
        self._stop_grace_s, self._stall_s, self._sweep_s = stop_grace_s, stall_s, sweep_s
        self._count_s = count_s
        self._metrics = metrics or Metrics(enabled=False)
        self._database = patiently(lambda: Database(options.database_url))
        # Twice as long as a worker that lives lets pass between heartbeats.
        self._queue = JobQueue(self._database, confirm_s=2 * beat_s, on_set_aside=self._tell_set_aside)
        self._jobs = JobStore(self._database, options.uploads)
        self._store = Store(options.data_dir, embedded=options.embedded, cache=options.cache)
        make_private(options.work_of(""))
        self._deliverer = Deliverer(options, self._database)
        self._stopping = asyncio.Event()
        self._is_leaving = False  # claims no more
        self._idle = asyncio.Event()
        self._idle.set()
        self.child_pid: int | None = None
        self.job_id: str | None = None

    async def run_forever(self) -> None:
        """Job after job, until `stop`; trackers are told beside it. An unreachable database is waited for."""
        beside = [asyncio.create_task(self._deliverer.run_forever())]
        if self._metrics.is_enabled:
            beside.append(asyncio.create_task(self._count_jobs()))
        try:
            await self._work()
        finally:
            for task in beside:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _count_jobs(self) -> None:
        while True:
            try:
                await asyncio.to_thread(count_into, self._metrics, self._jobs)
            except Exception as exc:  # gauges that stand still look like a service that does
                if not isinstance(exc, StoreUnavailable):  # of which `_work` tells
                    log.exception("count_failed")
            await asyncio.sleep(self._count_s)

    async def _work(self) -> None:
        next_sweep = time.monotonic()
        while not self._stopping.is_set():
            worked = False
            try:
                if time.monotonic() >= next_sweep:
                    await asyncio.to_thread(self._sweep)
                    next_sweep = time.monotonic() + self._sweep_s
                worked = await self.run_one()
            except StoreUnavailable as exc:
                log.warning("jobs_unavailable", reason=exc.message)
            if not worked:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), self._poll_s)

    async def run_one(self) -> bool:
        """Claims one job and sees it through; False when there was none, or it is stopped."""
        if self._is_leaving:
            return False
        self._idle.clear()  # also while it claims: a claim that `stop` does not wait for would start a process later
        try:
            claim = await asyncio.to_thread(self._queue.claim, self._worker, self._lease_s)
            if claim is not None:
                await self._see_through(claim)
            return claim is not None
        finally:
            self._idle.set()

    async def _see_through(self, claim: Claim) -> None:
        with bound(job_id=claim.job.id, base=claim.job.request.base_model):
            await self._attempt(claim)

    async def _attempt(self, claim: Claim) -> None:
        started = time.monotonic()
        log.info("job_started", attempt=claim.attempt, fence=claim.fence)
        self.job_id = claim.job.id
        try:
            job = await self._run_child(claim)
        finally:
            self.job_id = None
        self._tell_end(job, time.monotonic() - started)
        self._deliverer.wake()
        await asyncio.to_thread(self._store.sweep)  # a child that was killed has staged what the next cannot find
        await asyncio.to_thread(self._clean_up, claim.job.id)

    def _tell_end(self, job: Job | None, duration_s: float) -> None:
        """Of an attempt; None where another worker has the job by now."""
        outcome = job.status if job else "lost"
        self._metrics.job_duration.labels(outcome).observe(duration_s)
        log.info(
            "job_attempt_ended",
            status=outcome,
            model=job and job.fine_tuned_model,
            code=job and job.error_code,
            tokens=job and job.trained_tokens,
            duration_ms=ms(duration_s),
        )

    def _tell_set_aside(self, job: Job) -> None:
        """Of a job whose worker died without a word, and that nobody tries again; its time is that of all attempts."""
        log.warning("job_set_aside", job_id=job.id, status=job.status, code=job.error_code)
        if job.finished_at is not None:
            self._metrics.job_duration.labels(job.status).observe(job.finished_at - (job.started_at or job.finished_at))

    async def stop(self, finish_s: float = 0.0) -> None:
        """Returns when the running job's process is gone: it may end within `finish_s`, or goes back to the queue."""
        self._is_leaving = True
        if finish_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), finish_s)
        self._stopping.set()
        await self._idle.wait()

    def close(self) -> None:
        """Lets go of the database; last of all."""
        self._database.close()

    # --- The child ----------------------------------------------------------------------------------------

    async def _run_child(self, claim: Claim) -> Job | None:
        """The job as it was left; None where another worker has it."""
        child = await self._start(claim)
        self.child_pid = child.pid
        exited = asyncio.create_task(child.wait())
        try:
            wanted = await self._watch(claim, child, exited)
            if not wanted:
                await self._end(child, exited)
        finally:
            # Also when this task is cancelled: no process stays behind.
            if not exited.done():
                _signal_group(child, signal.SIGKILL)
                await exited
            self.child_pid = None
        return await self._retry(lambda: self._conclude(claim, exited.result(), wanted))

    async def _start(self, claim: Claim) -> asyncio.subprocess.Process:
        # Always said: Ray tells the processes that it starts, and so their children, to use one thread.
        threads = self._options.num_threads or len(os.sched_getaffinity(0))
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serve.training.jobs.run"),
            *("--job", claim.job.id, "--token", str(claim.fence), "--parent", str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            # PASSIVE: threads that spin while they wait take the cores from serving, and from each other.
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "OMP_WAIT_POLICY": "PASSIVE",
                "TOKENIZERS_PARALLELISM": "false",
            },
            start_new_session=True,  # a process group of its own; uvloop, which Ray uses, has no process_group
        )
        assert child.stdin is not None
        # By a pipe: the options may hold a password, and arguments can be read by all.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            child.stdin.write(self._options.to_json().encode())
            await child.stdin.drain()
        child.stdin.close()
        return child

    async def _watch(self, claim: Claim, child: asyncio.subprocess.Process, exited: asyncio.Task[int]) -> bool:
        """Keeps the lease until the child ends; False when it should be made to end."""
        stopping = asyncio.create_task(self._stopping.wait())
        last_beat = last_work = time.monotonic()
        ticks = 0
        try:
            while True:
                await asyncio.wait({exited, stopping}, timeout=self._beat_s, return_when=asyncio.FIRST_COMPLETED)
                if exited.done():
                    return True
                if stopping.done():
                    return False
                if (ticks_now := _processor_ticks(child.pid)) != ticks:
                    ticks, last_work = ticks_now, time.monotonic()
                elif time.monotonic() - last_work > self._stall_s:
                    log.warning("job_stalled", pid=child.pid, stall_s=self._stall_s)
                    _signal_group(child, signal.SIGKILL)  # counts as an attempt that died
                    await exited
                    return True
                try:
                    wish = await asyncio.to_thread(self._queue.heartbeat, claim, self._lease_s)
                    last_beat = time.monotonic()
                    if wish is not None:
                        log.info("job_stopping", wish=wish)
                        return False
                except Conflict:
                    # Most often it has just said how the job ended, and is on its way out.
                    await asyncio.wait({exited}, timeout=self._stop_grace_s)
                    if exited.done():
                        return True
                    log.warning("job_lost", fence=claim.fence)
                    return False
                except StoreUnavailable as exc:
                    log.warning("heartbeat_missed", reason=exc.message)
                    if time.monotonic() - last_beat > self._lease_s:
                        return False  # somebody else has it by now
        finally:
            stopping.cancel()

    async def _end(self, child: asyncio.subprocess.Process, exited: asyncio.Task[int]) -> None:
        _signal_group(child, signal.SIGTERM)
        done, _ = await asyncio.wait({exited}, timeout=self._stop_grace_s)
        if not done:
            log.warning("job_killed", pid=child.pid, grace_s=self._stop_grace_s)
            _signal_group(child, signal.SIGKILL)
            await exited

    def _conclude(self, claim: Claim, exit_status: int, wanted: bool) -> Job | None:
        """Where the child could not, says how the attempt ended; the job then, None where another worker has it."""
        with contextlib.suppress(Conflict):  # it said so itself, or somebody else has the job
            if not wanted:
                self._queue.release(claim)
            else:
                self._queue.abandon(claim, _explain(exit_status), self._options.retry_delay_s)
        return self._queue.outcome(claim)

    async def _retry(self, action: Callable[[], T]) -> T | None:
        """Until it succeeds or the lease would have ended anyway, and then the job is somebody else's."""
        deadline = time.monotonic() + self._lease_s
        while True:
            try:
                return await asyncio.to_thread(action)
            except StoreUnavailable:
                if time.monotonic() > deadline:
                    return None
                await asyncio.sleep(self._poll_s)

    # --- The folder ---------------------------------------------------------------------------------------

    def _clean_up(self, job_id: str) -> None:
        """Removes what a job that has ended leaves, or one that does not exist."""
        job = None
        with contextlib.suppress(NotFound):
            job = self._jobs.get_job(job_id)
            if job.status.is_final:
                self._jobs.drop_archives(job)
                if job.status is not JobStatus.SUCCEEDED:
                    self._drop_checkpoints(job)
        if job is None or job.status.is_final:
            shutil.rmtree(self._options.work_of(job_id), ignore_errors=True)

    def _drop_checkpoints(self, job: Job) -> None:
        """Those that were published: nobody asked for a model that is half made. Some may not have been recorded."""
        listed = self._jobs.list_checkpoints(job.id, limit=1000).items
        names = [checkpoint.model_id for checkpoint in listed] + [job.result.get("model_id") or ""]
        self._jobs.forget_checkpoints(job.id)
        for model_id in {name.partition("@")[0] for name in names if name}:
            self._store.drop_checkpoints(model_id, of_job=job.id)

    def _sweep(self) -> None:
        """What is left of jobs that ended without a supervisor: it had died, or they were waiting or paused.

        And what nobody made a job of.
        """
        self._store.sweep()
        self._jobs.sweep()
        folders = {folder.name for folder in self._options.work_of("").iterdir()}
        for job_id in folders.union(self._jobs.list_untidy()):
            self._clean_up(job_id)


def _signal_group(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _processor_ticks(pid: int) -> int:
    """User and system time so far. Source: proc(5), fields 14 and 15, counted after the name in brackets."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1  # it has just ended
    return int(fields[11]) + int(fields[12])


def _explain(exit_status: int) -> str:
    if exit_status < 0:
        return f"its process was ended by {signal.Signals(-exit_status).name}"
    return f"its process ended with status {exit_status}"
