"""Serve's controller, a whole machine, and rolling restarts: what goes on, and what is there afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select

from serve.database.connection import Database
from serve.database.tables import JobRow
from serve.settings import Settings
from tests.deployments.conftest import BASE, LiveService, start_service, stop_service, wait_until
from tests.faults.live import MODELS, flock, publish
from tests.faults.row import Measured, row
from tests.faults.traffic import Traffic, make_asks
from tests.k8s.cluster import open_stage, run_drain, run_head_kill
from tests.k8s.nodes import serve_config
from tests.training.making import made_up_texts

_READY_S = 60.0
_TRAINED_S = 300.0
_NUM_RESTARTS = 5
_PLAN = """
about = "Many short texts, and some long ones, while all is started anew."
duration_s = 3600
warmup_s = 0
timeout_s = 60

[[flow]]
name = "readers"
[flow.arrivals]
rate = 8
[flow.models]
count = 1
[flow.requests]
streaming = 0.5
output_tokens = [8, 40]

[[flow]]
name = "long streams"
[flow.arrivals]
rate = 0.3
[flow.models]
first = 1
count = 1
[flow.requests]
streaming = 1
output_tokens = [150, 300]
"""


@row(
    "F7",
    did="kill -9 of Serve's controller under 8 callers, then of a generator",
    expected="0 lost; the generator is replaced within 60 s",
    minutes=3,
)
def controller_killed(folder: Path, share: float) -> Measured:
    del share  # one death of each
    with flock(folder / "data") as live:
        with Traffic(live.url, make_asks(MODELS, 100), unary=4, streams=4) as traffic:
            traffic.wait_for(20)
            (controller,) = live.pids_of("ray::ServeController")
            os.kill(controller, signal.SIGKILL)
            wait_until(lambda: live.pids_of("ray::ServeController") not in ([], [controller]), 60)
            traffic.wait_for(len(traffic.outcomes) + 20)
            killed = live.signal_generator(signal.SIGKILL)
            wait_until(lambda: killed not in live.service.replica_pids("generator"), 30)
            healed_s = live.wait_until_whole()
            traffic.wait_for(len(traffic.outcomes) + 20)
        verdict = traffic.verdict()
    return Measured(
        f"{verdict.lost} of {verdict.requests} lost, {verdict.refused} refused; replaced after {healed_s:.0f} s",
        verdict.lost == verdict.refused == verdict.streams_told == 0 and healed_s <= 60,
        asdict(verdict),
    )


@row(
    "F7b",
    did="kill -9 of every process at once while a bot is trained, then `rookery up` over the same folder",
    expected="ready within 60 s, every model and job is there, the training succeeds",
    minutes=3,
)
def all_killed(folder: Path, share: float) -> Measured:
    del share
    data = folder / "data"
    data.mkdir()
    publish(data)
    service = start_service(data)
    try:
        job_id = _begin_training(service)
        before = _ids(service, "/v1/models?limit=1000"), _ids(service, "/v1/fine_tuning/jobs")
    finally:
        stop_service(service, signal.SIGKILL)
    began = time.monotonic()
    service = start_service(data)
    try:
        ready_s = time.monotonic() - began
        models, jobs = _ids(service, "/v1/models?limit=1000"), _ids(service, "/v1/fine_tuning/jobs")
        num_lost = len(before[0] - models) + len(before[1] - jobs)
        job = _wait_for(service, job_id, lambda job: job["status"] in ("succeeded", "failed"))
    finally:
        stop_service(service)
    return Measured(
        f"ready after {ready_s:.0f} s; {num_lost} of {len(before[0])} models and {len(before[1])} jobs lost; the "
        f"training {job['status']}",
        ready_s <= _READY_S and num_lost == 0 and job["status"] == "succeeded",
    )


@row(
    "F7c",
    did="kill -9 of a cluster's head (5 nodes, Redis), another takes its place, then a generator dies; under load",
    expected="0 failed",
    minutes=5,
    needs="root",
)
def head_killed(folder: Path, share: float) -> Measured:
    del share
    with open_stage(folder) as stage:
        outcome = run_head_kill(stage)
    return Measured(
        f"{outcome.failed} of {outcome.requests} failed; the head was back after {outcome.detail['back_s']:g} s",
        outcome.failed == 0 and outcome.requests > 0,
        outcome.detail,
    )


@row(
    "F23",
    did="5 rolling restarts of all generators and gateways, then SIGTERM of a node of each; 5 nodes, under load",
    expected="0 failed",
    minutes=12,
    needs="root",
)
def rolled(folder: Path, share: float) -> Measured:
    plan = folder / "restarts.toml"
    plan.write_text(_PLAN)
    num_restarts = max(1, round(_NUM_RESTARTS * share))
    with open_stage(folder) as stage:
        with stage.load(str(plan)) as load:
            for number in range(num_restarts):
                places = Settings().max_sequences + 1 + number  # another number is reason enough to start all anew
                stage.cluster.deploy(serve_config(settings={"max_sequences": places}))
                stage.wait_until_whole()
        restarts, drained = load.outcome(), run_drain(stage)
    num_requests, num_failed = restarts.requests + drained.requests, restarts.failed + drained.failed
    return Measured(
        f"{num_failed} of {num_requests:,} failed in {num_restarts} restarts and 2 drained nodes; the slowest took "
        f"{restarts.detail['slowest_s']:g} s",
        num_failed == 0 and num_requests > 0,
        {"restarts": restarts.detail, "drained": drained.detail},
    )


@row(
    "F23b",
    did="SIGTERM of the service while a bot is trained, then `rookery up` again",
    expected="its job is back in the queue within 20 s, and succeeds from its last checkpoint",
    minutes=3,
)
def trainer_stopped(folder: Path, share: float) -> Measured:
    del share
    data = folder / "data"
    data.mkdir()
    publish(data)
    service = start_service(data)
    job_id = _begin_training(service)
    began = time.monotonic()
    left = stop_service(service)
    stopped_s = time.monotonic() - began
    status = _status_on_disk(data, job_id)
    service = start_service(data)
    try:
        job = _wait_for(service, job_id, lambda job: job["status"] in ("succeeded", "failed"))
        goes_on = [event["message"] for event in _events(service, job_id) if "goes on from" in event["message"]]
    finally:
        stop_service(service)
    return Measured(
        f"{status} after {stopped_s:.1f} s, {len(left)} processes left; then: "
        f"{' '.join(goes_on) or 'It begins anew.'} It {job['status']}",
        status == "queued" and stopped_s <= 20 and not left and bool(goes_on) and job["status"] == "succeeded",
    )


def _begin_training(service: LiveService) -> str:
    """The id of a job that has taken steps."""
    tweets = "\n".join(made_up_texts(400)).encode()
    with httpx.Client(base_url=service.url, timeout=60) as client:
        file = client.post("/v1/files", files={"file": ("tweets.txt", tweets)}, data={"purpose": "fine-tune"}).json()
        body = {"model": BASE, "training_file": file["id"], "handle": "ada", "hyperparameters": {"n_epochs": 40}}
        job_id = str(client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"])
    wait_until(lambda: any(event["type"] == "metrics" for event in _events(service, job_id)), _TRAINED_S)
    return job_id


def _events(service: LiveService, job_id: str) -> list[dict[str, Any]]:
    """The newest first."""
    answer = httpx.get(f"{service.url}/v1/fine_tuning/jobs/{job_id}/events?limit=100", timeout=30)
    return list(answer.raise_for_status().json()["data"])


def _status_on_disk(data: Path, job_id: str) -> str:
    database = Database(Settings(data=data).sql_url)
    try:
        with database.read() as session:
            return str(session.scalars(select(JobRow.status).where(JobRow.id == job_id)).one())
    finally:
        database.close()


def _wait_for(service: LiveService, job_id: str, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The job, once it is so."""
    found: dict[str, Any] = {}

    def look() -> bool:
        with suppress(httpx.HTTPError):
            found.update(httpx.get(f"{service.url}/v1/fine_tuning/jobs/{job_id}", timeout=30).json())
        return bool(found) and is_so(found)

    wait_until(look, _TRAINED_S)
    return found


def _ids(service: LiveService, path: str) -> set[str]:
    return {one["id"] for one in httpx.get(f"{service.url}{path}", timeout=30).raise_for_status().json()["data"]}
