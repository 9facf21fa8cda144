"""The generator as a whole, without HTTP: real folders, real engine, real pool."""

from __future__ import annotations

import asyncio
import mmap
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve import generator as generator_module
from serve.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelDisabled,
    ModelNotFound,
    ModelUnusable,
    RookeryError,
)
from serve.generator import LocalGenerator
from serve.settings import Settings
from serve.types import Delta, GenerationRequest
from tests.fakes.models import write_tiny_gpt2

NUM_MODELS = 5


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for i in range(NUM_MODELS):
        write_tiny_gpt2(tmp_path / "models" / "test" / f"m{i}", seed=i)
    return tmp_path


def settings(data: Path, **changes: Any) -> Settings:
    return Settings(data=data, base="test/m0", dtype="float32", memory_bytes=1 << 30, hub_enabled=False, **changes)


@pytest.fixture
async def generator(data: Path) -> AsyncIterator[LocalGenerator]:
    generator = LocalGenerator(settings(data))
    yield generator
    await generator.close()


async def room_for(num_models: int, data: Path) -> LocalGenerator:
    """A generator whose memory holds so many of the tiny models."""
    large = LocalGenerator(replace(settings(data), memory_bytes=1 << 24))
    await collect(large, GenerationRequest("test/m0", ("a",), {"max_new_tokens": 1}))
    one_model = large.view().residents[0].num_bytes
    await large.close()
    return LocalGenerator(replace(settings(data), memory_bytes=num_models * one_model))


async def collect(generator: LocalGenerator, request: GenerationRequest) -> list[list[Delta]]:
    """Deltas by sequence index."""
    found: dict[int, list[Delta]] = {}
    async for deltas in generator.generate(request):
        for delta in deltas:
            found.setdefault(delta.index, []).append(delta)
    return [found[i] for i in sorted(found)]


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def test_greedy_texts_of_five_models_at_once_are_those_of_transformers(
    generator: LocalGenerator, data: Path
) -> None:
    sampling: Any = {"temperature": 0, "max_new_tokens": 16}
    requests = [GenerationRequest(f"test/m{i}", ("My dream is",), sampling) for i in range(NUM_MODELS)]
    results = await asyncio.gather(*(collect(generator, request) for request in requests))
    for i, (sequence,) in enumerate(results):
        folder = data / "models" / "test" / f"m{i}"
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer("My dream is", return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=16, pad_token_id=0)[0]
        new = ids[inputs.input_ids.shape[1] :]
        assert text(sequence) == tokenizer.decode(new, skip_special_tokens=True)
        assert sequence[-1].finish_reason in ("length", "stop")


async def test_the_first_delta_tells_of_the_prompt_and_where_the_weights_were(generator: LocalGenerator) -> None:
    request = GenerationRequest("test/m1", ("My dream is",), {"max_new_tokens": 3}, num_choices=2)
    cold = await collect(generator, request)
    warm = await collect(generator, request)
    for sequence in cold + warm:
        assert sequence[0].prompt is not None and sequence[0].prompt.text == "My dream is"
        assert all(delta.prompt is None for delta in sequence[1:])
    assert cold[0][0].prompt is not None and cold[0][0].prompt.tier in ("host", "disk")
    assert warm[0][0].prompt is not None and warm[0][0].prompt.tier == "device"
    assert [text(s) for s in cold] == [text(s) for s in warm]  # the same seed gives the same texts
    assert text(cold[0]) != text(cold[1])


async def test_an_unknown_model_is_not_found_and_nothing_is_evicted(generator: LocalGenerator) -> None:
    await collect(generator, GenerationRequest("test/m1", ("a",), {"max_new_tokens": 1}))
    for name in ("test/none", "../../etc/passwd", "a/b/c", ""):
        with pytest.raises(ModelNotFound):
            await collect(generator, GenerationRequest(name, ("a",)))
    assert [r.model_id for r in generator.view().residents] == ["test/m1"]


