"""What a weight format costs in quality: perplexity and agreement on people's posts, against float32.

    python -m loadtest.engine.precision [--model FOLDER] [ARCHIVE ...]

Every post is read by the engine itself, format by format; the model is the one that comes with the program
unless a folder is named. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from serve.engine.backend import WEIGHT_FORMATS, Span
from serve.engine.selection import build_backend, slot_bytes
from serve.shape import GPT2Shape, canonical_name
from serve.store.opening import EMBEDDED
from serve.training.archives import read_archive
from serve.training.clean import clean

ROOT = Path(__file__).resolve().parents[1]


def read_logits(folder: Path, texts: Sequence[Sequence[int]], weights: str) -> list[Tensor]:
    """For each text of ids, ``(len, V)`` float32: what the engine expects after each of its tokens."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {canonical_name(name) or "": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    shape, tied = GPT2Shape.from_config(config), "lm_head.weight" not in tensors
    backend = build_backend(shape, 1, 1, weights, torch.device("cpu"), tied=tied)
    slot = backend.acquire()
    backend.write(slot, tensors)
    return [backend.forward([Span(slot, 0, 0, text, wants_all_logits=True)]).clone() for text in texts]


def compare(folder: Path, texts: Sequence[Sequence[int]]) -> dict[str, dict[str, float]]:
    """By format: perplexity of the texts, and how often the likeliest token is float32's."""
    found: dict[str, dict[str, float]] = {}
    reference: list[Tensor] = []
    config = json.loads((folder / "config.json").read_text())
    for weights in WEIGHT_FORMATS:
        logits = read_logits(folder, texts, weights)
        best = [each.argmax(-1) for each in logits]
        reference = reference or best
        nats = [
            torch.nn.functional.cross_entropy(each[:-1], torch.tensor(text[1:]), reduction="sum")
            for each, text in zip(logits, texts, strict=True)
        ]
        count = sum(len(text) - 1 for text in texts)
        same = sum(int((one == other).sum()) for one, other in zip(best, reference, strict=True))
        found[weights] = {
            "perplexity": math.exp(float(sum(nats)) / count),
            "agreement": same / sum(map(len, best)),
            "slot_mb": slot_bytes(GPT2Shape.from_config(config), weights, torch.device("cpu"), tied=True) / 1e6,
        }
    return found


def texts_of(folder: Path, archives: Sequence[Path]) -> list[list[int]]:
    """The archives' cleaned posts as ids, each between two ends of text, within the model's context."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = int(tokenizer.token_to_id("<|endoftext|>") or 0)
    room = json.loads((folder / "config.json").read_text())["n_positions"]
    posts = [text for archive in archives for text in clean(read_archive(archive)).kept]
    return [[end, *tokenizer.encode(post).ids, end][:room] for post in posts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=EMBEDDED["fledgling"], help="a Hugging Face folder")
    parser.add_argument("archives", type=Path, nargs="*", help="archives of posts; the demo's unless given")
    arguments = parser.parse_args()
    archives = arguments.archives or sorted((ROOT / "deployments" / "archives").glob("*.zip"))
    texts = texts_of(arguments.model, archives)
    found = compare(arguments.model, texts)
    table = Table("weights", "MB a model", "perplexity", "against float32", "same likeliest token")
    for weights, figures in found.items():
        cost = figures["perplexity"] / found["float32"]["perplexity"] - 1
        table.add_row(weights, f"{figures['slot_mb']:.1f}", f"{figures['perplexity']:.3f}", f"{cost:+.3%}",
                      f"{figures['agreement']:.2%}")  # fmt: skip
    Console().print(f"{len(texts)} posts, {sum(map(len, texts))} tokens", table)
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
