"""Keys, turns, pauses, progress and records of jobs, on both kinds of database."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from serve.database.tables import DeliveryRow, FileRow, IdempotencyRow, JobRow
from serve.errors import Conflict, InvalidRequest, NotFound, Overloaded, StoreUnavailable
from serve.training import jobs as jobs_package
from serve.training.jobs import store as store_module
from serve.training.jobs.queue import MAX_ATTEMPTS, Claim, JobQueue, Publication
from serve.training.jobs.store import JobStore
from serve.types import (
    BOT_PURPOSE,
    RESULTS_PURPOSE,
    Artifact,
    Integration,
    Job,
    JobRequest,
    JobStatus,
    Priority,
    Run,
    TrainingFile,
)
from tests.training.making import BASE, Training

ENDED = -1.0  # a lease that has ended when it begins
HOUR_MS = 3_600_000


@pytest.fixture
def training(training_on_both: Training) -> Training:
    return training_on_both


def request_of(
    training: Training, *, owner: str = "", priority: Priority = 0, purpose: str = "fine-tune"
) -> JobRequest:
    file = training.upload(purpose=purpose)
    return JobRequest(BASE, (TrainingFile(file.id, "ada"),), owner=owner, priority=priority)


def claim_of(training: Training, lease_s: float = 30) -> Claim:
    claim = training.queue.claim("worker", lease_s)
    assert claim is not None
    return claim


# --- Idempotency keys -------------------------------------------------------------------------------------


def test_same_key_and_request_give_the_same_job(training: Training) -> None:
    request = request_of(training)
    first, again = (training.jobs.create_job(request, idempotency_key="k") for _ in range(2))
    assert first.id == again.id and len(training.jobs.list_jobs(limit=9).items) == 1
    training.jobs.cancel_job(first.id)
    assert training.jobs.create_job(request, idempotency_key="k").status is JobStatus.CANCELLED
    assert training.jobs.create_job(request, idempotency_key="other").id != first.id
    assert training.jobs.create_job(replace(request, owner="bob"), idempotency_key="k").id != first.id


def test_same_key_with_another_request_is_refused(training: Training) -> None:
    request = request_of(training)
    job = training.jobs.create_job(request, idempotency_key="k")
    with pytest.raises(Conflict, match=job.id):
        training.jobs.create_job(replace(request, seed=3), idempotency_key="k")


def test_archives_of_a_bot_are_the_same_request_when_sent_again(training: Training) -> None:
    first = training.jobs.create_job(request_of(training, purpose=BOT_PURPOSE), idempotency_key="k")
    again = training.jobs.create_job(request_of(training, purpose=BOT_PURPOSE), idempotency_key="k")
    assert first.id == again.id
    training.jobs.cancel_job(first.id)  # its archives go
    assert training.jobs.create_job(request_of(training, purpose=BOT_PURPOSE), idempotency_key="k").id == first.id


def test_key_is_forgotten_after_a_day(training: Training) -> None:
    request = request_of(training)
    first = training.jobs.create_job(request, idempotency_key="k")
    with training.database.write() as session:
        session.execute(update(IdempotencyRow).values(created_at=IdempotencyRow.created_at - 24 * 3600))
    assert training.jobs.create_job(replace(request, seed=3), idempotency_key="k").id != first.id


def test_key_of_a_refused_request_is_free(training: Training) -> None:
    bad = JobRequest(BASE, (TrainingFile("file-none"),))
    with pytest.raises(NotFound):
        training.jobs.create_job(bad, idempotency_key="k")
    assert training.jobs.create_job(request_of(training), idempotency_key="k")


def test_requests_with_one_key_at_once_make_one_job(training: Training) -> None:
    request = request_of(training)
    together = threading.Barrier(6)

    def create(_number: int) -> str:
        together.wait()
        return training.jobs.create_job(request, idempotency_key="k").id

    with ThreadPoolExecutor(6) as callers:
        assert len(set(callers.map(create, range(6)))) == 1
    assert len(training.jobs.list_jobs(limit=9).items) == 1


# --- Turns and limits -------------------------------------------------------------------------------------


def claimed_owners(training: Training, number: int) -> list[str]:
    return [claim_of(training).job.request.owner for _ in range(number)]


def test_callers_take_turns_however_many_jobs_each_has(training: Training) -> None:
    for owner in ("ada", "ada", "ada", "bob", "bob", "eve"):
        training.jobs.create_job(request_of(training, owner=owner))
    assert claimed_owners(training, 6) == ["ada", "bob", "eve", "ada", "bob", "ada"]


def test_caller_who_comes_later_does_not_make_up_for_it(training: Training) -> None:
    for _ in range(4):
        training.jobs.create_job(request_of(training, owner="ada"))
    assert claimed_owners(training, 2) == ["ada", "ada"]
    for _ in range(3):
        training.jobs.create_job(request_of(training, owner="bob"))
    assert claimed_owners(training, 5) == ["ada", "bob", "ada", "bob", "bob"]


def test_higher_priority_goes_first_and_does_not_cost_its_owner_other_turns(training: Training) -> None:
    wanted: list[tuple[str, Priority]] = [("ada", -1), ("ada", 0), ("ada", 0), ("ada", 1), ("bob", 0)]
    for owner, priority in wanted:
        training.jobs.create_job(request_of(training, owner=owner, priority=priority))
    claims = [claim_of(training).job.request for _ in wanted]
    assert [(request.owner, request.priority) for request in claims] == [
        ("ada", 1),
        ("ada", 0),
        ("bob", 0),
        ("ada", 0),
        ("ada", -1),
    ]


def test_job_that_comes_back_has_its_turn_again(training: Training) -> None:
    jobs = [training.jobs.create_job(request_of(training, owner="ada")) for _ in range(2)]
    training.queue.release(claim_of(training))
    assert claim_of(training).job.id == jobs[0].id


def test_owner_with_too_many_open_jobs_is_told_to_come_back_and_others_are_not(training: Training) -> None:
    jobs = JobStore(training.database, training.options.uploads, max_jobs_per_key=2)
    mine = [jobs.create_job(request_of(training, owner="ada")) for _ in range(2)]
    with pytest.raises(Overloaded, match="2 is the limit") as caught:
        jobs.create_job(request_of(training, owner="ada"))
    assert caught.value.retry_after_s
    jobs.pause_job(mine[0].id)
    with pytest.raises(Overloaded):
        jobs.create_job(request_of(training, owner="ada"))
    jobs.create_job(request_of(training, owner="bob"))
    jobs.cancel_job(mine[0].id)
    jobs.create_job(request_of(training, owner="ada"))


def test_all_owners_together_have_a_limit(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_OPEN_JOBS", 1)
    training.jobs.create_job(request_of(training, owner="ada"))
    with pytest.raises(Overloaded):
        training.jobs.create_job(request_of(training, owner="bob"))


# --- Pausing ----------------------------------------------------------------------------------------------


def test_waiting_job_pauses_at_once_is_not_claimed_and_goes_on(training: Training) -> None:
    job = training.create_job()
    assert training.jobs.pause_job(job.id).status is JobStatus.PAUSED
    assert training.jobs.pause_job(job.id).status is JobStatus.PAUSED
    assert training.queue.claim("worker", 30) is None
    assert training.jobs.resume_job(job.id).status is JobStatus.QUEUED
    with pytest.raises(Conflict, match="queued"):
        training.jobs.resume_job(job.id)
    assert claim_of(training).job.id == job.id
    assert training.messages(job.id)[1:3] == ["The job is paused.", "The job goes on."]


def test_running_job_pauses_when_its_worker_gives_it_back(training: Training) -> None:
    job = training.create_job()
    claim = claim_of(training)
    assert training.jobs.pause_job(job.id).status is JobStatus.RUNNING
    assert training.queue.heartbeat(claim, 30) == "pause"
    assert training.queue.release(claim) is JobStatus.PAUSED
    with pytest.raises(Conflict):
        training.queue.check(claim)
    training.jobs.resume_job(job.id)
    assert claim_of(training).attempt == 1


def test_pause_that_has_not_begun_can_be_taken_back(training: Training) -> None:
    job = training.create_job()
    claim = claim_of(training)
    training.jobs.pause_job(job.id)
    assert training.jobs.resume_job(job.id).status is JobStatus.RUNNING
    assert training.queue.heartbeat(claim, 30) is None
    assert training.queue.release(claim) is JobStatus.QUEUED


def test_paused_job_can_be_cancelled(training: Training) -> None:
    job = training.create_job(purpose=BOT_PURPOSE)
    training.jobs.pause_job(job.id)
    assert training.jobs.cancel_job(job.id).status is JobStatus.CANCELLED
    assert not list(training.options.uploads.iterdir())
    for action in (training.jobs.pause_job, training.jobs.resume_job):
        with pytest.raises(Conflict, match="ended"):
            action(job.id)


def test_job_that_is_to_pause_is_not_taken_over_from_a_dead_worker(training: Training) -> None:
    job = training.create_job()
    claim_of(training, ENDED)
    training.jobs.pause_job(job.id)
    assert training.queue.claim("other", 30) is None
    assert training.jobs.get_job(job.id).status is JobStatus.PAUSED


def test_who_cancels_what_is_to_pause_gets_it_cancelled(training: Training) -> None:
    job = training.create_job()
    claim = claim_of(training)
    training.jobs.pause_job(job.id)
    training.jobs.cancel_job(job.id)
    assert training.queue.heartbeat(claim, 30) == "cancel"
    assert training.queue.release(claim) is JobStatus.CANCELLED


def test_cancelled_job_that_may_have_published_is_settled_first(training: Training, tmp_path: Path) -> None:
    job = training.create_job()
    claim = claim_of(training)
    training.queue.set_publication(claim, Publication(tmp_path / "stage", "huggingtweets/ada", "0123"))
    training.jobs.pause_job(job.id)
    assert training.queue.release(claim) is JobStatus.PAUSED
    assert training.jobs.cancel_job(job.id).status is JobStatus.QUEUED
    heir = claim_of(training)
    assert heir.pending
    training.queue.set_publication(heir, None)
    assert training.queue.release(heir) is JobStatus.CANCELLED


# --- Progress ---------------------------------------------------------------------------------------------


def test_f5_job_that_advances_is_no_poison_and_one_that_stands_still_is(training: Training) -> None:
    job = training.create_job()
    for step in range(1, 2 * MAX_ATTEMPTS):
        claim = claim_of(training)
        assert claim.attempt == min(step, 2)
        training.queue.set_progress(claim, 100 * step)
        assert training.queue.abandon(claim, "it died") is JobStatus.QUEUED
    for step in (100, 200):  # it has been there before
        claim = claim_of(training)
        training.queue.set_progress(claim, step)
        status = training.queue.abandon(claim, "it died")
    assert status is JobStatus.FAILED and training.jobs.get_job(job.id).error_code == "poison_job"


def test_checkpoint_is_listed_once_a_step_newest_first(training: Training) -> None:
    job = training.create_job()
    claim = claim_of(training)
    for step, revision in ((10, "a"), (20, "b"), (20, "c")):
        training.queue.record_checkpoint(
            claim, step=step, model_id=f"huggingtweets/ada@{revision}", metrics={"step": step, "valid_loss": 2.5}
        )
    page = training.jobs.list_checkpoints(job.id, limit=1)
    [newest] = page.items
    assert (newest.step, newest.model_id, newest.metrics["valid_loss"]) == (20, "huggingtweets/ada@c", 2.5)
    assert page.has_more and newest.id.startswith("ftckpt-")
    [oldest] = training.jobs.list_checkpoints(job.id, limit=5, after=newest.id).items
    assert oldest.step == 10
    assert sum(message.startswith("Checkpoint") for message in training.messages(job.id)) == 2
    with pytest.raises(NotFound):
        training.jobs.list_checkpoints("ftjob-none", limit=1)


# --- Files and records ------------------------------------------------------------------------------------


def write_csv(tmp_path: Path) -> Path:
    (tmp_path / "metrics.csv").write_text("step,train_loss\n1,2.5\n")
    return tmp_path / "metrics.csv"


def test_result_file_is_named_once_however_many_attempts_made_one(training: Training, tmp_path: Path) -> None:
    job = training.create_job()
    uploads = training.options.uploads
    zombie = claim_of(training, ENDED)
    training.queue.add_result_file(zombie, uploads, write_csv(tmp_path), "step_metrics.csv")
    heir = claim_of(training)
    file_id = training.queue.add_result_file(heir, uploads, write_csv(tmp_path), "step_metrics.csv")
    with pytest.raises(Conflict):
        training.queue.add_result_file(zombie, uploads, write_csv(tmp_path), "step_metrics.csv")
    training.queue.finish(heir, model_id="huggingtweets/ada", trained_tokens=1, result={"revision": "abc"})
    done = training.jobs.get_job(job.id)
    assert done.result["result_files"] == [file_id] and done.result["revision"] == "abc"
    [listed] = training.jobs.list_files(limit=9, purpose=RESULTS_PURPOSE).items
    assert (listed.id, listed.filename, listed.num_bytes) == (file_id, "step_metrics.csv", 22)
    assert listed.path.read_text().startswith("step,") and len(list(uploads.iterdir())) == 2


def run_of(job: Job) -> Run:
    base = Artifact("pretrained-model", "gpt2", "b" * 64)
    made = Artifact("finetuned-model", "ada", "c" * 64)
    return Run(job.id, "train", "@ada-train", 1, 2, {"seed": 7}, inputs=(base,), outputs=(made,))


def test_runs_and_deliveries_are_recorded_with_the_success_and_not_without(training: Training) -> None:
    job = training.create_job()
    zombie = claim_of(training, ENDED)
    heir = claim_of(training)
    facts = {"model_id": "huggingtweets/ada", "trained_tokens": 1, "result": {}}
    with pytest.raises(Conflict):
        training.queue.finish(zombie, **facts, runs=(run_of(job),), deliveries={"wandb": {}})  # type: ignore[arg-type]
    assert training.jobs.list_runs(job.id) == ()
    training.queue.finish(heir, **facts, runs=(run_of(job),), deliveries={"wandb": {"project": "p"}})  # type: ignore[arg-type]
    [run] = training.jobs.list_runs(job.id)
    assert (run.name, run.config["seed"], run.outputs[0].name) == ("@ada-train", 7, "ada")
    with training.database.read() as session:
        [delivery] = session.scalars(select(DeliveryRow))
        assert (delivery.tracker, delivery.status, delivery.options) == ("wandb", "waiting", {"project": "p"})
    with pytest.raises(NotFound):
        training.jobs.list_runs("ftjob-none")


def test_file_of_held_out_texts_is_one_of_the_jobs_files(training: Training) -> None:
    request = request_of(training)
    with pytest.raises(NotFound) as missing:
        training.jobs.create_job(replace(request, validation_file="file-none"))
    assert missing.value.param == "validation_file"
    with pytest.raises(InvalidRequest) as same:
        training.jobs.create_job(replace(request, validation_file=request.files[0].file_id))
    assert same.value.param == "validation_file"
    held_out = training.upload(seed=1, purpose=BOT_PURPOSE)
    job = training.jobs.create_job(replace(request, validation_file=held_out.id))
    with pytest.raises(Conflict, match=job.id):
        training.jobs.delete_file(held_out.id)
    training.jobs.cancel_job(job.id)
    assert not held_out.path.exists()
    with training.database.read() as session:
        assert session.scalar(select(func.count()).select_from(FileRow)) == 1


def test_all_of_a_request_comes_back(training: Training) -> None:
    integration = Integration("wandb", project="p", tags=("a", "b"))
    request = replace(request_of(training, owner="ada", priority=1), integrations=(integration,), metadata={"a": "b"})
    assert training.jobs.get_job(training.jobs.create_job(request).id).request == request


# --- What ends, pauses and goes ----------------------------------------------------------------------------


def test_pause_saves_up_no_turns_and_what_goes_on_takes_them_one_by_one(training: Training) -> None:
    mine = [training.jobs.create_job(request_of(training, owner="ada")) for _ in range(3)]
    for job in mine:
        training.jobs.pause_job(job.id)
    for _ in range(6):
        training.jobs.create_job(request_of(training, owner="bob"))
    assert claimed_owners(training, 3) == ["bob"] * 3
    for job in mine:
        training.jobs.resume_job(job.id)
    training.jobs.create_job(request_of(training, owner="eve"))
    assert claimed_owners(training, 7) == ["ada", "bob", "eve", "ada", "bob", "ada", "bob"]


def test_pause_that_ends_before_its_turn_costs_none(training: Training) -> None:
    mine = [training.jobs.create_job(request_of(training, owner="ada")) for _ in range(2)]
    training.jobs.pause_job(mine[0].id)
    training.jobs.resume_job(mine[0].id)
    assert claim_of(training).job.id == mine[0].id


def test_job_that_is_to_be_cancelled_cannot_be_parked(training: Training, tmp_path: Path) -> None:
    job = training.create_job()
    claim = claim_of(training)
    training.queue.set_publication(claim, Publication(tmp_path / "stage", "huggingtweets/ada", "0123"))
    training.queue.abandon(claim, "it died")
    training.jobs.cancel_job(job.id)
    assert training.jobs.pause_job(job.id).status is JobStatus.QUEUED
    heir = claim_of(training)
    training.queue.set_publication(heir, None)
    assert training.queue.read_wish(heir) == "cancel" and training.queue.release(heir) is JobStatus.CANCELLED


def test_publication_comes_back_with_what_main_was(training: Training, tmp_path: Path) -> None:
    training.create_job()
    publication = Publication(tmp_path / "stage", "huggingtweets/ada", "0123", "4567")
    claim = claim_of(training, ENDED)
    training.queue.set_publication(claim, publication)
    assert claim_of(training).pending == publication


def test_result_file_whose_commit_was_not_heard_of_is_kept(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training.create_job()
    claim = claim_of(training)
    write, calls = training.database.write, []

    @contextmanager
    def commit_unheard() -> Iterator[Session]:
        with write() as session:
            yield session
        calls.append(1)
        if len(calls) == 1:
            raise StoreUnavailable("The connection was lost.")

    monkeypatch.setattr(training.database, "write", commit_unheard)
    queue = JobQueue(training.database, patience_s=4)
    file_id = queue.add_result_file(claim, training.options.uploads, write_csv(tmp_path), "step_metrics.csv")
    assert (training.options.uploads / file_id).is_file() and len(calls) == 2
    assert training.jobs.get_job(job.id).result["result_files"] == [file_id]


def checkpoint(training: Training, claim: Claim, model_id: str = "huggingtweets/ada") -> None:
    training.queue.add_result(claim, {"model_id": model_id})
    training.queue.record_checkpoint(claim, step=1, model_id=f"{model_id}@{claim.job.id}", metrics={})


def test_end_of_a_training_forgets_the_checkpoints_of_those_that_are_over_alone(training: Training) -> None:
    over, paused, own, other = (training.create_job() for _ in range(4))
    claims = [claim_of(training) for _ in range(4)]
    for claim, model_id in zip(claims, ["huggingtweets/ada"] * 3 + ["huggingtweets/ada_l"], strict=True):
        checkpoint(training, claim, model_id)
    for claim in (claims[0], claims[3]):
        training.queue.fail(claim, code="x", message="It failed.")
    training.jobs.pause_job(paused.id)
    training.queue.release(claims[1])
    assert training.jobs.list_untidy() == sorted([over.id, other.id])
    assert training.jobs.forget_earlier_checkpoints("huggingtweets/ada", own.id) == (paused.id,)
    assert [len(training.jobs.list_checkpoints(job.id, limit=9).items) for job in (over, paused, own, other)] == [
        0,
        1,
        1,
        1,
    ]
    assert training.jobs.list_untidy() == [other.id]


def test_what_the_jobs_of_a_deleted_model_wrote_of_its_texts_is_gone(training: Training) -> None:
    done, going_on, waiting, other = (training.create_job() for _ in range(4))
    claims = [claim_of(training) for _ in range(4)]
    for claim, name in zip(claims, ("ada", "Ada", "ada", "ada_l"), strict=True):
        checkpoint(training, claim, f"huggingtweets/{name}")
        training.queue.add_event(claim, "Step 1", metrics={"step": 1, "samples": ["secret"]})
        training.queue.add_event(claim, "Step 2", metrics={"step": 2, "samples": []})
    run = replace(run_of(done), tables={"examples": {"columns": ["Prediction"], "data": [["secret"]]}})
    training.queue.finish(
        claims[0],
        model_id="huggingtweets/ada",
        trained_tokens=1,
        result={"samples": ["secret"], "losses": {}},
        runs=(run,),
        deliveries={"wandb": {}},
    )
    training.queue.release(claims[2])
    training.jobs.forget_model("huggingtweets/ada")

    found = training.jobs.get_job(done.id)
    assert found.status is JobStatus.SUCCEEDED and "samples" not in found.result and "losses" in found.result
    assert training.jobs.list_runs(done.id)[0].tables == {}
    assert training.queue.heartbeat(claims[1], 30) == "cancel"
    assert training.jobs.get_job(waiting.id).status is JobStatus.CANCELLED
    assert training.queue.heartbeat(claims[3], 30) is None
    for job, number in ((done, 0), (going_on, 0), (waiting, 0), (other, 1)):
        assert len(training.jobs.list_checkpoints(job.id, limit=9).items) == number
        events = training.jobs.list_events(job.id, limit=99).items
        assert sum("secret" in str(event.data) for event in events) == number
    with training.database.read() as session:
        assert session.scalars(select(DeliveryRow)).all() == []


def test_what_people_sent_is_for_the_services_own_user_alone(training: Training) -> None:
    assert training.options.uploads.stat().st_mode & 0o777 == 0o700
    for path in training.options.data_dir.glob("rookery.db*"):
        assert path.stat().st_mode & 0o777 == 0o600


# --- Clocks -----------------------------------------------------------------------------------------------


def shift_clock(training: Training, by_ms: int) -> None:
    """What a jump of the database's clock does: all times stored before it lie that much elsewhere."""
    with training.database.write() as session:
        session.execute(
            update(JobRow).values(
                lease_until_ms=JobRow.lease_until_ms - by_ms, not_before_ms=JobRow.not_before_ms - by_ms
            )
        )


