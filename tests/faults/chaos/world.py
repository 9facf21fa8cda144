"""The service that is broken, and all that it stands on: its data folder, a Hub, its models, its processes."""

from __future__ import annotations

import itertools
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from serve.store.revisions import Store
from serve.store.validate import WEIGHTS
from tests.deployments.conftest import BASE, LiveService, import_tiny_model, start_service, stop_service
from tests.fakes.hub import FakeHub, fake_hub
from tests.fakes.models import write_tiny_gpt2

STABLE = [f"stable/m{number}" for number in range(3)]  # whose texts are compared
CHANGING = [f"changing/m{number}" for number in range(6)]  # replaced, deleted, made again
AWAY = [f"huggingtweets/away{number}" for number in range(40)]  # on the Hub until they are asked for
REPLICAS = {"generator": 2, "gateway": 2, "trainer": 1}

_SLOW: dict[str, Any] = {
    "n_layer": 6,
    "n_embd": 256,
    "n_head": 4,
    "n_positions": 256,
}  # its streams are there when something dies
_QUICK: dict[str, Any] = {"n_embd": 192, "n_positions": 256}  # 4 MB
_MEMORY_BYTES = 100_000_000  # not enough for all of them
_DISK = "size=3g"
_MARK_BYTES = 64


@dataclass
class World:
    """A live service over a folder, and what was done to it."""

    root: Path
    hub: FakeHub
    service: LiveService
    random: random.Random
    has_own_disk: bool  # which can be filled
    fetched: dict[str, Path]  # a model on the Hub -> the folder that is served there
    present: dict[str, list[bytes]] = field(default_factory=dict)  # a changing model -> bytes of each of its revisions
    gone: dict[bytes, str] = field(default_factory=dict)  # bytes of a revision that was deleted -> its model
    gateway_kills_s: list[float] = field(default_factory=list)  # by `time.monotonic`
    num_killed: int = 0
    broken: list[str] = field(default_factory=list)  # what was promised and is not so, a sentence each
    _seeds: Iterator[int] = field(default_factory=lambda: itertools.count(1000))
    _reversals: list[tuple[threading.Timer, Callable[[], object]]] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.service.data

    @property
    def url(self) -> str:
        return self.service.url

    @property
    def logs(self) -> list[Path]:
        """Outside the disk that is filled."""
        return sorted(self.root.glob("log.jsonl*"), reverse=True)

    # --- Its processes --------------------------------------------------------------------------------------

    def pids(self, what: str) -> list[int]:
        """Of a deployment's replicas, of the trainings ("training"), or of Serve's controller ("controller")."""
        if what in REPLICAS:
            return sorted(self.service.replica_pids(what))
        return sorted(pid for pid, command in self.service.commands() if _is_a(command, what))

    def is_whole(self) -> bool:
        """Whether there are as many replicas as there should be, and a text can be written."""
        if any(len(self.pids(name)) != number for name, number in REPLICAS.items()):
            return False
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        return False

    # --- What is put right again ----------------------------------------------------------------------------

    def later(self, seconds: float, put_right: Callable[[], object]) -> None:
        """Calls it then, and once more when all is put right: it must bear that."""
        timer = threading.Timer(seconds, put_right)
        timer.daemon = True
        self._reversals.append((timer, put_right))
        timer.start()

    def recover(self) -> None:
        for timer, put_right in self._reversals:
            timer.cancel()
            timer.join()
            put_right()
        self._reversals.clear()

    # --- Its models -----------------------------------------------------------------------------------------

    def publish(self, model_id: str) -> None:
        """With weights that never were before, from another process than the service's. Raises: RookeryError."""
        folder = write_tiny_gpt2(self.root / "made", seed=next(self._seeds), **_QUICK)
        self.present.setdefault(model_id, []).append(_mark(folder))
        Store(self.data, embedded={}).import_folder(folder, model_id)

    def deleted(self, model_id: str) -> None:
        """The service has said so: nothing of what it was may be found."""
        self.gone |= dict.fromkeys(self.present.pop(model_id, []), model_id)


def _is_a(command: list[str], what: str) -> bool:
    title = {"controller": "ray::ServeController"}.get(what)
    return command[0].startswith(title) if title else "--job" in command


def _mark(folder: Path) -> bytes:
    """Bytes of its weights that no other has: random floats, from the middle of the file."""
    weights = (folder / WEIGHTS).read_bytes()
    return weights[len(weights) // 2 :][:_MARK_BYTES]


@contextmanager
def world(root: Path, seed: int) -> Iterator[World]:
    """Until the block ends. With root's rights the data folder is a disk of its own."""
    with ExitStack() as stack:
        data = root / "data"
        data.mkdir()
        has_own_disk = subprocess.run(["mount", "-t", "tmpfs", "-o", _DISK, "tmpfs", data], check=False).returncode == 0
        if has_own_disk:
            stack.callback(lambda: subprocess.run(["umount", "--lazy", data], check=True))
        hub = stack.enter_context(fake_hub())
        fetched = {}
        for number, model_id in enumerate(AWAY):
            fetched[model_id] = write_tiny_gpt2(root / "hub" / str(number), seed=100 + number, **_QUICK)
            hub.add(model_id, fetched[model_id])
        import_tiny_model(data, BASE)
        for number, model_id in enumerate(STABLE):
            Store(data, embedded={}).import_folder(
                write_tiny_gpt2(root / "stable" / str(number), seed=10 + number, **_SLOW), model_id
            )
        service = start_service(
            data,
            *("--generators", "2", "--gateways", "2"),
            ROOKERY_HUB_ENABLED="true",
            ROOKERY_HUB_ENDPOINT=hub.endpoint,
            ROOKERY_HUB_DEADLINE_S="20",
            ROOKERY_MEMORY_BYTES=str(_MEMORY_BYTES),
            ROOKERY_LOG_FILE=str(root / "log.jsonl"),
        )
        stack.callback(_stop, service)
        made = World(root, hub, service, random.Random(seed), has_own_disk, fetched)
        stack.callback(made.recover)
        for model_id in CHANGING:
            made.publish(model_id)
        yield made


def _stop(service: LiveService) -> None:
    if service.process.poll() is None:
        stop_service(service)
