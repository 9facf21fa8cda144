"""How a stored revision gets into an engine's slot: the pool's `Loader` over the store's folders.

What is known of a revision is read and checked once. A load then opens one file and copies its bytes: the revision's
own, or this machine's copy of it, where copies are kept.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from serve.engine.engine import Engine, Layout, Slot
from serve.engine.memory import is_out_of_memory
from serve.engine.text import Vocabularies, Vocabulary
from serve.errors import ModelNotFound, ModelUnusable, OutOfMemory, StoreUnavailable
from serve.pool.loader import Prepared
from serve.shape import GPT2Shape, canonical_name
from serve.store.defaults import GenerationDefaults, generation_defaults
from serve.store.disk import is_shared
from serve.store.local_copies import LocalCopies
from serve.store.revisions import Store
from serve.store.safetensors_file import TensorEntry, read_header
from serve.store.validate import check_folder
from serve.types import Tier

WEIGHTS = "model.safetensors"
MAX_FACTS = 1024  # revisions of which facts are kept
# Of threads that copy weights: behind the engine's, from which they take cores, but before training's 10. Loads without
# a pause make a warm stream's tokens 1.6 times as slow at 0, 1.3 times at 8, and are as fast (2 cores).
LOAD_NICENESS = 8
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A checked safetensors file: where each tensor lies, under canonical names, and how the file looked then."""

    path: Path
    entries: tuple[TensorEntry, ...]
    stamp: tuple[int, int, int]

    @classmethod
    def open(cls, path: Path) -> WeightsFile:
        """Raises: ModelUnusable."""
        stamp = _stamp(path.stat())
        entries = [
            replace(entry, name=name) for entry in read_header(path) if (name := canonical_name(entry.name)) is not None
        ]
        return cls(path, _shared(tuple(entries)), stamp)

    @property
    def has_head(self) -> bool:
        return any(entry.name == "lm_head.weight" for entry in self.entries)

    def read(self) -> Mapping[str, Tensor]:
        """The tensors, not yet in memory where the file is mapped. Raises: StoreUnavailable when the file has changed.

        A published file is read-only and never changes, so it is mapped. One that somebody may yet overwrite is
        read, and one that another machine may remove: a file that shrinks or goes under its map ends the process
        (SIGBUS).
        """
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & 0o222 or is_shared(status.st_dev):
                data = torch.empty(status.st_size, dtype=torch.uint8)
                file.readinto(data.numpy().data)
                status = os.fstat(file.fileno())
            else:
                # ACCESS_COPY: torch wants memory that could be written, though nobody does.
                data = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        if _stamp(status) != self.stamp:
            raise StoreUnavailable("The files of the model have just been replaced; try again.", retry_after_s=1)
        return {entry.name: _tensor(data, entry) for entry in self.entries}


@dataclass(frozen=True, slots=True)
class Facts:
    """What must be known of a model to check a request, and needs none of its weights."""

    weights: WeightsFile
    layout: Layout
    vocabulary: Vocabulary
    defaults: GenerationDefaults

    @property
    def shape(self) -> GPT2Shape:
        return self.layout.shape


