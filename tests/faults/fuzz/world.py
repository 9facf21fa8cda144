"""The service in this process, of its real parts but the engine: to be fuzzed within seconds."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI

from serve.api.app import build_api
from serve.database.connection import Database
from serve.settings import Settings
from serve.store.opening import EMBEDDED
from serve.store.revisions import Store
from serve.training.dataset import preview
from serve.training.jobs.store import JobStore
from serve.training.picture.draw import draw_preview
from serve.web.router import add_pages
from tests.fakes.generator import EchoGenerator


def build_world(folder: Path) -> FastAPI:
    """Over a store, a database and archives of its own in `folder`."""
    jobs = JobStore(Database(Settings(data=folder).sql_url), folder / "files")
    return build_api(
        generator=EchoGenerator(),
        catalogue=Store(folder, embedded=EMBEDDED),
        files=jobs,
        jobs=jobs,
        upload_dir=folder / "uploads",
        preview=preview,
        draw_preview=draw_preview,
        add_pages=add_pages,
    )
