"""Names to revisions: which folder a model id means, in any case, with an alias, a revision or how one begins.

Reads names and small files of the disk, and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from serve.errors import ModelNotFound
from serve.store.homes import Homes
from serve.store.model_files import content_hash, fingerprint
from serve.types import ModelId

MAIN = "main"
MIN_PREFIX = 7  # characters by which a revision may be called, if no other begins with them


@dataclass(frozen=True, slots=True)
class Revision:
    """One immutable version of one model. `model_id` is the id as it is spelled here."""

    model_id: str
    revision: str
    path: Path


class Lookup:
    """The revisions in `homes`, and the models in `embedded`, which come with the program."""

    def __init__(self, homes: Homes, embedded: Mapping[str, Path]) -> None:
        self._homes = homes
        self._embedded = {model_id.lower(): _Embedded(model_id, path) for model_id, path in embedded.items()}

    def is_embedded(self, wanted: ModelId) -> bool:
        """Whether any model of this name comes with the program."""
        return str(wanted).lower() in self._embedded

    def ids(self) -> set[str]:
        """Of all models, and of homes in which none lives."""
        return {embedded.model_id for embedded in self._embedded.values()} | self._homes.ids()

    def find(self, wanted: ModelId) -> Revision | None:
        """The model's own folder. Raises: ModelNotFound for a beginning that several revisions share."""
        if self.is_embedded(wanted):
            return self._find_embedded(wanted)
        home = self._homes.find(wanted)
        return None if home is None else self._find_in(home, wanted.revision or MAIN)

    def revisions(self, wanted: ModelId) -> list[Revision]:
        """All of a model, newest first: by when each was made, whatever `main` names now."""
        if self.is_embedded(wanted):
            found = self._find_embedded(wanted)
            return [found] if found else []
        home = self._homes.find(wanted)
        made_at: dict[Revision, int] = {}
        for one in self._revisions_in(home) if home else ():
            with suppress(FileNotFoundError):  # removed since
                made_at[one] = _made_at(one)
        return sorted(made_at, key=made_at.__getitem__, reverse=True)

    def _find_embedded(self, wanted: ModelId) -> Revision | None:
        embedded = self._embedded[str(wanted).lower()]
        found = Revision(embedded.model_id, embedded.revision, embedded.path)
        return found if wanted.revision in (None, MAIN) or _begins(found, wanted.revision) else None

    def _find_in(self, home: Path, name: str) -> Revision | None:
        """By alias, by revision, then by how a revision begins."""
        path = home / name
        if (path / "config.json").is_file():
            # The link is read once: what a request is given stays, whatever `main` points to next.
            path = home / os.readlink(path) if path.is_symlink() else path
            return Revision(self._homes.id_of(home), path.name, path)
        if name == MAIN:
            return self._put_by_hand(home)
        found = [one for one in self._revisions_in(home) if _begins(one, name)]
        if len(found) > 1:
            raise ModelNotFound(
                f"{len(found)} revisions of '{self._homes.id_of(home)}' begin with '{name}'; give more of it.",
                param="model",
            )
        return found[0] if found else None

    def _revisions_in(self, home: Path) -> list[Revision]:
        model_id = self._homes.id_of(home)
        with os.scandir(home) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."]
        found = [Revision(model_id, name, home / name) for name in names if (home / name / "config.json").is_file()]
        by_hand = self._put_by_hand(home)
        return found + ([by_hand] if by_hand else [])

    def _put_by_hand(self, home: Path) -> Revision | None:
        if not (home / "config.json").is_file():
            return None
        return Revision(self._homes.id_of(home), fingerprint(home), home)


class _Embedded:
    """A model folder inside the package. Hashed once, at its first use."""

    def __init__(self, model_id: str, path: Path) -> None:
        self.model_id = model_id
        self.path = path

    @cached_property
    def revision(self) -> str:
        return content_hash(self.path)


def _begins(found: Revision, prefix: str | None) -> bool:
    return prefix is not None and len(prefix) >= MIN_PREFIX and found.revision.startswith(prefix.lower())


def _made_at(found: Revision) -> int:
    """Nanoseconds: what a revision says itself is too coarse. Its folder last changes just before it is published."""
    is_by_hand = found.path.name != found.revision
    return (found.path / "config.json" if is_by_hand else found.path).stat().st_mtime_ns
