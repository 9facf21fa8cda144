"""The Hub as a server: its repositories, its routes, its faults, and what it was asked."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.fakes.hub.faults import Fault, send
from tests.fakes.hub.messages import Answer, Request, Seen
from tests.fakes.hub.read import READ_ROUTES, Route
from tests.fakes.hub.repos import Commit, Repo

_EVERYWHERE = ""  # instead of a repository's id


class FakeHub:
    """`endpoint` is its address; `requests` is what it was asked, `bytes_sent` what it gave, by path.

    A part that adds to what it can do puts its routes first in `routes`.
    """

    def __init__(self, port: int = 0) -> None:
        self._socket = _bind(port)
        self.port: int = self._socket.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.storage = self.endpoint  # the address large files are redirected to
        self.has_resolve_cache = False  # whether small files are behind a relative redirect, as the real Hub's are
        self.tokens: dict[str, bool] = {"hf_secret": True}  # token -> whether it opens private and gated repositories
        self.repos: dict[str, Repo] = {}
        self.routes: list[Route] = list(READ_ROUTES)
        self.requests: list[Seen] = []
        self.bytes_sent: Counter[str] = Counter()
        self._moved: dict[str, str] = {}
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()
        self._server: _Server | None = None

    # --- what it has ------------------------------------------------------------------------------------

    def add(self, repo_id: str, folder: Path, *, branch: str = "main", tag: str | None = None, **info: Any) -> str:
        """Serves `folder` as the newest commit of the branch; its sha, which changes with the files."""
        commit = Commit.of(folder, info)
        repo = self.repos.setdefault(repo_id, Repo(repo_id))
        repo.commits = [old for old in repo.commits if old.sha != commit.sha] + [commit]
        repo.branches[branch] = commit.sha
        if tag:
            repo.tags[tag] = commit.sha
        return commit.sha

    def remove(self, repo_id: str) -> None:
        del self.repos[repo_id]

    def move(self, old_id: str, new_id: str) -> None:
        """Requests for the old name are sent on to the new one."""
        repo = self.repos.pop(old_id)
        repo.id = new_id
        self.repos[new_id] = repo
        self._moved[old_id] = new_id

    def moved_to(self, name: str) -> str | None:
        """The name to ask for instead of one that has moved, or is spelled otherwise."""
        spelled = next((known for known in self.repos if known.lower() == name.lower() and known != name), None)
        return None if name in self.repos else self._moved.get(name) or spelled

    # --- what goes wrong --------------------------------------------------------------------------------

    def fail(self, repo_id: str, *faults: Fault) -> None:
        """From now on, instead of what was set before; the first that fits befalls a request."""
        with self._lock:
            self._faults[repo_id] = list(faults)

    def fail_everywhere(self, *faults: Fault) -> None:
        self.fail(_EVERYWHERE, *faults)

    def recover(self) -> None:
        with self._lock:
            self._faults.clear()

    def take_fault(self, request: Request, answer: Answer) -> Fault | None:
        """The one that befalls this request, used up by one."""
        with self._lock:
            for repo_id, faults in self._faults.items():
                if repo_id != _EVERYWHERE and f"/{repo_id}/" not in f"{request.path}/":
                    continue
                for i, fault in enumerate(faults):
                    if fault.befalls(request, answer):
                        left = replace(fault, times=fault.times - 1)
                        faults[i : i + 1] = [left] if left.times else []
                        return fault
        return None

    # --- what it was asked ------------------------------------------------------------------------------

    def num_requests(self, path: str = "", method: str | None = None) -> int:
        """Those whose path ends so."""
        return sum(seen.path.endswith(path) and method in (None, seen.method) for seen in list(self.requests))

    def answer(self, request: Request) -> Answer:
        for method, pattern, handler in self.routes:
            is_of_method = method == request.method or (method, request.method) == ("GET", "HEAD")
            if is_of_method and (match := pattern.fullmatch(request.path)):
                return handler(self, request, match)
        return Answer(404)

    # --- its door ---------------------------------------------------------------------------------------

    def open_door(self) -> None:
        if self._server is None:
            self._server = _Server(self._socket, self)

    def close_door(self) -> None:
        """Every connection is cut and new ones are refused, until the door is opened at the same address."""
        if self._server:
            self._server.stop()
            self._server = None
            self._socket = _bind(self.port)  # bound and not listening: refused, and nobody else gets the port

    def close(self) -> None:
        if self._server:
            self._server.stop()
            self._server = None
        else:
            self._socket.close()


@contextmanager
def fake_hub(port: int = 0) -> Iterator[FakeHub]:
    """A Hub that runs until the block ends."""
    hub = FakeHub(port)
    hub.open_door()
    try:
        yield hub
    finally:
        hub.close()


def _bind(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound


class _Server(ThreadingHTTPServer):
    """Takes the bound socket over and listens on it until `stop`."""

    request_queue_size = 128
    block_on_close = False

    def __init__(self, bound: socket.socket, hub: FakeHub) -> None:
        super().__init__(bound.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = bound
        self.hub = hub
        self.stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self.server_activate()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), name="fake-hub", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.stopped.set()
        self.shutdown()
        self._thread.join()
        self.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is not worth a word."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        hub, target = self.server.hub, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        path = unquote(target.path)
        hub.requests.append(
            Seen(self.command, path, headers.get("authorization"), headers.get("range"), time.monotonic())
        )
        body = self.rfile.read(int(headers.get("content-length", 0)))
        request = Request(self.command, path, parse_qs(target.query, keep_blank_values=True), headers, body)
        answer = hub.answer(request)
        fault = hub.take_fault(request, answer)

        def count(num_bytes: int) -> None:
            hub.bytes_sent[path] += num_bytes

        is_kept = send(
            self.connection,
            fault.spoil(answer) if fault else answer,
            fault,
            with_body=self.command != "HEAD",
            stopped=self.server.stopped,
            count=count,
        )
        self.close_connection = self.close_connection or not is_kept

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815
