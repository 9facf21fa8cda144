"""Data folders with any number of registered models, as the service keeps them: for benchmarks of the catalogue.

Every model is published: its home holds one revision and the link `main`. All share the same weights, by hard links:
what grows is the catalogue, not the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from loadtest.models import write_random_gpt2

OWNER = "huggingtweets"
_SYLLABLES = ("ba", "ko", "mi", "ru", "sen", "tal", "vo", "xi", "lu", "dra")
_PRIME = 999_983  # of numbers below it no two have the same digits
_MAX_LINKS = 50_000  # of one file: ext4 takes 65,000
_SHAPE = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 128}


def model_name(number: int) -> str:
    """Of the model of this number, the same in every folder: handles of all first letters, with digits of their own."""
    digits = hashlib.sha256(b"%d" % number).digest()[:3]
    return "".join(_SYLLABLES[digit % len(_SYLLABLES)] for digit in digits) + f"_{number * 40_503 % _PRIME:06}"


def model_ids(num_models: int) -> Iterator[str]:
    """Of a folder of so many models; a larger one has them too."""
    return (f"{OWNER}/{model_name(number)}" for number in range(num_models))


def build_folder(data: Path, num_models: int, seed: int = 0) -> None:
    """Makes `data` and the models in it, some 5,000 a second."""
    home_of_all = data / "models" / OWNER
    home_of_all.mkdir(parents=True)
    original = data / "original"
    write_random_gpt2(original, seed=seed, shape=_SHAPE)
    (original / "README.md").write_text("---\ntags:\n- huggingtweets\n---\n# A bot that nobody knows\n")
    names = sorted(path.name for path in original.iterdir())
    for number in range(num_models):
        if number and number % _MAX_LINKS == 0:
            newer = data / f"original{number}"
            shutil.copytree(original, newer)
            original = newer
        _add_model(home_of_all / model_name(number), original, names, number)


def _add_model(home: Path, original: Path, names: list[str], number: int) -> None:
    revision = hashlib.sha1(home.name.encode(), usedforsecurity=False).hexdigest()
    folder = f"{home}/{revision}"
    os.makedirs(folder)
    for name in names:
        os.link(original / name, f"{folder}/{name}")
    facts = {
        "created_at": 1_600_000_000 + number,
        "handles": [home.name],
        "tags": ["huggingtweets", f"t{number % 997}"],
    }
    with open(f"{folder}/rookery.json", "w", encoding="utf-8") as file:
        json.dump(facts, file)
    os.symlink(revision, home / "main")
