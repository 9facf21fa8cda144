"""The models on this disk: immutable revisions in plain Hugging Face folders, and an alias `main` that moves.

    <root>/models/<namespace>/<name>/<revision>/     "_" is the namespace of ids without one
    <root>/models/<namespace>/<name>/main            a link to the revision that is served, replaced in one step
    <root>/models/<namespace>/<name>/.datasets/      what its revisions have learnt, see `serve.store.datasets`
    <root>/models/<namespace>/<name>/.previews/      how somebody wants them shown, see `serve.store.previews`
    <root>/models/<namespace>/<name>/config.json     or: a folder somebody put there by hand, served as it is
    <root>/models/.converted/                        its copy with other weights, see `serve.store.conversions`
    <root>/models/.fetching/                         what comes from a Hub, see `serve.hub.claims`
    <root>/models/.deleted/                          what was deleted of late, see `serve.store.deletions`
    <root>/models/.staging/                          what is being made, or removed, see `serve.store.staging`

A reader never meets half a model: a revision's folder appears by one rename, complete and on disk, before the
alias points to it. Writers take turns by a file lock. Nothing here knows the Hub, torch, or who reads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from serve.errors import Conflict, InvalidRequest, ModelNotFound, ModelUnusable, StoreUnavailable
from serve.store import datasets, files
from serve.store.conversions import Conversions
from serve.store.deletions import Deletions
from serve.store.describe import (
    describe,
    describe_revision,
    drop_step,
    find_avatar,
    find_picture,
    is_checkpoint,
    is_from_hub,
    job_of,
    read_card,
)
from serve.store.disk import locked, sync, translated
from serve.store.homes import Homes
from serve.store.index import Index
from serve.store.index_search import Filter, Place
from serve.store.listing import Listing
from serve.store.lookup import MAIN, Lookup, Revision
from serve.store.marks import KEPT, PRIVATE, is_marked, set_mark
from serve.store.model_files import WEIGHT_FILES, content_hash, copy_model, seal
from serve.store.previews import drop_preview, write_preview
from serve.store.staging import Staging
from serve.store.validate import WEIGHTS, check_finite, check_folder
from serve.types import ModelId, ModelInfo, Page, RepoFile, RevisionInfo

__all__ = ["MAIN", "Fetched", "Revision", "Standing", "Store"]


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


class Store:
    """The models under `root`, and those in `embedded`, which come with the program and stay.

    Methods block on disk; any number of threads and processes may use one root.
    """

    def __init__(self, root: Path, *, embedded: Mapping[str, Path]) -> None:
        models = root.resolve() / "models"
        self._models, self._lock = models, models / ".lock"
        self._homes, index = Homes(models), Index(models, self._lock)
        self._lookup = Lookup(self._homes, index, embedded)
        self._listing = Listing(self._homes, self._lookup, index)
        with translated("open the model folder"):
            self._staging = Staging(models / ".staging")
        self._conversions = Conversions(models / ".converted", self._staging, self._lock)
        self._deletions = Deletions(models / ".deleted")

    @property
    def fetching(self) -> Path:
        """Where what is fetched from a Hub may lie until it can be staged; made by whom that is."""
        return self._models / ".fetching"

    # --- Finding ---------------------------------------------------------------------------------------------

    def resolve(self, model_id: str) -> Revision:
        """The folder to serve for `model_id`, from this disk alone, with its weights as model.safetensors.

        After `@` may stand a revision, its first characters (7 at least), or an alias.
        Raises: ModelNotFound, ModelUnusable, StoreUnavailable.
        """
        return self._served(self.locate(model_id))

    def _served(self, found: Revision) -> Revision:
        if (found.path / WEIGHTS).exists() or not any((found.path / name).exists() for name in WEIGHT_FILES):
            return found
        return replace(found, path=self._conversions.copy_of(found.model_id, found.revision, found.path))

    def locate(self, model_id: str) -> Revision:
        """The model's own folder, whatever its weights are: a few looks at the disk, and nothing is converted.

        Raises: ModelNotFound, StoreUnavailable.
        """
        wanted = ModelId.parse(model_id)
        with translated("look up a model"):
            try:
                found = self._lookup.find(wanted)
            except FileNotFoundError:
                found = None  # deleted between two looks at it
        if found is None:
            raise _not_here(model_id)
        return found

    def standing_of(self, model_id: str) -> Standing:
        """For a fetch, which `publish` then takes to what is still so. Raises: ModelNotFound, StoreUnavailable."""
        wanted = _without_revision(model_id)
        if self._lookup.is_embedded(wanted):
            return Standing(str(wanted), True, False, True, None)
        with translated("look up a model"):
            deletion = self._deletions.last(str(wanted))  # first: a later one is to be noticed
            home = self._lookup.home_of(wanted)
            if home is not None:
                with suppress(FileNotFoundError):  # deleted between two looks at it
                    main = self._lookup.main_in(home)
                    revisions = [main] if main else self._lookup.revisions_in(home)
                    is_own = not all(one.path != home and is_from_hub(one.path) for one in revisions)
                    return Standing(self._homes.id_of(home), True, is_marked(home, PRIVATE), is_own, deletion)
        return Standing(str(wanted), False, False, False, deletion)

    # --- The catalogue ---------------------------------------------------------------------------------------

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
        with_private: bool = True,
    ) -> Page[ModelInfo]:
        """By id those after the id `after`; or the newest first those `older_than` a (created_at, id).

        `query`: a part of the id, and `owner`: the namespace, in any case; `tags`: all of them.
        """
        place = Place.after(older_than) if newest_first else Place.after(None if after is None else (0, after))
        wanted = Filter(query or "", owner, tuple(tags), with_private)
        with translated("list the models"):
            return self._listing.page(wanted, limit=limit, after=place, newest_first=newest_first)

    def count_models(self, *, with_private: bool = True) -> int | None:
        """How many `list_models` would list in all; None where only a look at every folder could tell."""
        with translated("count the models"):
            return self._listing.count(with_private=with_private)

    def describe_in_background(self) -> None:
        """Has every model described before somebody asks for them by age or by tag, and nobody waits for it."""
        threading.Thread(target=self._listing.describe_slowly, name="describe-models", daemon=True).start()

    def get_model(self, model_id: str) -> ModelInfo:
        """Raises: ModelNotFound."""
        with translated("read a model's folder"), self._reading(model_id) as found:
            return describe(
                found.model_id, found.revision, found.path, is_private=found.is_private, is_embedded=found.is_embedded
            )

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

    def list_revisions(self, model_id: str) -> tuple[RevisionInfo, ...]:
        """Newest first: by when each was made, whatever `main` names now. Raises: ModelNotFound."""
        wanted = _without_revision(model_id)
        infos: list[RevisionInfo] = []
        with translated("list a model's revisions"), suppress(FileNotFoundError):  # deleted between two looks at it
            main = self._lookup.find(wanted)
            for found in self._lookup.revisions(wanted):
                with suppress(FileNotFoundError):  # a checkpoint that has been removed since
                    infos.append(_inform(found, is_main=found == main))
        if not infos:
            raise _not_here(model_id)
        return tuple(infos)

    @contextmanager
    def _reading(self, model_id: str) -> Iterator[Revision]:
        found = self.locate(model_id)
        try:
            yield found
        except FileNotFoundError as exc:
            raise ModelNotFound(f"Model {model_id!r} has just been deleted.", param="model") from exc

    def delete_model(self, model_id: str) -> str:
        """Removes all revisions; the id as it was spelled here. Who has a file open or mapped keeps it.

        Raises: ModelNotFound, Conflict.
        """
        wanted = ModelId.parse(model_id)
        self._refuse_embedded(wanted)
        if wanted.revision:
            raise Conflict(f"Models are deleted whole: name '{wanted}' without its revision.")
        with translated("delete a model"), self._writing(wanted) as home:
            if home is None:
                raise ModelNotFound(f"Model {model_id!r} is not here.", param="model")
            # The alias first, then everything, in one step each.
            if (home / MAIN).is_symlink():
                (home / MAIN).unlink()
            self._deletions.note(str(wanted))
            self._staging.remove(home)
            sync(home.parent)
            deleted = self._homes.id_of(home)
            self._conversions.forget(deleted)
        return deleted

    def _refuse_embedded(self, wanted: ModelId) -> None:
        if self._lookup.is_embedded(wanted):
            raise Conflict(f"Model '{wanted}' comes with the program; it can be neither replaced nor deleted.")

    # --- Publishing ------------------------------------------------------------------------------------------

    def stage(self) -> Path:
        """A new empty folder to prepare a model in; `publish` or `discard` ends it, as does this process's end."""
        with translated("make room for a model"):
            return self._staging.new()

    def discard(self, folder: Path) -> None:
        """Removes a staged folder and what is in it."""
        self._staging.discard(folder)

    def sweep(self) -> None:
        """Removes what processes that have died meanwhile had staged."""
        with translated("remove what was staged"):
            self._staging.sweep()
            self._deletions.sweep()

    def publish(
        self,
        model_id: str,
        folder: Path,
        *,
        revision: str | None = None,
        alias: str | None = MAIN,
        is_private: bool = False,
        standing: Standing | None = None,
    ) -> Revision:
        """Checks the staged `folder` and makes it a revision of `model_id`, spelled just so, which `alias` then names.

        With `standing` it becomes one of the model that is here in any spelling, unless that was deleted since.
        Takes `folder` over. A revision that is here already stays as it is. Raises: ModelUnusable, InvalidRequest,
        Conflict, ModelNotFound, StoreUnavailable; the folder is then removed.
        """
        assert self._staging.holds(folder), f"{folder} does not come from stage()"
        try:
            wanted = self._new_id(model_id)
            if revision:
                ModelId.parse(f"{wanted}@{revision}")
            if revision == MAIN:
                raise Conflict(f"'{MAIN}' is the name of a model's newest revision and cannot be one itself.")
            with translated("publish a model"):
                if alias:
                    drop_step(folder)
                check_folder(folder)
                check_finite(folder)
                seal(folder)
                name = revision or content_hash(folder)
                with locked(self._lock):
                    return self._move_in(self._still(wanted, standing), folder, name, alias, is_private)
        finally:
            self.discard(folder)

    def _new_id(self, model_id: str) -> ModelId:
        """Raises: ModelNotFound, InvalidRequest, Conflict when nothing can be published under it."""
        wanted = ModelId.parse(model_id)
        if wanted.revision:
            raise InvalidRequest(
                f"'{wanted}' gets its revision from what is in it; leave out '@{wanted.revision}'.", param="model"
            )
        self._refuse_embedded(wanted)
        return wanted

    def _still(self, wanted: ModelId, standing: Standing | None) -> ModelId:
        """How the model is spelled that a fetch found with `standing`. Raises: ModelNotFound, StoreUnavailable."""
        if standing is None:
            return wanted
        now = self.standing_of(str(wanted))
        if now.deletion not in (None, standing.deletion):
            raise ModelNotFound(f"Model '{wanted}' was deleted meanwhile.", param="model")
        if now.is_own and not standing.is_own:
            raise StoreUnavailable(f"Another model '{wanted}' has just been published; try again.", retry_after_s=1)
        return ModelId.parse(now.model_id) if now.is_here else wanted

    def _move_in(self, wanted: ModelId, folder: Path, revision: str, alias: str | None, is_private: bool) -> Revision:
        with self._writing(wanted, is_new=True) as home:
            assert home is not None
            target = home / revision
            home.mkdir(parents=True, exist_ok=True)
            if is_private:  # before anybody can see it; what was made private stays so
                set_mark(home, PRIVATE, True)
            datasets.move_datasets(folder, home)  # first: no revision is without it
            if not target.exists():
                os.rename(folder, target)
                for changed in (home, home.parent, self._models):
                    sync(changed)
            if alias and alias != revision:
                self._point(home / alias, revision)
            return Revision(self._homes.id_of(home), revision, target, is_marked(home, PRIVATE))

    def _point(self, alias: Path, revision: str) -> None:
        if alias.is_symlink() and os.readlink(alias) == revision:
            return
        link = self._staging.new() / alias.name
        try:
            os.symlink(revision, link)
            os.replace(link, alias)
            sync(alias.parent)
        finally:
            self.discard(link.parent)

    def set_alias(self, found: Revision, alias: str = MAIN) -> None:
        """Makes `alias` name a revision that is here already. Raises: ModelNotFound when it has just gone."""
        with translated("move an alias"), self._writing(ModelId.parse(found.model_id)):
            if not (found.path / "config.json").is_file():
                raise _not_here(f"{found.model_id}@{found.revision}")
            self._point(found.path.parent / alias, found.revision)

    def main_of(self, model_id: str) -> str | None:
        """The revision that `main` names; None where there is no such model."""
        wanted = _without_revision(model_id)
        with translated("look up a model"):
            try:
                found = self._lookup.find(wanted)
            except FileNotFoundError:
                found = None  # deleted between two looks at it
        return found.revision if found else None

    def settle(self, model_id: str, revision: str, *, main_before: str | None) -> Revision | None:
        """Ends a publication whose process may have died on the way; None where it had not come to the revision.

        `main` names the revision then, unless it has been moved from `main_before` since: that was decided later.
        """
        wanted = _without_revision(model_id)
        with translated("publish a model"), self._writing(wanted):
            found = self._lookup.find(ModelId.parse(f"{wanted}@{revision}"))
            main = self._lookup.find(wanted)
            if found is not None and (main.revision if main else None) == main_before:
                self._point(found.path.parent / MAIN, found.revision)
            return found

    def import_folder(self, folder: Path, model_id: str) -> Revision:
        """Copies a Hugging Face folder from anywhere, converts its weights if need be, and publishes it."""
        self._new_id(model_id)
        staged = self.stage()
        try:
            with translated("copy a model folder"):
                copy_model(folder, staged)
        except BaseException:
            self.discard(staged)
            raise
        return self.publish(model_id, staged)

    @contextmanager
    def _writing(self, wanted: ModelId, *, is_new: bool = False) -> Iterator[Path | None]:
        """The home of the model, which nobody else changes meanwhile; afterwards the index knows of it."""
        with locked(self._lock):
            home = self._homes.of(wanted) if is_new else self._lookup.home_of(wanted)
            if home is None:
                yield None
                return
            with self._listing.following(home):
                yield home

    # --- Versions --------------------------------------------------------------------------------------------

    def roll_back(self, model_id: str, revision: str) -> RevisionInfo:
        """Makes `main` name a revision that is here, also one newer than `main`'s. It may be called by how it begins.

        Raises: ModelNotFound; Conflict for a checkpoint or the base.
        """
        whole = _without_revision(model_id)
        wanted = ModelId.parse(f"{whole}@{revision}")
        self._refuse_embedded(wanted)
        with translated("roll back a model"), self._writing(whole):
            found = self._lookup.find(wanted)
            if found is None:
                raise ModelNotFound(f"'{whole}' has no revision '{revision}' here.", param="revision")
            if is_checkpoint(found.path):
                raise Conflict(f"'{wanted}' is a checkpoint from the middle of a training; only whole models are main.")
            if found.path.name == found.revision:
                self._point(found.path.parent / MAIN, found.revision)
            elif found != self._lookup.find(whole):
                raise Conflict(f"'{wanted}' was put there by hand; delete the model and put it there again.")
            return _inform(found, is_main=True)

    def drop_checkpoints(
        self, model_id: str, *, of_job: str | None = None, keep: Collection[str] = (), spare: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Removes the checkpoints that `of_job` has left (None: any training) but the revisions `keep`; tells which.

        What an alias names stays, and what the jobs `spare` made. Who has a file open or mapped keeps it. Where no
        revision is left, no data set is.
        """
        wanted = _without_revision(model_id)
        with translated("remove checkpoints"), self._writing(wanted) as home:
            if home is None:
                return ()
            named = {os.readlink(path) for path in home.iterdir() if path.is_symlink()}
            dropped = [
                found
                for found in self._lookup.revisions(wanted)
                if found.revision not in named and is_checkpoint(found.path)
                if found.revision not in keep
                if of_job is None or job_of(found.path) == of_job
                if job_of(found.path) not in spare
            ]
            for found in dropped:
                self._staging.remove(found.path)
                drop_preview(found.path)
            if not named and not self._lookup.revisions(wanted) and (home / datasets.DATASETS).is_dir():
                self._staging.remove(home / datasets.DATASETS)
            if dropped:
                sync(home)
            with suppress(OSError):  # not empty: a model is here
                home.rmdir()
            return tuple(found.revision for found in dropped)

    # --- What is said of a model --------------------------------------------------------------------------------

    def list_aliases(self, model_id: str) -> Mapping[str, str]:
        """Name -> revision, `main` among them. Raises: ModelNotFound."""
        wanted = _without_revision(model_id)
        aliases: dict[str, str] = {}
        with translated("list a model's aliases"), suppress(FileNotFoundError):
            aliases = self._lookup.aliases(wanted)
        if not aliases and not self._lookup.revisions(wanted):
            raise _not_here(model_id)
        return aliases

    def set_private(self, model_id: str, is_private: bool) -> None:
        """All revisions of the model. Raises: ModelNotFound; Conflict for the embedded base."""
        self._mark(model_id, PRIVATE, is_private)

    def keep(self, model_id: str) -> None:
        """It stays when room is made for other models. Raises: ModelNotFound; Conflict for the embedded base."""
        self._mark(model_id, KEPT, True)

    def set_preview(self, model_id: str, text: str, picture: bytes) -> None:
        """The sample and the picture (a PNG) that the revision has from now on, instead of those it was made with.

        Raises: ModelNotFound; Conflict for what is not ours to change: the embedded base, a folder put here by hand.
        """
        wanted = ModelId.parse(model_id)
        if self._lookup.is_embedded(wanted):
            raise Conflict(f"Model '{wanted}' comes with the program, and is shown as it is.")
        with translated("keep a preview"), self._writing(wanted) as home:
            found = self._lookup.find(wanted)
            if home is None or found is None:
                raise _not_here(model_id)
            if found.path == home:
                raise Conflict(f"'{found.model_id}' was put there by hand, and is shown as it is.")
            write_preview(found.path, text, picture)
            os.utime(home)  # by which all who have described it learn that it is another now

    def _mark(self, model_id: str, mark: str, is_set: bool) -> None:
        wanted = _without_revision(model_id)
        self._refuse_embedded(wanted)
        with translated("mark a model"), self._writing(wanted) as home:
            if home is None or not self._lookup.revisions(wanted):
                raise _not_here(model_id)
            set_mark(home, mark, is_set)

    # --- Room ---------------------------------------------------------------------------------------------------

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

    def drop_revision(self, model_id: str, revision: str, *, unused_since: float | None = None) -> bool:
        """Removes one revision, the aliases that name it, and the home of which nothing is left.

        With `unused_since`, Unix seconds, only if it has not been used since, and the model is not kept. Whether it
        was removed. Who has a file open or mapped keeps it.
        """
        wanted = ModelId.parse(f"{_without_revision(model_id)}@{revision}")
        self._refuse_embedded(wanted)
        with translated("remove a revision"), self._writing(wanted):
            found = self._lookup.find(wanted)
            if found is None or found.path.name != found.revision:
                return False
            home = found.path.parent
            if unused_since is not None and (is_marked(home, KEPT) or last_use(found.path) > unused_since):
                return False
            for alias in [path for path in home.iterdir() if path.is_symlink()]:
                if os.readlink(alias) == found.revision:
                    alias.unlink()
            self._staging.remove(found.path)
            drop_preview(found.path)
            sync(home)
            if not self._lookup.revisions(wanted) and not is_marked(home, PRIVATE):  # it stays so when it comes again
                self._staging.remove(home)
                sync(home.parent)
            return True

    # --- What was learnt -------------------------------------------------------------------------------------

    def keep_dataset(self, folder: Path, sha256: str, lines: Iterable[str]) -> None:
        """Puts a data set into a staged folder: publishing it keeps the data set privately beside the revisions.

        It is no part of the revision. `sha256` is its name, 64 hex digits. Raises: NotFound, StoreUnavailable.
        """
        assert self._staging.holds(folder), f"{folder} does not come from stage()"
        with translated("keep a data set"):
            datasets.write_dataset(folder, sha256, lines)

    def find_dataset(self, model_id: str, sha256: str) -> Path | None:
        """The file of a data set that one of the model's revisions has learnt. Raises: ModelNotFound, NotFound."""
        wanted = ModelId.parse(model_id)
        with translated("look for a data set"):
            home = self._lookup.home_of(wanted)
            return None if home is None else datasets.find_dataset(home, sha256)


def last_use(folder: Path) -> float:
    """When a revision's weights were last used, in Unix seconds. Raises: FileNotFoundError."""
    return (folder / WEIGHTS).stat().st_atime


def _inform(found: Revision, *, is_main: bool) -> RevisionInfo:
    return describe_revision(found.model_id, found.revision, found.path, is_main=is_main)


def _without_revision(model_id: str) -> ModelId:
    """Raises: ModelNotFound, InvalidRequest."""
    wanted = ModelId.parse(model_id)
    if wanted.revision:
        raise InvalidRequest(f"Name '{wanted}' itself, without '@{wanted.revision}'.", param="model")
    return wanted


def _not_here(model_id: str) -> ModelNotFound:
    return ModelNotFound(f"Model {model_id!r} is not here. GET /v1/models lists those that are.", param="model")
