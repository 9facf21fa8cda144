"""The replica that writes text: one `LocalGenerator`, with its own memory for models and its own engine thread."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

from ray import serve

from deployments.parts import read_settings
from deployments.router import SEAT
from deployments.wire import PackedDelta, pack
from serve.generator import LocalGenerator
from serve.types import GenerationRequest, ReplicaView


class Generator:
    """The `Generator` protocol as methods that a Ray Serve handle can call."""

    def __init__(self, overrides: Mapping[str, str]) -> None:
        self._replica: str = serve.get_replica_context().replica_id.unique_id
        self._generator = LocalGenerator(read_settings(overrides))  # Ray calls constructors inside the event loop

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[PackedDelta]]:
        async for deltas in self._generator.generate(request):
            yield pack(deltas)

    def record_replica_metadata(self) -> dict[str, int]:
        """Ray asks once, when the replica has started; its routers see the answer."""
        return {SEAT: serve.get_replica_context().rank.rank}

    async def replicas(self) -> list[ReplicaView]:
        """This one alone, under its name."""
        view = self._generator.view()
        residents = tuple(replace(resident, replica=self._replica) for resident in view.residents)
        return [replace(view, name=self._replica, residents=residents)]

    async def forget(self, model_id: str) -> None:
        await self._generator.forget(model_id)

    async def check_ready(self) -> None:
        await self._generator.check_ready()

    async def metrics_text(self) -> tuple[str, str]:
        """This replica's name, and its Prometheus exposition."""
        return self._replica, self._generator.metrics_text()

    async def check_health(self) -> None:
        """Ray calls it again and again: the event loop must answer in time, and the engine's thread be there."""
        self._generator.check_alive()

    async def __del__(self) -> None:
        """Ray awaits it when the replica is stopped."""
        await self._generator.close()
