"""A server of HTTP that answers with the bytes it is told to, for clients that must bear anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


Answer = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


@dataclass(slots=True)
class Scripted:
    """What came in so far. `left` is set when a client has hung up."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def scripted(answer: Answer) -> AsyncIterator[Scripted]:
    """A server on a free port whose requests go to `answer`, which writes what it likes."""
    seen = Scripted()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while (asked := await _read(reader)) is not None:
                seen.asked.append(asked)
                watcher = asyncio.create_task(_watch(reader, seen.left))
                try:
                    await answer(asked, writer)
                    await writer.drain()
                finally:
                    watcher.cancel()
                    await asyncio.gather(watcher, return_exceptions=True)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            seen.left.set()
            writer.close()
            tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    seen.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield seen
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> Asked | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Asked(method, path, headers, body)


async def _watch(reader: asyncio.StreamReader, left: asyncio.Event) -> None:
    """Nothing comes while an answer is written but the end."""
    if not await reader.read(1):
        left.set()


def head(status: str = "200 OK", **headers: str) -> bytes:
    """The head of an answer; underscores stand for dashes."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return f"HTTP/1.1 {status}\r\n{''.join(lines)}\r\n".encode()


def whole(content: Any, status: str = "200 OK", **headers: str) -> bytes:
    """An answer that is one JSON value, or bytes."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return head(status, content_length=str(len(body)), **headers) + body


def chunk(data: bytes) -> bytes:
    """A piece of a chunked answer; the empty one ends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(content: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n\n"


def token(text: str = "a", finish: str | None = None, index: int = 0) -> bytes:
    """An event of a stream of completions."""
    return event({"choices": [{"index": index, "text": text, "finish_reason": finish}]})


def usage(prompt: int, completion: int) -> bytes:
    """The event before the last of such a stream, and the end mark."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return event({"choices": [], "usage": counts}) + event(b"[DONE]")


STREAM = head(
    content_type="text/event-stream", transfer_encoding="chunked", x_model_tier="disk", x_model_load_time="70"
)
