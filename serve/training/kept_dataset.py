"""A data set as the lines in which it is kept, and back: the same texts, in the same order, on the same sides.

    {"text": "...", "split": "train", "handle": "ada"}      and  "repeat": true  of a text that fills up a shorter side
    {"text": "...", "split": "held_out", "handle": "ada"}   `handle` is null where the texts are nobody's in particular

Knows no files: `serve.store.datasets` has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from serve.store.datasets import damaged
from serve.training.dataset import Dataset


def to_lines(dataset: Dataset) -> Iterator[str]:
    """All of `dataset`, a text a line, in ASCII."""
    counts = dataset.counts
    longest = max((count["train"] for count in counts.values()), default=0)
    owners = [(handle, i) for handle, count in counts.items() if count["train"] for i in range(longest)]
    for (handle, i), text in _pair(owners, dataset.train):
        repeat = {"repeat": True} if handle is not None and i >= counts[handle]["train"] else {}
        yield json.dumps({"text": text, "split": "train", "handle": handle, **repeat})
    owners = [(handle, i) for handle, count in counts.items() for i in range(count["held_out"])]
    for (handle, _), text in _pair(owners, dataset.held_out):
        yield json.dumps({"text": text, "split": "held_out", "handle": handle})


def from_lines(lines: Iterable[str]) -> Dataset:
    """What `to_lines` was given. Raises: NotFound where the lines are damaged."""
    texts: dict[str, list[str]] = {"train": [], "held_out": []}
    counts: dict[str, dict[str, int]] = {}
    for line in lines:
        text, split, handle, is_repeat = _parse(line)
        texts[split].append(text)
        if handle is not None and not is_repeat:
            count = counts.setdefault(handle, {"kept": 0, "train": 0, "held_out": 0})
            count["kept"] += 1
            count[split] += 1
    return Dataset(train=tuple(texts["train"]), held_out=tuple(texts["held_out"]), counts=counts)


def _pair(owners: list[tuple[str, int]], texts: tuple[str, ...]) -> Iterator[tuple[tuple[str | None, int], str]]:
    """Whose each text is, where the counts account for all of them."""
    known: Iterable[tuple[str | None, int]] = owners if len(owners) == len(texts) else [(None, 0)] * len(texts)
    return zip(known, texts, strict=True)


def _parse(line: str) -> tuple[str, str, str | None, bool]:
    try:
        row: Mapping[str, Any] = json.loads(line)
        text, split, handle = row["text"], row["split"], row["handle"]
    except (ValueError, KeyError, TypeError) as exc:
        raise damaged() from exc
    if not isinstance(text, str) or split not in ("train", "held_out") or not isinstance(handle, str | None):
        raise damaged()
    return text, split, handle, row.get("repeat") is True
