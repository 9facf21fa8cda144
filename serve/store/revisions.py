"""The models on this disk: immutable revisions in plain Hugging Face folders, and an alias `main` that moves.

    <root>/models/<namespace>/<name>/<revision>/     "_" is the namespace of ids without one
    <root>/models/<namespace>/<name>/main            a link to the revision that is served, replaced in one step
    <root>/models/<namespace>/<name>/.datasets/      what its revisions have learnt, see `serve.store.datasets`
    <root>/models/<namespace>/<name>/.previews/      how somebody wants them shown, see `serve.store.previews`
    <root>/models/<namespace>/<name>/config.json     or: a folder somebody put there by hand, served as it is
    <root>/models/.converted/                        its copy with other weights, see `serve.store.conversions`
    <root>/models/.fetching/                         what comes from a Hub, see `serve.hub.claims`
    <root>/models/.tombstones/                       what is not to be here, see `serve.store.tombstones`
    <root>/models/.staging/                          what is being made, or removed, see `serve.store.staging`

A reader never meets half a model: a revision's folder appears by one rename, complete and on disk, before the
alias points to it. Writers take turns by a file lock. Nothing here knows the Hub, torch, or who reads.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from serve.errors import Conflict, InvalidRequest, ModelNotFound, NotOwner, StoreUnavailable
from serve.store import datasets
from serve.store.burials import Fence
from serve.store.describe import (
    drop_step,
    is_checkpoint,
    job_of,
)
from serve.store.disk import locked, refresh, sync, translated
from serve.store.listing import describe_found
from serve.store.lookup import MAIN, Revision
from serve.store.marks import (
    DAMAGED,
    KEPT,
    OWNER,
    PRIVATE,
    is_marked,
    read_owner,
    read_visibility,
    restrict,
    set_mark,
    set_owner,
    set_visibility,
    unmark,
)
from serve.store.model_files import content_hash, copy_model, seal
from serve.store.previews import drop_preview, write_preview
from serve.store.reading import Fetched, Reader, Standing, inform, not_here, without_revision
from serve.store.tombstones import Why
from serve.store.validate import WEIGHTS, check_finite, check_folder
from serve.types import ALL_SEEING, ModelId, RevisionInfo, Viewer, Visibility

__all__ = ["MAIN", "Fetched", "Revision", "Standing", "Store"]


class Store(Reader):
    """The models under a root, read and changed. Writers take turns, in other processes too."""

    # --- Publishing ---------------------------------------------------------------------------------------

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

    def publish(
        self,
        model_id: str,
        folder: Path,
        *,
        revision: str | None = None,
        alias: str | None = MAIN,
        visibility: Visibility = Visibility.PUBLIC,
        viewer: Viewer = ALL_SEEING,
        standing: Standing | None = None,
        fence: Fence | None = None,
    ) -> Revision:
        """Checks the staged `folder` and makes it a revision of `model_id`, spelled just so, which `alias` then names.

        With `standing` it becomes one of the model that is here in any spelling. What was deleted since `fence` was
        given does not come back, nor what is of somebody who is erased. Takes `folder` over. A revision that is here
        already stays as it is. Raises: ModelUnusable, ModelDisabled, InvalidRequest, Conflict, Erased, ModelNotFound,
        StoreUnavailable; the folder is then removed.
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
                    self.refresh(str(wanted))
                    spelled = self._still(wanted, standing)
                    self.burials.check_publish(str(spelled), fence)
                    self.check_name(str(spelled), viewer)
                    published = self._move_in(spelled, folder, name, alias, visibility, viewer.tenant)
                    self.burials.lift(str(spelled))  # last: until the model is here it is not to come by itself
                    return published
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
        if now.is_own and not standing.is_own:
            raise StoreUnavailable(f"Another model '{wanted}' has just been published; try again.", retry_after_s=1)
        return ModelId.parse(now.model_id) if now.is_here else wanted

    def check_name(self, model_id: str, viewer: Viewer) -> None:
        """Whether they may publish under it: it is free, or theirs. Raises: NotOwner, ModelNotFound, InvalidRequest."""
        wanted = without_revision(model_id)
        home = self._lookup.home_of(wanted)
        if home is None or viewer.may_change(owner := read_owner(home)):
            return
        if owner or self._lookup.revisions_in(home):
            raise NotOwner(f"The name '{wanted}' is taken on this server: choose another one.", param="suffix")

    def _move_in(
        self, wanted: ModelId, folder: Path, revision: str, alias: str | None, visibility: Visibility, owner: str
    ) -> Revision:
        with self._writing(wanted, is_new=True) as home:
            assert home is not None
            target = home / revision
            home.mkdir(parents=True, exist_ok=True)
            # Before anybody can see it; what was said of it before stays so.
            if owner and not read_owner(home) and not self._lookup.revisions_in(home):
                set_owner(home, owner)
            restrict(home, visibility)
            datasets.move_datasets(folder, home)  # first: no revision is without it
            if is_marked(target, DAMAGED):
                self._staging.remove(target)
            if not target.exists():
                os.rename(folder, target)
                for changed in (home, home.parent, self._models):
                    sync(changed)
            if alias and alias != revision:
                self._point(home / alias, revision)
            return Revision(self._homes.id_of(home), revision, target, read_visibility(home), read_owner(home))

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

    def keep_dataset(self, folder: Path, sha256: str, lines: Iterable[str]) -> None:
        """Puts a data set into a staged folder: publishing it keeps the data set privately beside the revisions.

        It is no part of the revision. `sha256` is its name, 64 hex digits. Raises: NotFound, StoreUnavailable.
        """
        assert self._staging.holds(folder), f"{folder} does not come from stage()"
        with translated("keep a data set"):
            datasets.write_dataset(folder, sha256, lines)

    def settle(self, model_id: str, revision: str, *, main_before: str | None) -> Revision | None:
        """Ends a publication whose process may have died on the way; None where it had not come to the revision.

        `main` names the revision then, unless it has been moved from `main_before` since: that was decided later.
        """
        wanted = without_revision(model_id)
        with translated("publish a model"), self._writing(wanted):
            found = self._lookup.find(ModelId.parse(f"{wanted}@{revision}"))
            main = self._lookup.find(wanted)
            if found is not None and (main.revision if main else None) == main_before:
                self._point(found.path.parent / MAIN, found.revision)
            return found

    # --- What answers -------------------------------------------------------------------------------------

    def set_alias(self, found: Revision, alias: str = MAIN) -> None:
        """Makes `alias` name a revision that is here already. Raises: ModelNotFound when it has just gone."""
        with translated("move an alias"), self._writing(ModelId.parse(found.model_id)):
            if not (found.path / "config.json").is_file():
                raise not_here(f"{found.model_id}@{found.revision}")
            self._point(found.path.parent / alias, found.revision)

    def roll_back(self, model_id: str, revision: str, viewer: Viewer = ALL_SEEING) -> RevisionInfo:
        """Makes `main` name a revision that is here, also one newer than `main`'s. It may be called by how it begins.

        Raises: ModelNotFound, NotOwner; Conflict for a checkpoint or the base.
        """
        whole = without_revision(model_id)
        wanted = ModelId.parse(f"{whole}@{revision}")
        self._refuse_embedded(wanted)
        with translated("roll back a model"), self._writing(whole, viewer=viewer) as home:
            found = self._lookup.find(wanted) if home else None
            if found is None:
                raise ModelNotFound(f"'{whole}' has no revision '{revision}' here.", param="revision")
            if is_checkpoint(found.path):
                raise Conflict(f"'{wanted}' is a checkpoint from the middle of a training; only whole models are main.")
            if found.path.name == found.revision:
                self._point(found.path.parent / MAIN, found.revision)
            elif found != self._lookup.find(whole):
                raise Conflict(f"'{wanted}' was put there by hand; delete the model and put it there again.")
            return inform(found, is_main=True)

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

    def check_use(self, found: Revision) -> None:
        """Also not of what came by hand, or out of a backup, and is of somebody who is erased."""
        super().check_use(found)
        with translated("look up a model"):
            self.burials.check_people(found.model_id, lambda: describe_found(found).handles)

    # --- What is said of a model --------------------------------------------------------------------------

    def set_visibility(self, model_id: str, visibility: Visibility, viewer: Viewer = ALL_SEEING) -> None:
        """Of all revisions of the model. Raises: ModelNotFound, NotOwner; Conflict for the embedded base."""
        with self._marking(model_id, viewer) as home:
            set_visibility(home, visibility)

    def keep(self, model_id: str) -> None:
        """It stays when room is made for other models. Raises: ModelNotFound; Conflict for the embedded base."""
        with self._marking(model_id) as home:
            set_mark(home, KEPT, True)

    def set_preview(self, model_id: str, text: str, picture: bytes, viewer: Viewer = ALL_SEEING) -> None:
        """The sample and the picture (a PNG) that the revision has from now on, instead of those it was made with.

        Raises: ModelNotFound, NotOwner; Conflict for what nobody changes: the embedded base, a folder put here by hand.
        """
        wanted = ModelId.parse(model_id)
        if self._lookup.is_embedded(wanted):
            raise Conflict(f"Model '{wanted}' comes with the program, and is shown as it is.")
        with translated("keep a preview"), self._writing(wanted, viewer=viewer) as home:
            found = self._lookup.find(wanted)
            if home is None or found is None:
                raise not_here(model_id)
            if found.path == home:
                raise Conflict(f"'{found.model_id}' was put there by hand, and is shown as it is.")
            write_preview(found.path, text, picture)
            os.utime(home)  # by which all who have described it learn that it is another now

    def set_damaged(self, found: Revision) -> None:
        """It is served no more, until the same is published again. Who has read it meanwhile goes on with it."""
        with translated("mark a revision"), self._writing(ModelId.parse(found.model_id)):
            if found.path.is_dir():  # else it has just gone
                set_mark(found.path, DAMAGED, True)

    @contextmanager
    def _marking(self, model_id: str, viewer: Viewer = ALL_SEEING) -> Iterator[Path]:
        wanted = without_revision(model_id)
        self._refuse_embedded(wanted)
        with translated("mark a model"), self._writing(wanted, viewer=viewer) as home:
            if home is None or not self._lookup.revisions(wanted):
                raise not_here(model_id)
            yield home

    def disable(self, model_id: str, *, by: str = "", reason: str = "") -> str:
        """It stays, but nobody may use or see it until `enable`; a new fetch or training of it is refused.

        The id as it is spelled here. Raises: ModelNotFound; Conflict for the embedded base.
        """
        wanted = without_revision(model_id)
        self._refuse_embedded(wanted)
        with translated("disable a model"), self._writing(wanted) as home:
            if home is None:
                raise not_here(model_id)
            self.burials.bury(str(wanted), "disabled", by=by, reason=reason)
            return self._homes.id_of(home)

    def enable(self, model_id: str) -> str:
        """Raises: ModelNotFound; Conflict where it is not disabled."""
        wanted = without_revision(model_id)
        with translated("enable a model"):
            if not self.burials.enable(str(wanted)):
                raise Conflict(f"Model '{wanted}' is not disabled.")
            home = self._lookup.home_of(wanted)
        return str(wanted) if home is None else self._homes.id_of(home)

    # --- Removing -----------------------------------------------------------------------------------------

    def delete_model(self, model_id: str, viewer: Viewer = ALL_SEEING, *, by: str = "", why: Why = "deleted") -> str:
        """Removes all revisions; the id as it was spelled here. Who has a file open or mapped keeps it.

        From then on the model comes back by no mere request, and not at all where it was "erased". `by`: the key that
        asks for it. Raises: ModelNotFound, NotOwner, Conflict.
        """
        wanted = ModelId.parse(model_id)
        self._refuse_embedded(wanted)
        if wanted.revision:
            raise Conflict(f"Models are deleted whole: name '{wanted}' without its revision.")
        with translated("delete a model"), self._writing(wanted, viewer=viewer) as home:
            if home is None:
                raise ModelNotFound(f"Model {model_id!r} is not here.", param="model")
            deleted = self._homes.id_of(home)
            # The tombstone first: nobody makes or fetches it meanwhile. Then the alias, then everything, in one step
            # each. On a full disk there is room for a tombstone only afterwards.
            with suppress(OSError):
                self.burials.bury(deleted, why, by=by)
            if (home / MAIN).is_symlink():
                (home / MAIN).unlink()
            self._staging.remove(home)
            sync(home.parent)
            self._conversions.forget(deleted)
            if self.burials.of(deleted) is None:
                self.burials.bury(deleted, why, by=by)
        return deleted

    def drop_revision(self, model_id: str, revision: str, *, unused_since: float | None = None) -> bool:
        """Removes one revision, the aliases that name it, and the home of which nothing is left.

        With `unused_since`, Unix seconds, only if it has not been used since, and the model is not kept. Whether it
        was removed. Who has a file open or mapped keeps it.
        """
        wanted = ModelId.parse(f"{without_revision(model_id)}@{revision}")
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

    def drop_checkpoints(
        self, model_id: str, *, of_job: str | None = None, keep: Collection[str] = (), spare: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Removes the checkpoints that `of_job` has left (None: any training) but the revisions `keep`; tells which.

        What an alias names stays, and what the jobs `spare` made. Who has a file open or mapped keeps it. Where no
        revision is left, no data set is.
        """
        wanted = without_revision(model_id)
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
            if is_marked(home, OWNER) and not self._lookup.revisions(wanted):
                unmark(home)  # the name is free again
            with suppress(OSError):  # not empty: a model is here
                home.rmdir()
            return tuple(found.revision for found in dropped)

    # --- Changing -----------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self, wanted: ModelId, *, is_new: bool = False, viewer: Viewer = ALL_SEEING) -> Iterator[Path | None]:
        """The home of the model, which nobody else changes meanwhile; afterwards the index knows of it.

        None where there is none, for the viewer. Raises: NotOwner.
        """
        with locked(self._lock):
            self.refresh(str(wanted))
            home = self._homes.of(wanted) if is_new else self._lookup.home_of(wanted, viewer)
            if home is None:
                yield None
                return
            if not is_new and not viewer.may_change(read_owner(home)):
                raise NotOwner(f"'{self._homes.id_of(home)}' is somebody else's: only they can change it.")
            refresh(home)  # it may be spelled in another way
            with self._listing.following(home):
                yield home

    def _refuse_embedded(self, wanted: ModelId) -> None:
        if self._lookup.is_embedded(wanted):
            raise Conflict(f"Model '{wanted}' comes with the program; it can be neither replaced nor deleted.")


def last_use(folder: Path) -> float:
    """When a revision's weights were last used, in Unix seconds. Raises: FileNotFoundError."""
    return (folder / WEIGHTS).stat().st_atime
