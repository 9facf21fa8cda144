"""What a job leaves: archives, stages and checkpoints, kept or deleted in time."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import Any

import pytest
from sqlalchemy import select as select_sql

from serve.database.tables import JobRow
from serve.errors import DiskFull
from serve.training.jobs import run as run_module
from serve.training.jobs.publishing import Publisher
from serve.training.jobs.queue import MAX_ATTEMPTS, Claim, JobQueue
from serve.training.jobs.rows import end_job
from serve.types import BOT_PURPOSE, JobStatus
from tests.training.making import BASE, Training
from tests.training.supervising import MODEL, claim_of, files_of_model, leftovers, run_of, supervisor_of, until


async def test_archive_of_a_bot_is_deleted_when_its_job_has_ended(training: Training) -> None:
    job = training.create_job(purpose=BOT_PURPOSE)
    claim = claim_of(training, 30)
    training.queue.fail(claim, code="x", message="It failed.")
    training.options.work_of(job.id).mkdir(parents=True)
    supervisor = supervisor_of(training)
    running = asyncio.create_task(supervisor.run_forever())
    await until(lambda: not list(training.options.uploads.iterdir()))
    await supervisor.stop()
    await running


async def test_what_ends_without_a_worker_is_tidied_up_while_others_wait(training: Training) -> None:
    cancelled = training.create_job(n_epochs=3)
    claim = claim_of(training, 30)
    training.queue.add_result(claim, {"model_id": MODEL})
    stage = training.store.stage()
    shutil.copytree(training.options.embedded[BASE], stage, dirs_exist_ok=True)
    (stage / "rookery.json").write_text(json.dumps({"job_id": cancelled.id, "checkpoint_step": 1}))
    training.store.publish(MODEL, stage, alias=None)  # and its worker died before it was recorded
    training.options.work_of(cancelled.id).mkdir(parents=True)
    training.jobs.pause_job(cancelled.id)
    training.queue.release(claim)
    supervisor = supervisor_of(training, sweep_s=0.1)
    running = asyncio.create_task(supervisor.run_forever())
    try:
        poison = training.create_job(purpose=BOT_PURPOSE)
        training.jobs.pause_job(poison.id)
        training.jobs.cancel_job(cancelled.id)
        with training.database.write() as session:  # as `claim` ends it
            row = session.scalars(select_sql(JobRow).where(JobRow.id == poison.id)).one()
            end_job(session, row, JobStatus.FAILED, "It was tried three times.")
        await until(lambda: leftovers(training) == [] and files_of_model(training) == [])
        await until(lambda: len(list(training.options.uploads.iterdir())) == 1)
    finally:
        await supervisor.stop()
        await running


async def test_archives_for_which_no_job_came_in_time_go_while_the_service_runs(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = supervisor_of(training, sweep_s=0.02)
    abandoned, kept = training.upload(purpose=BOT_PURPOSE).path, training.upload().path
    wanted = training.create_job(purpose=BOT_PURPOSE)
    training.jobs.pause_job(wanted.id)
    running = asyncio.create_task(supervisor.run_forever())
    try:
        monkeypatch.setattr("serve.training.jobs.store.ABANDONED_AFTER_S", -2)
        await until(lambda: not abandoned.exists())
    finally:
        await supervisor.stop()
        await running
    assert kept.exists() and training.jobs.get_file(wanted.request.files[0].file_id).path.exists()


def test_checkpoint_without_room_is_left_out_and_training_goes_on(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object, **_named: object) -> None:
        raise DiskFull("The disk is full.")

    job = training.create_job(n_epochs=2)
    monkeypatch.setattr(Publisher, "publish_checkpoint", full)
    run_of(training, claim_of(training, 30)).run()
    assert training.jobs.get_job(job.id).status is JobStatus.SUCCEEDED
    assert any("no checkpoint of step" in message for message in training.messages(job.id))


def test_checkpoints_that_cost_too_much_are_left_out(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_FREE_CHECKPOINTS_S", 0.0)
    monkeypatch.setattr(run_module, "_CHECKPOINTS_SHARE", 0.0)
    job = training.create_job(n_epochs=4)
    run_of(training, claim_of(training, 30)).run()
    assert len(training.jobs.list_checkpoints(job.id, limit=9).items) == 1


def test_last_attempt_starts_anew_once(training: Training) -> None:
    job = training.create_job()
    for _ in range(MAX_ATTEMPTS - 1):
        training.queue.abandon(claim_of(training, 30), "it died")
    work = training.options.work_of(job.id)
    (work / "1" / "checkpoint-5").mkdir(parents=True)
    claim = claim_of(training, 30)
    run_of(training, claim)._start_anew_if_last(work)
    assert not (work / "1").exists()
    (work / "3" / "checkpoint-4").mkdir(parents=True)
    training.queue.release(claim)
    again = claim_of(training, 30)
    assert again.attempt == MAX_ATTEMPTS
    run_of(training, again)._start_anew_if_last(work)
    assert (work / "3" / "checkpoint-4").is_dir()


def test_training_that_ends_leaves_the_checkpoints_of_one_that_goes_on(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = training.create_job(seed=1, n_epochs=3), training.create_job(seed=2)
    first, second = claim_of(training, 30), claim_of(training, 30)
    record, other = JobQueue.record_checkpoint, run_of(training, second)

    def record_late(self: JobQueue, claim: Claim, **facts: Any) -> tuple[str, ...]:
        if training.jobs.get_job(quick.id).status is JobStatus.RUNNING:
            other.run()  # between what the first has published and what it says of it
        return record(self, claim, **facts)

    monkeypatch.setattr(JobQueue, "record_checkpoint", record_late)
    monkeypatch.setattr(run_module, "_FREE_CHECKPOINTS_S", 600.0)  # the other training seems to be the first one's cost
    run_of(training, first).run()
    assert training.jobs.get_job(quick.id).status is JobStatus.SUCCEEDED
    listed = training.jobs.list_checkpoints(slow.id, limit=9).items
    assert len(listed) == 2 and all(training.store.resolve(one.model_id) for one in listed)