async def test_bad_requests_are_refused_before_anything_is_loaded(generator: LocalGenerator) -> None:
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 64"):
        await collect(generator, GenerationRequest("test/m2", ("word " * 100,)))
    with pytest.raises(ContextLengthExceeded):
        await collect(generator, GenerationRequest("test/m2", ("a",), {"max_new_tokens": 64}))
    with pytest.raises(InvalidRequest, match="logit_bias"):
        await collect(generator, GenerationRequest("test/m2", ("a",), {"logit_bias": ((512, 1.0),)}))
    with pytest.raises(InvalidRequest, match="vocabulary"):
        await collect(generator, GenerationRequest("test/m2", ((1, 2, 512),)))
    assert generator.view().residents == ()


async def test_a_folder_that_is_no_gpt2_is_refused_with_what_was_found(generator: LocalGenerator, data: Path) -> None:
    folder = write_tiny_gpt2(data / "models" / "test" / "llama")
    config = (folder / "config.json").read_text().replace('"gpt2"', '"llama"')
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelUnusable, match="llama"):
        await collect(generator, GenerationRequest("test/llama", ("a",)))


async def test_leaving_early_frees_the_weights_and_the_place_in_the_batch(generator: LocalGenerator) -> None:
    request = GenerationRequest("test/m3", ("a",), {"max_new_tokens": 60, "ignore_eos": True}, num_choices=4)
    stream = generator.generate(request)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    for _ in range(200):
        (resident,) = generator.view().residents
        if resident.leases == 0:
            break
        await asyncio.sleep(0.01)
    assert resident.leases == 0
    assert generator._calls == {}


async def test_more_models_than_fit_take_turns(data: Path) -> None:
    small = await room_for(2, data)
    requests = [GenerationRequest(f"test/m{i % NUM_MODELS}", ("a",), {"max_new_tokens": 5}) for i in range(20)]
    results = await asyncio.wait_for(asyncio.gather(*(collect(small, request) for request in requests)), 60)
    assert all(sequence[-1].finish_reason for (sequence,) in results)
    assert len(small.view().residents) <= 2
    await small.close()


async def test_a_replaced_folder_is_served_anew_without_a_restart(generator: LocalGenerator, data: Path) -> None:
    request = GenerationRequest("test/m4", ("My dream is",), {"temperature": 0, "max_new_tokens": 16})
    before = text((await collect(generator, request))[0])
    write_tiny_gpt2(data / "models" / "test" / "m4", seed=77)
    after = text((await collect(generator, request))[0])
    assert after != before  # two random models agree on 16 greedy tokens with odds below 1e-20


async def test_ready_means_a_token_was_really_generated(generator: LocalGenerator) -> None:
    await generator.check_ready()
    assert [r.model_id for r in generator.view().residents] == ["test/m0"]


async def test_a_look_at_it_tells_what_is_in_memory_and_what_is_being_written(data: Path) -> None:
    write_tiny_gpt2(data / "models" / "test" / "tireless", n_positions=1024)  # its texts last while they are looked at
    generator = LocalGenerator(settings(data, max_sequences=2))
    request = GenerationRequest("test/tireless", ("a",), {"max_new_tokens": 1000, "ignore_eos": True}, num_choices=3)
    stream = generator.generate(request)
    await anext(stream)
    (view,) = await generator.replicas()
    assert (view.name, view.device, view.dtype, view.budget_bytes) == ("", "cpu", "float32", 1 << 30)
    (resident,) = view.residents
    assert resident.model_id == "test/tireless" and resident.leases == 1 and view.used_bytes == resident.num_bytes
    assert (view.num_running, view.num_queued, view.num_waiting) == (2, 1, 0)
    await stream.aclose()  # type: ignore[attr-defined]
    async with asyncio.timeout(30):
        while (idle := generator.view()).num_running:
            await asyncio.sleep(0.01)
    assert (idle.num_queued, idle.evictions) == (0, ())
    assert idle.up_s > view.up_s > 0
    await generator.close()


