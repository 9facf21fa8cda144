"""The live application: one Ray for the whole session, started as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from serve.store.revisions import Store
from tests.deployments.cli_world import archive, hub_world, rookery, world  # noqa: F401  # fixtures
from tests.fakes.models import write_tiny_gpt2

with warnings.catch_warnings():  # of pydantic's, about Ray's own models
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401

ROOKERY = (sys.executable, "-m", "deployments.cli")  # the command, whether or not it is on the PATH
BASE = "tiny/base"
OUTLIVE_S = 10.0  # a killed service cannot end its processes: they must notice


@dataclass(frozen=True, slots=True)
class LiveService:
    """A service that runs, and where it keeps its models."""

    url: str
    process: subprocess.Popen[str]
    data: Path

    def replica_pids(self, deployment: str) -> list[int]:
        """Operating-system processes of a deployment's replicas."""
        title = f"ray::ServeReplica:rookery:{deployment}"
        return [pid for pid, command in self.commands() if command[0].startswith(title)]

    def commands(self) -> Iterator[tuple[int, list[str]]]:
        """Number and command line of all its processes that live."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if command := child.cmdline():
                    yield child.pid, command


def start_service(data: Path, *arguments: str, **variables: str) -> LiveService:
    """Starts `rookery up` over a folder with a tiny base model, and waits until it says `ready`."""
    port = _free_port()
    settings = {
        "ROOKERY_HUB_ENABLED": "false",
        "ROOKERY_MEMORY_BYTES": str(50_000_000),  # a dozen of the models of `test_live_replicas`
        "ROOKERY_THREADS": "1",
        "ROOKERY_TRAINER_THREADS": "1",
        "ROOKERY_DTYPE": "float32",  # bfloat16 rounds by the shape of the batch, which then decides close draws
    }
    process = subprocess.Popen(
        [*ROOKERY, "up", "--port", str(port), "--data", str(data), "--base", BASE, "--no-browser", *arguments],
        env={**os.environ, **settings, **variables},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    service = LiveService(f"http://127.0.0.1:{port}", process, data)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # ends with the process, too
    except BaseException:  # whoever waits is ended: nobody else knows of the service
        stop_service(service)
        raise
    if line != f"ready {service.url}\n":
        stop_service(service)
        raise AssertionError(f"the service did not start; it said {line!r}")
    return service


def stop_service(service: LiveService, number: signal.Signals = signal.SIGTERM) -> list[str]:
    """Signals the service and waits for its end; the titles of processes that are left, which it ends as well."""
    try:
        family = psutil.Process(service.process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    titles = {process: " ".join(process.cmdline()).strip() for process in family}
    service.process.send_signal(number)
    service.process.wait(60)
    assert service.process.stdout is not None
    service.process.stdout.close()
    _, left = psutil.wait_procs(family, timeout=0 if number == signal.SIGTERM else OUTLIVE_S)
    for process in left:
        process.kill()
    return [titles[process] for process in left]


def import_tiny_model(data: Path, model_id: str, *, seed: int = 0) -> None:
    """Publishes a tiny model with random weights, the same for the same seed."""
    folder = write_tiny_gpt2(data / f"tiny-{seed}", seed=seed)
    Store(data, embedded={}).import_folder(folder, model_id)


def wait_until(is_so: Callable[[], bool], timeout_s: float, poll_s: float = 0.1) -> None:
    """Looks again and again at what another process does; an AssertionError when it does not come about in time."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"it did not come about within {timeout_s:g} s"
        time.sleep(poll_s)


@pytest.fixture(scope="session")
def live_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    """One gateway, two generators, a trainer and the model `tiny/base`."""
    data = tmp_path_factory.mktemp("live")
    import_tiny_model(data, BASE)
    service = start_service(data, "--generators", "2")
    yield service
    assert stop_service(service) == [], "SIGTERM left processes behind"


@pytest.fixture(scope="session")
def live_url(live_service: LiveService) -> str:
    """The address of the live service."""
    return live_service.url


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
