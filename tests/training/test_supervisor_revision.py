"""One revision of a job, whoever dies when, and none that was decided against since."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.errors import ModelUnusable, StoreUnavailable
from serve.store.model_files import content_hash
from serve.training.jobs.publishing import Publisher
from serve.training.jobs.queue import Publication
from serve.training.jobs.run import JobRun
from serve.types import JobStatus, Visibility
from tests.training.making import BASE, Training
from tests.training.supervising import MODEL, claim_of, files_of_model, leftovers, revisions, run_of


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

    def die_after(self: Publisher, stage: Path, model_id: str, *, visibility: Visibility) -> None:
        for path in (stage / "runs").iterdir():
            path.write_text('{"run": "as it was told once"}')
        published(self, stage, model_id, visibility=visibility)
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
