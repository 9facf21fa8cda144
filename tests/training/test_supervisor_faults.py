"""Whatever dies, hangs, is locked, full or told to stop: a job goes on or fails by name, and no process is left."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from serve.training.jobs import publishing
from serve.training.jobs.queue import MAX_ATTEMPTS, Claim
from serve.training.jobs.run import JobRun
from serve.types import JobStatus
from tests.postgres import PostgresServer, is_installed
from tests.training.making import BASE, Training
from tests.training.supervising import claim_of, is_training, leftovers, revisions, supervisor_of, until


@pytest.mark.slow
async def test_paused_job_goes_on_from_its_checkpoint(training_on_both: Training) -> None:
    training = training_on_both
    job = training.create_job(n_epochs=12)
    supervisor = supervisor_of(training)
    first = asyncio.create_task(supervisor.run_one())
    await until(is_training(training, job))
    training.jobs.pause_job(job.id)
    await first
    assert training.jobs.get_job(job.id).status is JobStatus.PAUSED
    assert await supervisor.run_one() is False
    training.jobs.resume_job(job.id)
    assert await supervisor.run_one() is True
    assert training.jobs.get_job(job.id).status is JobStatus.SUCCEEDED
    assert any("goes on from checkpoint" in message for message in training.messages(job.id))
    assert leftovers(training) == [] and len(revisions(training)) == 1


async def test_second_supervisor_leaves_the_work_of_the_first_alone(training: Training) -> None:
    job = training.create_job()
    training.queue.claim("another", 30)
    ended = training.create_job()
    training.jobs.cancel_job(ended.id)
    for folder in (training.options.work_of(job.id), training.options.work_of(ended.id)):
        (folder / "1" / "checkpoint-5").mkdir(parents=True)
    supervisor = supervisor_of(training)
    running = asyncio.create_task(supervisor.run_forever())
    await until(lambda: not training.options.work_of(ended.id).exists())
    await supervisor.stop()
    await running
    assert (training.options.work_of(job.id) / "1" / "checkpoint-5").is_dir()


async def test_f5_other_jobs_do_not_wait_for_a_poison_job(training: Training) -> None:
    training.create_job()
    healthy = training.create_job(handle="eve")
    supervisor = supervisor_of(training, lease_s=20.0)
    started = time.monotonic()
    for _ in range(MAX_ATTEMPTS):
        attempt = asyncio.create_task(supervisor.run_one())
        await until(lambda: supervisor.child_pid)
        assert supervisor.child_pid
        os.kill(supervisor.child_pid, signal.SIGSEGV)
        await attempt
    claim = training.queue.claim("worker", 30)
    assert claim and claim.job.id == healthy.id
    assert time.monotonic() - started < MAX_ATTEMPTS * 20.0


@pytest.mark.slow
async def test_f25_job_outlasts_a_database_that_is_locked(training: Training, tmp_path: Path) -> None:
    job = training.create_job()
    supervisor = supervisor_of(training)
    running = asyncio.create_task(supervisor.run_one())
    await until(lambda: supervisor.child_pid)
    holder = sqlite3.connect(tmp_path / "rookery.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    await asyncio.sleep(7.0)  # longer than SQLite's own patience
    holder.close()
    await running
    done = training.jobs.get_job(job.id)
    assert done.status is JobStatus.SUCCEEDED, training.messages(job.id)
    assert len(revisions(training)) == 1 and leftovers(training) == []


@pytest.mark.slow
async def test_f25_job_outlasts_a_restart_of_postgresql(tmp_path: Path) -> None:
    if not is_installed():
        pytest.skip("PostgreSQL's initdb and postgres are not on the PATH")
    server = PostgresServer()
    training = Training(tmp_path, server.create_database())
    try:
        job = training.create_job()
        supervisor = supervisor_of(training)
        running = asyncio.create_task(supervisor.run_one())
        await until(lambda: supervisor.child_pid)
        server.stop()
        await asyncio.sleep(1.0)
        server.start()
        await running
        assert training.jobs.get_job(job.id).status is JobStatus.SUCCEEDED, training.messages(job.id)
    finally:
        training.close()
        server.close()


@pytest.mark.slow
async def test_f3_killed_child_is_followed_by_another_attempt(training: Training) -> None:
    job = training.create_job(n_epochs=50)
    supervisor = supervisor_of(training)
    first = asyncio.create_task(supervisor.run_one())
    await until(is_training(training, job))
    assert supervisor.child_pid
    os.kill(supervisor.child_pid, signal.SIGKILL)
    await first
    assert training.jobs.get_job(job.id).status is JobStatus.QUEUED
    assert any("SIGKILL" in message for message in training.messages(job.id))
    claim = training.queue.claim("other", 30)
    assert claim and claim.attempt == 2


async def test_f5_child_that_always_dies_fails_its_job_after_three_attempts(training: Training) -> None:
    job = training.create_job()
    supervisor = supervisor_of(training)
    for _ in range(3):
        attempt = asyncio.create_task(supervisor.run_one())
        await until(lambda: supervisor.child_pid)
        assert supervisor.child_pid
        os.kill(supervisor.child_pid, signal.SIGSEGV)
        await attempt
    failed = training.jobs.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", "poison_job")
    assert failed.error_message and "SIGSEGV" in failed.error_message
    assert leftovers(training) == []


async def test_stopped_child_is_found_out_and_replaced(training: Training) -> None:
    training.create_job()
    supervisor = supervisor_of(training, stall_s=1.0)
    attempt = asyncio.create_task(supervisor.run_one())
    await until(lambda: supervisor.child_pid)
    assert supervisor.child_pid
    os.kill(supervisor.child_pid, signal.SIGSTOP)
    await attempt
    claim = training.queue.claim("other", 30)
    assert claim and claim.attempt == 2


@pytest.mark.slow
async def test_cancelled_job_ends_within_a_heartbeat_and_a_step(training: Training) -> None:
    job = training.create_job(n_epochs=50)
    supervisor = supervisor_of(training)
    running = asyncio.create_task(supervisor.run_one())
    await until(is_training(training, job))
    training.jobs.cancel_job(job.id)
    await running
    assert training.jobs.get_job(job.id).status is JobStatus.CANCELLED
    assert revisions(training) == [] and leftovers(training) == []


@pytest.mark.slow
async def test_f23_stop_gives_the_job_back_and_leaves_no_process(training: Training) -> None:
    job = training.create_job(n_epochs=50)
    supervisor = supervisor_of(training)
    running = asyncio.create_task(supervisor.run_forever())
    await until(is_training(training, job))
    pid = supervisor.child_pid
    assert pid
    asked = time.monotonic()
    await supervisor.stop()
    await running
    assert time.monotonic() - asked < 20.0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert training.jobs.get_job(job.id).status is JobStatus.QUEUED
    claim = training.queue.claim("other", 30)
    assert claim and claim.attempt == 1
    assert list(training.options.work_of(job.id).glob("*/checkpoint-*/COMPLETE"))


async def test_stop_waits_for_a_claim_that_is_under_way_and_nothing_starts_after_it(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training.create_job()
    supervisor = supervisor_of(training)
    entered, gate, claim = threading.Event(), threading.Event(), supervisor._queue.claim

    def slow(worker: str, lease_s: float) -> Claim | None:
        entered.set()
        gate.wait()
        return claim(worker, lease_s)

    monkeypatch.setattr(supervisor._queue, "claim", slow)
    running = asyncio.create_task(supervisor.run_forever())
    await until(entered.is_set)
    stopping = asyncio.create_task(supervisor.stop())
    await asyncio.sleep(0)
    assert not stopping.done()
    gate.set()
    await stopping
    await running
    assert supervisor.child_pid is None and training.jobs.get_job(job.id).status is JobStatus.QUEUED
    assert claim_of(training, 30).attempt == 1


async def test_cancelled_supervisor_leaves_no_process(training: Training) -> None:
    training.create_job()
    supervisor = supervisor_of(training)
    running = asyncio.create_task(supervisor.run_one())
    await until(lambda: supervisor.child_pid)
    pid = supervisor.child_pid
    assert pid
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


_SUPERVISE = """
import asyncio, sys
from serve.training.jobs.options import RunOptions
from serve.training.jobs.supervisor import Supervisor