async def test_the_last_evictions_are_told_with_their_reasons_the_newest_first(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator_module, "_NUM_EVICTIONS", 3)
    small = await room_for(1, data)
    for number in range(5):
        await collect(small, GenerationRequest(f"test/m{number}", ("a",), {"max_new_tokens": 1}))
    (left,) = small.view().residents
    assert [(one.model_id, one.reason) for one in small.view().evictions] == [
        (f"test/m{number}", "budget") for number in (3, 2, 1)
    ]
    await small.forget("test/m4")
    newest, before, *_ = small.view().evictions
    assert (newest.model_id, newest.revision, newest.reason) == ("test/m4", left.revision, "forgotten")
    assert newest.num_bytes == left.num_bytes and 0 <= newest.ago_s <= before.ago_s
    await small.close()


async def test_what_is_forgotten_leaves_nothing_behind(
    generator: LocalGenerator, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await collect(generator, GenerationRequest("test/m0", ("a",), {"max_new_tokens": 1}))
    (kept,) = generator._loader._facts
    monkeypatch.setattr(generator_module, "_STOPS_KEPT_S", 0.0)
    for number in range(3):
        write_tiny_gpt2(data / "models" / "test" / f"Passing{number}")
        await collect(generator, GenerationRequest(f"test/Passing{number}", ("a",), {"max_new_tokens": 1}))
        generator._store.disable(f"test/Passing{number}")
        await generator.forget(f"TEST/passing{number}", at_once=True)
    assert list(generator._loader._facts) == [kept] and list(generator._stopped) == ["test/passing2"]
    assert await collect(generator, GenerationRequest("test/m0", ("a",), {"max_new_tokens": 1}))


async def test_the_seed_and_index_decide_the_text_not_the_company(generator: LocalGenerator) -> None:
    request = GenerationRequest("test/m0", ("My dream is",), {"max_new_tokens": 12, "ignore_eos": True}, seed=5)
    (alone,) = await collect(generator, request)
    others = [GenerationRequest(f"test/m{i % 5}", ("x",), {"max_new_tokens": 20}, seed=i) for i in range(10)]
    (together,), *_ = await asyncio.gather(*(collect(generator, r) for r in [request, *others]))
    assert text(together) == text(alone)


async def test_who_does_not_read_along_gets_the_first_token_and_then_all_the_rest(generator: LocalGenerator) -> None:
    asked = GenerationRequest("test/m0", ("a",), {"max_new_tokens": 50, "ignore_eos": True}, num_choices=4, seed=1)
    whole = await collect(generator, replace(asked, is_whole=True))
    assert {len(deltas) for deltas in whole} <= {1, 2}
    assert {sum(len(delta.tokens) for delta in deltas) for deltas in whole} == {50}
    assert [text(deltas) for deltas in whole] == [text(deltas) for deltas in await collect(generator, asked)]


async def test_a_model_s_odd_defaults_harm_nobody_else(generator: LocalGenerator, data: Path) -> None:
    defaults = data / "models" / "test" / "m1" / "generation_config.json"
    defaults.write_text('{"do_sample": true, "temperature": 1e-40, "stop_strings": ["x"]}')
    requests = [GenerationRequest(f"test/m{i}", ("a",), {"max_new_tokens": 8}) for i in range(3)]
    for (sequence,) in await asyncio.gather(*(collect(generator, request) for request in requests)):
        assert sequence[-1].error is None and sequence[-1].finish_reason


async def test_without_a_way_to_the_hub_an_unknown_model_is_not_found(data: Path) -> None:
    offline = LocalGenerator(
        Settings(data=data, base="test/m0", hub_endpoint="http://127.0.0.1:9", memory_bytes=1 << 28)
    )
    for _ in range(2):  # the second time from memory
        with pytest.raises(ModelNotFound, match="cannot be reached"):
            await collect(offline, GenerationRequest("huggingtweets/nobody", ("a",)))
    await offline.close()


async def test_what_is_here_does_not_wait_for_a_slow_hub(data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:  # takes connections and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        generator = LocalGenerator(Settings(data=data, base="test/m0", hub_endpoint=endpoint, hub_deadline_s=2))
        unknown = [asyncio.create_task(collect(generator, GenerationRequest(f"x/n{i}", ("a",)))) for i in range(12)]
        await asyncio.sleep(0)
        await collect(generator, GenerationRequest("test/m0", ("a",), {"max_new_tokens": 2}))
        assert not any(task.done() for task in unknown)
        for task in unknown:
            task.cancel()
        await asyncio.gather(*unknown, return_exceptions=True)
        await generator.close()


async def test_closing_ends_texts_whose_reader_has_stopped_reading(data: Path) -> None:
    generator = LocalGenerator(settings(data))
    stream = generator.generate(GenerationRequest("test/m0", ("a",), {"max_new_tokens": 60, "ignore_eos": True}))
    await anext(stream)
    await asyncio.wait_for(generator.close(), 30)
    with pytest.raises(RookeryError):
        await generator.check_health()
    await stream.aclose()  # type: ignore[attr-defined]


async def test_a_lease_ends_with_the_last_token_however_slow_the_reader(generator: LocalGenerator) -> None:
    stream = generator.generate(GenerationRequest("test/m0", ("a",), {"max_new_tokens": 30, "ignore_eos": True}))
    await anext(stream)
    for _ in range(500):
        (resident,) = generator.view().residents
        if resident.leases == 0:
            break
        await asyncio.sleep(0.01)
    assert resident.leases == 0
    await stream.aclose()  # type: ignore[attr-defined]


async def test_four_hundred_loads_and_evictions_leave_every_slot_and_no_memory_behind(data: Path) -> None:
    small = await room_for(2, data)

    async def turn(number: int) -> None:
        await collect(small, GenerationRequest(f"test/m{number % NUM_MODELS}", ("a",), {"max_new_tokens": 1}))

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    marks = []
    for number in range(400):
        await turn(number)
        if number % 100 == 99:
            marks.append(resident_bytes())
    # What is lost is lost in each hundred; what others of this process need all of a sudden is not.
    grown = min(after - before for before, after in pairwise(marks))
    assert grown < 100 * 20_000  # a slot has 175,616 bytes: one lost load in nine would show
    assert len(small.view().residents) == 2
    await asyncio.gather(turn(0), turn(1))
    await small.close()


async def test_what_observes_the_end_of_a_generation_cannot_change_it(data: Path) -> None:
    def fail(account: object) -> None:
        raise RuntimeError("nobody traces")

    generator = LocalGenerator(settings(data), on_end=fail)
    ((*_, last),) = await collect(generator, GenerationRequest("test/m0", ("a",), {"max_new_tokens": 2}))
    assert last.finish_reason is not None
    with pytest.raises(ModelNotFound):
        await collect(generator, GenerationRequest("test/nobody", ("a",), {}))
    await generator.close()


async def test_a_disabled_model_stops_in_the_middle_of_its_texts_and_others_go_on(
    generator: LocalGenerator, data: Path
) -> None:
    write_tiny_gpt2(data / "models" / "test" / "long", n_positions=2048)
    long = GenerationRequest("test/long", ("a",), {"max_new_tokens": 2000, "ignore_eos": True})
    store = generator._store
    texts = generator.generate(long)
    await anext(texts)
    other = asyncio.create_task(collect(generator, GenerationRequest("test/m0", ("a",), {"max_new_tokens": 40})))
    store.disable("test/Long")
    await generator.forget("TEST/long", at_once=True)
    with pytest.raises(ModelDisabled):
        async for _ in texts:
            pass
    with pytest.raises(ModelDisabled):
        await collect(generator, long)
    assert len(await other) == 1
    await eventually(lambda: all(one.model_id != "test/long" for one in generator.view().residents))
    store.enable("test/long")
    assert await collect(generator, replace(long, sampling={"max_new_tokens": 2}))


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
