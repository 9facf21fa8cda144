"""How many jobs run or wait, as a gateway tells it: while there is no trainer, nobody else could."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from deployments.scaling import JOBS
from serve.errors import StoreUnavailable
from serve.metrics import Metrics
from serve.training.jobs.gauges import count_into
from serve.training.jobs.store import JobStore
from serve.types import JobStatus

FRESH_S = 5.0
_WORK = (JobStatus.VALIDATING, JobStatus.QUEUED, JobStatus.RUNNING)


class Backlog:
    """Asks the database at most once in `fresh_s`, on a thread, and keeps the gauges of jobs beside the trainers."""

    def __init__(
        self,
        jobs: JobStore,
        metrics: Metrics,
        *,
        fresh_s: float = FRESH_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs = jobs
        self._metrics = metrics
        self._fresh_s = fresh_s
        self._clock = clock
        self._stats: dict[str, float] = {}
        self._asked_at = -math.inf

    async def stats(self) -> dict[str, float]:
        """Nothing where the database cannot be reached: trainers then stay as many as they are."""
        if self._clock() - self._asked_at >= self._fresh_s:
            self._asked_at = self._clock()
            try:
                self._stats = await asyncio.to_thread(self._count)
            except StoreUnavailable:
                self._stats = {}
        return self._stats

    def _count(self) -> dict[str, float]:
        counts = count_into(self._metrics, self._jobs)
        return {JOBS: sum(counts.get(status, 0) for status in _WORK)}
