"""The API over fakes, in this process and behind a real uvicorn on a loopback socket; and so over a real store."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from serve.api.access import Access
from serve.api.app import build_api
from serve.api.service import Limits
from serve.metrics import Metrics
from serve.store.opening import EMBEDDED
from serve.store.revisions import Store
from tests.api.hub_world import KEY, Hub
from tests.fakes.generator import EchoGenerator
from tests.fakes.keys import MemoryKeys
from tests.fakes.memory import MemoryCatalogue, MemoryFiles, MemoryJobs, memory_draw_preview, memory_preview

LIMITS = Limits(upload_bytes=1 << 20, read_s=1.0, generate_s=30.0, ready_s=0.2)


@dataclass
class World:
    """The fakes behind one API, to look at from a test."""

    app: FastAPI
    generator: EchoGenerator
    catalogue: MemoryCatalogue
    files: MemoryFiles
    jobs: MemoryJobs
    metrics: Metrics
    upload_dir: Path


def build_world(folder: Path, limits: Limits = LIMITS) -> World:
    generator, metrics = EchoGenerator(), Metrics()
    catalogue = MemoryCatalogue("fledgling", "huggingtweets/ada", "huggingtweets/bob")
    files = MemoryFiles(folder / "files")
    jobs = MemoryJobs(files)
    app = build_api(
        generator=generator,
        catalogue=catalogue,
        files=files,
        jobs=jobs,
        upload_dir=folder / "uploads",
        metrics=metrics,
        limits=limits,
        preview=memory_preview,
        draw_preview=memory_draw_preview,
    )
    return World(app, generator, catalogue, files, jobs, metrics, folder / "uploads")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return build_world(tmp_path)


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=world.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://rookery") as client:
        yield client


class Server(uvicorn.Server):
    """Uvicorn in a thread of its own, as a process of its own would be; signals stay with pytest."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    def serve_for_ever(self) -> None:
        asyncio.run(self.serve(sockets=[self.socket]))


@pytest.fixture
def server(world: World) -> Iterator[Server]:
    server = Server(world.app)
    thread = threading.Thread(target=server.serve_for_ever)
    thread.start()
    assert server.is_up.wait(10)
    yield server
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    store = Store(tmp_path / "data", embedded=EMBEDDED)
    files, generator = MemoryFiles(tmp_path / "files"), EchoGenerator()
    app = build_api(
        generator=generator,
        catalogue=store,
        files=files,
        jobs=MemoryJobs(files),
        upload_dir=tmp_path / "uploads",
        limits=LIMITS,
        access=Access(MemoryKeys(KEY)),
    )
    server = Server(app)
    thread = threading.Thread(target=server.serve_for_ever)
    thread.start()
    assert server.is_up.wait(10)
    yield Hub(store, generator, server.url, tmp_path)
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()
