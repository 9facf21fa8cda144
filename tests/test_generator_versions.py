"""Requests go on while the model they name gets a new version and goes back to an old one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from serve.errors import ModelNotFound, RookeryError
from serve.generator import LocalGenerator
from serve.settings import Settings
from serve.store.revisions import Store
from serve.types import Delta, GenerationRequest
from tests.fakes.models import write_tiny_gpt2

ADA = "huggingtweets/ada"
NUM_CLIENTS = 8
SAMPLING: Any = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
REQUEST = GenerationRequest(ADA, ("My dream is",), SAMPLING, num_choices=2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, embedded={})


@pytest.fixture
async def generator(tmp_path: Path) -> AsyncIterator[LocalGenerator]:
    settings = Settings(data=tmp_path, base=ADA, dtype="float32", memory_bytes=1 << 28, hub_enabled=False)
    generator = LocalGenerator(settings)
    yield generator
    await generator.close()


def publish(store: Store, seed: int, alias: str | None = "main") -> str:
    return store.publish(ADA, write_tiny_gpt2(store.stage(), seed=seed), alias=alias).revision


@dataclass(frozen=True)
class Answer:
    """What one request got. Times are of time.monotonic(), of which `first_s` is the wait for the first token."""

    begun_at: float
    ended_at: float
    first_s: float
    revisions: set[str]
    texts: tuple[str, ...]


async def ask(generator: LocalGenerator, request: GenerationRequest = REQUEST) -> Answer:
    """Raises: RookeryError, also where a single sequence fails."""
    begun_at, first_s = time.monotonic(), 0.0
    texts, revisions = dict.fromkeys(range(request.num_choices), ""), set()
    async for deltas in generator.generate(request):
        first_s = first_s or time.monotonic() - begun_at
        for delta in deltas:
            if delta.error:
                raise RookeryError(delta.error)
            texts[delta.index] += delta.text
            revisions |= {delta.prompt.revision} if delta.prompt else set()
    return Answer(begun_at, time.monotonic(), first_s, revisions, tuple(texts.values()))


class Crowd:
    """Clients that ask again as soon as they are answered."""

    def __init__(self, generator: LocalGenerator) -> None:
        self.answers: list[Answer] = []
        self.failures: list[BaseException] = []
        self._generator = generator
        self._stopping = False
        self._answered = asyncio.Condition()

    async def __aenter__(self) -> Crowd:
        self._clients = [asyncio.create_task(self._ask_on()) for _ in range(NUM_CLIENTS)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._clients)

    async def more_answers(self, number: int) -> None:
        wanted = len(self.answers) + number
        async with self._answered:
            await self._answered.wait_for(lambda: self.failures or len(self.answers) >= wanted)

    async def _ask_on(self) -> None:
        while not self._stopping:
            try:
                self.answers.append(await ask(self._generator))
            except BaseException as exc:
                self.failures.append(exc)
                self._stopping = True
            async with self._answered:
                self._answered.notify_all()


async def test_no_request_fails_while_main_moves_and_each_is_answered_by_one_version(
    store: Store, generator: LocalGenerator
) -> None:
    old = publish(store, seed=1)
    texts = {old: (await ask(generator)).texts}
    moved: list[tuple[float, float, str]] = []  # (before, after, the revision that main names then)

    async def move(action: Any, *arguments: Any) -> str:
        before = time.monotonic()
        done = await asyncio.to_thread(action, *arguments)
        revision = done if isinstance(done, str) else done.revision
        moved.append((before, time.monotonic(), revision))
        await crowd.more_answers(5 * NUM_CLIENTS)
        return revision

    async with Crowd(generator) as crowd:
        await crowd.more_answers(5 * NUM_CLIENTS)
        new = await move(publish, store, 2)
        texts[new] = (await ask(generator)).texts
        for revision in (old, new[:7], old[:12], new):
            await move(store.roll_back, ADA, revision)

    assert crowd.failures == []
    assert texts[old] != texts[new]
    for answer in crowd.answers:
        [revision] = answer.revisions
        assert answer.texts == texts[revision], "words of two versions"
    for number, (_, after, revision) in enumerate(moved):
        until = moved[number + 1][0] if number + 1 < len(moved) else time.monotonic()
        settled = [answer for answer in crowd.answers if after <= answer.begun_at and answer.ended_at <= until]
        assert settled and all(answer.revisions == {revision} for answer in settled)

    loads = [max(a.first_s for a in crowd.answers if a.begun_at <= t1 and a.ended_at >= t0) for t0, t1, _ in moved]
    usual = sorted(answer.first_s for answer in crowd.answers)[len(crowd.answers) // 2]
    print(
        f"{len(crowd.answers)} answers, 0 failures; wait for the first token: median {1000 * usual:.1f} ms, longest at "
        f"a switch {1000 * max(loads):.1f} ms"
    )


async def test_a_stream_that_began_before_the_switch_ends_with_the_version_it_began_with(
    store: Store, generator: LocalGenerator
) -> None:
    old = publish(store, seed=1)
    long = replace(REQUEST, sampling=SAMPLING | {"max_new_tokens": 50})
    whole = await ask(generator, long)

    stream = generator.generate(long)
    deltas: list[Delta] = await anext(stream)
    new = await asyncio.to_thread(publish, store, 2)
    assert (await ask(generator)).revisions == {new}
    async for more in stream:
        deltas += more

    assert {delta.prompt.revision for delta in deltas if delta.prompt} == whole.revisions == {old}
    told = ["".join(delta.text for delta in deltas if delta.index == index) for index in range(2)]
    assert tuple(told) == whole.texts


async def test_every_revision_is_served_by_its_name_and_by_how_that_begins(
    store: Store, generator: LocalGenerator
) -> None:
    old, new = publish(store, seed=1), publish(store, seed=2)
    checkpoint = publish(store, seed=3, alias=None)
    for revision in (old, new, checkpoint):
        for name in (revision, revision[:7], revision[:7].upper()):
            answer = await ask(generator, replace(REQUEST, model_id=f"HuggingTweets/Ada@{name}"))
            assert answer.revisions == {revision}
    for wrong in ("0000000", old[:6], old + "0"):
        with pytest.raises(ModelNotFound):
            await ask(generator, replace(REQUEST, model_id=f"{ADA}@{wrong}"))
    assert (await ask(generator)).revisions == {new}
    residents = [resident.revision for resident in generator.view().residents]
    assert len(residents) == len(set(residents))  # however it was named
    assert {new} <= set(residents) <= {old, new, checkpoint}  # those that are replaced may be gone again
