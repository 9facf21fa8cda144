"""Fixtures of the command line's tests: the command in this process, and the servers that it talks to."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments import cli
from serve.api.access import Access
from serve.api.app import build_api
from serve.hub.opening import open_hub
from serve.settings import Settings
from serve.store.opening import open_store
from serve.store.revisions import Store
from serve.types import ALL_SEEING, Job, JobEvent, JobRequest, JobStatus, Page, ReplicaView, Resident, Viewer
from tests.api.conftest import Server
from tests.fakes.generator import EchoGenerator, replica_view
from tests.fakes.hub import FakeHub, fake_hub
from tests.fakes.hub_uploads import Uploads, accept_uploads
from tests.fakes.keys import MemoryKeys
from tests.fakes.memory import MemoryCatalogue, MemoryFiles, MemoryJobs

COUNTS = {"ada": {"downloaded": 12, "retweets": 2, "short": 1, "kept": 9}}
NUMBERS = {"valid_loss": 4.5, "step": 30, "total_steps": 40, "train_loss": 4.25, "seconds_left": 65.0}
LEARNING = {**NUMBERS, "samples": ["My dream is to learn."]}


class ScriptedJobs(MemoryJobs):
    """Each look at a job finds it one status further."""

    def __init__(self, files: MemoryFiles, end: JobStatus = JobStatus.SUCCEEDED) -> None:
        super().__init__(files)
        self.script = [JobStatus.QUEUED, JobStatus.RUNNING, end]
        self.requests: list[JobRequest] = []

    def create_job(self, request: JobRequest, **options: Any) -> Job:
        self.requests.append(request)
        return super().create_job(request, **options)

    def get_job(self, job_id: str, viewer: Viewer = ALL_SEEING) -> Job:
        if not self.script:
            return super().get_job(job_id, viewer)
        job = replace(super().get_job(job_id, viewer), status=self.script[0])
        if job.status is JobStatus.SUCCEEDED:
            result = {"counts": COUNTS, "samples": ["My dream is tea."]}
            job = replace(job, fine_tuned_model="huggingtweets/ada", result=result)
        if job.status is JobStatus.FAILED:
            job = replace(job, error_code="training_failed", error_message="The loss is no number.")
        self.script = self.script[1:] or self.script
        return job

    def list_events(self, job_id: str, *, limit: int, after: str | None = None) -> Page[JobEvent]:
        steps = JobEvent("ftevent-1", job_id, 1, "info", "Step 30 of 40: loss 4.250.", "metrics", LEARNING)
        return Page((steps, JobEvent("ftevent-0", job_id, 0, "info", "The job has started.")), has_more=False)


class BusyGenerator(EchoGenerator):
    async def replicas(self) -> list[ReplicaView]:
        return [replica_view("r1", Resident("huggingtweets/ada", "abc123", "device", 249_000_000, 2, 0.5, "r1"))]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


Rookery = Callable[..., Outcome]


@pytest.fixture
def rookery(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Rookery:
    """The command's own `main`, in this process: an exit code, stdout and stderr."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["rookery", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), printed.out, printed.err)

    return run


@dataclass
class World:
    """The parts behind the server that ROOKERY_URL names."""

    generator: BusyGenerator
    catalogue: MemoryCatalogue
    files: MemoryFiles
    jobs: ScriptedJobs


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    files = MemoryFiles(tmp_path / "files")
    catalogue = MemoryCatalogue("fledgling", "huggingtweets/ada", "huggingtweets/bob")
    catalogue.models["huggingtweets/ada"] = replace(catalogue.models["huggingtweets/ada"], counts=COUNTS)
    world = World(BusyGenerator(), catalogue, files, ScriptedJobs(files))
    server = Server(build_api(**vars(world), upload_dir=tmp_path / "uploads"))
    monkeypatch.setenv("ROOKERY_URL", server.url)
    thread = threading.Thread(target=server.serve_for_ever)
    thread.start()
    assert server.is_up.wait(10)
    yield world
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "ada.zip"
    path.write_bytes(b"the fake does not look inside")
    return path


@contextmanager
def another_program(handler: type[BaseHTTPRequestHandler] = BaseHTTPRequestHandler) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), handler)  # the default answers 501 in HTML
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class HubWorld:
    """A server over a real store, and the Hub that it pulls from and is pushed to."""

    store: Store
    hub: FakeHub
    uploads: Uploads

    def weights(self, model_id: str) -> bytes:
        return (self.store.resolve(model_id).path / "model.safetensors").read_bytes()


@pytest.fixture
def hub_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubWorld]:
    with fake_hub() as hub, accept_uploads(hub, tmp_path / "uploads") as uploads:
        settings = Settings(data=tmp_path / "data", hub_endpoint=hub.endpoint, hub_token="hf_lina")
        store, files = open_store(settings), MemoryFiles(tmp_path / "files")
        app = build_api(
            generator=EchoGenerator(),
            catalogue=store,
            files=files,
            jobs=MemoryJobs(files),
            upload_dir=tmp_path / "uploaded",
            puller=open_hub(settings, store),
            access=Access(MemoryKeys("sk-key")),
        )
        server = Server(app)
        variables = {"ROOKERY_URL": server.url, "ROOKERY_API_KEY": "sk-key", "HF_ENDPOINT": hub.endpoint}
        variables |= {"HF_TOKEN": "hf_lina", "XDG_CACHE_HOME": str(tmp_path / "cache"), "NO_PROXY": "", "no_proxy": ""}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        thread = threading.Thread(target=server.serve_for_ever)
        thread.start()
        assert server.is_up.wait(10)
        yield HubWorld(store, hub, uploads)
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
