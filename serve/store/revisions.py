"""The models on this disk: immutable revisions in plain Hugging Face folders, and an alias `main` that moves.

    <root>/models/<namespace>/<name>/<revision>/     "_" is the namespace of ids without one
    <root>/models/<namespace>/<name>/main            a link to the revision that is served, replaced in one step
    <root>/models/<namespace>/<name>/.datasets/      what its revisions have learnt, see `serve.store.datasets`
    <root>/models/<namespace>/<name>/config.json     or: a folder somebody put there by hand, served as it is
    <root>/models/.converted/                        its copy with other weights, see `serve.store.conversions`
    <root>/models/.staging/                          what is being made, or removed, see `serve.store.staging`

A reader never meets half a model: a revision's folder appears by one rename, complete and on disk, before the
alias points to it. Writers take turns by a file lock. Nothing here knows the Hub, torch, or who reads.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from serve.errors import Conflict, InvalidRequest, ModelNotFound
from serve.store import datasets
from serve.store.conversions import Conversions
from serve.store.describe import (
    describe,
    describe_revision,
    drop_step,
    find_picture,
    is_checkpoint,
    job_of,
    read_card,
)
from serve.store.disk import locked, sync, translated
from serve.store.homes import Homes
from serve.store.lookup import MAIN, Lookup, Revision
from serve.store.model_files import WEIGHT_FILES, content_hash, copy_model, seal
from serve.store.staging import Staging
from serve.store.validate import WEIGHTS, check_finite, check_folder
from serve.types import ModelId, ModelInfo, Page, RevisionInfo

__all__ = ["MAIN", "Revision", "Store"]


class Store:
    """The models under `root`, and those in `embedded`, which come with the program and stay.

    Methods block on disk; any number of threads and processes may use one root.
    """

    def __init__(self, root: Path, *, embedded: Mapping[str, Path]) -> None:
        models = root.resolve() / "models"
        self._models, self._lock = models, models / ".lock"
        self._homes = Homes(models)
        self._lookup = Lookup(self._homes, embedded)
        with translated("open the model folder"):
            self._staging = Staging(models / ".staging")
        self._conversions = Conversions(models / ".converted", self._staging, self._lock)

    # --- Finding ---------------------------------------------------------------------------------------------

    def resolve(self, model_id: str) -> Revision:
        """The folder to serve for `model_id`, from this disk alone, with its weights as model.safetensors.

        After `@` may stand a revision, its first characters (7 at least), or an alias.
        Raises: ModelNotFound, ModelUnusable, StoreUnavailable.
        """
        found = self._locate(model_id)
        if (found.path / WEIGHTS).exists() or not any((found.path / name).exists() for name in WEIGHT_FILES):
            return found
        return replace(found, path=self._conversions.copy_of(found.model_id, found.revision, found.path))

    def _locate(self, model_id: str) -> Revision:
        """The model's own folder, whatever its weights are."""
        wanted = ModelId.parse(model_id)
        with translated("look up a model"):
            try:
                found = self._lookup.find(wanted)
            except FileNotFoundError:
                found = None  # deleted between two looks at it
        if found is None:
            raise _not_here(model_id)
        return found

    # --- The catalogue ---------------------------------------------------------------------------------------

    def list_models(self, *, limit: int, after: str | None = None, query: str | None = None) -> Page[ModelInfo]:
        """Models by id, those after `after`, whose id contains `query` in any case. Opens the page's files only."""
        with translated("list the models"):
            infos: list[ModelInfo] = []
            for model_id in self._ids(after or "", (query or "").lower()):
                info = self._describe_if_there(model_id)
                if info is not None and len(infos) == limit:
                    return Page(tuple(infos), has_more=True)
                infos += [info] if info else []
            return Page(tuple(infos), has_more=False)

    def _ids(self, after: str, query: str) -> list[str]:
        return sorted(one for one in self._lookup.ids() if one > after and query in one.lower())

    def _describe_if_there(self, model_id: str) -> ModelInfo | None:
        try:
            return self.get_model(model_id)
        except ModelNotFound:
            return None  # an empty folder, one that is not ours, or one deleted since

    def get_model(self, model_id: str) -> ModelInfo:
        """Raises: ModelNotFound."""
        with translated("read a model's folder"), self._reading(model_id) as found:
            return describe(found.model_id, found.revision, found.path)

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
        found = self._locate(model_id)
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
        with translated("delete a model"), self._writing():
            home = self._homes.find(wanted)
            if home is None:
                raise ModelNotFound(f"Model {model_id!r} is not here.", param="model")
            # The alias first, then everything, in one step each.
            if (home / MAIN).is_symlink():
                (home / MAIN).unlink()
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

    def publish(
        self, model_id: str, folder: Path, *, revision: str | None = None, alias: str | None = MAIN
    ) -> Revision:
        """Checks the staged `folder` and makes it a revision of `model_id`, spelled just so, which `alias` then names.

        Takes `folder` over. A revision that is here already stays as it is. Raises: ModelUnusable, InvalidRequest,
        Conflict, StoreUnavailable; the folder is then removed.
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
                return self._move_in(wanted, folder, revision or content_hash(folder), alias)
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

    def _move_in(self, wanted: ModelId, folder: Path, revision: str, alias: str | None) -> Revision:
        with self._writing():
            home = self._homes.of(wanted)
            target = home / revision
            home.mkdir(parents=True, exist_ok=True)
            datasets.move_datasets(folder, home)  # first: no revision is without it
            if not target.exists():
                os.rename(folder, target)
                for changed in (home, home.parent, self._models):
                    sync(changed)
            if alias and alias != revision:
                self._point(home / alias, revision)
            return Revision(self._homes.id_of(home), revision, target)

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
        """Makes `alias` name a revision that is here already."""
        with translated("move an alias"), self._writing():
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
        with translated("publish a model"), self._writing():
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

    def _writing(self) -> AbstractContextManager[None]:
        return locked(self._lock)

    # --- Versions --------------------------------------------------------------------------------------------

    def roll_back(self, model_id: str, revision: str) -> RevisionInfo:
        """Makes `main` name a revision that is here, also one newer than `main`'s. It may be called by how it begins.

        Raises: ModelNotFound; Conflict for a checkpoint or the base.
        """
        whole = _without_revision(model_id)
        wanted = ModelId.parse(f"{whole}@{revision}")
        self._refuse_embedded(wanted)
        with translated("roll back a model"), self._writing():
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
        with translated("remove checkpoints"), self._writing():
            home = self._homes.find(wanted)
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
            if not named and not self._lookup.revisions(wanted) and (home / datasets.DATASETS).is_dir():
                self._staging.remove(home / datasets.DATASETS)
            if dropped:
                sync(home)
            with suppress(OSError):  # not empty: a model is here
                home.rmdir()
            return tuple(found.revision for found in dropped)

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
            home = self._homes.find(wanted)
            return None if home is None else datasets.find_dataset(home, sha256)


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
