"""What is on this disk, read: models by their ids, what is known of them, and what lies in their folders.

Changes nothing, but makes the copies of models that were put here with weights of another format. A reader never meets
half a model, see `serve.store.revisions`, which writes them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from serve.errors import InvalidRequest, ModelNotFound, ModelUnusable, RookeryError, model_disabled
from serve.store import datasets, files
from serve.store.burials import Burials
from serve.store.conversions import Conversions
from serve.store.describe import (
    describe_revision,
    find_avatar,
    find_picture,
    is_from_hub,
    read_card,
)
from serve.store.disk import refresh, translated
from serve.store.homes import Homes
from serve.store.index import Index
from serve.store.index_search import Filter, Place
from serve.store.listing import Listing, describe_found
from serve.store.lookup import Lookup, Revision
from serve.store.marks import DAMAGED, PRIVATE, is_marked, read_owner
from serve.store.model_files import WEIGHT_FILES
from serve.store.staging import Staging
from serve.store.validate import WEIGHTS
from serve.types import ALL_SEEING, ModelId, ModelInfo, Page, RepoFile, RevisionInfo, Viewer


class Fetched(NamedTuple):
    """A revision that came from a Hub, and its size."""

    model_id: str
    revision: str
    path: Path
    num_bytes: int


class Standing(NamedTuple):
    """How a model stands here when a fetch begins. `model_id` is as it is spelled here, where it is here.

    `is_own`: not from a Hub, but made here, put here by hand, or part of the program.
    """

    model_id: str
    is_here: bool
    is_private: bool
    is_own: bool
    deletion: str | None  # which one was the last
    owner: str = ""  # the tenant whose it is


class Reader:
    """The models under `root`, and those in `embedded`, which come with the program and stay.

    Methods block on disk; any number of threads, processes and machines may use one root. `cache` is a folder of this
    machine's own for what is derived; None: that is under `root` as well.
    """

    def __init__(self, root: Path, *, embedded: Mapping[str, Path], cache: Path | None = None) -> None:
        models = root.resolve() / "models"
        self._models, self._lock = models, models / ".lock"
        self._homes, index = Homes(models), Index(models, self._lock, cache)
        self._lookup = Lookup(self._homes, index, embedded)
        self._listing = Listing(self._homes, self._lookup, index)
        with translated("open the model folder"):
            self._staging = Staging(models / ".staging")
            if cache is not None:
                cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._conversions = Conversions(models / ".converted", self._staging, self._lock)
        self.burials = Burials(models / ".tombstones")

    @property
    def models(self) -> Path:
        """Under which all revisions are."""
        return self._models

    @property
    def fetching(self) -> Path:
        """Where what is fetched from a Hub may lie until it can be staged; made by whom that is."""
        return self._models / ".fetching"

    # --- Finding ------------------------------------------------------------------------------------------

    def refresh(self, model_id: str) -> None:
        """What another machine has just done to the model is seen from now on, not some seconds later."""
        home = self._homes.of(ModelId.parse(model_id))
        refresh(self._models, home.parent, home, self.burials.root)

    def forget(self, model_id: str) -> None:
        """What this machine has derived of a model goes or is made anew: another one has deleted or disabled it."""
        self.refresh(model_id)
        self._listing.forget(ModelId.parse(model_id))

    def why_stopped(self, model_id: str) -> RookeryError:
        """What to tell those for whom the model wrote when it was deleted or disabled. Raises: StoreUnavailable."""
        with translated("look up a model"):
            found = self.burials.of(model_id)
        if found is not None and found.why == "disabled":
            return model_disabled(model_id)
        return ModelNotFound(f"Model {model_id!r} was deleted while it wrote.", param="model")

    def resolve(self, model_id: str, viewer: Viewer = ALL_SEEING) -> Revision:
        """The folder to serve for `model_id`, from this disk alone, with its weights as model.safetensors.

        After `@` may stand a revision, its first characters (7 at least), or an alias.
        Raises: ModelNotFound, ModelDisabled, ModelUnusable, StoreUnavailable.
        """
        found = self.locate(model_id, viewer)
        self.check_use(found)
        return self._served(found)

    def check_use(self, found: Revision) -> None:
        """Whether it may be used: asked for each text. Raises: ModelDisabled, ModelNotFound, StoreUnavailable."""
        with translated("look up a model"):
            self.burials.check_use(found.model_id)

    def is_to_be_fetched(self, found: Revision) -> bool:
        """Whether the disk has damaged it, and a Hub has it still."""
        return is_marked(found.path, DAMAGED) and is_from_hub(found.path)

    def _served(self, found: Revision) -> Revision:
        if is_marked(found.path, DAMAGED):
            raise ModelUnusable(
                f"The disk has damaged the files of '{found.model_id}@{found.revision}': roll the model back to "
                "another revision, or make it again."
            )
        if (found.path / WEIGHTS).exists() or not any((found.path / name).exists() for name in WEIGHT_FILES):
            return found
        return replace(found, path=self._conversions.copy_of(found.model_id, found.revision, found.path))

    def locate(self, model_id: str, viewer: Viewer = ALL_SEEING) -> Revision:
        """The model's own folder, whatever its weights are: a few looks at the disk, and nothing is converted.

        Raises: ModelNotFound, also for what the viewer may not see; StoreUnavailable.
        """
        wanted = ModelId.parse(model_id)
        with translated("look up a model"):
            try:
                found = self._lookup.find(wanted, viewer)
            except FileNotFoundError:
                found = None  # deleted between two looks at it
        if found is None:
            raise not_here(model_id)
        return found

    def main_of(self, model_id: str) -> str | None:
        """The revision that `main` names; None where there is no such model."""
        wanted = without_revision(model_id)
        try:
            return self.locate(str(wanted)).revision
        except ModelNotFound:
            return None

    def list_aliases(self, model_id: str) -> Mapping[str, str]:
        """Name -> revision, `main` among them. Raises: ModelNotFound."""
        wanted = without_revision(model_id)
        aliases: dict[str, str] = {}
        with translated("list a model's aliases"), suppress(FileNotFoundError):
            aliases = self._lookup.aliases(wanted)
        if not aliases and not self._lookup.revisions(wanted):
            raise not_here(model_id)
        return aliases

    def standing_of(self, model_id: str) -> Standing:
        """For a fetch, which `publish` then takes to what is still so. Raises: ModelNotFound, StoreUnavailable."""
        wanted = without_revision(model_id)
        if self._lookup.is_embedded(wanted):
            return Standing(str(wanted), True, False, True, None)
        with translated("look up a model"):
            burial = self.burials.of(str(wanted))  # first: a later one is to be noticed
            deletion = burial.word if burial else None
            home = self._lookup.home_of(wanted)
            if home is not None:
                with suppress(FileNotFoundError):  # deleted between two looks at it
                    main = self._lookup.main_in(home)
                    revisions = [main] if main else self._lookup.revisions_in(home)
                    is_own = not all(one.path != home and is_from_hub(one.path) for one in revisions)
                    is_private = is_marked(home, PRIVATE)
                    return Standing(self._homes.id_of(home), True, is_private, is_own, deletion, read_owner(home))
        return Standing(str(wanted), False, False, False, deletion)

    # --- The catalogue ------------------------------------------------------------------------------------

    def list_models(
        self,
        *,
        limit: int,
        after: str | None = None,
        older_than: tuple[int, str] | None = None,
        query: str | None = None,
        owner: str | None = None,
        tags: Sequence[str] = (),
        newest_first: bool = False,
        viewer: Viewer = ALL_SEEING,
    ) -> Page[ModelInfo]:
        """By id those after the id `after`; or the newest first those `older_than` a (created_at, id).

        `query`: a part of the id, and `owner`: the namespace, in any case; `tags`: all of them. Of others' than the
        viewer's only public ones.
        """
        place = Place.after(older_than) if newest_first else Place.after(None if after is None else (0, after))
        wanted = Filter(query or "", owner, tuple(tags), viewer)
        with translated("list the models"):
            page = self._listing.page(wanted, limit=limit, after=place, newest_first=newest_first)
            return Page(tuple(map(self._as_used, page.items)), page.has_more)

    def count_models(self, *, viewer: Viewer = ALL_SEEING) -> int | None:
        """How many `list_models` would list in all; None where only a look at every folder could tell."""
        with translated("count the models"):
            return self._listing.count(viewer)

    def bytes_of(self, owner: str) -> int:
        """Of the newest revisions of a tenant's models."""
        with translated("measure a tenant's models"):
            return self._listing.bytes_of(owner)

    def describe_in_background(self) -> None:
        """Has every model described before somebody asks for them by age or by tag, and nobody waits for it."""
        threading.Thread(target=self._listing.describe_slowly, name="describe-models", daemon=True).start()

    def get_model(self, model_id: str, viewer: Viewer = ALL_SEEING) -> ModelInfo:
        """Raises: ModelNotFound, also for what the viewer may not see."""
        with translated("read a model's folder"), self._reading(model_id, viewer) as found:
            return self._as_used(describe_found(found))

    def _as_used(self, info: ModelInfo) -> ModelInfo:
        """Of one that is disabled nothing is shown of what it writes."""
        found = self.burials.of(info.model_id)
        if found is None or found.why == "deleted":
            return info
        return replace(info, is_disabled=True, sample="", names={})

    def list_revisions(self, model_id: str, viewer: Viewer = ALL_SEEING) -> tuple[RevisionInfo, ...]:
        """Newest first: by when each was made, whatever `main` names now. Raises: ModelNotFound."""
        wanted = without_revision(model_id)
        infos: list[RevisionInfo] = []
        with translated("list a model's revisions"), suppress(FileNotFoundError):  # deleted between two looks at it
            main = self._lookup.find(wanted, viewer)
            for found in self._lookup.revisions(wanted, viewer):
                with suppress(FileNotFoundError):  # a checkpoint that has been removed since
                    infos.append(inform(found, is_main=found == main))
        if not infos:
            raise not_here(model_id)
        return tuple(infos)

    # --- What a model has ---------------------------------------------------------------------------------

    def list_files(self, model_id: str, *, with_digests: bool = False) -> tuple[RepoFile, ...]:
        """Those of the revision that `model_id` names, by name. Raises: ModelNotFound."""
        with translated("list a model's files"), self._reading(model_id) as found:
            listed = files.list_files(found.path, with_digests=with_digests)
            folder = self._weights_folder(found)
            if folder not in (None, found.path):
                converted = files.list_files(folder, with_digests=with_digests)
                listed += tuple(file for file in converted if file.name == WEIGHTS)
            return tuple(sorted(listed, key=lambda file: file.name))

    def find_file(self, model_id: str, name: str) -> RepoFile:
        """With its digests. Raises: ModelNotFound, NotFound."""
        with translated("read a model's file"), self._reading(model_id) as found:
            folder = self._weights_folder(found) if name == WEIGHTS else None
            return files.find_file(folder or found.path, name)

    def _weights_folder(self, found: Revision) -> Path | None:
        """Where a revision's weights are as we read them; None where they cannot be had."""
        try:
            return self._served(found).path
        except ModelUnusable:
            return None

    def read_card(self, model_id: str) -> str:
        """The README.md of the revision; "" when it has none. Raises: ModelNotFound."""
        with translated("read a model's card"), self._reading(model_id) as found:
            return read_card(found.path)

    def find_picture(self, model_id: str) -> Path:
        """The file of its preview picture, a PNG. Raises: ModelNotFound when it has none."""
        with translated("look for a model's picture"), self._reading(model_id) as found:
            picture = find_picture(found.path)
        if picture is None:
            raise ModelNotFound(f"Model {model_id!r} has no preview picture.", param="model")
        return picture

    def find_avatar(self, model_id: str, number: int) -> Path:
        """The file of the face of its handle `number`, from 0: a square WebP. Raises: ModelNotFound."""
        with translated("look for a model's faces"), self._reading(model_id) as found:
            avatar = find_avatar(found.path, number)
        if avatar is None:
            raise ModelNotFound(f"Model {model_id!r} has no face number {number}.", param="model")
        return avatar

    def find_dataset(self, model_id: str, sha256: str) -> Path | None:
        """The file of a data set that one of the model's revisions has learnt. Raises: ModelNotFound, NotFound."""
        wanted = ModelId.parse(model_id)
        with translated("look for a data set"):
            home = self._lookup.home_of(wanted)
            return None if home is None else datasets.find_dataset(home, sha256)

    @contextmanager
    def _reading(self, model_id: str, viewer: Viewer = ALL_SEEING) -> Iterator[Revision]:
        found = self.locate(model_id, viewer)
        try:
            yield found
        except FileNotFoundError as exc:
            raise ModelNotFound(f"Model {model_id!r} has just been deleted.", param="model") from exc

    # --- What is looked through -----------------------------------------------------------------------------

    def model_ids(self) -> Iterator[str]:
        """Of all that may be here, in no order, without those that come with the program. Looks at every home."""
        with translated("list the models"):
            yield from self._homes.ids()

    def published(self, model_id: str) -> list[Revision]:
        """The revisions of the model of exactly this name that were published, not put there by hand, in no order."""
        with translated("list a model's revisions"), suppress(FileNotFoundError):  # deleted meanwhile
            home = self._homes.of(ModelId.parse(model_id))
            return [found for found in self._lookup.revisions_in(home) if found.path != home]
        return []

    # --- What a Hub has brought ---------------------------------------------------------------------------

    def fetched(self) -> Iterator[Fetched]:
        """The revisions that came from a Hub and may be removed to make room: none of a model that is kept."""
        with translated("look for room"):
            for model_id, revision, num_bytes in self._listing.fetched():
                yield Fetched(model_id, revision, self._homes.of(ModelId.parse(model_id)) / revision, num_bytes)

    def is_any_fetched(self) -> bool:
        """Whether there is one, as far as models have been described: nobody waits until all are."""
        with translated("look for models from a Hub"):
            return self._listing.is_any_fetched()

    def fetched_bytes(self) -> int:
        """Of those revisions, without a look at each: what others have just taken away is still counted."""
        with translated("look for room"):
            return self._listing.fetched_bytes()


def inform(found: Revision, *, is_main: bool) -> RevisionInfo:
    return describe_revision(found.model_id, found.revision, found.path, is_main=is_main)


def without_revision(model_id: str) -> ModelId:
    """Raises: ModelNotFound, InvalidRequest."""
    wanted = ModelId.parse(model_id)
    if wanted.revision:
        raise InvalidRequest("Name the model itself, without '@' and a version.", param="model")
    return wanted


def not_here(model_id: str) -> ModelNotFound:
    return ModelNotFound(f"Model {model_id!r} is not here. GET /v1/models lists those that are.", param="model")
