"""How a stored revision gets into an engine's slot: the pool's `Loader` over the store's folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from serve.engine.engine import Engine, Layout, Slot
from serve.engine.text import Vocabularies, Vocabulary
from serve.errors import ModelNotFound, ModelUnusable, StoreUnavailable
from serve.pool.loader import Prepared
from serve.shape import GPT2Shape, canonical_name
from serve.store.defaults import GenerationDefaults, generation_defaults
from serve.store.revisions import Store
from serve.store.safetensors_file import read_header
from serve.store.validate import check_folder, read_json
from serve.types import Tier

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Facts:
    """What must be known of a model to check a request, and needs none of its weights."""

    folder: Path
    layout: Layout
    vocabulary: Vocabulary
    defaults: GenerationDefaults

    @property
    def shape(self) -> GPT2Shape:
        return self.layout.shape


class EngineLoader:
    """Loads `model_id@revision` from `store` into `engine`. Revisions are immutable, so facts are kept."""

    def __init__(self, store: Store, engine: Engine) -> None:
        self._store = store
        self._engine = engine
        self._vocabularies = Vocabularies()
        self.facts = lru_cache(maxsize=1024)(self._read_facts)

    def _read_facts(self, key: str) -> Facts:
        """Raises: ModelNotFound, ModelUnusable."""
        folder = self._store.resolve(key).path
        shape = check_folder(folder)
        # As transformers has it: where the config ties the head, one that lies in the file all the same is ignored.
        tied = read_json(folder / "config.json").get("tie_word_embeddings", True) is not False
        with _translated(key):
            has_head = any(canonical_name(entry.name) == "lm_head.weight" for entry in read_header(folder / WEIGHTS))
        layout = Layout(shape, tied=tied or not has_head)
        return Facts(folder, layout, self._vocabularies.load(folder), generation_defaults(folder))

    def prepare(self, key: str) -> Prepared[Facts]:
        facts = self.facts(key)
        with _translated(key):
            tier: Tier = "host" if _is_cached(facts.folder / WEIGHTS) else "disk"
        return Prepared(self._engine.model_bytes(facts.layout), tier, facts)

    def load(self, prepared: Prepared[Facts]) -> Slot:
        facts = prepared.payload
        with _translated(facts.folder.name):
            tensors = _read_tensors(facts.folder / WEIGHTS)
        _check_shapes(tensors, facts.layout)
        return self._engine.load(facts.layout, tensors)

    def unload(self, slot: Slot) -> None:
        self._engine.unload(slot)


@contextmanager
def _translated(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as exc:
        raise ModelNotFound(f"The model {name!r} was deleted.", param="model") from exc
    except SafetensorError as exc:
        raise ModelUnusable("The weights file of the model is damaged.") from exc
    except OSError as exc:
        raise StoreUnavailable("The weights of the model cannot be read now.", retry_after_s=5) from exc


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The file's tensors under canonical names.

    A published file is read-only and never changes, so it is mapped. One that somebody may yet overwrite is
    read: a file that shrinks under its map ends the process (SIGBUS).
    """
    may_change = path.stat().st_mode & 0o222
    tensors = load(path.read_bytes()) if may_change else load_file(path)
    return {known: tensor for name, tensor in tensors.items() if (known := canonical_name(name))}


def _check_shapes(tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """The folder may have been replaced since it was looked at. Raises: ModelUnusable."""
    for name, shape in layout.shape.tensor_shapes().items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape and not (name == "lm_head.weight" and layout.tied):
            raise ModelUnusable(f"Tensor {name!r} of the model has shape {found}, expected {shape}.")


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
