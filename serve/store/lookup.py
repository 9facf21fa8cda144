"""Names to revisions: which folder a model id means, in any case, with an alias, a revision or how one begins.

Reads names and small files of the disk, and changes nothing. An id as it is spelled here costs a few looks at the
disk, any other one look into the index; neither depends on how many models there are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from serve.errors import ModelNotFound
from serve.store.homes import NO_NAMESPACE, Homes
from serve.store.index import Index, IndexUnavailable, despite_damage
from serve.store.marks import PRIVATE, is_marked, read_owner, read_visibility
from serve.store.model_files import content_hash, fingerprint
from serve.types import ALL_SEEING, ModelId, Viewer, Visibility

MAIN = "main"
MIN_PREFIX = 7  # characters by which a revision may be called, if no other begins with them


@dataclass(frozen=True, slots=True)
class Revision:
    """One immutable version of one model. `model_id` is the id as it is spelled here."""

    model_id: str
    revision: str
    path: Path
    visibility: Visibility = Visibility.PUBLIC  # of the model, now
    owner: str = ""  # the tenant whose the model is
    is_embedded: bool = False

    @property
    def is_private(self) -> bool:
        return self.visibility is Visibility.PRIVATE


class Lookup:
    """The revisions in `homes`, and the models in `embedded`, which come with the program."""

    def __init__(self, homes: Homes, index: Index, embedded: Mapping[str, Path]) -> None:
        self._homes, self._index = homes, index
        self._embedded = {model_id.lower(): _Embedded(model_id, path) for model_id, path in embedded.items()}

    def is_embedded(self, wanted: ModelId) -> bool:
        """Whether any model of this name comes with the program."""
        return str(wanted).lower() in self._embedded

    def embedded(self) -> list[Revision]:
        """The models that come with the program."""
        return [Revision(one.model_id, one.revision, one.path, is_embedded=True) for one in self._embedded.values()]

    def home_of(self, wanted: ModelId, viewer: Viewer = ALL_SEEING) -> Path | None:
        """The model's home: by its exact name first, then whatever the case (X handles have none).

        One that the viewer may not see is looked for as long as one that is not there.
        """
        exact = self._homes.of(wanted)
        if _is_there(exact, viewer):
            return exact
        homes = (self._homes.of(ModelId.parse(model_id)) for model_id in self._other_spellings(wanted))
        return next((home for home in homes if _is_there(home, viewer)), None)

    def _other_spellings(self, wanted: ModelId) -> list[str]:
        lower_id = str(wanted).lower()
        try:
            return despite_damage(lambda: self._index.spellings(wanted.namespace, lower_id))
        except IndexUnavailable:
            ids = self._homes.ids((wanted.namespace or NO_NAMESPACE).lower())
            return sorted((one for one in ids if one.lower() == lower_id), reverse=True)

    def find(self, wanted: ModelId, viewer: Viewer = ALL_SEEING) -> Revision | None:
        """The model's own folder. Raises: ModelNotFound for a beginning that several revisions share."""
        if self.is_embedded(wanted):
            return self._find_embedded(wanted)
        home = self.home_of(wanted, viewer)
        return None if home is None else self._find_in(home, wanted.revision or MAIN)

    def revisions(self, wanted: ModelId, viewer: Viewer = ALL_SEEING) -> list[Revision]:
        """All of a model, newest first: by when each was made, whatever `main` names now."""
        if self.is_embedded(wanted):
            found = self._find_embedded(wanted)
            return [found] if found else []
        home = self.home_of(wanted, viewer)
        made_at: dict[Revision, int] = {}
        for one in self.revisions_in(home) if home else ():
            with suppress(FileNotFoundError):  # removed since
                made_at[one] = _made_at(one)
        return sorted(made_at, key=made_at.__getitem__, reverse=True)

    def aliases(self, wanted: ModelId) -> dict[str, str]:
        """Name -> revision. What has no links, a folder put there by hand or an embedded one, has `main`."""
        home = None if self.is_embedded(wanted) else self.home_of(wanted)
        found: dict[str, str] = {}
        if home is not None:
            links = (path for path in home.iterdir() if path.is_symlink())
            found = {path.name: os.readlink(path) for path in links if (path / "config.json").is_file()}
        main = None if MAIN in found else self.find(wanted)
        return found | ({MAIN: main.revision} if main else {})

    def _find_embedded(self, wanted: ModelId) -> Revision | None:
        embedded = self._embedded[str(wanted).lower()]
        found = Revision(embedded.model_id, embedded.revision, embedded.path, is_embedded=True)
        return found if wanted.revision in (None, MAIN) or _begins(found, wanted.revision) else None

    def main_in(self, home: Path) -> Revision | None:
        """The model's newest revision."""
        return self._find_in(home, MAIN)

    def _find_in(self, home: Path, name: str) -> Revision | None:
        """By alias, by revision, then by how a revision begins."""
        path = home / name
        if (path / "config.json").is_file():
            # The link is read once: what a request is given stays, whatever `main` points to next.
            path = home / os.readlink(path) if path.is_symlink() else path
            return self._revision(home, path.name, path)
        if name == MAIN:
            return self._put_by_hand(home)
        found = [one for one in self.revisions_in(home) if _begins(one, name)]
        if len(found) > 1:
            raise ModelNotFound(
                f"{len(found)} revisions of '{self._homes.id_of(home)}' begin with '{name}'; give more of it.",
                param="model",
            )
        return found[0] if found else None

    def revisions_in(self, home: Path) -> list[Revision]:
        """All of a home, in no order."""
        model_id, visibility, owner = self._homes.id_of(home), read_visibility(home), read_owner(home)
        with os.scandir(home) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."]
        found = [
            Revision(model_id, name, home / name, visibility, owner)
            for name in names
            if (home / name / "config.json").is_file()
        ]
        by_hand = self._put_by_hand(home)
        return found + ([by_hand] if by_hand else [])

    def _put_by_hand(self, home: Path) -> Revision | None:
        if not (home / "config.json").is_file():
            return None
        return self._revision(home, fingerprint(home), home)

    def _revision(self, home: Path, name: str, path: Path) -> Revision:
        return Revision(self._homes.id_of(home), name, path, read_visibility(home), read_owner(home))


class _Embedded:
    """A model folder inside the package. Hashed once, at its first use."""

    def __init__(self, model_id: str, path: Path) -> None:
        self.model_id = model_id
        self.path = path

    @cached_property
    def revision(self) -> str:
        return content_hash(self.path)


def _is_there(home: Path, viewer: Viewer) -> bool:
    """Whether it is a home, for them."""
    return home.is_dir() and (viewer.sees_all or viewer.may_see(read_owner(home), is_marked(home, PRIVATE)))


def _begins(found: Revision, prefix: str | None) -> bool:
    return prefix is not None and len(prefix) >= MIN_PREFIX and found.revision.startswith(prefix.lower())


def _made_at(found: Revision) -> int:
    """Nanoseconds: what a revision says itself is too coarse. Its folder last changes just before it is published."""
    is_by_hand = found.path.name != found.revision
    return (found.path / "config.json" if is_by_hand else found.path).stat().st_mtime_ns
