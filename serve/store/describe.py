"""What a model folder says about itself: config.json, the provenance we wrote beside it, and its card.

Reads small files only, and never fails for what is in them: a damaged model is still listed, so that it can be deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.errors import ModelUnusable
from serve.shape import GPT2Shape
from serve.store.validate import read_json, read_shape
from serve.types import ModelId, ModelInfo

PROVENANCE = "rookery.json"
MAX_CARD_BYTES = 1_000_000

_COUNTS = ("downloaded", "retweets", "short", "kept")
_DATES = range(253_370_764_800)  # Unix seconds before the year 9999: no later one can be shown as a date


def describe(model_id: str, revision: str, folder: Path) -> ModelInfo:
    """The catalogue's entry for one folder."""
    provenance = _read(folder / PROVENANCE)
    shape = _shape(folder)
    base_model = provenance.get("base_model")
    return ModelInfo(
        model_id=model_id,
        revision=revision,
        created_at=_created_at(folder, provenance),
        num_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        owned_by=ModelId.parse(model_id).namespace or "rookery",
        base_model=_text(base_model) if isinstance(base_model, str) else None,
        handles=_strings(provenance.get("handles")),
        num_parameters=shape.num_parameters if shape else None,
        context_length=shape.n_positions if shape else None,
        counts=_counts(provenance.get("counts")),
        tags=_strings(provenance.get("tags")),
    )


def read_card(folder: Path) -> str:
    """The folder's README.md, cut at a million bytes; "" when there is none."""
    try:
        with (folder / "README.md").open("rb") as file:
            return file.read(MAX_CARD_BYTES).decode("utf-8", "replace")
    except (FileNotFoundError, IsADirectoryError):
        return ""


def _shape(folder: Path) -> GPT2Shape | None:
    try:
        return read_shape(folder)
    except (ModelUnusable, OSError):
        return None


def _created_at(folder: Path, provenance: Mapping[str, Any]) -> int:
    said, changed = provenance.get("created_at"), int((folder / "config.json").stat().st_mtime)
    return next((time for time in (said, changed) if type(time) is int and time in _DATES), 0)


def _counts(value: Any) -> dict[str, dict[str, int]]:
    if not isinstance(value, dict):
        return {}
    return {
        _text(handle): {key: counts[key] for key in _COUNTS if type(counts.get(key)) is int}
        for handle, counts in value.items()
        if isinstance(counts, dict)
    }


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(_text(item) for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _text(said: str) -> str:
    """JSON can spell halves of characters, which no file and no terminal takes."""
    return said.encode("utf-8", "replace").decode()


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (ModelUnusable, OSError):
        return {}
