"""What a model folder says about itself: config.json, the provenance we wrote beside it, and its card.

Reads small files only, and never fails for what is in them: a damaged model is still listed, so that it can be deleted.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from serve.errors import ModelUnusable
from serve.shape import GPT2Shape
from serve.store.datasets import DATASETS
from serve.store.disk import write_json
from serve.store.marks import MARKS
from serve.store.model_files import AVATARS, PICTURES, PROVENANCE
from serve.store.previews import read_preview
from serve.store.texts import is_visible, printable
from serve.store.validate import read_json, read_shape
from serve.types import MAX_SAMPLE_CHARS, ModelId, ModelInfo, RevisionInfo, Visibility

MAX_CARD_BYTES = 1_000_000
BOT_TAG = "huggingtweets"  # by which the Hub finds bots of this kind

_MAX_NAME_CHARS = 120
_MAX_CHARS = 256  # of any other text: an id of a model has at most 193
_MAX_HANDLES = 16  # and tags; ours have three
_NUMBERS = range(2**53)  # of posts and steps: what every reader of JSON takes
_COUNTS = ("downloaded", "retweets", "short", "kept")
_DATES = range(253_370_764_800)  # Unix seconds before the year 9999: no later one can be shown as a date


def describe(
    model_id: str,
    revision: str,
    folder: Path,
    *,
    visibility: Visibility = Visibility.PUBLIC,
    owner: str = "",
    is_embedded: bool = False,
) -> ModelInfo:
    """The catalogue's entry for one folder."""
    provenance = _read(folder / PROVENANCE)
    shape = _shape(folder)
    base_model, handles = provenance.get("base_model"), _strings(provenance.get("handles"))
    return ModelInfo(
        model_id=model_id,
        revision=revision,
        created_at=_created_at(folder, provenance),
        num_bytes=size_of(folder),
        owned_by=ModelId.parse(model_id).namespace or "rookery",
        base_model=_text(base_model) if isinstance(base_model, str) else None,
        handles=handles,
        num_parameters=shape.num_parameters if shape else None,
        context_length=shape.n_positions if shape else None,
        counts=_counts(provenance.get("counts")),
        names=_names(provenance.get("display_names"), handles),
        sample=_sample(folder, provenance),
        num_avatars=next((number for number in range(len(AVATARS)) if not find_avatar(folder, number)), len(AVATARS)),
        tags=_tags(provenance),
        visibility=visibility,
        owner=owner,
        from_hub=_is_from_hub(provenance),
        is_embedded=is_embedded,
    )


def describe_revision(model_id: str, revision: str, folder: Path, *, is_main: bool) -> RevisionInfo:
    """One line of a model's history."""
    provenance = _read(folder / PROVENANCE)
    job_id, losses = provenance.get("job_id"), provenance.get("losses")
    return RevisionInfo(
        model_id=model_id,
        revision=revision,
        created_at=_created_at(folder, provenance),
        num_bytes=size_of(folder),
        is_main=is_main,
        job_id=_text(job_id) if isinstance(job_id, str) else None,
        step=_step(provenance),
        losses=_losses(losses) if isinstance(losses, dict) else {},
    )


def provenance_of(folder: Path) -> dict[str, Any]:
    """What was written beside the files; nothing where that cannot be read."""
    return _read(folder / PROVENANCE)


def is_from_hub(folder: Path) -> bool:
    """Whether the folder was fetched from a Hub, and can be again."""
    return _is_from_hub(_read(folder / PROVENANCE))


def size_of(folder: Path) -> int:
    """Bytes of all files of a model; the data sets that are kept privately beside it are not the model's."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += size_of(folder / entry.name) if entry.name != DATASETS else 0
            elif entry.is_file() and entry.name not in MARKS:
                total += entry.stat().st_size
    return total


def is_checkpoint(folder: Path) -> bool:
    """Whether the model comes from the middle of a training, which goes on or has gone on."""
    return _step(_read(folder / PROVENANCE)) is not None


def job_of(folder: Path) -> str | None:
    """The id of the job that made the model."""
    job_id = _read(folder / PROVENANCE).get("job_id")
    return job_id if isinstance(job_id, str) else None


def drop_step(folder: Path) -> None:
    """What is published as a whole model is no checkpoint, whatever the folder that it was copied from was."""
    provenance = _read(folder / PROVENANCE)
    if provenance.pop("checkpoint_step", None) is not None:
        write_json(folder / PROVENANCE, provenance)


def find_picture(folder: Path) -> Path | None:
    """The model's preview picture, the chosen one first. A link is none: it might show a file from elsewhere."""
    if chosen := read_preview(folder):
        return chosen.picture
    paths = (folder / name for name in PICTURES)
    return next((path for path in paths if path.is_file() and not path.is_symlink()), None)


def find_avatar(folder: Path, number: int) -> Path | None:
    """The face of the model's handle `number`, from 0. As above, no link."""
    if number not in range(len(AVATARS)):
        return None
    path = folder / AVATARS[number]
    return path if path.is_file() and not path.is_symlink() and not path.parent.is_symlink() else None


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


def _is_from_hub(provenance: Mapping[str, Any]) -> bool:
    return provenance.get("source") == "hub"


def _tags(provenance: Mapping[str, Any]) -> tuple[str, ...]:
    """What it was published with; the bots that are made here all carry one, as their cards say."""
    said = _strings(provenance.get("tags"))
    return said or ((BOT_TAG,) if provenance.get("handles") else ())


def _step(provenance: Mapping[str, Any]) -> int | None:
    step = provenance.get("checkpoint_step")
    return step if type(step) is int and step in _NUMBERS else None


def _losses(value: Mapping[str, Any]) -> dict[str, float]:
    said = islice(value.items(), _MAX_HANDLES)
    return {_text(name): loss for name, loss in said if type(loss) in (int, float) and abs(loss) < 1e9}


def _counts(value: Any) -> dict[str, dict[str, int]]:
    if not isinstance(value, dict):
        return {}
    return {
        _text(handle): {key: of[key] for key in _COUNTS if type(of.get(key)) is int and of[key] in _NUMBERS}
        for handle, of in islice(value.items(), _MAX_HANDLES)
        if isinstance(of, dict)
    }


def _names(value: Any, handles: Collection[str]) -> dict[str, str]:
    said = value if isinstance(value, dict) else {}
    names = {one: printable(said[one])[:_MAX_NAME_CHARS] for one in handles if isinstance(said.get(one), str)}
    return {handle: name for handle, name in names.items() if is_visible(name)}


def _sample(folder: Path, provenance: Mapping[str, Any]) -> str:
    chosen = read_preview(folder)
    said = chosen.text if chosen else provenance.get("sample")
    return printable(said)[:MAX_SAMPLE_CHARS] if isinstance(said, str) else ""


def _strings(value: Any) -> tuple[str, ...]:
    said = value[:_MAX_HANDLES] if isinstance(value, list) else []
    return tuple(_text(item) for item in said if isinstance(item, str))


def _text(said: str) -> str:
    """JSON can spell halves of characters, which no file and no terminal takes; and texts of any length."""
    return said[:_MAX_CHARS].encode("utf-8", "replace").decode()


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (ModelUnusable, OSError):
        return {}
