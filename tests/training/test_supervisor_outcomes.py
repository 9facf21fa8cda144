"""What is counted and told of each attempt: by its own end, also where another worker or nobody says it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from sqlalchemy import select

from serve.database.tables import JobRow
from serve.errors import StoreUnavailable
from serve.metrics import Metrics
from serve.training.finetune import Progress
from serve.training.jobs.queue import MAX_ATTEMPTS
from serve.training.jobs.run import JobRun
from serve.types import Job, JobStatus
from tests.api.test_metrics import counted
from tests.fakes.logs import captured_lines
from tests.training.making import Training
from tests.training.supervising import claim_of, supervisor_of, until

DURATIONS = "rookery_job_duration_seconds_count"


async def test_job_that_nobody_tries_again_is_counted_as_failed(training: Training) -> None:
    metrics = Metrics()
    job = training.create_job()
    for _ in range(MAX_ATTEMPTS - 1):
        training.queue.abandon(claim_of(training, 30), "it died")
    claim_of(training, 0.0)  # and its worker is never heard of again
    supervisor = supervisor_of(training, metrics=metrics, beat_s=0.01)
    with captured_lines() as lines:
        while not training.jobs.get_job(job.id).status.is_final:
            assert await supervisor.run_one() is False
            await asyncio.sleep(0.01)
    assert counted(metrics, DURATIONS) == {("failed",): 1}
    [line] = [line for line in lines if line["event"] == "job_set_aside"]
    assert (line["job_id"], line["status"], line["code"]) == (job.id, "failed", "poison_job")


async def test_job_that_another_worker_has_taken_is_counted_as_lost(training: Training) -> None:
    metrics = Metrics()
    job = training.create_job()
    supervisor = supervisor_of(training, metrics=metrics, stop_grace_s=0.05)
    with captured_lines() as lines:
        running = asyncio.create_task(supervisor.run_one())
        await until(lambda: supervisor.child_pid)
        _take_over(training, job)
        await running
    assert counted(metrics, DURATIONS) == {("lost",): 1}
    [end] = [line for line in lines if line["event"] == "job_attempt_ended"]
    assert end["status"] == "lost"


async def test_end_is_told_though_nothing_can_be_tidied_up(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_job_id: str) -> None:
        raise StoreUnavailable("The job database does not answer.")

    metrics = Metrics()
    training.create_job()
    supervisor = supervisor_of(training, metrics=metrics)
    monkeypatch.setattr(supervisor, "_clean_up", fail)
    with captured_lines() as lines:
        running = asyncio.create_task(supervisor.run_one())
        await until(lambda: supervisor.child_pid)
        assert supervisor.child_pid
        os.kill(supervisor.child_pid, signal.SIGSEGV)
        with pytest.raises(StoreUnavailable):
            await running
    assert counted(metrics, DURATIONS) == {("queued",): 1}
    assert [line["status"] for line in lines if line["event"] == "job_attempt_ended"] == ["queued"]


def test_outcome_is_that_of_the_attempt_whoever_has_the_job_since(training: Training) -> None:
    def outcome() -> str | None:
        job = training.queue.outcome(claim)
        return None if job is None else str(job.status)

    job = training.create_job()
    claim = claim_of(training, 30)
    assert outcome() is None  # it has not ended
    training.queue.abandon(claim, "it died")
    assert outcome() == "queued"
    other = claim_of(training, 30)
    assert outcome() == "queued"
    training.queue.fail(other, code="x", message="It failed.")
    assert outcome() is None and training.queue.outcome(other) == training.jobs.get_job(job.id)
    training.create_job()
    claim = claim_of(training, 30)
    _take_over(training, claim.job)
    assert outcome() is None


async def test_gauges_of_jobs_outlast_an_error_that_nobody_foresaw(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[Any] = [None, StoreUnavailable("Away."), {JobStatus.QUEUED: 3}]

    def count_jobs() -> dict[JobStatus, int]:
        told = counts.pop(0) if len(counts) > 1 else counts[0]
        if isinstance(told, Exception):
            raise told
        return told  # type: ignore[no-any-return]  # None is what nobody foresaw

    metrics = Metrics()
    supervisor = supervisor_of(training, metrics=metrics, count_s=0.001)
    monkeypatch.setattr(supervisor._jobs, "count_jobs", count_jobs)
    with captured_lines() as lines:
        running = asyncio.create_task(supervisor.run_forever())
        await until(lambda: counted(metrics, "rookery_jobs") == {("queued",): 3})
        await supervisor.stop()
        await running
    assert [line["event"] for line in lines] == ["count_failed"]


def test_each_token_is_counted_once_by_attempts_that_go_on_from_a_checkpoint(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training.create_job()
    counts = []
    for last_step in (3, None):
        metrics, claim = Metrics(), claim_of(training, 30)
        run = JobRun(training.options, job.id, claim.fence, metrics)
        report = run._report

        def stop_after(progress: Progress, run: Any = run, report: Any = report, last: int | None = last_step) -> None:
            report(progress)
            if progress.step == last:
                run.stop()

        monkeypatch.setattr(run, "_report", stop_after)
        run.run()
        counts.append(counted(metrics, "rookery_training_tokens_total")[()])
    done = training.jobs.get_job(job.id)
    assert done.status is JobStatus.SUCCEEDED and any("goes on from" in one for one in training.messages(job.id))
    assert counts[0] > 0 and sum(counts) == done.trained_tokens


def _take_over(training: Training, job: Job) -> None:
    """As a worker does that takes the other for dead."""
    with training.database.write() as session:
        row = session.scalars(select(JobRow).where(JobRow.id == job.id)).one()
        row.fence += 1
        row.worker = "another"


async def test_a_supervisor_that_is_to_go_lets_its_job_end_and_claims_no_other(training: Training) -> None:
    first, second = training.create_job(), training.create_job()
    supervisor = supervisor_of(training)
    working = asyncio.create_task(supervisor.run_forever())
    await until(lambda: supervisor.child_pid)
    await supervisor.stop(finish_s=60)
    await working
    assert training.jobs.get_job(first.id).status is JobStatus.SUCCEEDED
    assert training.jobs.get_job(second.id).status is JobStatus.QUEUED


async def test_a_job_that_does_not_end_in_time_goes_back_to_the_queue(training: Training) -> None:
    job = training.create_job()
    supervisor = supervisor_of(training)
    working = asyncio.create_task(supervisor.run_forever())
    await until(lambda: supervisor.child_pid)
    await supervisor.stop(finish_s=0.01)
    await working
    assert training.jobs.get_job(job.id).status is JobStatus.QUEUED
