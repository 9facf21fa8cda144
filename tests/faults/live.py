"""A live service whose streams take seconds, so that they are there when something dies; its processes and counters."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from serve.store.opening import EMBEDDED
from serve.store.revisions import Store
from tests.deployments.conftest import BASE, LiveService, import_tiny_model, start_service, stop_service, wait_until
from tests.faults.traffic import Traffic

MODELS = [f"flock/m{number}" for number in range(4)]
BACK_S = 300.0  # on a busy machine
KILL_EVERY_S = 10.0


@dataclass
class Flock:
    """The service, and what is done to it."""

    service: LiveService
    num_generators: int
    random: random.Random = field(default_factory=lambda: random.Random(1))

    @property
    def url(self) -> str:
        return self.service.url

    def is_whole(self) -> bool:
        """Whether all generators are there and one of them writes."""
        with suppress(httpx.HTTPError, KeyError):
            replicas = httpx.get(f"{self.url}/v1/replicas", timeout=30).json()["data"]
            is_ready = httpx.get(f"{self.url}/readyz", timeout=30).status_code == 200
            return len(replicas) == self.num_generators and is_ready
        return False

    def wait_until_whole(self) -> float:
        """The seconds that it took."""
        began = time.monotonic()
        wait_until(self.is_whole, BACK_S)
        return time.monotonic() - began

    def signal_generator(self, number: signal.Signals) -> int:
        """One of them, at random; its process."""
        pid = self.random.choice(sorted(self.service.replica_pids("generator")))
        os.kill(pid, number)
        return pid

    def kill_generators(self, traffic: Traffic, num_outcomes: int) -> int:
        """Every `KILL_EVERY_S`, or when all are there again if that is later, until so many requests have ended."""
        num_kills = 0
        while len(traffic.outcomes) < num_outcomes:
            began = time.monotonic()
            self.wait_until_whole()
            self.signal_generator(signal.SIGKILL)
            num_kills += 1
            while time.monotonic() < began + KILL_EVERY_S and len(traffic.outcomes) < num_outcomes:
                time.sleep(0.1)
        return num_kills

    def pids_of(self, title: str) -> list[int]:
        """Of the service's processes whose name begins so."""
        found = []
        for process in psutil.Process(self.service.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                    found.append(process.pid)
        return found

    def resumed_ids(self) -> set[str]:
        """Requests whose streams were taken up after a token of theirs."""
        lines = (self.service.data / "log.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines if '"generation_resumed"' in line]
        return {event["request_id"] for event in events if event["had"] == "stream"}

    def count(self, name: str, **labels: str) -> float:
        """A counter of all its processes together, those that have died among them."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=30).text)
        samples = [one for family in families for one in family.samples if one.name == name]
        return sum(one.value for one in samples if labels.items() <= one.labels.items())


def publish(data: Path) -> None:
    """A tiny base, and models of some 5 ms a token: copies of a trained one, as random weights blow rounding up."""
    import_tiny_model(data, BASE)
    for model_id in MODELS:
        Store(data, embedded={}).import_folder(EMBEDDED["fledgling"], model_id)


@contextmanager
def flock(data: Path, *, generators: int = 2, gateways: int = 2, **variables: str) -> Iterator[Flock]:
    """Until the block ends."""
    data.mkdir(exist_ok=True)
    publish(data)
    variables = {"ROOKERY_MEMORY_BYTES": str(400_000_000), **variables}
    service = start_service(data, "--generators", str(generators), "--gateways", str(gateways), **variables)
    live = Flock(service, generators)
    try:
        live.wait_until_whole()
        yield live
    finally:
        if service.process.poll() is None:
            stop_service(service)
