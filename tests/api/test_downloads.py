"""Files on their way to slow clients, fast ones, and those that leave."""

from __future__ import annotations

import asyncio
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Scope

from serve.api import downloads
from serve.api.downloads import FileReply
from serve.types import RepoFile

SIZE = 8 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(SIZE))
    return path


def scope(method: str = "GET", **headers: str) -> Scope:
    return {"type": "http", "method": method, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}


class Queue:
    """A server that takes all it is given at once, as Ray Serve's replicas do."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.has_left = asyncio.Event()

    async def receive(self) -> Message:
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.messages.put_nowait(message)

    async def drain(self) -> bytes:
        content = b""
        while (message := await self.messages.get()).get("more_body", True):
            content += message.get("body", b"")
        return content


async def test_a_server_that_queues_all_it_gets_never_holds_more_than_a_few_pieces(path: Path) -> None:
    queue, descriptor = Queue(), RepoFile(path.name, SIZE, path).open()
    sending = asyncio.create_task(FileReply(descriptor, {"etag": '"x"'})(scope(), queue.receive, queue.send))
    while queue.messages.qsize() < downloads._MAX_PIECES + 1:  # the head, and the pieces
        await asyncio.sleep(0)
    for _ in range(1000):
        await asyncio.sleep(0)
    assert queue.messages.qsize() == downloads._MAX_PIECES + 1
    assert await queue.drain() == path.read_bytes()
    await sending
    with pytest.raises(OSError):
        os.fstat(descriptor)


async def test_a_client_that_leaves_ends_it_and_closes_the_file(path: Path) -> None:
    queue, descriptor = Queue(), RepoFile(path.name, SIZE, path).open()
    sending = asyncio.create_task(FileReply(descriptor, {"etag": '"x"'})(scope(), queue.receive, queue.send))
    await queue.messages.get()
    queue.has_left.set()
    await asyncio.wait_for(sending, 10)
    with pytest.raises(OSError):
        os.fstat(descriptor)


async def test_a_client_that_takes_nothing_more_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_STALL_S", 0.05)
    queue, descriptor = Queue(), RepoFile(path.name, SIZE, path).open()
    with pytest.raises(Exception, match="not complete"):
        await FileReply(descriptor, {"etag": '"x"'})(scope(), queue.receive, queue.send)
    with pytest.raises(OSError):
        os.fstat(descriptor)


async def test_a_head_reads_nothing(path: Path) -> None:
    queue = Queue()
    await FileReply(RepoFile(path.name, SIZE, path).open(), {"etag": '"x"'})(scope("HEAD"), queue.receive, queue.send)
    head: Any = await queue.messages.get()
    assert (b"content-length", str(SIZE).encode()) in head["headers"] and await queue.drain() == b""


def test_a_reply_that_nobody_sends_closes_the_file(path: Path) -> None:
    descriptor = RepoFile(path.name, SIZE, path).open()
    reply = FileReply(descriptor, {"etag": '"x"'})
    os.fstat(descriptor)
    del reply
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_a_piece_is_plain_bytes_in_another_process() -> None:
    ended: list[bool] = []
    piece = downloads._Piece(b"abc", lambda: ended.append(True))
    copy = pickle.loads(pickle.dumps(piece))
    assert type(copy) is bytes and copy == b"abc" and not ended
    del piece
    assert ended == [True]
