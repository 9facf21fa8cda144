"""A real service for a browser: started as a user starts it, over a folder of its own, ended with its block."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from deployments.haproxy import free_port

ROOT = Path(__file__).parents[2]
BASE = "fledgling"
TRAIN_S = 240.0  # a bot of one epoch takes some 20 s on two quiet cores, behind others longer
_STOP_S = 90.0
_POLL_S = 0.3

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Site:
    """A service that runs; what a test wants beside the browser, it asks for over the API."""

    url: str
    data: Path
    key: str = ""

    def ask(self, method: str, path: str, **arguments: Any) -> Json:
        """The JSON of an answer. Raises: httpx.HTTPStatusError."""
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        reply = httpx.request(method, self.url + path, headers=headers, timeout=60, **arguments)
        reply.raise_for_status()
        answer: Json = reply.json()
        return answer

    def job(self, job_id: str) -> Json:
        return self.ask("GET", f"/v1/fine_tuning/jobs/{job_id}")

    def train(self, archive: Path, handle: str, *, seed: int = 0) -> str:
        """Asks for a bot of one epoch; the job's id."""
        fields = {"handle": handle, "n_epochs": "1", "seed": str(seed)}
        return str(self.ask("POST", "/v1/bots", data=fields, files={"archive": archive.open("rb")})["id"])

    def versions(self, model: str) -> list[Json]:
        """The newest first."""
        found: list[Json] = self.ask("GET", f"/v1/models/{model}/versions")["data"]
        return found

    def finish(self, job_id: str) -> str:
        """Waits for a job that succeeds; its model."""
        wait_for(lambda: self.job(job_id)["status"] in ("succeeded", "failed", "cancelled"), TRAIN_S)
        job = self.job(job_id)
        assert job["status"] == "succeeded", job["error"]
        return str(job["fine_tuned_model"])

    def write(self, model: str, prompt: str = "My dream is") -> str:
        """What it says most likely: the same for the same weights."""
        body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "add_bos": True}
        return str(self.ask("POST", "/v1/completions", json=body)["choices"][0]["text"])


@contextmanager
def open_site(data: Path, **variables: str) -> Iterator[Site]:
    """`python -m deployments.up` with these settings; its log is in the data folder."""
    data.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{(port := free_port())}"
    settings = {"ROOKERY_HUB_ENABLED": "false", "ROOKERY_DATA": str(data), **variables}
    command = [sys.executable, "-m", "deployments.up", f"--port={port}"]
    log = data / "up.log"
    with log.open("wb") as said:
        environment = {**os.environ, **settings}
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True, stdin=subprocess.DEVNULL
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # ends with the process, too
        assert line == f"ready {url}\n", f"the service said {line!r}\n{log.read_text(errors='replace')[-2000:]}"
        yield Site(url, data, variables.get("ROOKERY_API_KEYS", ""))
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def wait_for(is_so: Callable[[], bool], timeout_s: float, what: str = "it") -> None:
    """Looks again and again at what another process does; an AssertionError when it does not come about in time."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"{what} did not come about within {timeout_s:g} s"
        time.sleep(_POLL_S)
