"""A client of a running server, for the command line and the demo.

Knows the routes and the shape of an error; what it returns is the server's JSON as it came.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote
from uuid import uuid4

import httpx

from serve.errors import NotFound, RookeryError
from serve.settings import BadSetting
from serve.types import JobStatus, ModelId, check_idempotency_key

Json = dict[str, Any]

_TIMEOUT = httpx.Timeout(660.0, connect=10.0)  # the server itself gives a generation up after 600 s
_POLL_S = 0.5
_PATIENCE_S = 60.0  # a server that restarts takes up its jobs again; so long is one followed unseen
_AWAY = (502, 503, 504)  # what stands before a server that starts again says so
_A_PAGE = 1000
_UPLOAD_TRIES = 3
_UPLOAD_PAUSE_S = 1.0  # before the second try, twice that before the third
_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_KEY = re.compile(r"[!-~]*")  # what a header can carry
_LATE_STATUS = {
    **{"model_not_found": 404, "model_gated": 403, "rate_limit_exceeded": 429, "store_unavailable": 503},
    **{"hub_unreachable": 503, "deadline_exceeded": 504, "disk_full": 507},
}
_STATUS = ("version", "ready")
_JOB = ("id", "status")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServerUnreachable(RookeryError):
    """There is nothing at the address, it went silent, or it is no server of ours."""

    code = "server_unreachable"


class AnswerLost(ServerUnreachable):
    """The connection broke off when the request may have arrived."""


class Refused(RookeryError):
    """The server's own refusal, in its own words. `status` is HTTP's; 0 where it was not said in HTTP's terms."""

    code = "refused"

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class JobView:
    """A job, what it said last, and its last numbers (none before the first step).

    `events`: those since the view before, oldest first.
    """

    job: Json
    said: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Json] = ()

    @property
    def status(self) -> JobStatus:
        return JobStatus(self.job["status"])


