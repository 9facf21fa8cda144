"""Questions to one Hub over HTTP: bounded in time and size, repeated where that may help, and never asked elsewhere.

Redirects are followed here: to the endpoint itself, or to the Hub's own storage; the token goes to the endpoint only.
Everything that can go wrong becomes one of our errors here. Knows nothing of models' files or of the store.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2  # huggingface_hub's own client: its session speaks for us, its errors reach us
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from serve.errors import HubUnreachable, ModelUnusable, RookeryError, StoreUnavailable
from serve.hub.answers import REDIRECTS, UNLIMITED, Answer, Failure, Subject, Told, check_status, no_way, unavailable
from serve.hub.breaker import BREAKERS, Breaker, Breakers
from serve.hub.call import Call
from serve.hub.pace import HEAD_S, MIN_BYTES_PER_S, SILENCE_S, WINDOW_S, Deadline, Pace
from serve.logs import get_logger

T = TypeVar("T")

log = get_logger()

MAX_JSON_BYTES = 10_000_000
MAX_REDIRECTS = 5
TRIES = 4

_STORAGE = re.compile(r"[a-z0-9.-]+\.(hf\.co|huggingface\.co)")  # hosts where the Hub keeps large files
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 8.0
_NO_WAY = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)


class Session:
    """The way to the Hub at `endpoint`. Methods block; safe to use from many threads."""

    def __init__(
        self,
        endpoint: str,
        token: str | None,
        *,
        breakers: Breakers | None = None,
        tries: int = TRIES,
        min_bytes_per_s: float = MIN_BYTES_PER_S,
        window_s: float = WINDOW_S,
        head_s: float = HEAD_S,
        random: Callable[[], float] = random.random,
        on_request: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        """`on_request` is told how each HTTP request ended, on the thread that made it."""
        self._endpoint = endpoint.rstrip("/")
        self._home = httpx2.URL(self._endpoint)
        self._token = token or False  # False: not the one that may lie in the user's home either
        self._breakers = BREAKERS if breakers is None else breakers
        self._tries = tries
        self._min_bytes_per_s, self._window_s, self._head_s = min_bytes_per_s, window_s, head_s
        self._random = random
        self._on_request = on_request

    # --- Questions ----------------------------------------------------------------------------------------

    def get_json(
        self, path: str, params: Mapping[str, str] | None, deadline: Deadline, *, knocks: int = UNLIMITED
    ) -> Any:
        """What the Hub says at `path`, such as `/api/models/huggingtweets/ada/revision/main`.

        `knocks`: after so many tries without any way there it is unreachable.
        Raises: ModelNotFound, ModelGated, ModelUnusable, HubUnreachable, StoreUnavailable.
        """
        query = str(httpx2.QueryParams(dict(params or {})))
        path = f"{path}?{query}" if query else path
        return self.retrying(lambda: self._get_json(path, deadline), deadline, knocks=knocks)

    def retrying(self, action: Callable[[], T], deadline: Deadline, *, knocks: int = UNLIMITED) -> T:
        """The result of `action`, which is repeated where it raises Failure. Raises: also the last Failure's error."""
        ended: Counter[int] = Counter()
        for attempt in range(self._tries):
            try:
                return action()
            except Failure as exc:
                failure = exc
            log.info("hub_try_failed", number=attempt + 1, of=self._tries, reason=str(failure))
            most = min(failure.most, knocks if isinstance(failure.error, HubUnreachable) else UNLIMITED)
            ended[most] += 1  # those of equal patience together
            pause_s = self._random() * min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)
            pause_s += failure.asked_s or 0.0  # not all at the same moment, when it is over
            if attempt + 1 == self._tries or ended[most] >= most or pause_s >= deadline.left():
                break
            time.sleep(pause_s)
        deadline.check()
        raise failure.error from failure

    @contextmanager
    def stream(self, path: str, deadline: Deadline, *, start: int = 0, etag: str | None = None) -> Iterator[Answer]:
        """One try at the bytes of `path` from `start` on, if the file there still has `etag` (as the server wrote it).

        Raises: Failure, in the block too while `chunks` are read; and as `get_json` where trying again is no use.
        """
        subject = Subject.of(path)
        wanted = {"Range": f"bytes={start}-"} if start else {}
        if start and etag:
            wanted["If-Range"] = etag
        told = Told()
        url = httpx2.URL(self._endpoint + path)
        for _ in range(1 + MAX_REDIRECTS):
            with self._asked(url, wanted, subject, deadline) as response:
                told.read(response, at_home=self._is_home(url))
                if response.status_code not in REDIRECTS or "Location" not in response.headers:
                    check_status(response, subject, start, at_home=self._is_home(url))
                    chunks = self._body(response, subject, deadline)
                    yield Answer(response.status_code, response.headers, chunks, told.etag, told.commit)
                    return
                url = self._next(url, response.headers["Location"], subject)
        raise ModelUnusable(f"{subject} is behind more than {MAX_REDIRECTS} redirects of the Hub.")

    # --- One request --------------------------------------------------------------------------------------

    @contextmanager
    def _asked(
        self, url: httpx2.URL, wanted: dict[str, str], subject: Subject, deadline: Deadline
    ) -> Iterator[httpx2.Response]:
        """One request to one host, and what its breaker learns of it."""
        breaker = self._breakers.of(str(url))
        breaker.check()
        call = Call()
        with _reported(breaker, subject), self._translated(url, call, subject, deadline), self._told() as told:
            headers = self._headers(url) | wanted
            timeout = deadline.timeout(min(SILENCE_S, self._window_s))
            response = call.send(url, headers, timeout, min(self._head_s, deadline.left()))
            told.append(_outcome(response.status_code))
            # Reads have a timeout each, which a trickle never meets: the connection is cut when all must be over.
            watchdog = threading.Timer(deadline.left() + 0.05, call.cut)
            watchdog.daemon = True
            watchdog.start()
            try:
                yield response
            finally:
                watchdog.cancel()
                response.close()

    @contextmanager
    def _told(self) -> Iterator[list[str]]:
        """Tells the last of the outcomes that the block puts there, unless the network has one of its own."""
        outcomes = ["error"]
        try:
            yield outcomes
        except httpx2.HTTPError as exc:
            outcomes.append("timeout" if isinstance(exc, httpx2.TimeoutException) else "connection")
            raise
        except OfflineModeIsEnabled:
            outcomes.append("offline")
            raise
        finally:
            self._on_request(outcomes[-1])

    def _headers(self, url: httpx2.URL) -> dict[str, str]:
        headers: dict[str, str] = build_hf_headers(token=self._token if self._is_home(url) else False)
        # A connection for each request, since only one that is this request's own can be cut off while it waits for
        # the headers of an answer: the price is a handshake per file, of which a model has about ten.
        return headers | {"Accept-Encoding": "identity", "Connection": "close"}

    def _is_home(self, url: httpx2.URL) -> bool:
        home = self._home
        return (url.scheme, url.userinfo, url.host, url.port) == (home.scheme, home.userinfo, home.host, home.port)

    def _next(self, url: httpx2.URL, location: str, subject: Subject) -> httpx2.URL:
        try:
            target = url.join(location)
        except (httpx2.InvalidURL, ValueError) as exc:
            raise ModelUnusable(f"{subject} is kept at an address that cannot be read.") from exc
        has_plain_address = target.scheme == "https" and target.port is None and not target.userinfo
        if not (self._is_home(target) or (has_plain_address and _STORAGE.fullmatch(target.host))):
            raise ModelUnusable(f"{subject} is kept at {target.host[:100]!r}, which is not a host of the Hub.")
        return target

    def _body(self, response: httpx2.Response, subject: Subject, deadline: Deadline) -> Iterator[bytes]:
        """The raw bytes as they come. Raises: Failure when they come too slowly; the time we take does not count."""
        self._breakers.of(str(response.url)).answered()  # whoever reads on has found the head good
        pace = Pace(self._min_bytes_per_s, self._window_s)
        chunks = response.iter_raw()
        while True:
            started = time.monotonic()
            chunk = next(chunks, None)
            if chunk is None:
                return
            deadline.check()
            if pace.is_too_slow(len(chunk), time.monotonic() - started):
                slow = unavailable(f"The Hub sends {subject} slower than {self._min_bytes_per_s / 1000:g} kB/s")
                raise Failure(slow, blames="repository")
            yield chunk

    def _get_json(self, path: str, deadline: Deadline) -> Any:
        subject = Subject.of(path)
        unreadable = StoreUnavailable(f"The Hub's answer about {subject} is not readable.", retry_after_s=60)
        with self.stream(path, deadline) as answer:
            content_type = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if content_type != "application/json":
                raise Failure(unreadable, blames="repository", most=2)
            body = bytearray()
            for chunk in answer.chunks:
                body += chunk
                if len(body) > MAX_JSON_BYTES:
                    raise ModelUnusable(f"What the Hub says of {subject} is longer than {MAX_JSON_BYTES:,} bytes.")
            try:
                return json.loads(body)
            except (ValueError, RecursionError) as exc:
                raise Failure(unreadable, blames="repository", most=2) from exc

    # --- Errors -------------------------------------------------------------------------------------------

    @contextmanager
    def _translated(self, url: httpx2.URL, call: Call, subject: Subject, deadline: Deadline) -> Iterator[None]:
        """The network's errors as ours."""
        try:
            yield
        except OfflineModeIsEnabled as exc:
            raise no_way(subject) from exc
        except httpx2.HTTPError as exc:
            deadline.check()
            if self._is_home(url) and (isinstance(exc, _NO_WAY) or not call.is_connected):
                # In the time of a connection's timeout TCP has knocked three times itself.
                most = 1 if isinstance(exc, httpx2.TimeoutException) else UNLIMITED
                raise Failure(no_way(subject), blames="host", most=most) from exc
            silent = unavailable(f"The Hub does not answer for {subject}")
            raise Failure(silent, blames="repository" if call.is_answered else "host") from exc


def _outcome(status: int) -> str:
    if status < 400 or status == 416:  # the file is here already
        return "ok"
    said = {401: "denied", 403: "denied", 451: "denied", 404: "not_found", 429: "rate_limited"}
    return said.get(status, "server_error" if status >= 500 else "refused")


@contextmanager
def _reported(breaker: Breaker, subject: Subject) -> Iterator[None]:
    """Tells the breaker what became of a request to its host."""
    try:
        yield
    except Failure as exc:
        if exc.blames == "nobody":
            breaker.succeeded()
        else:
            assert isinstance(exc.error, StoreUnavailable)
            about = subject.repo.lower() if exc.blames == "repository" else None
            breaker.failed(exc.error, about=about, asked_s=exc.asked_s or 0.0)
        raise
    except RookeryError as exc:
        # Our own time, disk or offline mode; other errors of ours are made of answers.
        breaker.released() if isinstance(exc, StoreUnavailable) else breaker.succeeded()
        raise
    except BaseException:
        breaker.released()
        raise
    breaker.succeeded()
