"""People's archives -> their bots and what those write, all through the product's own code and defaults.

A bot is fine-tuned as a job would do it and then asked through the engine that serves it. Nothing here judges.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve.errors import RookeryError
from serve.generator import LocalGenerator
from serve.settings import Settings
from serve.training.archives import read_archive
from serve.training.clean import clean, require_enough
from serve.training.dataset import Dataset, build_dataset, epoch_texts
from serve.training.finetune import (
    LEARNING_RATE,
    NUM_EPOCHS,
    FineTuneSpec,
    finetune,
    suggested_batch_size,
    suggested_multiplier,
)
from serve.types import GenerationRequest

logger = logging.getLogger(__name__)

NAMESPACE = "quality"
OF_NOBODY = "(base)"  # instead of a handle
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody's kept texts, in the archive's order (newest first in an API's timeline)."""

    handle: str
    kept: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.kept)


@dataclass(frozen=True, slots=True)
class Bot:
    """A model that learnt `dataset.train` and has never seen `dataset.held_out`."""

    handle: str
    dataset: Dataset
    model_id: str
    folder: Path


def list_archives(folder: Path) -> dict[str, Path]:
    """Handle -> archive; a file is called by the handle, whatever its format."""
    return {path.name.partition(".")[0]: path for path in sorted(folder.iterdir()) if path.is_file()}


def read_person(handle: str, archive: Path) -> Person:
    """Raises: BadUpload, also where there is too little to learn from."""
    cleaned = clean(read_archive(archive))
    require_enough(cleaned, handle)
    return Person(handle, tuple(cleaned.kept))


def spread(people: Sequence[Person], number: int) -> list[Person]:
    """The choice of people: by bytes of kept text, the least, the most, and evenly placed ranks between them."""
    ranked = sorted(people, key=lambda person: (person.num_bytes, person.handle))
    if number >= len(ranked):
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / max(number - 1, 1))] for i in range(number)]


def sample_texts(people: Sequence[Person], number: int, seed: int) -> list[str]:
    """About `number` texts, of everybody the same number at most, in random order."""
    generator = random.Random(seed)
    each = math.ceil(number / max(len(people), 1))
    texts = [text for person in people for text in generator.sample(person.kept, min(each, len(person.kept)))]
    generator.shuffle(texts)
    return texts


# --- Making -------------------------------------------------------------------------------------------------


def default_hyperparameters(base: Path, epochs: Sequence[Sequence[str]]) -> tuple[int, float]:
    """(batch size, learning rate) of a job that asks for nothing."""
    batch_size = suggested_batch_size(base, epochs)
    return batch_size, LEARNING_RATE * suggested_multiplier(base, batch_size)


def train_bot(person: Person, base: Path, work: Path, seed: int, num_threads: int | None = None) -> Bot:
    """Fine-tunes with the defaults of a job, unless the very same was done in `work` before."""
    dataset = build_dataset({person.handle: person.kept}, seed=seed)
    epochs = [epoch_texts(dataset, seed, epoch) for epoch in range(NUM_EPOCHS)]
    batch_size, rate = default_hyperparameters(base, epochs)
    key = _digest(_file_digest(base / _WEIGHTS), epochs, seed, batch_size, rate)
    model_id = f"{NAMESPACE}/{person.handle}-{key}"
    folder = _home(work, model_id)
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=work) as temporary:
            out = Path(temporary) / "out"
            spec = FineTuneSpec(
                base=base,
                epochs=epochs,
                held_out=dataset.held_out,
                out=out,
                seed=seed,
                batch_size=batch_size,
                learning_rate=rate,
                num_previews=0,
                num_threads=num_threads,
            )
            result = finetune(spec)
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.rename(out, folder)
        logger.info(
            "trained %s in %.0f s, %d steps: held-out loss %s -> %s",
            person.handle,
            result.duration_s,
            result.num_steps,
            result.loss_before,
            result.loss_after,
        )
    return Bot(person.handle, dataset, model_id, folder)


def place_base(base: Path, work: Path) -> Bot:
    """The base as a bot of nobody, where the engine finds it."""
    model_id = f"{NAMESPACE}/base-{_file_digest(base / _WEIGHTS)[:12]}"
    folder = _home(work, model_id)
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=work) as temporary:
            shutil.copytree(base, Path(temporary) / "copy")
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.rename(Path(temporary) / "copy", folder)
    return Bot(OF_NOBODY, Dataset((), (), {}), model_id, folder)


def _home(work: Path, model_id: str) -> Path:
    return work / "models" / model_id


def _digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Writing ------------------------------------------------------------------------------------------------


def write_texts(bots: Sequence[Bot], work: Path, prompt: str, number: int, seed: int) -> dict[str, list[str]]:
    """Handle -> `number` texts with the bot's own sampling, without the prompt. "": from <|endoftext|> alone.

    All bots write at once, in one engine. Each has random numbers of its own.
    """
    return asyncio.run(_write_all(bots, work, prompt, number, seed))


async def _write_all(bots: Sequence[Bot], work: Path, prompt: str, number: int, seed: int) -> dict[str, list[str]]:
    generator = LocalGenerator(Settings(data=work, base=bots[0].model_id, hub_enabled=False))
    try:
        requests = {
            bot.handle: GenerationRequest(bot.model_id, (prompt,), num_choices=number, seed=seed + i, is_whole=True)
            for i, bot in enumerate(bots)
        }
        written = await asyncio.gather(*(_write(generator, request) for request in requests.values()))
    finally:
        await generator.close()
    return dict(zip(requests, written, strict=True))


async def _write(generator: LocalGenerator, request: GenerationRequest) -> list[str]:
    parts: Mapping[int, list[str]] = {i: [] for i in range(request.num_choices)}
    async for deltas in generator.generate(request):
        for delta in deltas:
            if delta.error:
                raise RookeryError(delta.error)
            parts[delta.index].append(delta.text)
    return ["".join(parts[i]) for i in range(request.num_choices)]
