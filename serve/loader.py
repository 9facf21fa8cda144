"""How a stored revision gets into an engine's slot: the pool's `Loader` over the store's folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from serve.engine.engine import Engine, Slot
from serve.engine.text import Vocabularies, Vocabulary
from serve.errors import ModelNotFound, ModelUnusable, StoreUnavailable
from serve.pool.loader import Prepared
from serve.shape import GPT2Shape, canonical_name
from serve.store.defaults import GenerationDefaults, generation_defaults
from serve.store.revisions import Store
from serve.store.validate import check_folder
from serve.types import Tier

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Facts:
    """What must be known of a model to check a request, and needs none of its weights."""

    folder: Path
    shape: GPT2Shape
    vocabulary: Vocabulary
    defaults: GenerationDefaults


class EngineLoader:
    """Loads `model_id@revision` from `store` into `engine`. Revisions are immutable, so facts are kept."""

    def __init__(self, store: Store, engine: Engine) -> None:
        self._store = store
        self._engine = engine
        self._vocabularies = Vocabularies()
        self.facts = lru_cache(maxsize=4096)(self._read_facts)

    def _read_facts(self, key: str) -> Facts:
        """Raises: ModelNotFound, ModelUnusable."""
        folder = self._store.resolve(key).path
        return Facts(folder, check_folder(folder), self._vocabularies.load(folder), generation_defaults(folder))

    def prepare(self, key: str) -> Prepared[Facts]:
        facts = self.facts(key)
        weights = facts.folder / WEIGHTS
        try:
            tier: Tier = "host" if _is_cached(weights) else "disk"
            names = _read_tensors(weights)
        except FileNotFoundError as exc:
            raise ModelNotFound(f"Model {key!r} was deleted.", param="model") from exc
        num_bytes = self._engine.model_bytes(facts.shape, tied="lm_head.weight" not in names)
        return Prepared(num_bytes, tier, facts)

    def load(self, prepared: Prepared[Facts]) -> Slot:
        facts = prepared.payload
        return self._engine.load(facts.shape, _read_tensors(facts.folder / WEIGHTS))

    def unload(self, slot: Slot) -> None:
        self._engine.unload(slot)


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The file's tensors under canonical names, mapped rather than read."""
    try:
        tensors = load_file(path)
    except SafetensorError as exc:
        raise ModelUnusable("The weights file of the model is damaged.") from exc
    except OSError as exc:
        if isinstance(exc, FileNotFoundError):
            raise
        raise StoreUnavailable("The weights of the model cannot be read now.", retry_after_s=5) from exc
    return {known: tensor for name, tensor in tensors.items() if (known := canonical_name(name))}


def _is_cached(path: Path, samples: int = 8) -> bool:
    """Whether the file seems to be in the page cache: reads that must not wait for the disk all succeed."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            for i in range(samples):
                os.preadv(file.fileno(), [bytearray(1)], size * i // samples, os.RWF_NOWAIT)
        except (BlockingIOError, OSError, AttributeError):  # not cached, or the file system cannot tell
            return False
    return True
