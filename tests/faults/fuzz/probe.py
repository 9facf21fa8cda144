"""How long the service takes for the least that can be asked, all the while: what a refusal's time is measured by.

Each probe names itself and looks whether it got its own answer: a request smuggled past a proxy would cross them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from tests.faults.fuzz.case import Case, request
from tests.faults.fuzz.exchange import exchange

_EVERY_S = 0.02
_NUM_RECENT = 200  # some seconds


class Probe:
    """GET /healthz, again and again."""

    def __init__(self, host: str, port: int) -> None:
        self.num_crossed = 0  # got an answer that was not theirs, or none
        self.all_s: list[float] = []
        self._host, self._port = host, port
        self._recent: deque[float] = deque(maxlen=_NUM_RECENT)
        self._asked_at: float | None = None

    @property
    def baseline_s(self) -> float:
        """The 99th percentile of the last seconds, or how long the present one has been waiting."""
        waiting = time.perf_counter() - self._asked_at if self._asked_at else 0.0
        return max(waiting, quantile(self._recent, 0.99))

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._ask(len(self.all_s))
            await asyncio.sleep(_EVERY_S)

    async def _ask(self, number: int) -> None:
        name = b"probe-%d" % number
        self._asked_at = time.perf_counter()
        outcome = await exchange(
            self._host, self._port, Case("", (request(b"GET", b"/healthz", [(b"x-request-id", name)]),))
        )
        self._asked_at = None
        self._recent.append(outcome.took_s)
        self.all_s.append(outcome.took_s)
        told = [(one.status, one.header(b"x-request-id"), one.body) for one in outcome.answers]
        self.num_crossed += told != [(200, name, b'{"status":"ok"}')]


def quantile(values: deque[float] | list[float], share: float) -> float:
    """0 of nothing."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0
