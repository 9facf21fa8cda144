"""A request that another generator has begun: it goes on, by the same revision, with what is not over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.resume import Transcript
from serve.errors import InvalidRequest
from serve.generator import LocalGenerator
from serve.settings import Settings
from serve.store.revisions import Store
from serve.types import Delta, GenerationRequest, Written
from tests.fakes.models import write_tiny_gpt2

MODEL = "test/ada"
REQUEST = GenerationRequest(
    MODEL, ("My dream is", "I think"), {"max_new_tokens": 16, "logit_bias": ((511, 4.0),)}, num_choices=2, seed=3
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "data", embedded={})
    store.import_folder(write_tiny_gpt2(tmp_path / "first", seed=1), MODEL)
    return store


def settings(tmp_path: Path) -> Settings:
    return Settings(
        data=tmp_path / "data", base=MODEL, dtype="float32", threads=1, memory_bytes=1 << 28, hub_enabled=False
    )


async def deltas_of(generator: LocalGenerator, request: GenerationRequest) -> list[Delta]:
    return [delta async for deltas in generator.generate(request) for delta in deltas]


def told(deltas: list[Delta]) -> list[tuple[Any, ...]]:
    """What each sequence came to."""
    rows = []
    for index in range(len(REQUEST.prompts) * REQUEST.num_choices):
        own = [delta for delta in deltas if delta.index == index]
        tokens = tuple(token.id for delta in own for token in delta.tokens)
        ends = [delta.finish_reason for delta in own if delta.finish_reason]
        prompts = [delta.prompt.text for delta in own if delta.prompt]
        rows.append((tokens, "".join(delta.text for delta in own), ends, prompts))
    return rows


async def test_whatever_of_a_request_was_sent_the_rest_comes_once_even_when_its_model_has_been_replaced(
    store: Store, tmp_path: Path
) -> None:
    first = LocalGenerator(settings(tmp_path))
    whole = await deltas_of(first, REQUEST)
    lengths = [len(tokens) for tokens, _, _, _ in told(whole)]
    assert min(lengths) < max(lengths), "all end together: none could be over while others go on"
    await first.close()
    store.import_folder(write_tiny_gpt2(tmp_path / "second", seed=2), MODEL)
    second = LocalGenerator(settings(tmp_path))
    try:
        for num_deltas in range(1, len(whole), max(1, len(whole) // 3)):
            transcript = Transcript(REQUEST)
            got = transcript.add(whole[:num_deltas])
            if not transcript.is_over:
                got += transcript.add(await deltas_of(second, transcript.rest()))
            assert told(got) == told(whole)
        assert told(await deltas_of(second, REQUEST)) != told(whole)
    finally:
        await second.close()


@pytest.mark.parametrize(
    "written",
    [
        (Written((1,)),),  # of four
        (Written((1,)),) * 5,
        (Written(is_over=True),) * 4,
        (Written((1,) * 16),) * 4,  # as long as it may be
        (Written((512,)),) * 4,
        (Written((-1,)),) * 4,
    ],
)
async def test_what_cannot_have_been_written_is_refused(
    store: Store, tmp_path: Path, written: tuple[Written, ...]
) -> None:
    generator = LocalGenerator(settings(tmp_path))
    with pytest.raises(InvalidRequest, match="'written'"):
        await deltas_of(generator, replace(REQUEST, written=written))
    await generator.close()
