"""The text and the picture that somebody has chosen for a revision, kept beside it: a revision itself never changes.

    <home of the model>/.previews/<revision>/preview.json    the text, and the name of the picture that goes with it
    <home of the model>/.previews/<revision>/<hash>.png

They go with the revision. Whoever writes holds the store's lock. What is damaged counts as never chosen.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from serve.errors import ModelUnusable
from serve.store.disk import replace_file, sync
from serve.store.validate import read_json

PREVIEWS = ".previews"  # no revision can be called that: none begins with a dot
_SAID = "preview.json"


class Preview(NamedTuple):
    """`picture` is a PNG."""

    text: str
    picture: Path


def write_preview(folder: Path, text: str, picture: bytes) -> None:
    """Of the revision in `folder`: text and picture change in one step, and are on the disk itself."""
    place = _place(folder)
    place.mkdir(parents=True, exist_ok=True)
    name = f"{hashlib.sha256(picture).hexdigest()[:32]}.png"
    replace_file(place / name, picture)
    replace_file(place / _SAID, json.dumps({"text": text, "picture": name}).encode())
    for old in place.iterdir():  # the picture before, and what a writer has left that was killed
        if old.name not in (name, _SAID):
            old.unlink()
    for changed in (place, place.parent, folder.parent):
        sync(changed)


def read_preview(folder: Path) -> Preview | None:
    """Of the revision in `folder`; None where nothing was chosen."""
    place = _place(folder)
    try:
        said = read_json(place / _SAID)
    except (ModelUnusable, OSError):
        return None
    text, name = said.get("text"), said.get("picture")
    if not isinstance(text, str) or not isinstance(name, str):
        return None
    picture = place / Path(name).name
    return Preview(text, picture) if picture.is_file() and not picture.is_symlink() else None


def drop_preview(folder: Path) -> None:
    """The revision that was in `folder` is gone."""
    place = _place(folder)
    shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):  # those of other revisions are there, or none ever was
        place.parent.rmdir()


def _place(folder: Path) -> Path:
    return folder.parent / PREVIEWS / folder.name
