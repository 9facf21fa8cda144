from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from sqlalchemy import select as select_sql

from serve.database.tables import JobRow
from serve.errors import DiskFull, ModelUnusable, StoreUnavailable
from serve.store.model_files import content_hash
from serve.store.texts import printable
from serve.training.jobs import publishing
from serve.training.jobs import run as run_module
from serve.training.jobs.publishing import Publisher
from serve.training.jobs.queue import MAX_ATTEMPTS, Claim, JobQueue, Publication
from serve.training.jobs.rows import end_job
from serve.training.jobs.run import JobRun
from serve.training.jobs.store import JobStore
from serve.training.jobs.supervisor import Supervisor
from serve.types import BOT_PURPOSE, Job, JobRequest, JobStatus, TrainingFile
from tests.postgres import PostgresServer, is_installed
from tests.training.archive_files import tweet, x_zip
from tests.training.making import BASE, Training, made_up_texts

MODEL = "huggingtweets/ada"
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """The database and /proc cannot be awaited; they are asked."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


def supervisor_of(training: Training, **times: float) -> Supervisor:
    supervisor = Supervisor(training.options, **{"beat_s": 0.1, "poll_s": 0.05, **times})  # type: ignore[arg-type]
    training.to_close.append(supervisor.close)
    return supervisor


def revisions(training: Training) -> list[str]:
    """Of finished models: neither aliases, data sets nor checkpoints."""
    folder = training.options.data_dir / "models" / "huggingtweets" / "ada"
    return [path.parent.name for path in folder.glob("*/runs") if not path.parent.is_symlink()]


def is_training(training: Training, job: Job) -> Callable[[], bool]:
    return lambda: any(message.startswith("Step") for message in training.messages(job.id))


def leftovers(training: Training) -> list[Path]:
    data = training.options.data_dir
    return [*(data / "models" / ".staging").iterdir(), *(data / "training").glob("*")]


# --- The whole way ----------------------------------------------------------------------------------------


async def test_job_goes_from_archive_to_a_published_model(training_on_both: Training) -> None:
    training = training_on_both
    job = training.create_job()
    texts = training.jobs.get_file(job.request.files[0].file_id).path.read_text().splitlines()
    assert await supervisor_of(training).run_one() is True
    done = training.jobs.get_job(job.id)
    assert done.status is JobStatus.SUCCEEDED and done.fine_tuned_model == MODEL
    assert done.result["losses"]["held_out_after"] < done.result["losses"]["held_out_before"]
    assert done.started_at and done.finished_at and done.trained_tokens
    told = [dict(e.data) for e in training.jobs.list_events(job.id, limit=99).items if e.type == "metrics"][::-1]
    losses = done.result["losses"]
    assert (told[0]["step"], told[0]["valid_loss"]) == (0, losses["held_out_before"])
    assert any(event["samples"] and 0 < event["step"] < event["total_steps"] for event in told)
    assert (told[-1]["valid_loss_before"], told[-1]["valid_loss"]) == tuple(
        losses[f"held_out_{when}"] for when in ("before", "after")
    )
    assert told[-1]["samples"] == done.result["samples"] and told[-1]["seconds_left"] == 0

    info = training.store.get_model(MODEL)
    assert (info.revision, info.base_model, info.handles) == (done.result["revision"], BASE, ("ada",))
    assert info.counts["ada"]["kept"] == 150
    card = training.store.read_card(MODEL)
    assert "@ada" in card and "thumbnail: predictions.png" in card
    folder = training.store.resolve(MODEL).path
    assert (folder / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert training.store.find_avatar(MODEL, 0) == folder / "avatars/0.webp" and info.num_avatars == 1
    assert info.sample.startswith("My dream is") and info.sample in map(printable, done.result["samples"])
    assert content_hash(folder) == folder.name
    assert not any(texts[0] in path.read_text() for path in folder.rglob("*.json"))  # tweets are not published
    assert leftovers(training) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        from transformers import pipeline

        assert pipeline("text-generation", model=str(folder))("My dream is")[0]["generated_text"]
    assert await supervisor_of(training).run_one() is False


async def test_job_that_a_user_can_mend_fails_with_the_same_words_as_at_upload(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.training.jobs.store.MAX_BYTES_READ_AT_ONCE", 0)
    job = training.create_job(number=20)
    assert job.status is JobStatus.VALIDATING
    await supervisor_of(training).run_one()
    failed = training.jobs.get_job(job.id)
    assert (failed.status, failed.error_code, failed.error_param) == ("failed", "too_few_tweets", "training_file")
    assert failed.error_message and "6,000" in failed.error_message


async def test_everything_that_decides_a_models_bytes_is_recorded(training: Training) -> None:
    training.create_job()
    JobRun(training.options, claim_of(training, 30).job.id, 1).run()
    folder = training.store.resolve(MODEL).path
    provenance, run = (json.loads((folder / name).read_text()) for name in ("rookery.json", "runs/train.json"))
    assert {
        name: provenance[name] for name in ("seed", "data_seed", "epoch_seeds", "block_size", "held_out_share")
    } == {
        "seed": 7,
        "data_seed": 7,
        "epoch_seeds": ["7/0"],
        "block_size": 64,
        "held_out_share": 0.1,
    }
    assert provenance.items() >= {name: run["config"][name] for name in ("device", "versions", "code_sha256")}.items()
    assert (provenance["num_threads"], provenance["attempts"]) == (1, 1)
    assert provenance["device"] in ("cpu", "cuda") and isinstance(provenance["bf16"], bool)
    expected = {"rookery", "python", "torch", "tokenizers", "numpy", "safetensors"}
    assert provenance["versions"].keys() == expected
    assert provenance["versions"]["rookery"] == tomllib.loads(PYPROJECT.read_text())["project"]["version"]


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


def test_owner_by_another_name_is_told_of(training: Training, tmp_path: Path) -> None:
    tweets = [tweet(number, text) for number, text in enumerate(made_up_texts(150))]
    file = training.jobs.create_file(x_zip(tmp_path / "x.zip", tweets), "x.zip", "fine-tune")
    job = training.jobs.create_job(JobRequest(BASE, (TrainingFile(file.id, "@Eve"),), suffix="EVE"))
    run = JobRun(training.options, job.id, claim_of(training, 30).fence)
    data = run._preprocess()
    assert data.model_id == "huggingtweets/eve"
    [warning] = [e.message for e in training.jobs.list_events(job.id, limit=9).items if "asked for" in e.message]
    assert "'Ada_L'" in warning and "'Eve'" in warning


async def test_job_with_a_base_that_is_not_here_fails_at_once(training: Training) -> None:
    entry = (TrainingFile(training.upload().id, "ada"),)
    unchecked = JobStore(training.database, training.options.uploads)
    job = unchecked.create_job(JobRequest("nobody/nothing", entry))
    await supervisor_of(training).run_one()
    failed = training.jobs.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", "model_not_found")


def test_job_whose_base_is_on_a_hub_that_does_not_answer_fails_by_that_name(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        training = Training(tmp_path, hub_enabled=True, hub_endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}")
        entry = (TrainingFile(training.upload().id, "ada"),)
        job = JobStore(training.database, training.options.uploads).create_job(JobRequest("some/body", entry))
        for _ in range(MAX_ATTEMPTS):
            JobRun(training.options, job.id, claim_of(training, 30).fence).run()
    failed = training.jobs.get_job(job.id)
    assert failed.status is JobStatus.FAILED and failed.error_code in ("store_unavailable", "hub_unreachable")
    assert failed.error_message and "some/body" in failed.error_message


# --- Faults -----------------------------------------------------------------------------------------------


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


# --- One revision, whoever dies when ----------------------------------------------------------------------


def claim_of(training: Training, lease_s: float) -> Claim:
    claim = training.queue.claim("worker", lease_s)
    assert claim is not None
    return claim


def test_f4_zombie_that_wakes_after_its_heir_published_cannot_publish(training: Training) -> None:
    job = training.create_job()
    zombie = claim_of(training, -1)
    stage = training.store.stage()
    for path in training.options.embedded[BASE].iterdir():
        (stage / path.name).write_bytes(path.read_bytes())
    training.queue.set_publication(zombie, Publication(stage, MODEL, content_hash(stage)))
    # Here the zombie sleeps, its token just checked; the heir does the whole job.
    heir = claim_of(training, 30)
    JobRun(training.options, job.id, heir.fence).run()
    assert training.jobs.get_job(job.id).status is JobStatus.SUCCEEDED
    with pytest.raises((ModelUnusable, StoreUnavailable)):
        training.store.publish(MODEL, stage)
    assert revisions(training) == [training.jobs.get_job(job.id).result["revision"]]


class _Dies(BaseException):
    pass


def test_f3_attempt_that_died_after_publishing_is_finished_by_the_next(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training.create_job()

    def die(*_arguments: object) -> None:
        raise _Dies

    first = claim_of(training, -1)
    with monkeypatch.context() as patched:
        patched.setattr(JobRun, "_finish", die)
        with pytest.raises(_Dies):
            JobRun(training.options, job.id, first.fence).run()
    [published] = revisions(training)
    second = claim_of(training, 30)
    JobRun(training.options, job.id, second.fence).run()
    done = training.jobs.get_job(job.id)
    assert done.status is JobStatus.SUCCEEDED and done.result["revision"] == published
    assert revisions(training) == [published] and training.store.resolve(MODEL).revision == published
    assert leftovers(training) == [] or all(path.parent.name == "training" for path in leftovers(training))


# --- What a job leaves ------------------------------------------------------------------------------------


def run_of(training: Training, claim: Claim) -> JobRun:
    return JobRun(training.options, claim.job.id, claim.fence)


def files_of_model(training: Training) -> list[Path]:
    folder = training.options.data_dir / "models" / "huggingtweets"
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


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


def test_error_after_publishing_leaves_the_model_to_the_next_attempt(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    job = training.create_job()
    with monkeypatch.context() as patched:
        patched.setattr(JobRun, "_add_metrics_file", full)
        run_of(training, claim_of(training, 30)).run()
    assert training.jobs.get_job(job.id).status is JobStatus.QUEUED
    run_of(training, claim_of(training, 30)).run()
    done = training.jobs.get_job(job.id)
    assert done.status is JobStatus.SUCCEEDED and done.result["revision"] == training.store.resolve(MODEL).revision


def test_model_of_an_earlier_release_is_adopted_without_its_runs(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training.create_job()
    published = Publisher.publish

    def die_after(self: Publisher, stage: Path, model_id: str, *, is_private: bool) -> None:
        for path in (stage / "runs").iterdir():
            path.write_text('{"run": "as it was told once"}')
        published(self, stage, model_id, is_private=is_private)
        raise _Dies

    with monkeypatch.context() as patched:
        patched.setattr(Publisher, "publish", die_after)
        with pytest.raises(_Dies):
            run_of(training, claim_of(training, -1)).run()
    run_of(training, claim_of(training, 30)).run()
    assert training.jobs.get_job(job.id).status is JobStatus.SUCCEEDED and training.jobs.list_runs(job.id) == ()


def test_settling_does_not_undo_what_was_decided_since(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_arguments: object) -> None:
        raise _Dies

    training.create_job(seed=1)
    run_of(training, claim_of(training, 30)).run()
    first = training.store.resolve(MODEL).revision
    second = training.create_job(seed=2)
    with monkeypatch.context() as patched:
        patched.setattr(JobRun, "_finish", die)
        with pytest.raises(_Dies):
            run_of(training, claim_of(training, -1)).run()
    assert training.store.resolve(MODEL).revision != first
    training.store.roll_back(MODEL, first)
    run_of(training, claim_of(training, 30)).run()
    assert training.jobs.get_job(second.id).status is JobStatus.SUCCEEDED
    assert training.store.resolve(MODEL).revision == first


def test_job_whose_model_was_deleted_before_it_ended_does_not_make_it_again(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_arguments: object) -> None:
        raise _Dies

    job = training.create_job()
    with monkeypatch.context() as patched:
        patched.setattr(JobRun, "_finish", die)
        with pytest.raises(_Dies):
            run_of(training, claim_of(training, -1)).run()
    training.store.delete_model(MODEL)
    training.jobs.forget_model(MODEL)
    run_of(training, claim_of(training, 30)).run()
    assert training.jobs.get_job(job.id).status is JobStatus.CANCELLED and files_of_model(training) == []


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
    run_of(training, first).run()
    assert training.jobs.get_job(quick.id).status is JobStatus.SUCCEEDED
    listed = training.jobs.list_checkpoints(slow.id, limit=9).items
    assert len(listed) == 2 and all(training.store.resolve(one.model_id) for one in listed)


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
