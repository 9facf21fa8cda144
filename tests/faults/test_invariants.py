"""The checker sees what it is there to see."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.database.tables import JobRow
from serve.store.revisions import Store
from serve.store.validate import WEIGHTS
from serve.types import JobStatus
from tests.fakes.models import write_tiny_gpt2
from tests.faults.invariants import (
    check_counts,
    check_gone,
    check_idle,
    check_jobs,
    check_leftovers,
    check_models,
    cut_by,
)
from tests.faults.traffic import Ask, Outcome
from tests.training.making import BASE, Training

MODEL = "huggingtweets/ada"


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    made = Training(tmp_path)
    yield made
    made.close()


def _set(training: Training, job_id: str, **values: object) -> None:
    with training.database.write() as session:
        row = session.query(JobRow).filter_by(id=job_id).one()
        for name, value in values.items():
            setattr(row, name, value)


def test_a_job_that_has_not_ended_is_lost(training: Training) -> None:
    job = training.create_job()
    lost, doubled = check_jobs(training.database, training.store, {job.id: MODEL})
    assert len(lost) == 1 and "queued" in lost[0]
    assert doubled == []


def test_a_job_that_was_cancelled_is_well_and_one_that_nobody_asked_for_is_not(training: Training) -> None:
    job = training.create_job()
    training.jobs.cancel_job(job.id)
    assert check_jobs(training.database, training.store, {job.id: MODEL}) == ([], [])
    assert check_jobs(training.database, training.store, {})[1] == ["1 jobs of 0 requests"]


def test_a_job_that_failed_is_lost_but_for_a_named_reason(training: Training) -> None:
    job = training.create_job()
    training.jobs.cancel_job(job.id)
    _set(training, job.id, status=JobStatus.FAILED, error_code="disk_full")
    accepted = {job.id: MODEL}
    assert check_jobs(training.database, training.store, accepted)[0] != []
    assert check_jobs(training.database, training.store, accepted, may_fail=("disk_full",)) == ([], [])


def test_a_job_that_succeeded_without_a_model_is_lost(training: Training) -> None:
    job = training.create_job()
    training.jobs.cancel_job(job.id)
    _set(training, job.id, status=JobStatus.SUCCEEDED)
    assert check_jobs(training.database, training.store, {job.id: MODEL})[0] == [f"{job.id}: succeeded without a model"]


def test_a_model_made_by_a_job_that_was_cancelled_is_one_too_many(training: Training, tmp_path: Path) -> None:
    job = training.create_job()
    training.jobs.cancel_job(job.id)
    training.store.import_folder(write_tiny_gpt2(tmp_path / "made", seed=1), MODEL)
    lost, doubled = check_jobs(training.database, training.store, {job.id: MODEL})
    assert (lost, len(doubled)) == ([], 1)


def test_a_byte_that_is_another_is_seen(tmp_path: Path) -> None:
    store = Store(tmp_path, embedded={})
    found = store.import_folder(write_tiny_gpt2(tmp_path / "made"), MODEL)
    assert check_models(store, {}) == []
    weights = found.path / WEIGHTS
    weights.chmod(0o644)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert check_models(store, {}) == [f"{MODEL}@{found.revision}: its bytes are others"]


def test_a_fetched_model_is_compared_with_what_the_hub_serves(tmp_path: Path) -> None:
    store = Store(tmp_path, embedded={})
    source, other = write_tiny_gpt2(tmp_path / "source"), write_tiny_gpt2(tmp_path / "other", seed=1)
    staged = store.stage()
    shutil.copytree(source, staged, dirs_exist_ok=True)
    store.publish(MODEL, staged, revision="a" * 40)
    assert check_models(store, {MODEL: source}) == []
    assert len(check_models(store, {MODEL: other})) == 1


def test_bytes_of_what_was_deleted_are_found(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "cache").write_bytes(b"0" * 5000 + b"canary" + b"1" * 10)
    (tmp_path / "empty").touch()
    assert check_gone([tmp_path], {b"canary": "a bot"}) == [f"a bot is still in {tmp_path / 'deep' / 'cache'}"]
    assert check_gone([tmp_path], {b"another": "a bot"}) == []


def test_what_is_left_behind_is_found(training: Training, tmp_path: Path) -> None:
    training.upload()
    assert check_leftovers(tmp_path, training.database) == []
    for name in ("file-of-nobody", "strange"):  # the first is swept, as in service
        (tmp_path / "uploads" / name).touch()
    (tmp_path / "models" / ".staging" / "left").mkdir()
    (tmp_path / "training" / "ftjob-1").mkdir(parents=True)
    assert check_leftovers(tmp_path, training.database) == [
        "left behind: models/.staging/left",
        "left behind: training/ftjob-1",
        "left behind: uploads/strange",
    ]


def test_an_ended_job_that_a_worker_holds_is_found(training: Training, tmp_path: Path) -> None:
    job = training.create_job()
    training.jobs.cancel_job(job.id)
    _set(training, job.id, worker="host:1")
    assert check_leftovers(tmp_path, training.database) == [f"{job.id} is held"]


@pytest.mark.parametrize(
    "busy", [{"running": 1}, {"residents": [{"model": "a", "leases": 1}]}, {"residents": [{"model": "b", "leases": 0}]}]
)
def test_a_generator_that_is_not_idle_is_seen(busy: dict[str, object]) -> None:
    idle = {"replica": "g", "waiting": 0, "queued": 0, "running": 0, "residents": [{"model": "a", "leases": 0}]}
    assert check_idle([idle], {"b"}) == []
    assert len(check_idle([idle | busy], {"b"})) == 1


def test_metrics_and_log_are_compared(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    request = {"event": "request", "route": "/v1/files", "status": 200}
    log.write_text("".join(json.dumps(line) + "\n" for line in (request, request, {"event": "job_started"})))
    metrics = (
        "# TYPE rookery_requests_total counter\n"
        'rookery_requests_total{route="/v1/files",status="200"} 2.0\n'
        'rookery_requests_total{route="/metrics",status="200"} 9.0\n'
    )
    assert check_counts(metrics, [log], slack=0) == []
    more = metrics + '# TYPE rookery_generations_total counter\nrookery_generations_total{outcome="ok"} 1.0\n'
    assert check_counts(more, [log], slack=0) == ["generated ok: 1 by the metrics, 0 in the log"]
    assert check_counts(more, [log], slack=1) == []


def test_only_a_stream_of_a_killed_gateway_is_excused() -> None:
    ask = Ask(BASE, "I", 0, 1)
    cut = Outcome(ask, True, began_s=10.0, ended_s=12.0, ended="cut")
    whole = Outcome(ask, True, began_s=10.0, ended_s=12.0, ended="whole")
    unary = Outcome(ask, False, began_s=10.0, ended_s=12.0, ended="cut")
    assert cut_by([cut, whole, unary], [11.5]) == [cut]
    assert cut_by([cut, whole, unary], [20.0, 5.0]) == []
