"""What is done to the service: each strike tells whether there was anything to strike."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

import httpx
from sqlalchemy import create_engine, select

from serve.database.tables import JobRow
from serve.errors import RookeryError
from serve.training.jobs.queue import MAX_ATTEMPTS
from serve.types import JobStatus
from tests.fakes.hub import Fault
from tests.faults.chaos.world import CHANGING, World

_LEASE_S = 30.0  # of a trainer
_TAKEDOWN_S = 1.0
_LEFT_BYTES = 1 << 20  # of a disk that is nearly full
_TIMEOUT_S = 60.0
_DATABASE = "rookery.db"


def _kill(what: str) -> Callable[[World], bool]:
    def strike(world: World) -> bool:
        victims = world.pids(what)
        if not victims or (what in ("trainer", "training") and _is_spared(world)):
            return False
        if what == "gateway":
            world.gateway_kills_s.append(time.monotonic())
        os.kill(world.random.choice(victims), signal.SIGKILL)
        world.num_killed += 1
        return True

    return strike


def _stop(what: str, shortest_s: float, longest_s: float) -> Callable[[World], bool]:
    """SIGSTOP, and SIGCONT later. Whom Ray has replaced meanwhile counts as killed."""

    def strike(world: World) -> bool:
        victims = world.pids(what)
        if not victims or (what == "trainer" and _is_spared(world)):
            return False
        victim = world.random.choice(victims)
        os.kill(victim, signal.SIGSTOP)
        world.num_killed += 1
        world.later(world.random.uniform(shortest_s, longest_s), lambda: _go_on(victim))
        return True

    return strike


def _go_on(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def _is_spared(world: World) -> bool:
    """A job that died twice without progress: killed once more, it would rightly fail as poison."""
    engine = create_engine(f"sqlite:///{world.data / _DATABASE}")
    with engine.connect() as connection:
        running = select(JobRow.attempt).where(JobRow.status == JobStatus.RUNNING)
        attempts = connection.scalars(running).all()
    engine.dispose()
    return any(attempt >= MAX_ATTEMPTS for attempt in attempts)


# --- Models ---------------------------------------------------------------------------------------------------


def republish(world: World) -> bool:
    """Another revision, while the one before is asked for."""
    try:
        world.publish(world.random.choice(CHANGING))
    except RookeryError:
        return False  # the disk is full
    return True


def delete(world: World) -> bool:
    """While it is asked for; it is made again later, by `republish`."""
    here = sorted(world.present)
    if not here:
        return False
    model_id = world.random.choice(here)
    if not _insist("DELETE", f"{world.url}/v1/models/{model_id}", (200, 404)):
        return False
    world.deleted(model_id)
    return True


def take_down(world: World) -> bool:
    """Nobody may get a text of it a second later; then it is given back."""
    here = sorted(world.present)
    if not here:
        return False
    address = f"{world.url}/v1/models/{world.random.choice(here)}"
    if not _insist("POST", f"{address}/disable", (200,), {"reason": "chaos"}):
        return False
    time.sleep(_TAKEDOWN_S)
    for _ in range(4):
        if _ask(world, address.rpartition("/v1/models/")[2]) == 200:
            world.broken.append(f"{address} was still answered {_TAKEDOWN_S:g} s after it was disabled")
    return _insist("POST", f"{address}/enable", (200, 404))


def _insist(method: str, url: str, wanted: tuple[int, ...], body: object = None) -> bool:
    """Asks again and again, as an operator does, until it is done. False when it is refused for good."""
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            status = httpx.request(method, url, json=body, timeout=_TIMEOUT_S).status_code
            if status in wanted or 400 <= status < 500:
                return status in wanted
        time.sleep(0.5)
    return False


def _ask(world: World, model_id: str) -> int:
    body = {"model": model_id, "prompt": "I", "max_tokens": 2}
    with suppress(httpx.HTTPError):
        return httpx.post(f"{world.url}/v1/completions", json=body, timeout=_TIMEOUT_S).status_code
    return 0


# --- What the service stands on -------------------------------------------------------------------------------


def _break_hub(*faults: Fault) -> Callable[[World], bool]:
    """Without faults it is not there at all."""

    def strike(world: World) -> bool:
        _mend_hub(world)
        if faults:
            world.hub.fail_everywhere(*faults)
        else:
            world.hub.close_door()
        world.later(world.random.uniform(5, 25), lambda: _mend_hub(world))
        return True

    return strike


def _mend_hub(world: World) -> None:
    world.hub.recover()
    world.hub.open_door()


def fill_disk(world: World) -> bool:
    if not world.has_own_disk:
        return False
    ballast = world.data / "ballast"
    with ballast.open("ab") as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(world.data).free - _LEFT_BYTES)
    world.later(world.random.uniform(3, 12), lambda: ballast.unlink(missing_ok=True))
    return True


def lock_database(world: World) -> bool:
    """Another program writes, for seconds."""
    connection = sqlite3.connect(world.data / _DATABASE, timeout=5, check_same_thread=False, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        connection.close()
        return False
    world.later(world.random.uniform(1, 12), connection.close)
    return True


# --- Bad company ----------------------------------------------------------------------------------------------

_STREAM = b'{"model": "%s", "prompt": "I", "max_tokens": 150, "stream": true, "ignore_eos": true}'
_BAD: tuple[tuple[str, bytes, str], ...] = (
    ("/v1/completions", b"{" * 10_000, "application/json"),
    ("/v1/completions", b'{"model": "tiny/base", "prompt": "I", "temperature": 1e999}', "application/json"),
    ("/v1/completions", b'{"model": "tiny/base", "prompt": "\\ud800", "n": 1000000000}', "application/json"),
    ("/v1/completions", b'{"model": "../../etc/passwd", "prompt": "I"}', "application/json"),
    ("/v1/completions", b'{"model": "tiny/base", "prompt": "' + b"a " * 100_000 + b'"}', "application/json"),
    ("/v1/completions", b"\xff\xfe\x00", "application/json; charset=utf-16"),
    ("/v1/completions", b"a=b", "application/x-www-form-urlencoded"),
    ("/v1/files", b"--x\r\n\r\n--x--", "multipart/form-data; boundary=x"),
    ("/v1/fine_tuning/jobs", b'{"model": "tiny/base", "training_file": "file-none"}', "application/json"),
    ("/v1/fine_tuning/jobs", b"[[[[", "application/json"),
    ("/models/%2e%2e/%00", b"{}", "application/json"),
)


def send_rubbish(world: World) -> bool:
    """Each is to be refused by a 4xx, whatever state the service is in."""
    for path, body, kind in 3 * _BAD:
        with suppress(httpx.HTTPError):  # the gateway was killed
            reply = httpx.post(f"{world.url}{path}", content=body, headers={"content-type": kind}, timeout=_TIMEOUT_S)
            is_clear = reply.status_code == 503 and "retry-after" in reply.headers
            if not (400 <= reply.status_code < 500 or is_clear):
                world.broken.append(f"bad input got {reply.status_code} of {path}: {body[:60]!r}")
    return True


def leave_early(world: World) -> bool:
    """A dozen who want long streams and hang up at any moment."""
    address = urlsplit(world.url)
    model_id = b"stable/m0"
    body = _STREAM % model_id
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    asked = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            with suppress(OSError):
                callers = socket.create_connection((address.hostname or "", address.port or 80), timeout=5)
                stack.enter_context(callers)
                callers.sendall(asked)
                time.sleep(world.random.uniform(0, 0.2))
    return True


# What is done, and how often in comparison.
STRIKES: dict[str, tuple[Callable[[World], bool], float]] = {
    "kill -9 generator": (_kill("generator"), 3),
    "kill -9 gateway": (_kill("gateway"), 1.5),
    "kill -9 trainer": (_kill("trainer"), 1),
    "kill -9 training": (_kill("training"), 2),
    "kill -9 Serve controller": (_kill("controller"), 0.7),
    "SIGSTOP generator": (_stop("generator", 2, 20), 1),
    "SIGSTOP trainer": (_stop("trainer", _LEASE_S + 5, _LEASE_S + 20), 0.5),
    "republish a model": (republish, 3),
    "delete a model": (delete, 2),
    "take down a model": (take_down, 1),
    "Hub away": (_break_hub(), 1),
    "Hub 429": (_break_hub(Fault(429, headers={"Retry-After": "3"})), 0.7),
    "Hub 503": (_break_hub(Fault(503)), 0.7),
    "Hub slow": (_break_hub(Fault(pace=(1000, 1.0))), 0.7),
    "disk full": (fill_disk, 1),
    "database locked": (lock_database, 1),
    "clients leave": (leave_early, 1),
    "bad input": (send_rubbish, 1),
}
