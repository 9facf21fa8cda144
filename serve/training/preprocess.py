"""Uploaded files -> whose texts a job learns from, with every count and hash that says what they were.

Used when a job is created, to refuse at once, and again by the worker that runs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace

from serve.errors import BadUpload, InvalidRequest, NotFound, TooFewTweets
from serve.training.archives import Archive, read_archive
from serve.training.archives.tweets import as_handle
from serve.training.clean import Cleaned, clean, require_enough, sample
from serve.training.dataset import NAMESPACE, merge_archives, model_name
from serve.types import FileRecord

PARAM = "training_file"  # how a job's request names its archives
VALIDATION_PARAM = "validation_file"
MAX_VALIDATION_TEXTS = 2_000  # they are gone through at each epoch's end; more would say no more


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody whose texts are learnt from. `handle` is the model's own name where the archive tells none."""

    handle: str
    display_name: str | None
    format: str
    left_out: dict[str, int]
    cleaned: Cleaned
    file_ids: tuple[str, ...] = ()  # of the archives, as in `Preprocessed.file_sha256`
    avatar: bytes | None = field(default=None, repr=False)  # PNG, JPEG, GIF or WebP by its first bytes, at most 1 MB


@dataclass(frozen=True, slots=True)
class Preprocessed:
    """`file_sha256`: file id -> sha256 of the file as it was uploaded; `said`: file id -> whose its archive says it is.

    `renamed`: (the handle in an archive, the other one that its uploader gave and that counts). `validation`: texts to
    judge by that came in a file of their own, a sample of them where they are many; None: some of the others are held
    out. Nobody learns from a text to judge by.
    """

    model_id: str
    people: tuple[Person, ...]
    file_sha256: dict[str, str]
    said: dict[str, str | None] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    validation: Cleaned | None = None

    @property
    def handles(self) -> tuple[str, ...]:
        return tuple(person.handle for person in self.people)

    @property
    def sources(self) -> tuple[str, ...]:
        """All whose posts are learnt, under whatever handle."""
        return (*self.handles, *(handle for handle in self.said.values() if handle))

    @property
    def display_names(self) -> dict[str, str]:
        """By handle, of those who have one."""
        return {person.handle: person.display_name for person in self.people if person.display_name}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        return {person.handle: person.cleaned.counts for person in self.people}

    @property
    def kept_by_handle(self) -> dict[str, Sequence[str]]:
        """All in memory; until here nothing is."""
        return {person.handle: tuple(person.cleaned.kept) for person in self.people}


def preprocess(
    files: Sequence[tuple[FileRecord, str | None]],
    *,
    suffix: str | None = None,
    validation: FileRecord | None = None,
) -> Preprocessed:
    """Reads and cleans `files`, each with the handle that its uploader gave; `suffix` names the model.

    Raises: NotFound for a file without its bytes; BadUpload; TooFewTweets; InvalidRequest where nothing says whose
    posts they are.
    """
    suffix = suffix and suffix.lower()
    judge_by = None if validation is None else _read_validation(validation)
    secret = frozenset(judge_by.kept if judge_by else ())
    given = [handle and _checked(handle) for _, handle in files]
    archives = [_read(file) for file, _ in files]
    owned = [
        archive if handle is None else replace(archive, handle=handle)
        for archive, handle in zip(archives, given, strict=True)
    ]
    file_ids: dict[str | None, tuple[str, ...]] = {}
    for (file, _), archive in zip(files, owned, strict=True):
        key = archive.handle and archive.handle.lower()
        file_ids[key] = (*file_ids.get(key, ()), file.id)
    people = tuple(
        replace(_to_person(archive, suffix, secret), file_ids=file_ids[handle and handle.lower()])
        for handle, archive in merge_archives(owned).items()
    )
    return Preprocessed(
        model_id=f"{NAMESPACE}/{suffix}" if suffix else model_name([person.handle for person in people]),
        people=people,
        file_sha256={file.id: _sha256(file) for file in (*(file for file, _ in files), validation) if file},
        said={file.id: archive.handle for (file, _), archive in zip(files, archives, strict=True)},
        renamed=tuple(
            (archive.handle, handle)
            for archive, handle in zip(archives, given, strict=True)
            if archive.handle and handle and archive.handle.lower() != handle.lower()
        ),
        validation=judge_by,
    )


def _read_validation(file: FileRecord) -> Cleaned:
    cleaned = sample(clean(_read(file, VALIDATION_PARAM)), MAX_VALIDATION_TEXTS)
    if not cleaned.kept:
        raise TooFewTweets(
            f"The validation file has {cleaned.downloaded:,} posts, and none of them is fit to judge by: all are "
            "retweets or too short.",
            param=VALIDATION_PARAM,
        )
    return cleaned


def _read(file: FileRecord, param: str = PARAM) -> Archive:
    if not file.path.is_file():
        raise NotFound(f"The bytes of file '{file.id}' are gone: upload it again.", param=param)
    try:
        return read_archive(file.path, filename=file.filename)
    except BadUpload as exc:
        exc.param = param
        raise


def _to_person(archive: Archive, suffix: str | None, secret: Set[str]) -> Person:
    handle = archive.handle or (suffix and _checked(suffix))  # it names the model, but is shown as a handle too
    if handle is None:
        raise InvalidRequest(
            f"An archive in the format '{archive.format}' does not say whose posts it holds: give a handle with it.",
            param="handle",
        )
    cleaned = clean(archive, without=secret)
    try:
        require_enough(cleaned, handle)
    except BadUpload as exc:
        exc.param = PARAM
        raise
    return Person(
        handle=handle,
        display_name=archive.display_name,
        format=archive.format,
        left_out=dict(archive.left_out),
        cleaned=cleaned,
        avatar=archive.avatar,
    )


def _checked(handle: str) -> str:
    bare = as_handle(handle)
    if bare is None:
        raise InvalidRequest(
            "A handle is made of ASCII letters, digits, '_', '.', '-' and '@'; one of those given is not.",
            param="handle",
        )
    return bare


def _sha256(file: FileRecord) -> str:
    with file.path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
