"""A real Prometheus over a folder of its own, with our rules; ended with its block."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from deployments.haproxy import free_port
from tests.monitoring.queries import RULES

JOB = "rookery"
_START_S = 30.0
_STOP_S = 15.0
_POLL_S = 0.1

Json = dict[str, Any]


class NoPrometheus(Exception):
    """It is not installed."""


@dataclass(frozen=True, slots=True)
class Series:
    """One series of an answer: (time, value) in order; one of them where a moment was asked for."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]

    @property
    def has_numbers(self) -> bool:
        """Whether any value is a number: a share of nothing is none."""
        return any(value == value for _, value in self.points)


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One that runs at `url`."""

    url: str

    def ask(self, path: str, **arguments: Any) -> Any:
        """The data of an answer of its HTTP API. Raises: AssertionError with what it says of a query."""
        reply = httpx.get(f"{self.url}/api/v1/{path}", params=arguments, timeout=30)
        said: Json = reply.json()
        assert said["status"] == "success", f"{arguments}: {said.get('error')}"
        return said["data"]

    def query(self, query: str) -> list[Series]:
        """As it is now."""
        found = self.ask("query", query=query)["result"]
        return [Series(one["metric"], _points([one["value"]])) for one in found]

    def query_range(self, query: str, start: float, end: float, step_s: float) -> list[Series]:
        """As it was from `start` to `end`."""
        found = self.ask("query_range", query=query, start=start, end=end, step=step_s)["result"]
        return [Series(one["metric"], _points(one["values"])) for one in found]

    def rules(self) -> list[Json]:
        """Every rule as Prometheus sees it, with `health` and `lastError`."""
        return [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[Json]:
        """Whom it scrapes, with `health` and `lastError`."""
        found: list[Json] = self.ask("targets")["activeTargets"]
        return found


@contextmanager
def running_prometheus(folder: Path, targets: Sequence[str], key: str, *, every_s: int = 1) -> Iterator[Prometheus]:
    """Scrapes the `targets` (host:port) with the `key` as the job `rookery`. Raises: NoPrometheus."""
    if (binary := shutil.which("prometheus")) is None:
        raise NoPrometheus("prometheus is not here; Debian and Ubuntu have it in a package of that name.")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "prometheus.json"  # JSON is YAML
    config.write_text(json.dumps(_config(targets, key, every_s)))
    url = f"http://127.0.0.1:{(port := free_port())}"
    options = {
        "config.file": config,
        "storage.tsdb.path": folder / "data",
        "web.listen-address": f"127.0.0.1:{port}",
        "log.level": "warn",
    }
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([binary, *(f"--{name}={value}" for name, value in options.items())], stderr=log)
    try:
        _wait_until_ready(url, process, folder / "prometheus.log")
        yield Prometheus(url)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _config(targets: Sequence[str], key: str, every_s: int) -> Json:
    scraped = {"job_name": JOB, "authorization": {"credentials": key}, "static_configs": [{"targets": list(targets)}]}
    return {
        "global": {"scrape_interval": f"{every_s}s", "scrape_timeout": f"{every_s}s", "evaluation_interval": "2s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [scraped],
    }


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        assert time.monotonic() < deadline, f"Prometheus was not ready within {_START_S:g} s"
        try:
            if httpx.get(f"{url}/-/ready", timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(_POLL_S)


def _points(values: list[list[Any]]) -> tuple[tuple[float, float], ...]:
    return tuple((float(at), float(value)) for at, value in values)
