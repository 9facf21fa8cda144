"""An application like ours without models: `GET /?pieces=N` streams N pieces, ten a second, from another deployment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.handle import DeploymentHandle

api = FastAPI()
_OPTIONS: dict[str, Any] = {
    "num_replicas": 2,
    "max_ongoing_requests": 100,
    "health_check_period_s": 2,
    "graceful_shutdown_wait_loop_s": 0.5,
    "graceful_shutdown_timeout_s": 60,
}


class Writer:
    async def write(self, pieces: int) -> AsyncIterator[str]:
        for number in range(pieces):
            yield f"{number}\n"
            await asyncio.sleep(0.1)


@serve.ingress(api)
class Entrance:
    def __init__(self, writer: DeploymentHandle[Any]) -> None:
        self._write = writer.options(method_name="write", stream=True)

    @api.get("/")
    async def read(self, pieces: int) -> StreamingResponse:
        return StreamingResponse(self._write.remote(pieces), media_type="text/plain")


def _placed(target: type, group: str) -> Deployment:
    options = {**_OPTIONS, "ray_actor_options": {"num_cpus": 0, "resources": {group: 1}}}
    deployment: Deployment = serve.deployment(**options)(target)
    return deployment


app: Application = _placed(Entrance, "gateway").bind(_placed(Writer, "generator").bind())
