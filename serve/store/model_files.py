"""Which files a model folder has: what is taken from others' folders, what ours add, and the hashes of them all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from serve.errors import ModelUnusable
from serve.store.convert import convert_weights, shard_names
from serve.store.datasets import DATASETS
from serve.store.disk import read_in_order, sync
from serve.store.marks import MARKS
from serve.store.validate import WEIGHTS

REVISION_LENGTH = 40  # hex digits, as a commit's
PROVENANCE = "rookery.json"
RUNS = PREPROCESS_RUN, TRAIN_RUN = "runs/preprocess.json", "runs/train.json"
PICTURES = ("predictions.png", "thumbnail.png")  # a model's preview picture, the better first
AVATARS = tuple(f"avatars/{number}.webp" for number in range(3))  # the faces of its first handles
LOOKS = (*PICTURES, *AVATARS)  # a model is served without them

# All that a text-generation model needs besides its weights. Nothing else is taken from a stranger's folder.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "README.md",
)
# What our own training writes beside them.
OUR_FILES = (PROVENANCE, *RUNS, *LOOKS)
# In order of preference; all but the first are converted into it.
WEIGHT_FILES = (WEIGHTS, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def model_files(folder: Path) -> Iterator[Path]:
    """Every file of a model; the data sets that are kept privately beside it, and marks, are not the model's."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return (path for path in files if path.parent.name != DATASETS and path.name not in MARKS)


def copy_model(source: Path, target: Path) -> None:
    """All that is served of a folder, its weights as one model.safetensors. Raises: ModelUnusable."""
    weights = next((name for name in WEIGHT_FILES if (source / name).is_file()), None)
    if weights is None:
        raise ModelUnusable(f"The folder has no weights: none of {', '.join(WEIGHT_FILES)}.")
    shards = shard_names(source / weights) if weights.endswith(".index.json") else []
    for name in [*MODEL_FILES, *OUR_FILES, weights, *shards]:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    finish_weights(target)


def finish_weights(folder: Path) -> None:
    """Leaves one model.safetensors in a staged folder, made from whatever weights are there. Raises: ModelUnusable."""
    source = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if source is None or source.name == WEIGHTS:
        return
    shards = [folder / name for name in shard_names(source)] if source.suffix == ".json" else []
    convert_weights(source, folder / WEIGHTS)
    for path in [source, *shards]:
        path.unlink()


def seal(folder: Path) -> None:
    """Every byte on the disk, every file read-only: a mapped file that changes would kill who reads it."""
    for path in folder.rglob("*"):
        if path.parent.name != DATASETS and path.name != DATASETS:
            path.chmod(0o444 if path.is_file() else 0o755)
        sync(path)
    read_in_order(folder / WEIGHTS)
    folder.chmod(0o755)
    sync(folder)


def content_hash(folder: Path, known: Mapping[str, str] | None = None, without: Collection[str] = ()) -> str:
    """sha256 over the sorted (name, sha256) of a model's files, shortened to the length of a commit's.

    `known`: the sha256 of files that need not be read; `without`: files that do not count.
    """
    total = hashlib.sha256()
    for path in sorted(model_files(folder)):
        name = path.relative_to(folder).as_posix()
        if name in without:
            continue
        digest = (known or {}).get(name) or _sha256(path)
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()[:REVISION_LENGTH]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(folder: Path) -> str:
    """Of a folder that somebody else may replace: names, sizes and times, so that new files are a new revision."""
    total = hashlib.sha256()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_file() and entry.name not in MARKS:
                status = entry.stat()
                total.update(f"{entry.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return total.hexdigest()[:REVISION_LENGTH]
