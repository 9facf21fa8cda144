"""How often a text that is taken up elsewhere is not the one that would have come.

Each text is written alone, and then again from one of its tokens on: alone, or beside texts of seven other models. What
differs is the rounding, and so a draw between two tokens that are that close.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from serve.generator import LocalGenerator
from serve.settings import Settings
from serve.store.opening import EMBEDDED
from serve.store.revisions import Store
from serve.types import GenerationRequest, SamplingOverrides, Written

NUM_MODELS = 8
NUM_TOKENS = 60
_PROMPTS = ("My dream is", "I think", "Today", "Don't forget to")
_SAMPLING: dict[str, SamplingOverrides] = {
    "greedy": {"temperature": 0.0, "repetition_penalty": 1.2},
    "sampled": {"temperature": 1.0, "top_p": 0.95},
}


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one way to write and to go on."""

    weights: str
    sampling: str
    num_beside: int  # texts of other models in the batch of the second half
    num_texts: int
    num_differing: int


def measure(folder: Path, num_texts: int) -> Iterator[Difference]:
    """`num_texts` of each kind, in float32 and in bfloat16, by the base model that comes with the program."""
    store = Store(folder, embedded={})
    for number in range(NUM_MODELS):
        store.import_folder(EMBEDDED["fledgling"], f"resume/m{number}")
    for weights in ("float32", "bfloat16"):
        yield from asyncio.run(_measure(folder, weights, num_texts))


async def _measure(folder: Path, weights: str, num_texts: int) -> list[Difference]:
    settings = Settings(data=folder, base="resume/m0", dtype=weights, memory_bytes=2 << 30, hub_enabled=False)
    generator = LocalGenerator(settings)
    found = []
    for name, sampling in _SAMPLING.items():
        requests = [_request(number, sampling) for number in range(num_texts)]
        whole = [await _ids(generator, request) for request in requests]
        for num_beside in (0, NUM_MODELS - 1):
            differing = 0
            for number, (request, ids) in enumerate(zip(requests, whole, strict=True)):
                cut = random.Random(number).randrange(1, len(ids))
                rest = replace(request, written=(Written(tuple(ids[:cut])),))
                others = [_request(number, sampling, model=1 + beside) for beside in range(num_beside)]
                texts = await asyncio.gather(_ids(generator, rest), *(_ids(generator, other) for other in others))
                differing += ids[:cut] + texts[0] != ids
            found.append(Difference(weights, name, num_beside, num_texts, differing))
    await generator.close()
    return found


def _request(number: int, sampling: SamplingOverrides, *, model: int = 0) -> GenerationRequest:
    asked: SamplingOverrides = {**sampling, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    return GenerationRequest(f"resume/m{model}", (_PROMPTS[number % len(_PROMPTS)],), asked, seed=number)


async def _ids(generator: LocalGenerator, request: GenerationRequest) -> list[int]:
    batches = [deltas async for deltas in generator.generate(request)]
    return [token.id for deltas in batches for delta in deltas for token in delta.tokens]
