"""A generator on a machine that keeps copies of weights: what it loads is its own copy, which goes with the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from serve import loader
from serve.errors import ModelNotFound
from serve.generator import LocalGenerator
from serve.store.local_copies import LocalCopies
from serve.store.opening import open_store
from serve.store.revisions import Store
from serve.types import GenerationRequest
from tests.fakes.logs import captured_lines
from tests.fakes.models import write_tiny_gpt2
from tests.test_generator import collect, settings, text

ASKED = GenerationRequest("test/m0", ("a",), {"max_new_tokens": 3, "ignore_eos": True})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    store = Store(tmp_path / "data", embedded={})
    staged = store.stage()
    write_tiny_gpt2(staged)
    store.publish("test/m0", staged)
    return tmp_path / "data"


def copies(cache: Path) -> list[str]:
    """The names of the models that have one."""
    return sorted(path.relative_to(cache).parts[3] for path in cache.rglob("model.safetensors*"))


async def test_weights_are_loaded_from_the_machines_own_copy_which_goes_with_the_model(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = replace(settings(data), cache=str(tmp_path / "cache"))
    read: list[Path] = []
    really_read = loader.WeightsFile.read

    def noted(file: loader.WeightsFile) -> Mapping[str, Tensor]:
        read.append(file.path)
        return really_read(file)

    monkeypatch.setattr(loader.WeightsFile, "read", noted)
    plain, generator = LocalGenerator(settings(data)), LocalGenerator(own)
    try:
        assert text((await collect(generator, ASKED))[0]) == text((await collect(plain, ASKED))[0])
        await generator._pool.forget(lambda key: True)
        await collect(generator, replace(ASKED, seed=1))
        mine, shared, mine_again = read
        assert mine == mine_again and mine.is_relative_to(tmp_path / "cache") and shared.is_relative_to(data)
        assert copies(tmp_path / "cache") == ["m0"]

        open_store(own).delete_model("test/m0")
        await generator.forget("test/M0")
        assert copies(tmp_path / "cache") == []
        with pytest.raises(ModelNotFound):
            await collect(generator, ASKED)
    finally:
        await plain.close()
        await generator.close()


async def test_a_copy_that_goes_before_it_is_loaded_is_made_again(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = LocalGenerator(replace(settings(data), cache=str(tmp_path / "cache")))
    really_load = generator._loader.load
    lost: list[str] = []

    def load(prepared: object) -> object:
        if not lost:
            lost.append("once")
            assert generator._copies is not None
            generator._copies.forget("test/m0")
        return really_load(prepared)  # type: ignore[arg-type]

    monkeypatch.setattr(generator._loader, "load", load)
    try:
        await collect(generator, ASKED)
        assert lost and copies(tmp_path / "cache") == ["m0"]
    finally:
        await generator.close()


async def test_what_goes_wrong_in_one_sweep_is_told_and_the_next_one_comes(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swept_again, outcomes = threading.Event(), iter([RuntimeError("nobody foresaw this")])

    def sweep(copies: LocalCopies) -> None:
        if (error := next(outcomes, None)) is not None:
            raise error
        swept_again.set()

    monkeypatch.setattr(LocalCopies, "sweep", sweep)
    monkeypatch.setattr("serve.generator._SWEEP_S", 0.01)
    with captured_lines() as lines:
        generator = LocalGenerator(replace(settings(data), cache=str(tmp_path / "cache")))
        try:
            assert await asyncio.to_thread(swept_again.wait, 10)
        finally:
            await generator.close()
    assert [line["event"] for line in lines].count("copies_not_swept") == 1


async def test_a_model_is_out_of_memory_before_anybody_looks_for_its_copies(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = LocalGenerator(replace(settings(data), cache=str(tmp_path / "cache")))
    in_memory: list[int] = []
    monkeypatch.setattr(
        LocalCopies, "forget", lambda copies, model_id: in_memory.append(len(generator.view().residents))
    )
    try:
        await collect(generator, ASKED)
        assert len(generator.view().residents) == 1
        await generator.forget("test/m0")
        assert in_memory == [0]
    finally:
        await generator.close()


def test_weights_that_another_machine_may_remove_are_read_and_not_mapped(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = loader.WeightsFile.open(Store(data, embedded={}).resolve("test/m0").path / "model.safetensors")
    mapped = weights.read()

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("mapped")

    monkeypatch.setattr("serve.loader.is_shared", lambda device: True)
    monkeypatch.setattr("serve.loader.mmap.mmap", refuse)
    read = weights.read()
    assert mapped.keys() == read.keys() and all(read[name].equal(mapped[name]) for name in mapped)
