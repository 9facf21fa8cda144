"""What a gateway tells of the jobs, over a real database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from deployments.backlog import Backlog
from deployments.scaling import JOBS
from serve.errors import StoreUnavailable
from serve.metrics import Metrics
from serve.types import JobStatus
from tests.api.test_metrics import counted
from tests.training.making import Training


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path)
    yield training
    training.close()


async def test_jobs_that_wait_or_run_count_and_others_do_not(training: Training) -> None:
    backlog = Backlog(training.jobs, Metrics(), fresh_s=0)
    assert await backlog.stats() == {JOBS: 0}
    jobs = [training.create_job() for _ in range(4)]
    training.jobs.pause_job(jobs[3].id)
    training.jobs.cancel_job(jobs[2].id)
    training.queue.claim("worker", 30)
    assert await backlog.stats() == {JOBS: 2}


async def test_the_database_is_asked_at_most_once_in_a_while(training: Training) -> None:
    clock = Clock()
    backlog = Backlog(training.jobs, Metrics(), fresh_s=5, clock=clock)
    await backlog.stats()
    training.create_job()
    clock.now = 4.9
    assert await backlog.stats() == {JOBS: 0}
    clock.now = 5
    assert await backlog.stats() == {JOBS: 1}


async def test_while_the_database_does_not_answer_it_says_nothing(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Mapping[JobStatus, int]:
        raise StoreUnavailable("The job database does not answer.")

    backlog = Backlog(training.jobs, Metrics(), fresh_s=0)
    training.create_job()
    assert await backlog.stats() == {JOBS: 1}
    with monkeypatch.context() as broken:
        broken.setattr(training.jobs, "count_jobs", fail)
        assert await backlog.stats() == {}
    assert await backlog.stats() == {JOBS: 1}


async def test_gauges_of_jobs_are_kept_while_there_is_no_trainer(training: Training) -> None:
    metrics = Metrics()
    training.create_job()
    await Backlog(training.jobs, metrics).stats()
    assert counted(metrics, "rookery_jobs")[("queued",)] == 1