class Client:
    """One server, by its URL. All methods raise Refused or ServerUnreachable, or refuse themselves what is no id.

    It sends `key` with every request; None: the one in ROOKERY_API_KEY, if any.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises: ServerUnreachable for what is no address, BadSetting for what is no key."""
        self.url = url.rstrip("/")
        try:
            has_host = bool(httpx.URL(self.url).host)
        except httpx.InvalidURL:
            has_host = False
        if not has_host:
            raise ServerUnreachable(f"'{url[:200]}' is no address of a server, such as http://127.0.0.1:8000.")
        self.key = api_key() if key is None else key
        if not _KEY.fullmatch(self.key):
            raise BadSetting("ROOKERY_API_KEY has spaces or letters other than ASCII's: no server has such a key.")
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        self._http = httpx.Client(base_url=self.url, timeout=_TIMEOUT, trust_env=uses_proxy(url), headers=headers)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    # --- Models -------------------------------------------------------------------------------------------

    def list_models(self, *, limit: int, query: str | None = None, after: str | None = None) -> Json:
        return self._list("/v1/models", {**_page(after, limit), **({"q": query} if query else {})})

    def all_models(self) -> Iterator[Json]:
        """Every model there is, a page at a time."""
        return _every(lambda after: self.list_models(limit=_A_PAGE, after=after))

    def get_model(self, model_id: str) -> Json:
        return self._call("GET", _model_path(model_id))

    def delete_model(self, model_id: str) -> Json:
        return self._call("DELETE", _model_path(model_id))

    def set_disabled(self, model_id: str, is_disabled: bool, reason: str = "") -> Json:
        """Takes a model out of use, or into it again."""
        path = f"{_model_path(model_id)}/{'disable' if is_disabled else 'enable'}"
        return self._call("POST", path, json={"reason": reason} if is_disabled else {})

    def read_card(self, model_id: str) -> str:
        """Its README.md, of the revision that `model_id` names."""
        self.get_model(model_id)  # says that there is none; the Hub's route asks a stranger for a key instead
        parsed = ModelId.parse(model_id)
        path = f"/{parsed}/resolve/{parsed.revision or 'main'}/README.md"
        with self._open("GET", path, follow_redirects=True) as response:
            return response.read().decode(errors="replace")

    def list_versions(self, model_id: str) -> Json:
        return self._list(f"{_model_path(model_id)}/versions")

    def roll_back(self, model_id: str, revision: str) -> Json:
        return self._call("POST", f"{_model_path(model_id)}/rollback", json={"revision": revision})

    def pull(self, model_id: str) -> Iterator[Json]:
        """How far the server is with fetching it from the Hub, again and again, and at last the model."""
        with self._open("POST", f"{_model_path(model_id)}/pull") as response:
            last: Json = {}
            for line in response.iter_lines():
                last = _parse(self.url, line.encode())
                if "error" in last:
                    raise _late_refusal(last["error"])
                yield last
        if last.get("object") != "model":
            raise AnswerLost(f"The answer of {self.url} broke off; the pull goes on there. Look with: rookery ls")

    def list_residents(self) -> Json:
        return self._call("GET", "/v1/residents", needs=("data",))

    def takes_key(self) -> bool:
        """Whether the server accepts the key that this client sends, or none where it sends none."""
        try:
            self.list_jobs(limit=1)
        except Refused as exc:
            if exc.status == 403:  # a good key, which may not read
                self._call("GET", "/api/whoami-v2", needs=("name",))
                return True
            if exc.status != 401:
                raise
            return False
        return True

    def is_ready(self) -> bool:
        """Whether the server is there and has really generated a token."""
        return not self.why_unready()

    def why_unready(self) -> str:
        """What it answers while it cannot write a text; "" when it really has."""
        try:
            answer = self._http.get("/readyz", timeout=15.0)
        except httpx.HTTPError as exc:
            return f"no answer ({type(exc).__name__})"
        return "" if answer.is_success else str(_refusal(self.url, answer.status_code, answer.content))

    def is_rookery(self) -> bool:
        """Whether a server of ours answers at the address; within three seconds."""
        try:
            answer = self._http.get("/v1/status", timeout=3.0)
            told = answer.json()
        except (httpx.HTTPError, ValueError):
            return False
        return isinstance(told, dict) and told.keys() >= set(_STATUS)

    def status(self) -> Json:
        """The numbers of the whole service; without a key that it needs only its version, and whether it is ready."""
        return self._call("GET", "/v1/status", needs=_STATUS)

    # --- Text ---------------------------------------------------------------------------------------------

    def complete(self, body: Mapping[str, Any]) -> Json:
        return self._call("POST", "/v1/completions", needs=("choices",), json=body)

    def stream(self, body: Mapping[str, Any]) -> Generator[Json, None, None]:
        """The choices of a completion, piece by piece. To close the iterator ends the writing.

        Raises: AnswerLost where it breaks off before the server says that it is done.
        """
        cuts = suppress(httpx.ReadError, httpx.RemoteProtocolError)
        with self._open("POST", "/v1/completions", json={**body, "stream": True}) as response, cuts:
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return
                if not line.startswith("data:"):
                    continue
                event = _parse(self.url, line.removeprefix("data:").encode())
                if "error" in event:
                    raise _late_refusal(event["error"])
                yield from event.get("choices", ())
        raise AnswerLost(f"The answer of {self.url} broke off; what came of it is not whole.")

    # --- Jobs ---------------------------------------------------------------------------------------------

    def create_bot(
        self,
        archives: Sequence[Path],
        handles: Sequence[str],
        options: Mapping[str, Any],
        *,
        validation: Path | None = None,
        key: str | None = None,
        on_sent: Callable[[int], None] = lambda num_bytes: None,
    ) -> Json:
        """Uploads `archives`, their owners' `handles` in the same order, and starts a training job.

        Where the answer is lost, it tries again under the same `key`, by which the server knows its job. `on_sent` is
        told how many bytes of the files have gone out in this try.
        """
        key = str(uuid4()) if key is None else check_idempotency_key(key)
        fields = {name: str(value) for name, value in options.items() if value is not None}
        parts = [("archive", path) for path in archives] + ([("validation", validation)] if validation else [])
        for number in range(1, _UPLOAD_TRIES + 1):
            try:
                return self._post_files("/v1/bots", parts, {**fields, "handle": list(handles)}, key, on_sent)
            except AnswerLost:
                if number == _UPLOAD_TRIES:
                    raise
                time.sleep(number * _UPLOAD_PAUSE_S)
        raise AssertionError("unreachable")

    def _post_files(
        self,
        path: str,
        parts: Sequence[tuple[str, Path]],
        fields: Mapping[str, Any],
        key: str,
        on_sent: Callable[[int], None],
    ) -> Json:
        num_sent = 0

        def count(num_bytes: int) -> None:
            nonlocal num_sent
            num_sent += num_bytes
            on_sent(num_sent)

        with ExitStack() as stack:
            files = [(name, (file.name, stack.enter_context(_CountedFile(file, count)))) for name, file in parts]
            headers = {"idempotency-key": key}
            return self._call("POST", path, needs=_JOB, files=files, data=fields, headers=headers)

    def delete_file(self, file_id: str) -> Json:
        return self._call("DELETE", f"/v1/files/{quote(file_id, safe='')}")

    def all_files(self) -> Iterator[Json]:
        """Every uploaded file that is still there, a page at a time."""
        return _every(lambda after: self._list("/v1/files", _page(after)))

    def begin_erasure(self, handle: str, *, dry_run: bool = False) -> Json:
        """Of all that the server has of a person; with `dry_run` it only tells what that is."""
        return self._call("POST", "/v1/erasures", json={"handle": handle, "dry_run": dry_run})

    def get_erasure(self, erasure_id: str) -> Json:
        return self._call("GET", f"/v1/erasures/{erasure_id}")

    def lift_erasure(self, handle: str) -> Json:
        return self._call("POST", "/v1/erasures/lift", json={"handle": handle})

    def list_jobs(self, *, limit: int, after: str | None = None) -> Json:
        return self._list("/v1/fine_tuning/jobs", _page(after, limit))

    def all_jobs(self) -> Iterator[Json]:
        """Every job there is, newest first, a page at a time."""
        return _every(lambda after: self.list_jobs(limit=_A_PAGE, after=after))

    def get_job(self, job_id: str) -> Json:
        return self._call("GET", _job_path(job_id), needs=_JOB)

    def change_job(self, job_id: str, change: Literal["pause", "resume", "cancel"]) -> Json:
        return self._call("POST", f"{_job_path(job_id)}/{change}", needs=_JOB)

    def list_events(self, job_id: str, *, limit: int, after: str | None = None) -> Json:
        """Newest first."""
        return self._list(f"{_job_path(job_id)}/events", _page(after, limit))

    def events_since(self, job_id: str, seen: str) -> list[Json]:
        """All that came after the event `seen`, oldest first; after "" that is all there are."""
        news: list[Json] = []
        for event in _every(lambda after: self.list_events(job_id, limit=_A_PAGE, after=after)):
            if event["id"] == seen:
                break
            news.append(event)
        return news[::-1]

    def list_runs(self, job_id: str) -> Json:
        return self._list(f"{_job_path(job_id)}/runs")

    def view_job(self, job_id: str) -> JobView:
        """As it is now, without events."""
        return replace(_as_view(self.get_job(job_id), self._last_events(job_id)), events=())

    def follow(self, job_id: str, *, seen: str | None = None) -> Iterator[JobView]:
        """The job again and again, at last as it has ended or paused. Outlives a restart of the server.

        Each event after `seen` is in one view, in order; "": all there are, None: the last few and what follows.
        """
        view: JobView | None = None
        seen_at = time.monotonic()
        while True:
            try:
                job = self.get_job(job_id)  # before its events: one that has ended has no more of them
                events = self._last_events(job_id) if seen is None else self.events_since(job_id, seen)
            except (ServerUnreachable, Refused) as exc:
                is_away = isinstance(exc, ServerUnreachable) or exc.status in _AWAY
                if not is_away or time.monotonic() - seen_at > _PATIENCE_S:
                    raise
            else:
                seen_at = time.monotonic()
                seen = events[-1]["id"] if events else seen
                view = _as_view(job, events, view)
                yield view
                if view.status.is_final or view.status is JobStatus.PAUSED:
                    return
            time.sleep(_POLL_S)

    def _last_events(self, job_id: str) -> list[Json]:
        """Some, oldest first."""
        events: list[Json] = self.list_events(job_id, limit=20)["data"]
        return events[::-1]

    # --- HTTP ---------------------------------------------------------------------------------------------

    def _list(self, path: str, params: Json | None = None) -> Json:
        page = self._call("GET", path, needs=("data", "has_more"), params=params)
        if not isinstance(page["data"], list) or not all(isinstance(item, dict) for item in page["data"]):
            raise _not_ours(self.url)
        return page

    def _call(self, method: str, path: str, *, needs: Sequence[str] = ("object",), **content: Any) -> Json:
        """`needs`: what an answer of ours has, by which one of another program is known."""
        with self._open(method, path, **content) as response:
            return _parse(self.url, response.read(), needs)

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


