"""How a model asks to be sampled when a request says nothing: its generation_config.json, or what came before it.

Values that make no sense are left out one by one: a bad default must not make a good model unusable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from serve.errors import ModelUnusable
from serve.store.validate import read_json
from serve.types import SamplingOverrides

_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (1e-6, 1.0),
    "repetition_penalty": (1e-3, 100.0),
}
_COUNTS = ("top_k", "max_new_tokens", "min_new_tokens")
_MAX_LENGTH = 1_000_000
_SAMPLING_KEYS = {*_RANGES, *_COUNTS, "do_sample", "max_length", "min_length", "stop_strings"}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """`max_length` and `min_length` are transformers' own: tokens in all, the prompt's included."""

    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    max_length: int | None = None
    min_length: int = 0
    prefix: str = ""  # put before each prompt by transformers' pipeline; "<|endoftext|>" for the first huggingtweets


def generation_defaults(folder: Path) -> GenerationDefaults:
    """The first that says anything of sampling: generation_config.json, then config.json's task_specific_params."""
    config = _read(folder / "config.json")
    tasks = config.get("task_specific_params")
    task = tasks.get("text-generation") if isinstance(tasks, dict) else None
    task = task if isinstance(task, dict) else {}
    generation = _read(folder / "generation_config.json")
    said = generation if _SAMPLING_KEYS & generation.keys() else task
    prefix = task.get("prefix")
    return GenerationDefaults(
        sampling=_sampling(said),
        max_length=_count(said, "max_length") or None,
        min_length=_count(said, "min_length") or 0,
        prefix=prefix if isinstance(prefix, str) and len(prefix) <= 1000 else "",
    )


def _sampling(said: Mapping[str, Any]) -> SamplingOverrides:
    sampling: dict[str, Any] = {}
    for key, (low, high) in _RANGES.items():
        value = said.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
            sampling[key] = float(value)
    sampling |= {key: count for key in _COUNTS if (count := _count(said, key)) is not None}
    if not sampling.get("max_new_tokens", 1):
        del sampling["max_new_tokens"]
    stop = said.get("stop_strings")
    stop = [stop] if isinstance(stop, str) else stop
    if isinstance(stop, list) and len(stop) <= 16 and all(isinstance(t, str) and 0 < len(t) <= 64 for t in stop):
        sampling["stop"] = tuple(stop)
    if said.get("do_sample") is False:
        sampling["temperature"] = 0.0
    return cast(SamplingOverrides, sampling)


def _count(said: Mapping[str, Any], key: str) -> int | None:
    value = said.get(key)
    return value if type(value) is int and 0 <= value <= _MAX_LENGTH else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ModelUnusable:
        return {}
