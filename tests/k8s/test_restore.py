"""The runbook's backup and restore: the database first, then the volume, while the service works."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.engine import make_url

from tests import postgres
from tests.deployments.conftest import BASE, LiveService, import_tiny_model, start_service, stop_service, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (postgres.is_installed() and shutil.which("pg_dump")), reason="needs PostgreSQL's server and client"
    ),
]

ARCHIVE = Path(__file__).parents[2] / "deployments" / "archives" / "unit_seven.zip"


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.PostgresServer]:
    started = postgres.PostgresServer()
    yield started
    started.close()


def test_what_was_backed_up_is_there_again(server: postgres.PostgresServer, tmp_path: Path) -> None:
    data, copy, dump = tmp_path / "data", tmp_path / "copy", tmp_path / "rookery.dump"
    url = server.create_database()
    import_tiny_model(data, BASE)
    service = start_service(data, ROOKERY_DATABASE_URL=url)
    try:
        _train(service, "seven")
        before = _seen(service)
        _run("pg_dump", "--format=custom", f"--file={dump}", f"--dbname={_plain(url)}")
        subprocess.run(["cp", "-a", str(data), str(copy)], check=True)
        _train(service, "late")  # after the backup
    finally:
        stop_service(service)
    shutil.rmtree(data)
    copy.rename(data)
    _run("pg_restore", "--clean", "--if-exists", "--no-owner", f"--dbname={_plain(url)}", str(dump))
    service = start_service(data, ROOKERY_DATABASE_URL=url)
    try:
        assert _seen(service) == before
        _train(service, "next")  # it goes on from there
    finally:
        stop_service(service)


def _train(service: LiveService, handle: str) -> None:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        with ARCHIVE.open("rb") as file:
            sent = client.post("/v1/files", files={"file": file}, data={"purpose": "fine-tune"}).raise_for_status()
        wanted = {"model": BASE, "training_file": sent.json()["id"], "metadata": {"handle": handle}}
        job = client.post("/v1/fine_tuning/jobs", json=wanted).raise_for_status().json()["id"]

        def status() -> str:
            return str(client.get(f"/v1/fine_tuning/jobs/{job}").json()["status"])

        wait_until(lambda: status() in ("succeeded", "failed", "cancelled"), 180, poll_s=0.5)
        assert status() == "succeeded"


def _seen(service: LiveService) -> dict[str, Any]:
    """What callers see of jobs, files and models, and what one of these writes."""
    with httpx.Client(base_url=service.url, timeout=60) as client:
        asked = {"model": "huggingtweets/seven", "prompt": "My dream is", "max_tokens": 20, "seed": 7}
        return {
            "jobs": client.get("/v1/fine_tuning/jobs").json(),
            "files": client.get("/v1/files").json(),
            "models": client.get("/v1/models").json(),
            "text": client.post("/v1/completions", json=asked).raise_for_status().json()["choices"],
        }


def _plain(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)