def test_f22_clock_that_jumps_forward_ends_no_lease_of_a_living_worker(training: Training) -> None:
    training.create_job()
    other = JobQueue(training.database, confirm_s=0.2)
    claim = claim_of(training)
    assert other.claim("other", 30) is None
    shift_clock(training, HOUR_MS)
    assert other.claim("other", 30) is None
    training.queue.heartbeat(claim, 30)  # as a worker that lives sends it
    threading.Event().wait(0.25)
    assert other.claim("other", 30) is None


def test_f22_worker_that_is_dead_when_the_clock_jumps_back_is_replaced_after_one_lease(training: Training) -> None:
    training.create_job()
    claim_of(training)
    shift_clock(training, -HOUR_MS)
    other = JobQueue(training.database, confirm_s=0.1)
    assert other.claim("other", 0.3) is None
    threading.Event().wait(0.35)
    heir = other.claim("other", 0.3)
    assert heir and heir.attempt == 2


def test_f22_job_that_waits_to_be_tried_again_does_not_wait_an_hour_longer(training: Training) -> None:
    training.create_job()
    training.queue.abandon(claim_of(training), "it died", delay_s=60)
    assert training.queue.claim("worker", 30) is None
    shift_clock(training, -HOUR_MS)
    assert training.queue.claim("worker", 30)


