"""The replica that trains: one supervisor, which runs one job at a time in a child process. It is called by nobody.

As many replicas as there are, so many jobs train at once: leases in the job table keep them apart. On CPUs Ray gives
one next to nothing on purpose: the child lowers its own priority, and generators never wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ray import serve

from deployments.parts import open_metrics, read_settings, run_options
from serve.errors import StoreUnavailable
from serve.logs import configure
from serve.training.jobs.supervisor import Supervisor


class Trainer:
    """Works off the job queue from its start to its end; the job at hand then has `finish_s` more.

    Ray chooses whom it stops where there are too many, and knows not who works.
    """

    def __init__(self, overrides: Mapping[str, str], memory_share: float | None = None, finish_s: float = 0.0) -> None:
        settings = read_settings(overrides)
        configure(settings, part="trainer", replica=serve.get_replica_context().replica_id.unique_id)
        self._finish_s = finish_s
        self._supervisor = Supervisor(run_options(settings, memory_share), metrics=open_metrics(settings))
        self._running = asyncio.get_running_loop().create_task(self._supervisor.run_forever())

    async def check_health(self) -> None:
        """Raises: StoreUnavailable when the supervisor has ended; Ray then makes a new one."""
        if self._running.done():
            raise StoreUnavailable("The training supervisor has ended.") from self._running.exception()

    async def __del__(self) -> None:
        """Ray awaits it when the replica is stopped: the running job ends, or goes back to the queue."""
        try:
            await self._supervisor.stop(self._finish_s)
            await self._running
        finally:
            self._supervisor.close()
