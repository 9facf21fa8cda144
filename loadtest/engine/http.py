"""Rookery as a contender over HTTP: `rookery up` with all that belongs to it, asked by concurrent clients."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx

from loadtest.engine.work import CASES, Case, Work


class Http:
    """`model_ids` at the server `url`, each text in one answer, as the peer's server is asked."""

    name = "rookery bfloat16 http"
    cases = frozenset(case.name for case in CASES)

    def __init__(self, url: str, model_ids: Sequence[str]) -> None:
        self.url = url
        self._model_ids = model_ids

    def run(self, case: Case, work: Work, seed: int) -> int:
        return asyncio.run(self._complete_all(case, work, seed))

    async def _complete_all(self, case: Case, work: Work, seed: int) -> int:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=600, limits=limits) as client:
            counts = await asyncio.gather(
                *(
                    _complete(client, model_id, work, seed * case.streams + stream)
                    for stream in range(case.streams)
                    for model_id in self._model_ids[: case.models]
                )
            )
        return sum(counts)


async def _complete(client: httpx.AsyncClient, model_id: str, work: Work, seed: int) -> int:
    answer = await client.post("/v1/completions", json=work.completion(model_id, seed))
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"])