_CLAIM_FOR_2_S = """
import select, sys, time
from serve.database.connection import Database
from serve.training.jobs.queue import JobQueue

queue = JobQueue(Database(sys.argv[1]), confirm_s=0.8)
print(time.time(), flush=True)
deadline = time.monotonic() + 2
while time.monotonic() < deadline:
    if queue.claim("from the future", 30):
        sys.exit("it took the job of a worker that lives")
    select.select([], [], [], 0.05)  # libfaketime breaks time.sleep
"""


@pytest.mark.parametrize("shift", ["+3600s", pytest.param("-3600s", marks=pytest.mark.slow)])
def test_f22_worker_with_another_clock_takes_no_job_from_one_that_lives(training: Training, shift: str) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is not installed")
    training.create_job()
    claim = claim_of(training, 2)
    environment = {"LD_PRELOAD": str(library), "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    command = [sys.executable, "-c", _CLAIM_FOR_2_S, training.options.database_url]
    with subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert abs(abs(float(other.stdout.readline()) - time.time()) - 3600) < 60
        while other.poll() is None:
            training.queue.heartbeat(claim, 2)
            threading.Event().wait(0.1)
    assert other.returncode == 0
    training.queue.check(claim)


def test_f22_leases_and_durations_read_no_local_wall_clock() -> None:
    [folder] = jobs_package.__path__
    for name in ("queue.py", "supervisor.py"):
        for node in ast.walk(ast.parse((Path(folder) / name).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("time", "time"), f"{name}, line {node.lineno}"
                assert node.value.id not in ("datetime", "date"), f"{name}, line {node.lineno}"
