"""What a generator counts, with a real engine and a pool that is too small."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from serve.generator import LocalGenerator
from serve.metrics import Metrics
from serve.types import GenerationRequest
from tests.api.test_metrics import counted
from tests.fakes.logs import captured_lines
from tests.test_generator import collect, data, room_for, settings  # noqa: F401  # a fixture


async def test_steps_waits_loads_and_evictions_are_counted(data: Path) -> None:  # noqa: F811
    probe = await room_for(1, data)
    budget = probe.view().budget_bytes
    await probe.close()
    metrics = Metrics()
    generator = LocalGenerator(replace(settings(data), memory_bytes=budget), metrics=metrics)
    for name in ("test/m0", "test/m1", "test/m0"):
        await collect(generator, GenerationRequest(name, ("a",), {"max_new_tokens": 3, "ignore_eos": True}))
    generator._set_gauges()
    assert sum(counted(metrics, "rookery_model_loads_total").values()) == 3
    assert counted(metrics, "rookery_model_evictions_total") == {("budget",): 2}
    assert counted(metrics, "rookery_model_age_at_eviction_seconds_count") == {(): 2}
    assert counted(metrics, "rookery_model_reloads_total") == {(): 1}
    assert counted(metrics, "rookery_queue_wait_seconds_count") == {(): 3}
    assert counted(metrics, "rookery_pool_models")[("resident",)] == 1
    assert counted(metrics, "rookery_pool_bytes") == {("device",): generator.view().used_bytes}
    assert counted(metrics, "rookery_pool_budget_bytes") == {("device",): budget}
    await generator.close()  # the engine tells of a step when its tokens are under way already
    assert counted(metrics, "rookery_step_duration_seconds_count") == {(): 9}


async def test_gauges_outlast_an_error_that_nobody_foresaw(
    data: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.generator._GAUGES_S", 0.001)
    seen: list[int] = []
    again = asyncio.Event()

    def fail_once(_generator: LocalGenerator) -> None:
        seen.append(len(seen))
        if len(seen) == 1:
            raise ValueError
        again.set()

    monkeypatch.setattr(LocalGenerator, "_set_gauges", fail_once)
    generator = LocalGenerator(settings(data), metrics=Metrics())
    with captured_lines() as lines:
        async with asyncio.timeout(30):
            await again.wait()
        await generator.close()
    assert [line["event"] for line in lines] == ["gauges_failed"]
