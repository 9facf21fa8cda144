"""Models that give NaN, disks that hang, revisions that are replaced, and engines that come to nothing."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve import generator as generator_module
from serve.currency import keep_current
from serve.errors import ModelUnusable, RookeryError
from serve.generator import LocalGenerator
from serve.loader import Facts
from serve.metrics import Metrics
from serve.quarantine import MAX_FAILURES, QUARANTINE_S, Quarantine
from serve.types import GenerationRequest
from tests.api.test_metrics import counted
from tests.fakes.models import write_tiny_gpt2
from tests.test_generator import collect, data, settings  # noqa: F401  # a fixture


def ask(model: str) -> GenerationRequest:
    return GenerationRequest(model, ("a",), {"max_new_tokens": 2, "ignore_eos": True})


def test_a_revision_is_refused_after_three_requests_and_another_is_not() -> None:
    quarantine = Quarantine()
    assert [quarantine.note("ada@1") for _ in range(MAX_FAILURES - 1)] == [None, None]
    assert quarantine.note("ada@2") is None
    assert isinstance(quarantine.note("ada@1"), ModelUnusable)
    assert quarantine.note("ada@1") is None, "after a quarantine it begins anew"


def test_what_failed_long_ago_counts_no_more() -> None:
    times = iter((0.0, 1.0, QUARANTINE_S + 0.5, QUARANTINE_S + 2.0, QUARANTINE_S + 2.0))
    quarantine = Quarantine(lambda: next(times))
    assert [quarantine.note("ada@1") for _ in range(4)] == [None] * 4, "never three within the time"
    assert isinstance(quarantine.note("ada@1"), ModelUnusable)


async def test_a_model_that_gives_nan_is_refused_until_it_has_a_new_revision(data: Path) -> None:  # noqa: F811
    folder = data / "models" / "test" / "m1"
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"transformer.ln_f.bias": torch.full_like(weights["transformer.ln_f.bias"], 3e38)},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    metrics = Metrics()
    generator = LocalGenerator(settings(data), metrics=metrics)
    for _ in range(MAX_FAILURES):  # requests: that one asks for many texts at once says no more of the model
        for *_, last in await collect(generator, replace(ask("test/m1"), prompts=("a",) * MAX_FAILURES)):
            assert last.error is not None and "NaN" in last.error
    with pytest.raises(ModelUnusable, match="NaN or Inf in 3 requests"):
        await collect(generator, ask("test/m1"))
    assert [one.model_id for one in generator.view().residents] == []
    await collect(generator, ask("test/m2"))
    assert counted(metrics, "rookery_model_quarantines_total") == {(): 1}
    write_tiny_gpt2(folder, seed=9)
    ((*_, last),) = await collect(generator, ask("test/m1"))
    assert last.error is None and last.finish_reason == "length"
    await generator.close()


async def test_a_disk_that_hangs_takes_no_more_than_its_own_model(
    data: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator, gate = LocalGenerator(replace(settings(data), lease_timeout_s=0.3)), threading.Event()
    read_facts = generator._loader._read_facts

    def hang(key: str) -> Facts:
        if key.startswith("test/m1@"):
            gate.wait()
        return read_facts(key)

    monkeypatch.setattr(generator._loader, "_read_facts", hang)
    asked = [asyncio.create_task(collect(generator, ask("test/m1"))) for _ in range(40)]
    await asyncio.sleep(0)
    await collect(generator, ask("test/m2"))
    errors = await asyncio.gather(*asked, return_exceptions=True)
    assert {error.code for error in errors if isinstance(error, RookeryError)} == {"store_unavailable"}
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("facts") == 1, "one thread hangs, however many asked"
    gate.set()
    async with asyncio.timeout(30):
        while generator._reading.num_hung:
            await asyncio.sleep(0.01)
    await collect(generator, ask("test/m1"))
    await generator.close()


async def test_an_engine_that_comes_to_nothing_is_not_healthy(
    data: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator, gate = LocalGenerator(settings(data)), threading.Event()
    await generator.check_health()
    monkeypatch.setattr(generator_module, "_STALLED_S", 0.0)
    monkeypatch.setattr(generator._engine, "_on_step", lambda stats: gate.wait())
    text = asyncio.create_task(collect(generator, ask("test/m0")))
    with pytest.raises(RookeryError, match="come to nothing"):
        async with asyncio.timeout(30):
            while True:
                await generator.check_health()
                await asyncio.sleep(0.01)
    gate.set()
    await text
    await generator.check_health()
    await generator.close()


async def test_a_device_that_fails_is_told(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    generator = LocalGenerator(settings(data))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("serve.engine.engine.torch.ones", fail)
    with pytest.raises(RookeryError, match="does not compute: RuntimeError"):
        await generator.check_health()
    monkeypatch.undo()
    await generator.check_health()
    await generator.close()


async def test_a_replaced_revision_and_a_deleted_model_leave_memory_by_themselves(data: Path) -> None:  # noqa: F811
    generator = LocalGenerator(settings(data))
    for model in ("test/m1", "test/m2", "test/m3"):
        await collect(generator, ask(model))
    keeping = asyncio.create_task(keep_current(generator._pool, generator._store, 0.01))
    write_tiny_gpt2(data / "models" / "test" / "m1", seed=9)
    (data / "models" / "test" / "m2").rename(data / "away")
    async with asyncio.timeout(30):
        while len(generator.view().residents) > 1:
            await asyncio.sleep(0.01)
    assert [one.model_id for one in generator.view().residents] == ["test/m3"]
    keeping.cancel()
    await generator.close()