class _CountedFile(io.FileIO):
    """A file that tells how much of it is read."""

    def __init__(self, path: Path, on_read: Callable[[int], None]) -> None:
        super().__init__(path)
        self._on_read = on_read

    def read(self, size: int | None = -1, /) -> bytes:
        block = super().read(-1 if size is None else size)
        self._on_read(len(block))
        return block


def _page(after: str | None, limit: int = _A_PAGE) -> Json:
    return {"limit": limit} if after is None else {"limit": limit, "after": after}


def _every(read_page: Callable[[str | None], Json]) -> Iterator[Json]:
    """The items of a list, a page after the other."""
    after: str | None = None
    while True:
        page = read_page(after)
        yield from page["data"]
        if not page["has_more"]:
            return
        after = page["last_id"]


def _as_view(job: Json, events: Sequence[Json], before: JobView | None = None) -> JobView:
    """`events`: oldest first; where they say nothing, what was known `before` holds."""
    said: str = before.said if before else job["status"]
    metrics = before.metrics if before else {}
    for event in events:
        if event["type"] == "metrics":
            metrics = event["data"]
        else:
            said = event["message"]
    return JobView(job, said, metrics, events)


def api_key() -> str:
    """Who sends it sees private models. Not an option of the command: others on the machine can read those."""
    return os.environ.get("ROOKERY_API_KEY", "")


