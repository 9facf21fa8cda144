"""A Hugging Face Hub on a local port: real HTTP, real git and LFS digests, faults on demand.

Speaks what huggingface_hub 2.4 asks of a Hub to read a model: the model's info, HEAD and GET of its files, large
ones through a redirect to where their bytes are.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_LARGE = (".bin", ".safetensors")


@dataclass(frozen=True)
class Fault:
    """What the Hub answers instead. `path` None: everywhere; otherwise where the request's path ends so."""

    status: int
    path: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # with status 200: sent in place of the file, its other headers unchanged
    truncate: bool = False  # send half of the file and close
    times: int = 10**9


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    authorization: str | None


class FakeHub:
    """`endpoint` is its address; `requests` is what it was asked."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.requests: list[Seen] = []
        self.storage = endpoint  # the address large files are redirected to
        self._repos: dict[str, tuple[Path, str, dict[str, Any]]] = {}
        self._faults: dict[str, list[Fault]] = {}

    def add(self, repo_id: str, folder: Path, **info: Any) -> str:
        """Serves `folder`; its commit's sha, which changes with the files."""
        total = hashlib.sha1(usedforsecurity=False)
        for path in sorted(folder.iterdir()):
            total.update(path.name.encode() + path.read_bytes())
        self._repos[repo_id] = folder, total.hexdigest(), info
        return total.hexdigest()

    def fail(self, repo_id: str, *faults: Fault) -> None:
        self._faults[repo_id] = list(faults)

    def take_fault(self, repo_id: str, method: str, path: str) -> Fault | None:
        for i, fault in enumerate(self._faults.get(repo_id, [])):
            in_body = fault.truncate or fault.body is not None
            if (fault.path is None or path.endswith(fault.path)) and (method == "GET" or not in_body):
                left = Fault(**{**fault.__dict__, "times": fault.times - 1})
                self._faults[repo_id][i : i + 1] = [left] if left.times else []
                return fault
        return None

    def find(self, repo_id: str, revision: str) -> tuple[Path, str, dict[str, Any]] | None:
        repo = self._repos.get(repo_id)
        return repo if repo and revision in ("main", repo[1]) else None

    def has(self, repo_id: str) -> bool:
        return repo_id in self._repos


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A Hub that runs until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def _hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self._hub.requests.append(Seen(self.command, path, self.headers.get("Authorization")))
        if match := re.fullmatch(r"/api/models/(.+?)(?:/revision/([^/]+))?", path):
            self._info(match[1], match[2] or "main", path)
        elif match := re.fullmatch(r"/(?:storage/)?(.+?)/resolve/([^/]+)/([^/]+)", path):
            self._file(match[1], match[2], match[3], path, stored=path.startswith("/storage/"))
        else:
            self._send(404, b"")

    def _refused(self, repo_id: str, revision: str, path: str) -> bool:
        fault = self._hub.take_fault(repo_id, self.command, path)
        self._fault = fault
        if fault and fault.status != 200:
            self._send(fault.status, b"{}", fault.headers)
        elif not self._hub.has(repo_id):
            # What the real Hub tells strangers, so that private names stay private.
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif not self._hub.find(repo_id, revision):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            return False
        return True

    def _info(self, repo_id: str, revision: str, path: str) -> None:
        if self._refused(repo_id, revision, path):
            return
        if self._fault and self._fault.body is not None:
            return self._send(200, self._fault.body, {"Content-Type": "text/html"})
        found = self._hub.find(repo_id, revision)
        assert found
        folder, sha, extra = found
        siblings = [_sibling(file) for file in sorted(folder.iterdir())]
        info = {"_id": "0" * 24, "id": repo_id, "modelId": repo_id, "sha": sha, "private": False, "gated": False}
        info |= {"disabled": False, "lastModified": "2023-01-02T03:04:05.000Z", "tags": ["gpt2"], "siblings": siblings}
        self._send(200, json.dumps(info | extra).encode(), {"Content-Type": "application/json"})

    def _file(self, repo_id: str, revision: str, name: str, path: str, *, stored: bool) -> None:
        if self._refused(repo_id, revision, path):
            return
        found = self._hub.find(repo_id, revision)
        assert found
        folder, sha, _ = found
        if not (folder / name).is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = (folder / name).read_bytes()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_digest(folder / name)}"', "Accept-Ranges": "bytes"}
        if name.endswith(_LARGE) and not stored:
            headers["X-Linked-Etag"] = headers.pop("ETag")
            headers["X-Linked-Size"] = str(len(content))
            headers["Location"] = f"{self._hub.storage}/storage/{repo_id}/resolve/{sha}/{name}"
            return self._send(302, b"", headers)
        if self._fault and self._fault.body is not None and self.command == "GET":
            content = self._fault.body
        self._send(200, content, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        start = 0
        if status == 200 and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start, status = int(match[1]), 206
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        fault = getattr(self, "_fault", None)
        if fault and fault.truncate and self.command == "GET":
            body, self.close_connection = body[: len(body) // 2], True
        if self.command == "GET":
            self.wfile.write(body[start:])


def _sibling(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    entry: dict[str, Any] = {"rfilename": file.name, "size": size, "blobId": _blob_id(file)}
    if file.name.endswith(_LARGE):
        entry["lfs"] = {"sha256": _digest(file), "size": size, "pointerSize": 134}
    return entry


def _digest(file: Path) -> str:
    """What the Hub uses as ETag: the sha256 of LFS files, git's id of others."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.name.endswith(_LARGE) else _blob_id(file)


def _blob_id(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
