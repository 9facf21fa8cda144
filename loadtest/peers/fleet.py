"""The models of the comparison in the forms that servers want: made once and kept, then linked under many names.

Few different models serve many names: what a load costs does not depend on what the weights say, and all of them fit in
the page cache. Where a server maps files, two names of one file share memory, in its favour.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loadtest import models, tokenizer
from loadtest.models import NAMESPACE, write_published_gpt2
from loadtest.peers import gguf

NUM_DISTINCT = 8
_PIECE = 8 << 20


@dataclass(frozen=True, slots=True)
class Fleet:
    """Models of one shape, by the ids that requests name. `data` is a folder as `rookery up` wants it."""

    data: Path
    ids: tuple[str, ...]

    @property
    def models(self) -> Path:
        """Under which each id is the path of a Hugging Face folder."""
        return self.data / "models"

    def folder(self, model_id: str) -> Path:
        return self.models / model_id

    def gguf(self, model_id: str) -> Path:
        """The same model for llama.cpp, in bf16."""
        return self.data / "gguf" / f"{model_id.rpartition('/')[2]}.gguf"

    @property
    def model_bytes(self) -> int:
        """Of one model's weights."""
        return (self.folder(self.ids[0]) / "model.safetensors").stat().st_size

    def first(self, count: int) -> Fleet:
        return Fleet(self.data, self.ids[:count])


def written(cache: Path, *, shape: Mapping[str, int] | None = None, num_distinct: int = NUM_DISTINCT) -> Path:
    """A folder in `cache` with `num_distinct` models as Hugging Face folders and GGUF; made at the first call."""
    recipe = "".join(Path(source).read_text() for source in (models.__file__, gguf.__file__, tokenizer.__file__))
    key = hashlib.sha256(f"{recipe}{shape}{num_distinct}".encode()).hexdigest()[:12]
    kept = cache / f"fleet-{key}"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix="fleet-", dir=cache))
        for seed in range(num_distinct):
            folder = fresh / f"m{seed}"
            write_published_gpt2(folder, seed=seed, shape=shape)
            gguf.convert(folder, folder.with_suffix(".gguf"), "bf16")
        os.sync()  # what goes to disk later would take its part of the memory's bandwidth
        fresh.rename(kept)
    return kept


def linked(kept: Path, data: Path, count: int) -> Fleet:
    """`count` names for the models of `kept`, in turn, in the new folder `data`; none of it in another's way."""
    sources = sorted(kept.glob("m*.gguf"))
    (data / "gguf").mkdir(parents=True)
    for number in range(count):
        source = sources[number % len(sources)]
        os.link(source, data / "gguf" / f"m{number}.gguf")
        folder = data / "models" / NAMESPACE / f"m{number}"
        shutil.copytree(source.with_suffix(""), folder, copy_function=os.link)
    return Fleet(data, tuple(f"{NAMESPACE}/m{number}" for number in range(count)))


def cache_in_order(kept: Path) -> None:
    """Into the page cache, as published files lie there: in the large pieces of a read from the disk."""
    for path in sorted(kept.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(_PIECE):
                    pass