def _model_path(model_id: str) -> str:
    ModelId.parse(model_id)  # httpx would fold `..`, and ask for something else
    return f"/v1/models/{quote(model_id, safe='/@')}"


def _job_path(job_id: str) -> str:
    if not _JOB_ID.fullmatch(job_id):
        raise NotFound("There is no job of that name: an id looks like 'ftjob-...'; see them with 'rookery jobs ls'.")
    return f"/v1/fine_tuning/jobs/{job_id}"


def uses_proxy(url: str) -> bool:
    """A proxy for the world outside knows nothing of this machine's own loopback."""
    return httpx.URL(url).host not in LOOPBACK


def _not_ours(url: str, status: int | None = None) -> ServerUnreachable:
    what = "" if status is None else f" {status}"
    return ServerUnreachable(f"{url} answers{what} in a way that Rookery does not; is it another program?")


def _refusal(url: str, status: int, body: bytes) -> RookeryError:
    try:
        error = json.loads(body)["error"]  # outside /v1 a text alone
        message = str(error if isinstance(error, str) else error["message"])
    except (ValueError, KeyError, TypeError):
        return _not_ours(url, status)
    if status == 401:  # which the server says in HTTP's terms
        message += " This command sends the key in ROOKERY_API_KEY: set it to one that the server takes."
    return Refused(message, status=status)


def _late_refusal(error: Json) -> Refused:
    """Of a server whose answer had begun well, and so with a status that says nothing."""
    return Refused(str(error["message"]), status=_LATE_STATUS.get(error.get("code", ""), 0))


def _parse(url: str, body: bytes, needs: Sequence[str] = ()) -> Json:
    try:
        told = json.loads(body)
    except ValueError as exc:
        raise ServerUnreachable(f"{url} answers something that is not JSON; is it another program?") from exc
    if not isinstance(told, dict) or not told.keys() >= set(needs):
        raise _not_ours(url)
    return told
