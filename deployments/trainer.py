"""The replica that trains: one supervisor, which runs one job at a time in a child process. It is called by nobody.

As many replicas as there are, so many jobs train at once: leases in the job table keep them apart. On CPUs Ray gives
one next to nothing on purpose: the child lowers its own priority, and generators never wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from deployments.parts import read_settings, run_options
from serve.errors import StoreUnavailable
from serve.training.jobs.supervisor import Supervisor


class Trainer:
    """Works off the job queue from its start to its end."""

    def __init__(self, overrides: Mapping[str, str], memory_share: float | None = None) -> None:
        self._supervisor = Supervisor(run_options(read_settings(overrides), memory_share))
        self._running = asyncio.get_running_loop().create_task(self._supervisor.run_forever())

    async def check_health(self) -> None:
        """Raises: StoreUnavailable when the supervisor has ended; Ray then makes a new one."""
        if self._running.done():
            raise StoreUnavailable("The training supervisor has ended.") from self._running.exception()

    async def __del__(self) -> None:
        """Ray awaits it when the replica is stopped: the running job goes back to the queue, its process ends."""
        try:
            await self._supervisor.stop()
            await self._running
        finally:
            self._supervisor.close()
