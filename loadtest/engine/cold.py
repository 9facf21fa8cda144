"""What a model that is not resident costs the first token, when its file lies in the page cache.

Through `LocalGenerator`, in process: locating, reading facts, leasing, loading and the first step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.engine.work import Work
from serve.generator import LocalGenerator
from serve.settings import Settings
from serve.types import GenerationRequest


@dataclass(frozen=True, slots=True)
class ColdStarts:
    """Times to the first token, in seconds."""

    unseen: list[float]  # of a model's first request in this process
    evicted: list[float]  # of a model that had been resident before
    resident: list[float]

    @property
    def cost_s(self) -> float:
        """What an unseen model adds."""
        return statistics.median(self.unseen) - statistics.median(self.resident)

    @property
    def reload_s(self) -> float:
        return statistics.median(self.evicted) - statistics.median(self.resident)


async def measure_cold_starts(
    data: Path, model_ids: Sequence[str], weights: str, memory_bytes: int, work: Work, rounds: int = 3
) -> ColdStarts:
    """Load and evict `model_ids` in turn in one generator of the store `data`; the first model warms it up."""
    settings = Settings(data=data, dtype=weights, memory_bytes=memory_bytes, hub_enabled=False)
    generator = LocalGenerator(settings)
    times = ColdStarts([], [], [])
    try:
        for _ in range(3):  # memory of a slot, threads, the first step: once in a process
            await _first_token_s(generator, model_ids[0], work)
            await generator.forget(model_ids[0])
        for number in range(rounds):
            for model_id in model_ids[1:]:
                cold = times.evicted if number else times.unseen
                cold.append(await _first_token_s(generator, model_id, work))
                times.resident.append(await _first_token_s(generator, model_id, work))
                await generator.forget(model_id)
    finally:
        await generator.close()
    return times


async def _first_token_s(generator: LocalGenerator, model_id: str, work: Work) -> float:
    request = GenerationRequest(
        model_id,
        prompts=(work.prompt_ids,),
        sampling={
            "max_new_tokens": 1,
            "top_p": work.top_p,
            "temperature": work.temperature,
            "ignore_eos": True,
        },
    )
    started = time.perf_counter()
    async for deltas in generator.generate(request):
        for delta in deltas:
            assert delta.error is None, delta.error
    return time.perf_counter() - started
