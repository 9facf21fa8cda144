"""Who uses the service beside the traffic that is counted: those who train, and those with a patient client."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import httpx
from openai import OpenAI, OpenAIError

from tests.deployments.conftest import BASE
from tests.faults.chaos.world import STABLE
from tests.training.making import made_up_texts

_OPEN = ("validating_files", "queued", "running", "paused")
_MAX_OPEN = 3
_CANCELLED = 0.1  # of the jobs, by their owner
_TIMEOUT_S = 60.0


class _Person:
    """Goes on in a thread of its own, from `with` to its end."""

    pause_s = 1.0

    def __init__(self) -> None:
        self._is_over = threading.Event()
        self._ended: Future[None] = Future()

    def act(self) -> None: ...

    def __enter__(self) -> None:
        threading.Thread(target=self._run, name=type(self).__name__, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._ended.result(10 * _TIMEOUT_S)

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                self.act()
                self._is_over.wait(self.pause_s)
        except BaseException as exc:
            self._ended.set_exception(exc)
        else:
            self._ended.set_result(None)


class Trainers(_Person):
    """Keep a few jobs in the queue. A request without an answer is sent again with its Idempotency-Key."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__()
        self.accepted: dict[str, str] = {}  # job -> the model that it makes
        self._client = httpx.Client(base_url=url, timeout=_TIMEOUT_S)
        self._random = random.Random(seed)

    def act(self) -> None:
        if self.num_open() < _MAX_OPEN:
            self._add()
        if self._random.random() < _CANCELLED / 10:
            self._send("POST", f"/v1/fine_tuning/jobs/{self._random.choice(list(self.accepted))}/cancel")

    def num_open(self) -> int:
        jobs = self._send("GET", "/v1/fine_tuning/jobs?limit=1000").json()["data"]
        return sum(job["status"] in _OPEN for job in jobs)

    def _add(self) -> None:
        handle = f"bot{len(self.accepted)}"
        tweets = "\n".join(made_up_texts(150, len(self.accepted))).encode()
        file = self._send("POST", "/v1/files", files={"file": ("tweets.txt", tweets)}, data={"purpose": "fine-tune"})
        body = {
            "model": BASE,
            "training_file": file.json()["id"],
            "handle": handle,
            "hyperparameters": {"n_epochs": self._random.randint(2, 8)},
            "seed": len(self.accepted),
        }
        job = self._send("POST", "/v1/fine_tuning/jobs", json=body, headers={"idempotency-key": handle}).json()
        self.accepted[job["id"]] = f"huggingtweets/{handle}"

    def _send(self, method: str, path: str, **said: Any) -> httpx.Response:
        """Until it is answered. Raises: httpx.HTTPStatusError where it is refused for good."""
        while True:
            with suppress(httpx.TransportError):
                reply = self._client.request(method, path, **said)
                if reply.status_code < 500 and reply.status_code != 429:
                    if reply.status_code != 409:  # a job that has ended cannot be cancelled
                        reply.raise_for_status()
                    return reply
            time.sleep(0.5)


class Patient(_Person):
    """Uses the `openai` client as it comes: it asks again, twice, where an answer has not begun."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=_TIMEOUT_S)
        self.asked = 0
        self.failed = Counter[str]()

    def act(self) -> None:
        self.asked += 1
        body: dict[str, Any] = {"model": STABLE[self.asked % len(STABLE)], "prompt": "I think", "max_tokens": 60}
        is_stream = self.asked % 2 == 0
        try:
            if is_stream:
                for _ in self._client.completions.create(stream=True, **body):
                    pass
            else:
                self._client.completions.create(**body)
        except (OpenAIError, httpx.HTTPError) as exc:
            self.failed[f"{'stream' if is_stream else 'whole'}: {type(exc).__name__}"] += 1
