"""The models on this disk: immutable revisions in plain Hugging Face folders, and an alias `main` that moves.

    <root>/models/<namespace>/<name>/<revision>/     "_" is the namespace of ids without one
    <root>/models/<namespace>/<name>/main            a link to the newest revision, replaced in one step
    <root>/models/<namespace>/<name>/config.json     or: a folder somebody put there by hand, served as it is
    <root>/models/.converted/<id>/<fingerprint>/     its copy with the weights as we read them, made at its first use
    <root>/models/.staging/<owner>.<random>/         what is being made, or removed

A reader never meets half a model: a revision's folder appears by one rename, complete and on disk, before the
alias points to it. Writers take turns by a file lock. Nothing here knows the Hub, torch, or who reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from serve.errors import Conflict, InvalidRequest, ModelNotFound, ModelUnusable, disk_error
from serve.store.convert import convert_weights, shard_names
from serve.store.describe import PROVENANCE, describe, read_card
from serve.store.validate import WEIGHTS, check_finite, check_folder
from serve.types import ModelId, ModelInfo, Page

MAIN = "main"
NO_NAMESPACE = "_"  # no id can spell it
REVISION_LENGTH = 40  # hex digits, as a commit's

# All that a text-generation model needs besides its weights. Nothing else is taken from a stranger's folder.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "README.md",
)
# What our own training writes beside them.
OUR_FILES = (PROVENANCE, "runs/preprocess.json", "runs/train.json", "thumbnail.png")
# In order of preference; all but the first are converted into it.
WEIGHT_FILES = (WEIGHTS, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_STALE_AFTER_S = 24 * 3600
_CLOCK_GRAIN_S = 2.0  # two changes of a folder within this may show the same time


@dataclass(frozen=True, slots=True)
class Revision:
    """One immutable version of one model. `model_id` is the id as it is spelled here."""

    model_id: str
    revision: str
    path: Path


class Store:
    """The models under `root`, and those in `embedded`, which come with the program and stay.

    Methods block on disk; any number of threads and processes may use one root.
    """

    def __init__(self, root: Path, *, embedded: Mapping[str, Path]) -> None:
        self._models = root.resolve() / "models"
        self._staging = self._models / ".staging"
        self._conversions = self._models / ".converted"
        self._converting = threading.Lock()
        self._unconvertible: dict[Path, str] = {}  # where its copy would be -> why there is none
        self._embedded = {model_id.lower(): _Embedded(model_id, path) for model_id, path in embedded.items()}
        self._names: dict[Path, tuple[int, dict[str, list[str]]]] = {}
        with _translated("open the model folder"):
            self._staging.mkdir(parents=True, exist_ok=True)
            self._sweep()

    # --- Finding ---------------------------------------------------------------------------------------------

    def resolve(self, model_id: str) -> Revision:
        """The folder to serve for `model_id`, from this disk alone, with its weights as model.safetensors.

        Raises: ModelNotFound, ModelUnusable, StoreUnavailable.
        """
        found = self._locate(model_id)
        return found if (found.path / WEIGHTS).exists() else self._converted(found)

    def _locate(self, model_id: str) -> Revision:
        """The model's own folder, whatever its weights are."""
        wanted = ModelId.parse(model_id)
        with _translated("look up a model"):
            try:
                found = self._find_embedded(wanted) or self._find(wanted)
            except FileNotFoundError:
                found = None  # deleted between two looks at it
        if found is None:
            raise ModelNotFound(f"Model {model_id!r} is not here. GET /v1/models lists those that are.", param="model")
        return found

    def _find_embedded(self, wanted: ModelId) -> Revision | None:
        embedded = self._embedded.get(str(wanted).lower())
        if embedded is None or wanted.revision not in (None, MAIN, embedded.revision):
            return None
        return Revision(embedded.model_id, embedded.revision, embedded.path)

    def _find(self, wanted: ModelId) -> Revision | None:
        folder = self._spelled_here(wanted)
        if folder is None:
            return None
        model_id = self._id_of(folder)
        revision = wanted.revision or MAIN
        path = folder / revision
        if (path / "config.json").is_file():
            # The link is read once: what a request is given stays, whatever `main` points to next.
            path = folder / os.readlink(path) if path.is_symlink() else path
            return Revision(model_id, path.name, path)
        if (folder / "config.json").is_file():
            fingerprint = _fingerprint(folder)
            if revision in (MAIN, fingerprint):
                return Revision(model_id, fingerprint, folder)
        return None

    def _spelled_here(self, wanted: ModelId) -> Path | None:
        """The model's folder: by its exact name first, then whatever the case (X handles have none)."""
        exact = self._home_of(wanted)
        if exact.is_dir():
            return exact
        for namespace in self._names_in(self._models).get((wanted.namespace or NO_NAMESPACE).lower(), ()):
            for name in self._names_in(self._models / namespace).get(wanted.name.lower(), ()):
                return self._models / namespace / name
        return None

    def _home_of(self, wanted: ModelId) -> Path:
        return self._models / (wanted.namespace or NO_NAMESPACE) / wanted.name

    def _names_in(self, folder: Path) -> dict[str, list[str]]:
        """Lower-case name -> names of subfolders, lower case first; remembered while the folder does not change."""
        try:
            changed = folder.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        remembered = self._names.get(folder)
        if remembered and remembered[0] == changed:
            return remembered[1]
        with os.scandir(folder) as entries:
            found = sorted((e.name for e in entries if not e.name.startswith(".") and e.is_dir()), reverse=True)
        names: dict[str, list[str]] = {}
        for name in found:
            names.setdefault(name.lower(), []).append(name)
        if time.time() - changed / 1e9 > _CLOCK_GRAIN_S:
            self._names[folder] = changed, names
        return names

    def _id_of(self, folder: Path) -> str:
        namespace = folder.parent.name
        return folder.name if namespace == NO_NAMESPACE else f"{namespace}/{folder.name}"

    # --- The catalogue ---------------------------------------------------------------------------------------

    def list_models(self, *, limit: int, after: str | None = None, query: str | None = None) -> Page[ModelInfo]:
        """Models by id, those after `after`, whose id contains `query` in any case. Opens the page's files only."""
        with _translated("list the models"):
            infos: list[ModelInfo] = []
            for model_id in self._ids(after or "", (query or "").lower()):
                info = self._describe_if_there(model_id)
                if info is not None and len(infos) == limit:
                    return Page(tuple(infos), has_more=True)
                infos += [info] if info else []
            return Page(tuple(infos), has_more=False)

    def _ids(self, after: str, query: str) -> list[str]:
        ids = {embedded.model_id for embedded in self._embedded.values()}
        for namespace in chain.from_iterable(self._names_in(self._models).values()):
            prefix = "" if namespace == NO_NAMESPACE else f"{namespace}/"
            ids.update(prefix + name for name in chain.from_iterable(self._names_in(self._models / namespace).values()))
        return sorted(model_id for model_id in ids if model_id > after and query in model_id.lower())

    def _describe_if_there(self, model_id: str) -> ModelInfo | None:
        try:
            return self.get_model(model_id)
        except ModelNotFound:
            return None  # an empty folder, one that is not ours, or one deleted since

    def get_model(self, model_id: str) -> ModelInfo:
        """Raises: ModelNotFound."""
        with _translated("read a model's folder"), self._reading(model_id) as found:
            return describe(found.model_id, found.revision, found.path)

    def read_card(self, model_id: str) -> str:
        """The README.md of the newest revision; "" when it has none. Raises: ModelNotFound."""
        with _translated("read a model's card"), self._reading(model_id) as found:
            return read_card(found.path)

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
        with _translated("delete a model"), self._writing():
            folder = self._spelled_here(wanted)
            if folder is None:
                raise ModelNotFound(f"Model {model_id!r} is not here.", param="model")
            # The alias first, then everything, in one step each; the bytes go when nobody can find them.
            if (folder / MAIN).is_symlink():
                (folder / MAIN).unlink()
            trash = self._new_staging()
            try:
                os.rename(folder, trash / folder.name)
                _sync(folder.parent)
            finally:
                self.discard(trash)
            deleted = self._id_of(folder)
            self.discard(self._copies_of(deleted))
        return deleted

    def _refuse_embedded(self, wanted: ModelId) -> None:
        if str(wanted).lower() in self._embedded:
            raise Conflict(f"Model '{wanted}' comes with the program; it can be neither replaced nor deleted.")

    # --- Publishing ------------------------------------------------------------------------------------------

    def stage(self) -> Path:
        """A new empty folder to prepare a model in; `publish` or `discard` ends it, as does this process's end."""
        with _translated("make room for a model"):
            return self._new_staging()

    def discard(self, folder: Path) -> None:
        """Removes a staged folder and what is in it."""
        shutil.rmtree(folder, ignore_errors=True)

    def publish(
        self, model_id: str, folder: Path, *, revision: str | None = None, alias: str | None = MAIN
    ) -> Revision:
        """Checks the staged `folder` and makes it a revision of `model_id`, spelled just so, which `alias` then names.

        Takes `folder` over. A revision that is here already stays as it is. Raises: ModelUnusable, InvalidRequest,
        Conflict, StoreUnavailable; the folder is then removed.
        """
        assert folder.resolve().parent == self._staging, f"{folder} does not come from stage()"
        try:
            wanted = self._new_id(model_id)
            if revision:
                ModelId.parse(f"{wanted}@{revision}")
            if revision == MAIN:
                raise Conflict(f"'{MAIN}' is the name of a model's newest revision and cannot be one itself.")
            with _translated("publish a model"):
                _check_and_seal(folder)
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
            home = self._home_of(wanted)
            target = home / revision
            if not target.exists():
                home.mkdir(parents=True, exist_ok=True)
                os.rename(folder, target)
                for changed in (home, home.parent, self._models):
                    _sync(changed)
            if alias and alias != revision:
                self._point(home / alias, revision)
            return Revision(self._id_of(home), revision, target)

    def _point(self, alias: Path, revision: str) -> None:
        if alias.is_symlink() and os.readlink(alias) == revision:
            return
        link = self._new_staging() / alias.name
        try:
            os.symlink(revision, link)
            os.replace(link, alias)
            _sync(alias.parent)
        finally:
            self.discard(link.parent)

    def set_alias(self, found: Revision, alias: str = MAIN) -> None:
        """Makes `alias` name a revision that is here already."""
        with _translated("move an alias"), self._writing():
            self._point(found.path.parent / alias, found.revision)

    def import_folder(self, folder: Path, model_id: str) -> Revision:
        """Copies a Hugging Face folder from anywhere, converts its weights if need be, and publishes it."""
        self._new_id(model_id)
        return self.publish(model_id, self._stage_copy(folder))

    def _stage_copy(self, folder: Path) -> Path:
        """All that is served of a folder, its weights as one model.safetensors."""
        staged = self.stage()
        try:
            with _translated("copy a model folder"):
                weights = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
                if weights is None:
                    raise ModelUnusable(f"The folder has no weights: none of {', '.join(WEIGHT_FILES)}.")
                shards = shard_names(folder / weights) if weights.endswith(".index.json") else []
                for name in [*MODEL_FILES, *OUR_FILES, weights, *shards]:
                    _copy(folder / name, staged / name)
                finish_weights(staged)
        except BaseException:
            self.discard(staged)
            raise
        return staged

    # --- Folders put here by hand ----------------------------------------------------------------------------

    def _converted(self, found: Revision) -> Revision:
        """The copy of a folder that has its weights in another form; the folder itself is left as it is."""
        if not any((found.path / name).exists() for name in WEIGHT_FILES):
            return found
        copy = self._copies_of(found.model_id) / found.revision
        if not copy.exists():
            with self._converting:  # one at a time: it takes a core, and several times the model's memory
                self._convert(found.path, copy)
        return replace(found, path=copy)

    def _convert(self, source: Path, copy: Path) -> None:
        if copy in self._unconvertible:
            raise ModelUnusable(self._unconvertible[copy])
        if copy.exists():
            return
        try:
            staged = self._stage_copy(source)
            try:
                with _translated("convert a model"):
                    _check_and_seal(staged)
                    self._replace_copy(staged, copy)
            finally:
                self.discard(staged)
        except ModelUnusable as exc:
            self._unconvertible[copy] = exc.message
            raise

    def _replace_copy(self, staged: Path, copy: Path) -> None:
        with self._writing():
            copy.parent.mkdir(parents=True, exist_ok=True)
            for old in copy.parent.iterdir():
                if old != copy:  # what it was made from is no longer there
                    self.discard(old)
            if not copy.exists():
                os.rename(staged, copy)

    def _copies_of(self, model_id: str) -> Path:
        return self._conversions / model_id.replace("/", "--")  # no id has a '--' of its own

    # --- On the disk -----------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with (self._models / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # closing the file ends it, so a dead process holds nothing
            yield

    def _new_staging(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{_owner(os.getpid())}.", dir=self._staging))

    def _sweep(self) -> None:
        """Removes what processes that no longer live have left behind."""
        host, now = socket.gethostname(), time.time()
        for folder in self._staging.iterdir():
            owner_host, _, rest = folder.name.partition(":")
            pid = rest.split(".")[0]
            local = owner_host == host and pid.isdigit()
            dead = local and not folder.name.startswith(f"{_owner(int(pid))}.")
            try:
                if dead or now - folder.stat().st_mtime > _STALE_AFTER_S:
                    shutil.rmtree(folder, ignore_errors=True)
            except FileNotFoundError:
                continue  # its owner, or another sweeper, was quicker


class _Embedded:
    """A model folder inside the package. Hashed once, at its first use."""

    def __init__(self, model_id: str, path: Path) -> None:
        self.model_id = model_id
        self.path = path

    @cached_property
    def revision(self) -> str:
        return content_hash(self.path)


def finish_weights(folder: Path) -> None:
    """Leaves one model.safetensors in a staged folder, made from whatever weights are there. Raises: ModelUnusable."""
    source = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if source is None or source.name == WEIGHTS:
        return
    shards = [folder / name for name in shard_names(source)] if source.suffix == ".json" else []
    convert_weights(source, folder / WEIGHTS)
    for path in [source, *shards]:
        path.unlink()


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def _check_and_seal(folder: Path) -> None:
    """Raises: ModelUnusable."""
    check_folder(folder)
    check_finite(folder)
    _seal(folder)


def _seal(folder: Path) -> None:
    """Every byte on the disk, every file read-only: a mapped file that changes would kill who reads it."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
        else:
            path.chmod(0o755)
        _sync(path)
    _cache_in_order(folder / WEIGHTS)
    folder.chmod(0o755)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cache_in_order(path: Path) -> None:
    """Has the system forget its copy of a file that is on the disk, and read it again from the start.

    A file that was written piece by piece lies in memory page by page; read in order it lies in large pieces, which
    cost a load of 250 MB 4 ms to map rather than 22.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), path.open("rb", buffering=0) as file:  # it is only for speed
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(8 << 20):
            pass


def content_hash(folder: Path) -> str:
    """sha256 over the sorted (name, sha256) of all files, shortened to the length of a commit's."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()[:REVISION_LENGTH]


def _fingerprint(folder: Path) -> str:
    """Of a folder that somebody else may replace: names, sizes and times, so that new files are a new revision."""
    total = hashlib.sha256()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_file():
                status = entry.stat()
                total.update(f"{entry.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return total.hexdigest()[:REVISION_LENGTH]


def _owner(pid: int) -> str:
    """`host:pid.start`: a process, even when its number is used again (a restarted container's always is)."""
    try:
        # Field 22, counted after the name in brackets, which may hold spaces. Source: proc(5).
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        start = "unknown"
    return f"{socket.gethostname()}:{pid}.{start}"


@contextmanager
def _translated(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise disk_error(action, exc) from exc
