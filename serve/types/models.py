"""Models: how they are called, what is known of them, and the catalogue of those that are here."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

from serve.errors import ModelNotFound
from serve.types.keys import ALL_SEEING, Viewer

T = TypeVar("T")

MAX_SAMPLE_CHARS = 600  # of the text that stands for a model: twice a post

# One part of an id: the Hub's own rule (huggingface_hub.utils.validate_repo_id), which X handles satisfy:
# they may begin and end with '_', and the Hub's word boundary counts '_' as a letter.
_ID_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}", re.ASCII)
_IS_NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EACCES})


@dataclass(frozen=True, slots=True)
class ModelId:
    """`[namespace/]name[@revision]`; `str()` gives the canonical form without the revision.

    Ids that never become a path unchecked: each part is ASCII, starts with a letter, digit or '_', has no
    `..` or `--`, does not end in `.` or `-`, and does not end with `.git` (Source: validate_repo_id). No namespace is
    `_`: the store keeps models without one there.
    """

    namespace: str | None
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name

    @classmethod
    def parse(cls, text: str) -> ModelId:
        """Raises: ModelNotFound when `text` cannot be the id of any model."""
        path, _, revision = text.partition("@")
        parts = path.split("/")
        checked = parts + ([revision] if revision else [])
        is_misplaced = len(parts) > 2 or parts[:-1] == ["_"] or ("@" in text and not revision)
        if is_misplaced or len(text) > 256 or not all(map(_is_id_part, checked)):
            raise ModelNotFound(
                "There is no model of that name: a model id looks like 'huggingtweets/handle' or 'gpt2', in ASCII "
                "letters, digits, '.', '_' and '-'.",
                param="model",
            )
        return cls(parts[0] if len(parts) == 2 else None, parts[-1], revision or None)


def _is_id_part(part: str) -> bool:
    return bool(_ID_PART.fullmatch(part)) and not (
        ".." in part or "--" in part or part.endswith((".", "-")) or part.lower().endswith(".git")
    )


class Visibility(StrEnum):
    """Who meets a model. Its tenant always does, and whoever may do everything."""

    PUBLIC = "public"  # everybody
    UNLISTED = "unlisted"  # everybody who knows its name: no list, no search has it
    PRIVATE = "private"  # nobody else


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model as the catalogue lists it. `created_at` is Unix seconds of its newest revision."""

    model_id: str
    revision: str
    created_at: int
    num_bytes: int
    owned_by: str
    base_model: str | None = None
    handles: tuple[str, ...] = ()
    num_parameters: int | None = None
    context_length: int | None = None
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # handle -> downloaded, retweets, short, kept
    names: Mapping[str, str] = field(default_factory=dict)  # handle -> the name that its profile shows
    sample: str = ""  # a text of its own, beginning with its prompt: the one on the picture
    num_avatars: int = 0  # that `find_avatar` has: the first handles'
    tags: tuple[str, ...] = ()
    visibility: Visibility = Visibility.PUBLIC
    owner: str = ""  # the tenant whose it is; "": nobody's, so that only who may do everything changes it
    from_hub: bool = False  # fetched from a Hub, and can be again
    is_embedded: bool = False  # comes with the program: it stays, and is public
    is_disabled: bool = False  # out of use, by who runs the server

    @property
    def is_private(self) -> bool:
        return self.visibility is Visibility.PRIVATE


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of a revision, as a Hub serves it. The digests are "" where nobody asked for them."""

    name: str  # relative, with "/"
    num_bytes: int
    location: Path
    sha256: str = ""  # of what the Hub would keep by Git LFS; "" of all else, which goes by its blob id
    blob_id: str = ""  # git's: sha1 over "blob <size>\0" and what git holds, the content or the pointer to it

    @property
    def lfs_pointer(self) -> bytes:
        """What git holds of a file with a `sha256`. Source: the Git LFS specification, version 1."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.num_bytes}\n".encode()

    def open(self) -> int:
        """A descriptor to read it by. Raises: FileNotFoundError, also for what is a link or no plain file by now."""
        try:
            descriptor = os.open(self.location, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as exc:
            if exc.errno in _IS_NO_FILE:
                raise FileNotFoundError(self.name) from exc
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileNotFoundError(self.name)
        return descriptor


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """`items` in order; `has_more` tells whether a further page follows the last one."""

    items: tuple[T, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class RevisionInfo:
    """One version of a model. `step`: of a checkpoint, which no alias ever named; None for a finished model."""

    model_id: str
    revision: str
    created_at: int  # Unix seconds
    num_bytes: int
    is_main: bool
    job_id: str | None = None
    step: int | None = None
    losses: Mapping[str, float] = field(default_factory=dict)


class Catalogue(Protocol):
    """Which models exist here. Methods block on disk: call them from a thread."""

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
        """By id, or the newest first. `query`: a part of the id, in any case; `owner`: the namespace, in any case.

        `tags`: all of them. A page follows the one before by what that one's last model said: its id is `after` in the
        order of ids, its (created_at, id) is `older_than` in the other. Neither need be here any more. Costs the same
        however many models there are. Of others' than the viewer's only public ones are listed.
        """
        ...

    def count_models(self, *, viewer: Viewer = ALL_SEEING) -> int | None:
        """How many `list_models` would list in all; None where to count them would take long."""
        ...

    def bytes_of(self, owner: str) -> int:
        """Of the newest revisions of a tenant's models."""
        ...

    def get_model(self, model_id: str, viewer: Viewer = ALL_SEEING) -> ModelInfo:
        """Raises: ModelNotFound, also for what the viewer may not see."""
        ...

    # What changes a model is refused to a viewer whose it is not: NotOwner, or ModelNotFound for what they may not see.

    def delete_model(self, model_id: str, viewer: Viewer = ALL_SEEING, *, by: str = "") -> str:
        """The id as it was spelled here. Raises: ModelNotFound, NotOwner; Conflict for the embedded base."""
        ...

    def disable(self, model_id: str, *, by: str = "", reason: str = "") -> str:
        """Nobody may use or see it until `enable`; the id as it is spelled. Raises: ModelNotFound; Conflict."""
        ...

    def enable(self, model_id: str) -> str:
        """Raises: ModelNotFound; Conflict where it is not disabled."""
        ...

    def read_card(self, model_id: str) -> str:
        """The README.md of the newest revision. Raises: ModelNotFound."""
        ...

    def find_picture(self, model_id: str) -> Path:
        """The file of its preview picture, a PNG. Raises: ModelNotFound when it has none."""
        ...

    def find_avatar(self, model_id: str, number: int) -> Path:
        """The file of the face of its handle `number`, from 0: a square WebP. Raises: ModelNotFound."""
        ...

    def set_preview(self, model_id: str, text: str, picture: bytes, viewer: Viewer = ALL_SEEING) -> None:
        """The sample and the picture (a PNG) that the revision has from now on, instead of those it was made with.

        Raises: ModelNotFound, NotOwner; Conflict for what nobody changes: the embedded base, a folder put here by hand.
        """
        ...

    def list_revisions(self, model_id: str, viewer: Viewer = ALL_SEEING) -> tuple[RevisionInfo, ...]:
        """Newest first. Raises: ModelNotFound."""
        ...

    def roll_back(self, model_id: str, revision: str, viewer: Viewer = ALL_SEEING) -> RevisionInfo:
        """Makes `main` name a revision that is here.

        Raises: ModelNotFound, NotOwner; Conflict for a checkpoint or the base.
        """
        ...

    def list_aliases(self, model_id: str) -> Mapping[str, str]:
        """Name -> revision, `main` among them. Raises: ModelNotFound."""
        ...

    def set_visibility(self, model_id: str, visibility: Visibility, viewer: Viewer = ALL_SEEING) -> None:
        """Of all revisions of the model. Raises: ModelNotFound, NotOwner; Conflict for the embedded base."""
        ...

    def list_files(self, model_id: str, *, with_digests: bool = False) -> tuple[RepoFile, ...]:
        """Those of the revision that `model_id` names, by name. Raises: ModelNotFound."""
        ...

    def find_file(self, model_id: str, name: str) -> RepoFile:
        """With its digests: of a large file they are computed once. Raises: ModelNotFound, NotFound."""
        ...


@dataclass(frozen=True, slots=True)
class PullProgress:
    """How far the fetch of a model from the Hub is. `file` is "" before the first."""

    phase: Literal["resolving", "waiting", "downloading", "converting", "publishing"]
    file: str = ""
    num_bytes: int = 0  # of all files of the model that are here
    total_bytes: int = 0  # 0: not known yet


class Puller(Protocol):
    """Fetches from the Hub what may or may not be here already. Blocks: call it from a thread."""

    def pull(self, model_id: str, on_progress: Callable[[PullProgress], None] = ...) -> ModelInfo:
        """The Hub's present revision, which then stays here until it is deleted.

        Raises: ModelNotFound, ModelGated, ModelUnusable, StoreUnavailable.
        """
        ...
