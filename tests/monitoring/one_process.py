"""The service without Ray, in one process, to be measured with and without metrics and logs.

    ROOKERY_DATA=... python -m tests.monitoring.one_process --port 8000

Gateway and generator count and log as they do under Ray, and nothing else takes time: what they cost is a larger part
of the whole here than there. Says `ready` once a token was written; ends with SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio

import uvicorn

from serve.api.app import build_api
from serve.database.connection import Database
from serve.exposition import open_metrics
from serve.generator import LocalGenerator
from serve.logs import configure
from serve.settings import Settings
from serve.store.opening import open_store
from serve.training.jobs.store import JobStore


async def main(settings: Settings, port: int) -> None:
    configure(settings, part="gateway")
    metrics = open_metrics(settings.data / "metrics", enabled=settings.metrics_enabled)
    generator = LocalGenerator(settings, metrics=metrics)
    jobs = JobStore(Database(settings.sql_url), settings.data / "files")
    app = build_api(
        generator=generator,
        catalogue=open_store(settings),
        files=jobs,
        jobs=jobs,
        upload_dir=settings.data / "uploads",
        default_base=settings.base,
        metrics=metrics,
    )
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, access_log=False))
    try:
        await generator.check_ready()
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        print("ready", flush=True)
        await serving
    finally:
        await generator.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(main(Settings.from_env(), parser.parse_args().port))
