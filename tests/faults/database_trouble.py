"""A live service whose database is locked, read-only or away for a while, again and again."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import create_engine, text

from tests.deployments.conftest import BASE, import_tiny_model, start_service, stop_service, wait_until
from tests.faults.traffic import Traffic, make_asks
from tests.postgres import PostgresServer
from tests.training.making import made_up_texts

LOCKED_S, AWAY_S = 20.0, 10.0
_ENDED = ("succeeded", "failed", "cancelled")


def run(folder: Path, server: PostgresServer | None, rounds: int) -> dict[str, Any]:
    """On SQLite, or on the `server`. Each round: trouble begins while a job trains, and it must end well."""
    data = folder / "data"
    import_tiny_model(data, BASE)
    url = server.create_database() if server else ""
    live = start_service(data, "--gateways", "2", "--generators", "2", ROOKERY_DATABASE_URL=url)
    count: Counter[str] = Counter()
    try:
        client = httpx.Client(base_url=live.url, timeout=60)
        archive = "\n".join(made_up_texts(150)).encode()
        sent = client.post("/v1/files", files={"file": ("a.txt", archive)}, data={"purpose": "fine-tune"})
        jobs = list[str]()
        with Traffic(live.url, make_asks([BASE], 50), unary=3, streams=3, pause_s=0.1) as traffic:
            for _ in range(rounds):
                reply = _create_job(client, sent.json()["id"], f"bot{len(jobs)}")
                jobs.append(reply.json()["id"])
                wait_until(lambda: _status(client, jobs[-1]) != "queued", 120)
                troubles = (_locked(data),) if server is None else (_read_only(server, url), _stopped(server))
                for trouble in troubles:
                    with trouble as until:
                        while time.monotonic() < until:
                            _note(count, _create_job(client, sent.json()["id"], f"none{count.total()}"))
                wait_until(lambda: client.get("/v1/fine_tuning/jobs").status_code == 200, 60)
            wait_until(lambda: all(_status(client, job_id) in _ENDED for job_id in jobs), 300)
            succeeded = sum(_status(client, job_id) == "succeeded" for job_id in jobs)
        verdict = traffic.verdict()
    finally:
        stop_service(live)
    return {
        "rounds": rounds,
        "requests": verdict.requests,
        "failed": verdict.requests - verdict.whole,
        "errors": dict(verdict.errors),
        "slowest_s": round(verdict.slowest_s, 1),
        "refused": count["refused"],
        "accepted": count["accepted"],  # in the last moment of the trouble: it had waited
        "wrong": count.total() - count["refused"] - count["accepted"],
        "answers": dict(count),
        "jobs": len(jobs),
        "succeeded": succeeded,
    }


def _create_job(client: httpx.Client, file_id: str, handle: str) -> httpx.Response:
    wanted = {"hyperparameters": {"n_epochs": 2}, "metadata": {"handle": handle}}
    return client.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file_id, **wanted})


def _status(client: httpx.Client, job_id: str) -> str:
    reply = client.get(f"/v1/fine_tuning/jobs/{job_id}")
    return str(reply.json()["status"]) if reply.status_code == 200 else str(reply.status_code)


def _note(count: Counter[str], reply: httpx.Response) -> None:
    if reply.is_success:
        count["accepted"] += 1
        reply.raise_for_status()
    elif reply.status_code == 503 and "retry-after" in reply.headers:
        count["refused"] += 1
    else:
        count[f"{reply.status_code} {reply.text[:100]}"] += 1


# --- Troubles: each gives the moment, by `time.monotonic`, when it has lasted long enough ------------------------


@contextmanager
def _locked(data: Path) -> Iterator[float]:
    with closing(sqlite3.connect(data / "rookery.db", isolation_level=None, timeout=30)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        yield time.monotonic() + LOCKED_S


@contextmanager
def _read_only(server: PostgresServer, url: str) -> Iterator[float]:
    """As a standby is, or a primary that was told to be."""
    name = url.rpartition("/")[2]
    engine = create_engine(server.url("postgres"), isolation_level="AUTOCOMMIT")
    say = f"ALTER DATABASE {name} SET default_transaction_read_only"
    drop = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
    try:
        with engine.connect() as session:
            session.execute(text(f"{say} = on"))
            session.execute(drop, {"name": name})  # sessions keep what they began with
            yield time.monotonic() + LOCKED_S
            session.execute(text(f"{say} = off"))
            session.execute(drop, {"name": name})
    finally:
        engine.dispose()


@contextmanager
def _stopped(server: PostgresServer) -> Iterator[float]:
    server.stop()
    yield time.monotonic() + AWAY_S
    server.start()
