"""The write side of a Hugging Face Hub, over the fake one's read side: what is pushed can be fetched again.

Speaks what huggingface_hub 2.4 asks of a Hub to create, commit and tag by LFS, single- and multi-part; the bytes of
large files go to a bucket at an address of its own, as they do on the real one. Xet is offered on demand, with a folder
for its storage.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.fakes.hub import Answer, FakeHub, Repo, Request
from tests.fakes.hub.messages import as_json, refusal
from tests.fakes.hub.repos import Commit, etag, is_large

_ID = r"(?P<repo>[^/]+/[^/]+)"
_CHUNK = 2**16


@dataclass(frozen=True)
class User:
    """`role`: of the token; `orgs`: name -> the user's role there."""

    name: str
    orgs: dict[str, str] = field(default_factory=dict)
    role: str = "write"

    def may_write(self, namespace: str) -> bool:
        is_own = namespace == self.name or self.orgs.get(namespace) in ("write", "admin")
        return is_own and self.role == "write"


@dataclass
class _Refusal:
    path: str  # a part of the request's
    answer: Answer
    times: int


class Uploads:
    """What a FakeHub takes in. `users` by token; `part_bytes`: larger files go up in parts (None: none does)."""

    def __init__(self, hub: FakeHub, folder: Path) -> None:
        self.hub = hub
        self.users = {"hf_lina": User("lina", {"birds": "write", "readers": "read"})}
        self.part_bytes: int | None = None
        self.bucket = Bucket(folder / "objects")
        self.xet_storage: Path | None = None
        self._folder = folder
        self._refusals: list[_Refusal] = []
        self._lock = threading.RLock()
        hub.routes[:0] = [
            (method, re.compile(pattern), self._guarded(handler)) for method, pattern, handler in self._routes()
        ]

    def refuse(self, path: str, status: int, headers: dict[str, str] | None = None, *, times: int = 1) -> None:
        """Answers requests with `path` in theirs with `status`, before anything is done."""
        self._refusals.append(_Refusal(path, Answer(status, b'{"error": "made up"}', headers or {}), times))

    def offer_xet(self, files: Iterable[Path]) -> Path:
        """From now on. The folder that hf_xet writes to, by chunks: its own `local://` storage.

        `files`: the large ones that will come, since a commit names them by their sha256 and that storage does not.
        """
        self.xet_storage = self._folder / "xet"
        self.xet_storage.mkdir()
        for file in files:
            self.bucket.store(hashlib.sha256(file.read_bytes()).hexdigest(), file.read_bytes())
        return self.xet_storage

    def create(self, repo_id: str, *, private: bool = False) -> Repo:
        """A repository with what the Hub puts into a new one."""
        repo = self.hub.repos[repo_id] = Repo(repo_id)
        self._commit(repo, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, set(), private)
        for token in self.users:
            self.hub.tokens.setdefault(token, True)
        return repo

    def put(self, repo_id: str, **files: bytes) -> str:
        """A commit by somebody else; names with "__" for "."."""
        repo = self.hub.repos[repo_id]
        changes = {name.replace("__", "."): content for name, content in files.items()}
        return self._commit(repo, changes, set(), bool(repo.head.info.get("private")))

    # --- Routes -------------------------------------------------------------------------------------------

    def _routes(self) -> list[tuple[str, str, _Handle]]:
        return [
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", rf"/api/models/{_ID}/xet-write-token/(?P<revision>[^/]+)", self._give_xet_token),
            ("POST", rf"/api/models/{_ID}/preupload/(?P<revision>[^/]+)", self._preupload),
            ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", self._batch),
            ("POST", rf"/{_ID}\.git/info/lfs/complete/(?P<oid>[0-9a-f]{{64}})", self._complete),
            ("POST", rf"/{_ID}\.git/info/lfs/verify", self._verify),
            ("POST", rf"/api/models/{_ID}/commit/(?P<revision>[^/]+)", self._take_commit),
            ("POST", rf"/api/models/{_ID}/tag/(?P<revision>[^/]+)", self._tag),
        ]

    def _guarded(self, handler: _Handle) -> Callable[[FakeHub, Request, re.Match[str]], Answer]:
        def handle(hub: FakeHub, request: Request, match: re.Match[str]) -> Answer:
            with self._lock:
                if refused := self._take_refusal(request.path):
                    return refused
                user = self.users.get(request.token or "")
                if user is None and "/lfs/complete/" not in request.path:  # whose address is the secret
                    return refusal(401, "", "Invalid username or password.")
                if (name := match.groupdict().get("repo")) and name not in hub.repos:
                    return refusal(404, "RepoNotFound", "Repository not found")
                if name and user and not user.may_write(name.split("/")[0]):
                    return refusal(403, "", f"You don't have write access to {name}.")
                return handler(request, match)

        return handle

    def _take_refusal(self, path: str) -> Answer | None:
        for refused in self._refusals:
            if refused.times and refused.path in path:
                refused.times -= 1
                return refused.answer
        return None

    def _whoami(self, request: Request, match: re.Match[str]) -> Answer:
        user = self.users[request.token or ""]
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user.orgs.items()]
        auth = {"type": "access_token", "accessToken": {"displayName": "a", "role": user.role}}
        return as_json({"type": "user", "id": "0", "name": user.name, "orgs": orgs, "auth": auth})

    def _create(self, request: Request, match: re.Match[str]) -> Answer:
        asked = json.loads(request.body)
        user = self.users[request.token or ""]
        namespace = asked.get("organization") or user.name
        repo_id = f"{namespace}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if not user.may_write(namespace):
            return refusal(403, "", f"You don't have the rights to create a model under the namespace {namespace!r}")
        if repo_id in self.hub.repos:
            return as_json({"error": "You already created this model repo", "url": url}, 409)
        self.create(repo_id, private=asked.get("visibility") == "private")
        return as_json({"url": url, "name": repo_id})

    def _validate(self, request: Request, match: re.Match[str]) -> Answer:
        head = json.loads(request.body)["content"].split("---")[1:2]
        if head and re.search(r"^base_model: [./]", head[0], re.MULTILINE):
            return as_json({"errors": [{"message": '"base_model" is not valid.'}], "warnings": []}, 400)
        return as_json({"errors": [], "warnings": []})

    def _give_xet_token(self, request: Request, match: re.Match[str]) -> Answer:
        if self.xet_storage is None:
            return Answer(404)
        return as_json({"casUrl": f"local://{self.xet_storage}", "exp": int(time.time()) + 3600, "accessToken": "xet"})

    def _preupload(self, request: Request, match: re.Match[str]) -> Answer:
        head = self.hub.repos[match["repo"]].head
        files = []
        for asked in json.loads(request.body)["files"]:
            here = head.folder / asked["path"]
            mode = "lfs" if is_large(here) else "regular"
            oid = etag(here) if here.is_file() else None
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": files})

    def _batch(self, request: Request, match: re.Match[str]) -> Answer:
        objects = [self._action(match["repo"], wanted) for wanted in json.loads(request.body)["objects"]]
        kind = {"Content-Type": "application/vnd.git-lfs+json"}
        return as_json({"transfer": "basic", "objects": objects}, headers=kind)

    def _action(self, repo_id: str, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        if self.bucket.has(oid):
            return {"oid": oid, "size": size}
        url = f"{self.hub.endpoint}/{repo_id}.git/info/lfs"
        upload: dict[str, Any] = {"href": f"{self.bucket.endpoint}/{oid}"}
        if self.part_bytes and size > self.part_bytes:
            count = -(-size // self.part_bytes)
            parts = {str(number): f"{self.bucket.endpoint}/{oid}/{number}" for number in range(1, count + 1)}
            upload = {"href": f"{url}/complete/{oid}", "header": {"chunk_size": str(self.part_bytes), **parts}}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{url}/verify"}}}

    def _complete(self, request: Request, match: re.Match[str]) -> Answer:
        parts = json.loads(request.body)["parts"]
        return as_json({}, 200 if self.bucket.join(match["oid"], [part["etag"] for part in parts]) else 400)

    def _verify(self, request: Request, match: re.Match[str]) -> Answer:
        return as_json({}, 200 if self.bucket.has(json.loads(request.body)["oid"]) else 404)

    def _take_commit(self, request: Request, match: re.Match[str]) -> Answer:
        repo = self.hub.repos[match["repo"]]
        parent, changes, deleted = None, dict[str, bytes](), set[str]()
        for line in request.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                parent = value.get("parentCommit")
            elif entry["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if not self.bucket.has(value["oid"]):
                    return refusal(400, "", f"LFS object {value['oid']} is not there.")
                changes[value["path"]] = self.bucket.read(value["oid"])
            elif entry["key"] == "deletedFile":
                deleted.add(value["path"])
        if parent and parent != repo.head.sha:
            return refusal(412, "", "A commit has happened since. Please refresh and try again.")
        sha = self._commit(repo, changes, deleted, bool(repo.head.info.get("private")))
        return as_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo.id}/commit/{sha}"})

    def _tag(self, request: Request, match: re.Match[str]) -> Answer:
        repo, tag = self.hub.repos[match["repo"]], json.loads(request.body)["tag"]
        if tag in repo.tags:
            return refusal(409, "", f"Tag {tag} exists already.")
        commit = repo.find(match["revision"])
        if commit is None:
            return refusal(404, "RevisionNotFound", "Invalid rev id")
        repo.tags[tag] = commit.sha
        return as_json({})

    def _commit(self, repo: Repo, changes: dict[str, bytes], deleted: set[str], private: bool) -> str:
        folder = self._folder / "repos" / repo.id / str(len(repo.commits))
        folder.mkdir(parents=True)
        if repo.commits:
            shutil.copytree(repo.head.folder, folder, dirs_exist_ok=True)
        for name in deleted:
            (folder / name).unlink()
        for name, content in changes.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        content_sha = Commit.of(folder, {}).sha
        # A commit is another one than its equal before: going back is a commit of its own.
        sha = hashlib.sha1(f"{len(repo.commits)} {content_sha}".encode(), usedforsecurity=False).hexdigest()
        repo.commits.append(Commit(sha, folder, {"private": True} if private else {}))
        repo.branches["main"] = sha
        return sha


_Handle = Callable[[Request, "re.Match[str]"], Answer]


class Bucket:
    """Takes large files by PUT. `received`: bytes by oid, repeated ones too. `cut_after`: resets once, so far in."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self.received: Counter[str] = Counter()
        self.cut_after: int | None = None
        self.hold_after: int | None = None  # so far in, nothing more is read; at `release` it is dropped
        self.is_held = threading.Event()
        self.release = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Put)
        self._server.bucket = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def has(self, oid: str) -> bool:
        return (self._folder / oid).is_file()

    def read(self, oid: str) -> bytes:
        return (self._folder / oid).read_bytes()

    def store(self, name: str, content: bytes) -> str | None:
        """The ETag, or None where the content is not what the name says."""
        oid, _, part = name.partition("/")
        if not part and hashlib.sha256(content).hexdigest() != oid:
            return None
        (self._folder / (f"{oid}.{part}" if part else oid)).write_bytes(content)
        return hashlib.md5(content, usedforsecurity=False).hexdigest()

    def join(self, oid: str, etags: list[str]) -> bool:
        contents = [(self._folder / f"{oid}.{number}").read_bytes() for number in range(1, len(etags) + 1)]
        known = [hashlib.md5(content, usedforsecurity=False).hexdigest() for content in contents]
        return [tag.strip('"') for tag in etags] == known and self.store(oid, b"".join(contents)) is not None

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    block_on_close = False
    daemon_threads = True
    bucket: Bucket

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is not worth a word."""


class _Put(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_PUT(self) -> None:
        bucket, name = self.server.bucket, self.path.lstrip("/")
        content = bytearray()
        for chunk in self._chunks():
            content += chunk
            bucket.received[name.partition("/")[0]] += len(chunk)
            if bucket.cut_after is not None and len(content) >= bucket.cut_after:
                bucket.cut_after = None
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            if bucket.hold_after is not None and len(content) >= bucket.hold_after:
                bucket.is_held.set()
                bucket.release.wait(60)
                raise ConnectionError("the client was killed")
        etag = bucket.store(name, bytes(content))
        self.send_response(200 if etag else 400)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _chunks(self) -> Iterator[bytes]:
        """The body, with a length or in chunks."""
        if "content-length" in self.headers:
            left = int(self.headers["content-length"])
            while left:
                chunk = self.rfile.read1(min(left, _CHUNK))
                if not chunk:
                    raise ConnectionError("the client left")
                left -= len(chunk)
                yield chunk
            return
        while size := int(self.rfile.readline().strip() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()


@contextmanager
def accept_uploads(hub: FakeHub, folder: Path) -> Iterator[Uploads]:
    """Adds the write side to `hub` until the block ends; what comes is kept in `folder`."""
    uploads = Uploads(hub, folder)
    hub.tokens |= dict.fromkeys(uploads.users, True)
    try:
        yield uploads
    finally:
        uploads.bucket.close()
