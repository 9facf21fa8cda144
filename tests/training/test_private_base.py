"""Bases that are not everybody's, and those that are still on their way from a Hub."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.training.jobs.run import JobRun
from serve.training.jobs.store import JobStore
from serve.types import ALL_SEEING, EVERYBODY, Hyperparameters, JobRequest, JobStatus, TrainingFile, Viewer, Visibility
from tests.fakes.hub import FakeHub, Fault, fake_hub
from tests.fakes.models import write_tiny_gpt2
from tests.training.making import Training

PRIVATE, MODEL = "acme/secret", "huggingtweets/ada"


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with fake_hub() as server:
        yield server


def job_run(training: Training, base: str, *, n_epochs: int = 1, viewer: Viewer = ALL_SEEING) -> JobRun:
    files = (TrainingFile(training.upload(owner=viewer.tenant).id, "ada"),)
    wanted = JobRequest(
        *(base, files, Hyperparameters(n_epochs=n_epochs)), seed=7, viewer=viewer, visibility=Visibility.UNLISTED
    )
    JobStore(training.database, training.options.uploads).create_job(wanted)
    claim = training.queue.claim("test", 60)
    assert claim is not None
    return JobRun(training.options, claim.job.id, claim.fence)


def test_what_has_learnt_from_a_private_model_is_private_and_so_are_its_checkpoints(training: Training) -> None:
    training.store.publish(PRIVATE, write_tiny_gpt2(training.store.stage()), visibility=Visibility.PRIVATE)
    job_run(training, PRIVATE, n_epochs=2).run()
    (info,) = [info for info in training.store.list_models(limit=9).items if info.model_id == MODEL]
    assert info.is_private
    assert training.store.resolve(MODEL).is_private
    assert MODEL not in {info.model_id for info in training.store.list_models(limit=9, viewer=EVERYBODY).items}


def test_model_that_is_private_stays_so_when_it_learns_from_a_public_one(training: Training) -> None:
    training.store.publish(MODEL, write_tiny_gpt2(training.store.stage()), visibility=Visibility.PRIVATE)
    training.store.publish("acme/public", write_tiny_gpt2(training.store.stage(), seed=1))
    job_run(training, "acme/public").run()
    assert training.store.resolve(MODEL).is_private


def test_a_model_is_its_jobs_tenants_and_nobody_else_makes_one_of_that_name(training: Training) -> None:
    training.store.publish("acme/public", write_tiny_gpt2(training.store.stage(), seed=1))
    ada, bob = Viewer("ada"), Viewer("bob")
    job_run(training, "acme/public", viewer=ada).run()
    made = training.store.get_model(MODEL)
    assert (made.owner, made.visibility) == ("ada", Visibility.UNLISTED)
    run = job_run(training, "acme/public", viewer=bob)
    run.run()
    job = training.jobs.get_job(run._claim.job.id, bob)
    assert (job.status, job.error_code) == (JobStatus.FAILED, "not_owner") and not training.store.list_revisions(MODEL)[
        1:
    ]
    results = training.jobs.list_files(limit=9, purpose="fine-tune-results")
    assert {file.owner for file in results.items} == {"ada"}  # bob's job came to none


def test_job_whose_base_is_still_coming_is_given_back_at_once(server: FakeHub, tmp_path: Path) -> None:
    server.add("some/body", write_tiny_gpt2(tmp_path / "repo"))
    server.fail("some/body", Fault(path="model.safetensors", pace=(20_000, 0.2)))
    training = Training(tmp_path / "data", hub_enabled=True, hub_endpoint=server.endpoint)
    run = job_run(training, "some/body")
    thread = threading.Thread(target=run.run)
    thread.start()
    while not server.num_requests("model.safetensors"):
        time.sleep(0.01)
    asked = time.monotonic()
    run.stop()
    thread.join(10)
    assert not thread.is_alive() and time.monotonic() - asked < 5
    assert training.jobs.get_job(run._claim.job.id).status is JobStatus.QUEUED
    training.close()
