"""`rookery up` as a peer among peers, with a memory budget of so many models."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import httpx

from loadtest.client.target import Target
from loadtest.peers.fleet import Fleet
from loadtest.peers.peer import Process, Started
from loadtest.server import free_port

# What a model takes beside its file's bytes: padding of its panels. Less than an eighth, else another would fit.
ROOM = 1.05
SMALL_BYTES = 1 << 20  # the same for tiny models, and for the base model that is always there
_LOADS = re.compile(r"^rookery_model_loads_total\{([^}]*)\} (\S+)", re.MULTILINE)


class Rookery(Started):
    """A peer. No warm start and nothing pinned: models come and go as with the others."""

    name = "rookery"
    about = "`rookery up`"
    keeps_limit = True
    start_s = 17.0
    restarts = False

    def __init__(self, scratch: Path) -> None:
        self._log = scratch / "rookery.log"
        self._url = ""

    def start(self, fleet: Fleet, memory: int) -> Target:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._process = Process(
            [
                sys.executable, "-m", "deployments.cli", "up",
                "--port", str(port), "--data", str(fleet.data), "--no-browser",
            ],
            self._log,
            environ={
                "ROOKERY_DTYPE": "bfloat16",
                "ROOKERY_HUB_ENABLED": "0",
                "ROOKERY_MEMORY_BYTES": str(int(memory * (fleet.model_bytes * ROOM + SMALL_BYTES))),
            },
        )  # fmt: skip
        self._process.wait_ready(lambda: f"ready {self._url}" in self._log.read_text())
        return Target(self._url, self.name)

    def num_loads(self) -> int:
        return count_loads(httpx.get(f"{self._url}/metrics", timeout=10).text)


def count_loads(metrics: str) -> int:
    """Of /metrics: loads that went well."""
    return sum(int(float(value)) for labels, value in _LOADS.findall(metrics) if 'outcome="ok"' in labels)
