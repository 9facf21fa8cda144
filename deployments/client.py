"""A client of a running server, for the command line and the demo.

Knows the routes and the shape of an error; what it returns is the server's JSON as it came.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import quote
from uuid import uuid4

import httpx

from serve.errors import RookeryError
from serve.types import JobStatus, ModelId, check_idempotency_key

Json = dict[str, Any]

_TIMEOUT = httpx.Timeout(660.0, connect=10.0)  # the server itself gives a generation up after 600 s
_POLL_S = 0.5
_PATIENCE_S = 60.0  # a server that restarts takes up its jobs again; so long is one followed unseen
_UPLOAD_TRIES = 3
_UPLOAD_PAUSE_S = 1.0  # before the second try, twice that before the third
_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServerUnreachable(RookeryError):
    """There is nothing at the address, it went silent, or it is no server of ours."""

    code = "server_unreachable"


class AnswerLost(ServerUnreachable):
    """The connection broke off when the request may have arrived."""


class Refused(RookeryError):
    """The server's own refusal, in its own words."""

    code = "refused"


@dataclass(frozen=True, slots=True)
class JobView:
    """A job, what it said last, and its last numbers (none before the first step)."""

    job: Json
    said: str
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> JobStatus:
        return JobStatus(self.job["status"])


class Client:
    """One server, by its URL. All methods raise Refused or ServerUnreachable, or refuse themselves what is no id.

    It sends `key` with every request; None: the one in ROOKERY_API_KEY, if any.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL:
            host = ""
        if not host:
            raise ServerUnreachable(f"'{url[:200]}' is no address of a server, such as http://127.0.0.1:8000.")
        self.key = api_key() if key is None else key
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        # A proxy for the world outside knows nothing of this machine's own loopback.
        trusts_proxies = host not in LOOPBACK
        self._http = httpx.Client(base_url=self.url, timeout=_TIMEOUT, trust_env=trusts_proxies, headers=headers)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    # --- Models -------------------------------------------------------------------------------------------

    def list_models(self, *, limit: int, query: str | None = None) -> Json:
        return self._call("GET", "/v1/models", params={"limit": limit, **({"q": query} if query else {})})

    def get_model(self, model_id: str) -> Json:
        return self._call("GET", _model_path(model_id))

    def delete_model(self, model_id: str) -> Json:
        return self._call("DELETE", _model_path(model_id))

    def list_versions(self, model_id: str) -> Json:
        return self._call("GET", f"{_model_path(model_id)}/versions")

    def roll_back(self, model_id: str, revision: str) -> Json:
        return self._call("POST", f"{_model_path(model_id)}/rollback", json={"revision": revision})

    def pull(self, model_id: str) -> Iterator[Json]:
        """How far the server is with fetching it from the Hub, again and again, and at last the model."""
        with self._open("POST", f"{_model_path(model_id)}/pull") as response:
            last: Json = {}
            for line in response.iter_lines():
                last = _parse(self.url, line.encode())
                if "error" in last:
                    raise Refused(last["error"]["message"])
                yield last
        if last.get("object") != "model":
            raise AnswerLost(f"The answer of {self.url} broke off; the pull goes on there. Look with: rookery ls")

    def list_residents(self) -> Json:
        return self._call("GET", "/v1/residents")

    def is_ready(self) -> bool:
        """Whether the server is there and has really generated a token."""
        try:
            return self._http.get("/readyz", timeout=15.0).is_success
        except httpx.HTTPError:
            return False

    # --- Text ---------------------------------------------------------------------------------------------

    def complete(self, body: Mapping[str, Any]) -> Json:
        return self._call("POST", "/v1/completions", json=body)

    def stream(self, body: Mapping[str, Any]) -> Iterator[str]:
        """The text of one completion, piece by piece."""
        with self._open("POST", "/v1/completions", json={**body, "stream": True}) as response:
            for line in response.iter_lines():
                if not line.startswith("data:") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data:"))
                if "error" in event:
                    raise Refused(event["error"]["message"])
                yield from (choice["text"] for choice in event["choices"])

    # --- Jobs ---------------------------------------------------------------------------------------------

    def create_bot(
        self,
        archives: Sequence[Path],
        handles: Sequence[str],
        options: Mapping[str, Any],
        *,
        validation: Path | None = None,
        key: str | None = None,
    ) -> Json:
        """Uploads `archives`, their owners' `handles` in the same order, and starts a training job.

        Where the answer is lost, it tries again under the same `key`, by which the server knows its job.
        """
        key = str(uuid4()) if key is None else check_idempotency_key(key)
        fields = {name: str(value) for name, value in options.items() if value is not None}
        parts = [("archive", path) for path in archives] + ([("validation", validation)] if validation else [])
        for number in range(1, _UPLOAD_TRIES + 1):
            try:
                return self._post_files("/v1/bots", parts, {**fields, "handle": list(handles)}, key)
            except AnswerLost:
                if number == _UPLOAD_TRIES:
                    raise
                time.sleep(number * _UPLOAD_PAUSE_S)
        raise AssertionError("unreachable")

    def _post_files(self, path: str, parts: Sequence[tuple[str, Path]], fields: Mapping[str, Any], key: str) -> Json:
        with ExitStack() as stack:
            files = [(name, (file.name, stack.enter_context(file.open("rb")))) for name, file in parts]
            return self._call("POST", path, files=files, data=fields, headers={"idempotency-key": key})

    def list_jobs(self, *, limit: int) -> Json:
        return self._call("GET", "/v1/fine_tuning/jobs", params={"limit": limit})

    def get_job(self, job_id: str) -> Json:
        return self._call("GET", _job_path(job_id))

    def change_job(self, job_id: str, change: Literal["pause", "resume", "cancel"]) -> Json:
        return self._call("POST", f"{_job_path(job_id)}/{change}")

    def list_events(self, job_id: str, *, limit: int) -> Json:
        """Newest first."""
        return self._call("GET", f"{_job_path(job_id)}/events", params={"limit": limit})

    def list_runs(self, job_id: str) -> Json:
        return self._call("GET", f"{_job_path(job_id)}/runs")

    def view_job(self, job_id: str) -> JobView:
        job = self.get_job(job_id)
        events = self.list_events(job_id, limit=20)["data"]
        said = next((event["message"] for event in events if event["type"] == "message"), job["status"])
        metrics: Json = next((event["data"] for event in events if event["type"] == "metrics"), {})
        return JobView(job, said, metrics)

    def follow(self, job_id: str, *, poll_s: float = _POLL_S, patience_s: float = _PATIENCE_S) -> Iterator[JobView]:
        """The job again and again, at last as it has ended or paused. Outlives a restart of the server."""
        seen_at = time.monotonic()
        while True:
            try:
                view = self.view_job(job_id)
            except ServerUnreachable:
                if time.monotonic() - seen_at > patience_s:
                    raise
            else:
                seen_at = time.monotonic()
                yield view
                if view.status.is_final or view.status is JobStatus.PAUSED:
                    return
            time.sleep(poll_s)

    # --- HTTP ---------------------------------------------------------------------------------------------

    def _call(self, method: str, path: str, **content: Any) -> Json:
        with self._open(method, path, **content) as response:
            return _parse(self.url, response.read())

    @contextmanager
    def _open(self, method: str, path: str, **content: Any) -> Iterator[httpx.Response]:
        """A response that is no error, its body unread."""
        try:
            with self._http.stream(method, path, **content) as response:
                if not response.is_success:
                    raise _refusal(self.url, response.status_code, response.read())
                yield response
        except httpx.HTTPError as exc:
            broke_off = isinstance(exc, httpx.ReadError | httpx.WriteError | httpx.RemoteProtocolError)
            kind = AnswerLost if broke_off else ServerUnreachable
            raise kind(
                f"No answer from {self.url} ({type(exc).__name__}). Start the service with 'rookery up', or name "
                "another one with --url or ROOKERY_URL."
            ) from exc


def api_key() -> str:
    """Who sends it sees private models. Not an option of the command: others on the machine can read those."""
    return os.environ.get("ROOKERY_API_KEY", "")


def _model_path(model_id: str) -> str:
    ModelId.parse(model_id)  # httpx would fold `..`, and ask for something else
    return f"/v1/models/{quote(model_id, safe='/@')}"


def _job_path(job_id: str) -> str:
    if not _JOB_ID.fullmatch(job_id):
        raise Refused("There is no job of that name: an id looks like 'ftjob-...'; see them with 'rookery jobs'.")
    return f"/v1/fine_tuning/jobs/{job_id}"


def _refusal(url: str, status: int, body: bytes) -> RookeryError:
    try:
        return Refused(str(json.loads(body)["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return ServerUnreachable(f"{url} answers {status} in a way that Rookery does not; is it another program?")


def _parse(url: str, body: bytes) -> Json:
    try:
        return cast(Json, json.loads(body))
    except ValueError as exc:
        raise ServerUnreachable(f"{url} answers something that is not JSON; is it another program?") from exc
