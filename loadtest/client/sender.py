"""Sends one call and tells what became of it. It knows aiohttp and the wire formats, not when calls are due."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import aiohttp
from yarl import URL

from loadtest.client.target import Target
from loadtest.client.wire import Answer, code_of, question, word_of
from loadtest.results.record import STOPPED, Outcome, Record
from loadtest.traffic.plan import Call, Flow

Clock = Callable[[], float]
"""Seconds from the start of the run."""

_REFUSALS = (429, 503)
_KEEP_ALIVE_S = 2.0  # shorter than any server's, or requests meet connections that are just being closed
_AGENT = "loadtest"
_MOST_BODY = 16 * 2**20  # bytes
_TAIL_S = 0.25  # for the end of a stream that is complete, so that its connection can be used again


class TooLarge(ValueError):
    """A body that is not read to its end."""


class Stopped(asyncio.CancelledError):
    """The run was stopped while something was under way; `record` is what is known of it."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record


_KINDS: Mapping[type[Exception], str] = {
    TooLarge: "too_large",
    aiohttp.ClientConnectorError: "no_connection",
    aiohttp.ServerDisconnectedError: "disconnected",
    aiohttp.ClientPayloadError: "cut",
    aiohttp.ClientOSError: "disconnected",
}


@asynccontextmanager
async def open_session(target: Target) -> AsyncIterator[aiohttp.ClientSession]:
    """Connections to `target`, as many as there are calls at a time; nothing is retried, followed or kept."""
    headers = {"user-agent": _AGENT, "accept": "*/*", "accept-encoding": "identity"}
    if target.key:
        headers["authorization"] = f"Bearer {target.key}"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        headers=headers,
        auto_decompress=False,
        read_bufsize=1 << 18,
    ) as session:
        yield session


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """The whole of it.

    Raises: TooLarge; aiohttp.ClientError
    """
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > _MOST_BODY:
            response.close()
            raise TooLarge(f"more than {_MOST_BODY:,} bytes")
    return bytes(body)


class _Exchange:
    """What is known of one call so far."""

    __slots__ = ("ended_s", "error", "first_s", "gaps", "last_s", "load_s", "outcome", "request_id", "status", "tier")

    def __init__(self) -> None:
        self.outcome: Outcome = "failed"
        self.status = 0
        self.error = ""
        self.first_s: float | None = None
        self.ended_s: float | None = None  # of a stream whose end is not that of its connection
        self.last_s = 0.0
        self.gaps: list[float] = []
        self.tier = ""
        self.load_s: float | None = None
        self.request_id = ""

    def read_head(self, response: aiohttp.ClientResponse) -> None:
        headers = response.headers
        self.status = response.status
        self.tier = word_of(headers.get("x-model-tier"))
        self.request_id = word_of(headers.get("x-request-id"))
        self.load_s = _seconds(headers.get("x-model-load-time"))

    def add_piece(self, now_s: float) -> None:
        if self.first_s is None:
            self.first_s = now_s
        else:
            self.gaps.append(now_s - self.last_s)
        self.last_s = now_s

    def conclude(self, answer: Answer) -> None:
        """Nothing more is expected of an answer with status 200."""
        self.error = answer.error or ("" if answer.is_complete else "cut")
        self.outcome = "failed" if self.error else "ok"


class Sender:
    """Sends the calls of `flows` over one session; `timeout_s` counts from when a call was due."""

    def __init__(
        self, session: aiohttp.ClientSession, target: Target, flows: tuple[Flow, ...], timeout_s: float, clock: Clock
    ) -> None:
        self._session, self._target, self._timeout_s, self._clock = session, target, timeout_s, clock
        self._flows = {flow.name: flow for flow in flows}
        self._urls: dict[str, URL] = {}

    async def send(self, call: Call) -> Record:
        """Never fails but by being cancelled: whatever goes wrong is in the record.

        Raises: Stopped where it is cancelled.
        """
        flow = self._flows[call.flow]
        api = self._target.api or flow.requests.api
        sent_s = self._clock()
        answer, seen = Answer(api), _Exchange()
        stays_s = self._timeout_s if call.leaves_after_s is None else min(call.leaves_after_s, self._timeout_s)
        try:
            async with asyncio.timeout(call.at_s + stays_s - sent_s):
                await self._exchange(call, flow, answer, seen)
        except TimeoutError:
            if seen.ended_s is None:
                has_left = call.leaves_after_s is not None and call.leaves_after_s <= self._timeout_s
                seen.outcome = "cancelled" if has_left else "timeout"
        except asyncio.CancelledError:
            seen.outcome, seen.error = "timeout", STOPPED
            raise Stopped(_record(call, sent_s, self._clock(), answer, seen)) from None
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            seen.error = next((word for kind, word in _KINDS.items() if isinstance(exc, kind)), type(exc).__name__)
        return _record(call, sent_s, self._clock() if seen.ended_s is None else seen.ended_s, answer, seen)

    async def _exchange(self, call: Call, flow: Flow, answer: Answer, seen: _Exchange) -> None:
        path, body = question(call, flow.requests, self._target)
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = URL(self._target.at(path))
        headers = {"content-type": "application/json"}
        if flow.key:
            headers["authorization"] = f"Bearer {flow.key}"
        async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
            try:
                seen.read_head(response)
                if response.status != 200:
                    seen.outcome = "refused" if response.status in _REFUSALS else "failed"
                    seen.error = code_of(await read_body(response))
                elif call.is_streaming:
                    await self._read_along(response, answer, seen)
                else:
                    answer.read_whole(await read_body(response))
                    seen.first_s = self._clock()
                    seen.conclude(answer)
            except BaseException:
                response.close()  # hangs up: the rest of the answer is nobody's
                raise

    async def _read_along(self, response: aiohttp.ClientResponse, answer: Answer, seen: _Exchange) -> None:
        read = response.content.readany
        while data := await read():
            now_s = self._clock()
            if answer.feed(data):
                seen.add_piece(now_s)
            if answer.error or answer.is_complete:
                seen.ended_s = now_s
                break
        seen.conclude(answer)
        if answer.is_complete and not answer.error:
            await _read_tail(response, answer)
        elif answer.error:
            response.close()


async def _read_tail(response: aiohttp.ClientResponse, answer: Answer) -> None:
    """What comes after the end: counts, and that of the connection's message. Who keeps it open is left."""
    try:
        async with asyncio.timeout(_TAIL_S):
            while data := await response.content.readany():
                answer.feed(data)
    except (TimeoutError, aiohttp.ClientError):
        response.close()


def _seconds(milliseconds: str | None) -> float | None:
    """None where they are no time."""
    try:
        seconds = float(milliseconds or "") / 1000
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _record(call: Call, sent_s: float, ended_s: float, answer: Answer, seen: _Exchange) -> Record:
    return Record(
        number=call.number,
        flow=call.flow,
        model=call.model,
        at_s=call.at_s,
        sent_s=sent_s,
        ended_s=ended_s,
        outcome=seen.outcome,
        status=seen.status,
        error=seen.error,
        first_s=seen.first_s,
        tier=seen.tier,
        load_s=seen.load_s,
        prompt_tokens=answer.prompt_tokens,
        output_tokens=answer.output_tokens,
        num_choices=call.num_choices,
        is_streaming=call.is_streaming,
        gaps_s=tuple(seen.gaps),
        request_id=seen.request_id,
    )
