"""What the driver asks of every server that it compares, and how one is started, watched and ended.

It knows none of them. A peer gets model ids and folders and a number of models that may be in memory at a time, and
gives an address that speaks one of the formats of `loadtest.client`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import httpx
import psutil  # type: ignore[import-untyped]

from loadtest.client.target import Target
from loadtest.engine.work import PeerUnavailableError
from loadtest.peers.fleet import Fleet

__all__ = ["Peer", "PeerUnavailableError", "Process", "cores"]

READY_TIMEOUT_S = 90.0  # five times what the slowest takes on two quiet cores
STOP_TIMEOUT_S = 20.0
_POLL_S = 0.02


class Peer(Protocol):
    """A server to compare with. `name` is its key in results."""

    name: str
    about: str
    keeps_limit: bool  # it unloads models to stay within a number of them
    start_s: float  # what a start and its end take on two cores, measured: for the plan of times
    restarts: bool  # it wants to be started anew for another number of models

    def start(self, fleet: Fleet, memory: int) -> Target:
        """Serve `fleet`, of which `memory` may be in memory; returns when it answers. Raises: PeerUnavailableError."""
        ...

    def stop(self) -> None:
        """End all that was started; nothing where nothing was."""
        ...

    def memory_bytes(self) -> int:
        """Proportional share (PSS) of its processes."""
        ...

    def num_loads(self) -> int:
        """How often a model was brought into memory since the start."""
        ...


class Process:
    """A server and all that it started."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environ: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, env=os.environ | (environ or {}), cwd=folder, stdout=file, stderr=subprocess.STDOUT
            )

    def wait_ready(self, is_ready: Callable[[], bool], timeout_s: float = READY_TIMEOUT_S) -> None:
        """Raises: PeerUnavailableError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise PeerUnavailableError(f"it ended with status {self._process.returncode}: {self._last_line()}")
            if is_ready():
                return
            time.sleep(_POLL_S)
        raise PeerUnavailableError(f"it was not ready after {timeout_s:g} s: {self._last_line()}")

    def wait_answering(self, url: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until a GET of `url` is answered with 200. Raises: PeerUnavailableError."""
        with httpx.Client(timeout=5) as client:

            def is_ready() -> bool:
                try:
                    return client.get(url).status_code == 200
                except httpx.TransportError:
                    return False

            self.wait_ready(is_ready, timeout_s)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def memory_bytes(self) -> int:
        return sum(map(_pss, self._tree()))

    def stop(self) -> None:
        """SIGTERM to the first process, which ends its own; whatever is left after a while is killed, by its id."""
        tree = self._tree()
        if self.is_running:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        _, alive = psutil.wait_procs(tree, timeout=2)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # psutil looks first whether the id is still that process's
        self._process.wait()

    def _tree(self) -> list[psutil.Process]:
        try:
            first = psutil.Process(self._process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        return lines[-1][:300]


class Started:
    """What peers have in common that are one `Process`, which `start` keeps."""

    _process: Process | None = None

    def stop(self) -> None:
        if self._process:
            self._process.stop()
            self._process = None

    def memory_bytes(self) -> int:
        """PSS of all its processes."""
        return self._process.memory_bytes() if self._process else 0


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def cores() -> int:
    return len(os.sched_getaffinity(0))