class EngineLoader:
    """Loads `model_id@revision` from `store` into `engine`. Revisions are immutable, so facts are kept.

    With `copies` the weights are first brought to a disk of this machine's own, and read from there.
    """

    def __init__(self, store: Store, engine: Engine, copies: LocalCopies | None = None) -> None:
        self._store = store
        self._engine = engine
        self._copies = copies
        self._vocabularies = Vocabularies()
        self._facts: OrderedDict[str, Facts] = OrderedDict()  # the least recently wanted first
        self._facts_lock = threading.Lock()

    def known(self, key: str) -> Facts | None:
        """The facts, if they were read before. Waits for no disk."""
        with self._facts_lock:
            if key in self._facts:
                self._facts.move_to_end(key)
            return self._facts.get(key)

    def facts(self, key: str) -> Facts:
        """Raises: ModelNotFound, ModelUnusable, StoreUnavailable."""
        if (facts := self.known(key)) is None:
            facts = self._read_facts(key)
            with self._facts_lock:
                self._facts[key] = facts
                if len(self._facts) > MAX_FACTS:
                    self._facts.popitem(last=False)
        return facts

    def forget(self, match: Callable[[str], bool]) -> None:
        """Of matching keys they are read anew."""
        with self._facts_lock:
            for key in [key for key in self._facts if match(key)]:
                del self._facts[key]

    def _read_facts(self, key: str) -> Facts:
        folder = self._store.resolve(key).path
        shape = check_folder(folder)
        with _translated(key):
            weights = WeightsFile.open(folder / WEIGHTS)
        # As transformers 5 has it: a head that lies in the file is used, though the config may tie it.
        layout = Layout(shape, tied=not weights.has_head)
        vocabulary = self._vocabularies.load(folder)
        # A tokenizer numbers its tokens anew where its files contradict each other.
        if vocabulary.eos_id >= shape.vocab_size:
            end, size = vocabulary.eos_id, shape.vocab_size
            raise ModelUnusable(f"The tokenizer's end of text is token {end}, but the model knows {size} tokens.")
        return Facts(weights, layout, vocabulary, generation_defaults(folder))

    def prepare(self, key: str) -> Prepared[Facts]:
        facts = self.facts(key)
        with _translated(key):
            if _stamp(facts.weights.path.stat()) != facts.weights.stamp:  # it made room, and was fetched again
                with self._facts_lock:
                    self._facts.pop(key, None)
                with suppress(ModelNotFound):  # replaced by hand meanwhile: loading will say so
                    facts = self.facts(key)
            weights, tier = self._bring_near(facts.weights)
        return Prepared(self._engine.model_bytes(facts.layout), tier, replace(facts, weights=weights))

    def _bring_near(self, weights: WeightsFile) -> tuple[WeightsFile, Tier]:
        """The file to read, and where its bytes were when they were asked for: "disk", too, is a shared folder's."""
        copy = self._copies.find(weights.path) if self._copies else None
        tier: Tier = "host" if _is_cached(copy or weights.path) else "disk"
        if copy is None and self._copies:
            copy = self._copies.make(weights.path)
        return weights if copy is None else replace(weights, path=copy, stamp=_stamp(copy.stat())), tier

    def load(self, prepared: Prepared[Facts]) -> Slot:
        # Helpers that the copy starts inherit it. Where nothing is being generated, nobody is there to give way to.
        thread = threading.get_native_id()
        if os.getpriority(os.PRIO_PROCESS, thread) < LOAD_NICENESS:
            os.setpriority(os.PRIO_PROCESS, thread, LOAD_NICENESS)
        facts = prepared.payload
        with _translated(facts.weights.path.parent.name):
            return self._engine.load(facts.layout, facts.weights.read())

    def unload(self, slot: Slot) -> None:
        self._engine.unload(slot)


@contextmanager
def _translated(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as exc:
        if is_out_of_memory(exc):
            raise OutOfMemory("There is no memory for the model now; try again.", retry_after_s=5) from exc
        if not isinstance(exc, OSError):
            raise
        if exc.errno in (errno.ENOENT, errno.ESTALE):  # the latter: by another machine
            raise ModelNotFound(f"The model {name!r} was deleted.", param="model") from exc
        raise StoreUnavailable("The weights of the model cannot be read now.", retry_after_s=5) from exc


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _shared(entries: tuple[TensorEntry, ...]) -> tuple[TensorEntry, ...]:
    """Equal tables as one: fine-tunes of one base, saved by one program, have the same."""
    return entries


def _tensor(data: Tensor, entry: TensorEntry) -> Tensor:
    dtype = _DTYPES[entry.dtype]
    raw = data[entry.start : entry.end]
    if entry.start % dtype.itemsize:  # the format allows it, though writers align
        raw = raw.clone()
    return raw.view(dtype).view(entry.shape)


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
