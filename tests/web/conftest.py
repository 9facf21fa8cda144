"""The pages over fakes, in this process, as a browser asks for them; with keys set and without."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve.api.access import COOKIE, Access
from serve.api.app import build_api
from serve.api.service import Limits
from serve.metrics import Metrics
from serve.training.dataset import preview
from serve.types import Job, JobEvent, JobRequest, JobStatus, ModelInfo, Page, Run, TrainingFile
from serve.web.router import add_pages
from tests.fakes.generator import EchoGenerator
from tests.fakes.keys import MemoryKeys
from tests.fakes.memory import MemoryCatalogue, MemoryFiles, MemoryJobs, page

KEY = "a key of ours"
LIMITS = Limits(upload_bytes=1 << 20, read_s=1.0, generate_s=30.0, ready_s=0.2)
BROWSER = {"accept": "text/html,application/xhtml+xml", "sec-fetch-site": "same-origin"}


class WebJobs(MemoryJobs):
    """Jobs whose events and runs a test writes itself, oldest first."""

    def __init__(self, files: MemoryFiles) -> None:
        super().__init__(files)
        self.events: dict[str, list[JobEvent]] = {}
        self.runs: dict[str, tuple[Run, ...]] = {}
        self.asked: list[tuple[str, str | None]] = []  # of whose events, and after which

    def begin(self, status: JobStatus = JobStatus.RUNNING, handle: str | None = "ada", **changes: Any) -> Job:
        """A job that is there already, in that state."""
        request = JobRequest("fledgling", (TrainingFile("file-0", handle),))
        job = Job(f"ftjob-{len(self.jobs)}", request, status, 1_700_000_000, 7)
        self.jobs[job.id] = dataclasses.replace(job, **changes)
        return self.jobs[job.id]

    def tell(self, job: Job, message: str, level: str = "info", **data: Any) -> None:
        """One more event: of type metrics where there are `data`."""
        told = self.events.setdefault(job.id, [])
        kind = "metrics" if data else "message"
        number = len(told)
        told.append(
            JobEvent(f"ftevent-{number}", job.id, 1_700_000_000 + number, level, message, kind, data)  # type: ignore[arg-type]
        )

    def list_events(self, job_id: str, *, limit: int, after: str | None = None) -> Page[JobEvent]:
        self.get_job(job_id)
        self.asked.append((job_id, after))
        newest_first = self.events.get(job_id, [])[::-1]
        return page(newest_first, [event.id for event in newest_first], limit, after)

    def list_runs(self, job_id: str) -> tuple[Run, ...]:
        self.get_job(job_id)
        return self.runs.get(job_id, ())


@dataclass
class World:
    """The fakes behind the pages, to look at from a test."""

    app: FastAPI
    generator: EchoGenerator
    catalogue: MemoryCatalogue
    files: MemoryFiles
    jobs: WebJobs
    upload_dir: Path
    pictures: list[tuple[ModelInfo, str]]  # drawn: whose, and of which text
    keys: MemoryKeys

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        """A browser, signed in with `key`; it follows no redirect by itself."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app),
            base_url="http://rookery",
            headers=BROWSER,
            cookies={} if key is None else {COOKIE: key.replace(" ", "%20")},
        )


def build_world(
    folder: Path,
    *,
    keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
    limits: Limits = LIMITS,
    look: Callable[..., Mapping[str, Any]] = preview,
) -> World:
    generator, pictures = EchoGenerator(), list[tuple[ModelInfo, str]]()
    catalogue = MemoryCatalogue("fledgling", "huggingtweets/ada", "huggingtweets/bob")
    files = MemoryFiles(folder / "files")
    jobs, known = WebJobs(files), MemoryKeys(*keys)

    def draw(info: ModelInfo, avatars: Sequence[bytes], text: str, /, *, prompt: str) -> bytes:
        pictures.append((info, text))
        return b"\x89PNG\r\n\x1a\n" + text.encode()

    app = build_api(
        generator=generator,
        catalogue=catalogue,
        files=files,
        jobs=jobs,
        upload_dir=folder / "uploads",
        metrics=Metrics(),
        limits=limits,
        preview=look,
        draw_preview=draw,
        add_pages=add_pages,
        access=Access(known, hosts),
    )
    return World(app, generator, catalogue, files, jobs, folder / "uploads", pictures, known)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """No keys: everybody may do everything."""
    return build_world(tmp_path)


@pytest.fixture
def locked_world(tmp_path: Path) -> World:
    """With a key."""
    return build_world(tmp_path, keys=[KEY])


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with world.client() as client:
        yield client


@pytest.fixture
async def stranger(locked_world: World) -> AsyncIterator[httpx.AsyncClient]:
    """Has no key, where one is needed."""
    async with locked_world.client() as client:
        yield client


@pytest.fixture
async def owner(locked_world: World) -> AsyncIterator[httpx.AsyncClient]:
    """Is signed in."""
    async with locked_world.client(KEY) as client:
        yield client


def upload_form(*parts: tuple[str, str | None, bytes]) -> tuple[dict[str, str], bytes]:
    """Headers and body of (name, filename, content) as browsers send them: a field without its file has "" for one."""
    lines = list[bytes]()
    for name, filename, content in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        kind = "" if filename is None else "Content-Type: application/octet-stream\r\n"
        lines.append(f'--of-parts\r\nContent-Disposition: form-data; name="{name}"{file}\r\n{kind}\r\n'.encode())
        lines.append(content + b"\r\n")
    return {"content-type": "multipart/form-data; boundary=of-parts"}, b"".join([*lines, b"--of-parts--\r\n"])
