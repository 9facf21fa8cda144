"""The replica that writes text: one `LocalGenerator`, with its own memory for models and its own engine thread."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace

from ray import serve

from deployments.parts import open_metrics, read_settings
from deployments.pulse import with_pulse
from deployments.router import SEAT
from deployments.scaling import GeneratorLoad
from deployments.tracing import annotate
from deployments.wire import PackedDelta, pack
from serve.errors import RookeryError
from serve.generator import LocalGenerator
from serve.logs import configure, get_logger
from serve.pool.working_set import WINDOW_S
from serve.types import GenerationRequest, ReplicaView, UsageSketch

log = get_logger()

_UNWELL_TIMES = 3  # as often as Ray would take it


class Generator:
    """The `Generator` protocol as methods that a Ray Serve handle can call."""

    def __init__(self, overrides: Mapping[str, str], working_set_s: float = WINDOW_S) -> None:
        self._replica: str = serve.get_replica_context().replica_id.unique_id
        settings = read_settings(overrides)
        configure(settings, part="generator", replica=self._replica)
        # Ray calls constructors inside the event loop.
        self._generator = LocalGenerator(
            settings, metrics=open_metrics(settings), on_end=annotate, working_set_s=working_set_s
        )
        self._num_places = settings.max_sequences
        self._working_set_s = working_set_s
        self._num_unwell = 0  # checks in a row

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[PackedDelta] | RookeryError]:
        """What is refused ends with its error, as an item: of each that is raised Ray logs the traceback, on this loop.

        Twenty refusals a second took a fifth of it so, just when there was the most to do.
        """
        try:
            async with aclosing(with_pulse(self._generator.generate(request))) as flushes:
                async for deltas in flushes:
                    yield pack(deltas)
        except RookeryError as error:
            yield error

    def record_replica_metadata(self) -> dict[str, int]:
        """Ray asks once, when the replica has started; its routers see the answer."""
        return {SEAT: serve.get_replica_context().rank.rank}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray asks every few seconds, where it may change the number of generators."""
        view = self._generator.view()
        return GeneratorLoad(
            texts=view.num_running + view.num_queued + view.num_waiting,
            places=self._num_places,
            asked_bytes=self._generator.asked_bytes,
            budget_bytes=view.budget_bytes,
            window_s=self._working_set_s,
        ).to_stats()

    async def replicas(self) -> list[ReplicaView]:
        """This one alone, under its name."""
        view = self._generator.view()
        residents = tuple(replace(resident, replica=self._replica) for resident in view.residents)
        return [replace(view, name=self._replica, residents=residents)]

    async def usage(self) -> UsageSketch:
        return self._generator.usage()

    async def forget(self, model_id: str, at_once: bool = False) -> None:
        await self._generator.forget(model_id, at_once=at_once)

    async def check_ready(self) -> None:
        await self._generator.check_ready()

    async def check_health(self) -> None:
        """Ray calls it again and again: the event loop must answer in time, and the engine compute something.

        Three times in a row without, and the process is ended: asked by Ray to end in order, it would hold its texts
        for 20 s more, which others go on with as soon as it is dead. Ray's switch for that leaves stopped ones behind.
        """
        try:
            await self._generator.check_health()
        except RookeryError:
            self._num_unwell += 1
            if self._num_unwell == _UNWELL_TIMES:
                log.exception("generator_ended_itself")
                os.kill(os.getpid(), signal.SIGKILL)
            raise
        self._num_unwell = 0

    async def __del__(self) -> None:
        """Ray awaits it when the replica is stopped."""
        await self._generator.close()
