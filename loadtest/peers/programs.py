"""The two servers that were written to be peers, `lru_server` and `deployments.multiplexed`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from loadtest.client.target import Target
from loadtest.peers.fleet import Fleet
from loadtest.peers.peer import Process, Started
from loadtest.server import free_port


@dataclass
class Program(Started):
    """A peer: the module of that name, which takes a folder, a number of models and a port, and counts its loads."""

    name: str
    about: str
    start_s: float
    module: str
    scratch: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    keeps_limit: bool = True
    restarts: bool = False
    _url: str = ""

    def start(self, fleet: Fleet, memory: int) -> Target:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._process = Process(
            [
                sys.executable, "-m", self.module,
                "--models", str(fleet.models), "--keep", str(memory), "--port", str(port),
            ],
            self.scratch / f"{self.name}.log",
            environ=self.environ,
        )  # fmt: skip
        self._process.wait_answering(f"{self._url}/loads")
        return Target(self._url, self.name)

    def num_loads(self) -> int:
        return int(httpx.get(f"{self._url}/loads", timeout=30).json())


def lru(scratch: Path) -> Program:
    about = "one process: FastAPI and an LRU of transformers models"
    return Program("lru", about, 6.0, "loadtest.peers.lru_server", scratch)


def multiplexed(scratch: Path) -> Program:
    # Ray's own niceness of 15 would put it behind whoever asks.
    environ = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    about = "Ray Serve: @serve.multiplexed and @serve.batch"
    return Program("ray", about, 16.0, "deployments.multiplexed", scratch, environ)