async def main():
    supervisor = Supervisor(RunOptions.from_json(sys.argv[1]))
    task = asyncio.create_task(supervisor.run_one())
    while not supervisor.child_pid:
        await asyncio.sleep(0.01)
    print(supervisor.child_pid, flush=True)
    await task

asyncio.run(main())
"""


def test_f6_child_dies_with_its_supervisor(training: Training) -> None:
    training.create_job(n_epochs=50)
    command = [sys.executable, "-c", _SUPERVISE, training.options.to_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as supervisor:
        assert supervisor.stdout is not None
        child = os.pidfd_open(int(supervisor.stdout.readline()))
        supervisor.kill()
    try:
        assert select.select([child], [], [], 20)[0], "the child outlived its supervisor"
    finally:
        os.close(child)


# As safetensors 0.7 and torch 2.13 say it when a disk of 1 MB is full.
_FULL_DISKS = [
    OSError(28, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
]


@pytest.mark.parametrize("error", _FULL_DISKS, ids=lambda error: type(error).__name__)
def test_f8_full_disk_fails_the_job_by_name_and_leaves_nothing_half(
    training: Training, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_arguments: object) -> None:
        raise error

    job = training.create_job()
    claim = claim_of(training, 30)
    monkeypatch.setattr(publishing, "content_hash", full)
    JobRun(training.options, job.id, claim.fence).run()
    failed = training.jobs.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", "disk_full")
    assert revisions(training) == [] and not list((training.options.data_dir / "models" / ".staging").iterdir())


def test_f8_disk_without_room_for_training_fails_the_job_before_it_trains(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training.create_job()
    claim = claim_of(training, 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    JobRun(training.options, job.id, claim.fence).run()
    failed = training.jobs.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", "disk_full")
    assert failed.error_message and "0 MB free" in failed.error_message and BASE in failed.error_message
    assert not any(message.startswith("Step") for message in training.messages(job.id))
