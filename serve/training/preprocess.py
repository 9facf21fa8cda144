"""Uploaded files -> whose texts a job learns from, with every count and hash that says what they were.

Used when a job is created, to refuse at once, and again by the worker that runs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from serve.errors import BadUpload, InvalidRequest, NotFound
from serve.training.archives import Archive, read_archive
from serve.training.archives.tweets import as_handle
from serve.training.clean import Cleaned, clean, require_enough
from serve.training.dataset import NAMESPACE, merge_archives, model_name
from serve.types import FileRecord

PARAM = "training_file"  # how a job's request names its archives


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody whose texts are learnt from. `handle` is the model's own name where the archive tells none."""

    handle: str
    display_name: str | None
    format: str
    left_out: dict[str, int]
    cleaned: Cleaned
    avatar_url: str | None = None


@dataclass(frozen=True, slots=True)
class Preprocessed:
    """`file_sha256`: file id -> sha256 of the file as it was uploaded.

    `renamed`: (the handle in an archive, the other one that its uploader gave and that counts).
    """

    model_id: str
    people: tuple[Person, ...]
    file_sha256: dict[str, str]
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def handles(self) -> tuple[str, ...]:
        return tuple(person.handle for person in self.people)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        return {person.handle: person.cleaned.counts for person in self.people}

    @property
    def kept_by_handle(self) -> dict[str, tuple[str, ...]]:
        return {person.handle: person.cleaned.kept for person in self.people}


def preprocess(files: Sequence[tuple[FileRecord, str | None]], *, suffix: str | None = None) -> Preprocessed:
    """Reads and cleans `files`, each with the handle that its uploader gave; `suffix` names the model.

    Raises: NotFound for a file without its bytes; BadUpload; TooFewTweets; InvalidRequest where nothing says whose
    posts they are.
    """
    suffix = suffix and suffix.lower()
    given = [handle and handle.strip().removeprefix("@") for _, handle in files]
    archives = [_read(file) for file, _ in files]
    merged = merge_archives(
        archive if handle is None else replace(archive, handle=handle)
        for archive, handle in zip(archives, given, strict=True)
    )
    people = tuple(_to_person(archive, suffix) for archive in merged.values())
    return Preprocessed(
        model_id=f"{NAMESPACE}/{suffix}" if suffix else model_name([person.handle for person in people]),
        people=people,
        file_sha256={file.id: _sha256(file) for file, _ in files},
        renamed=tuple(
            (archive.handle, handle)
            for archive, handle in zip(archives, given, strict=True)
            if archive.handle and handle and archive.handle.lower() != handle.lower()
        ),
    )


def _read(file: FileRecord) -> Archive:
    if not file.path.is_file():
        raise NotFound(f"The bytes of file '{file.id}' are gone: upload it again.", param=PARAM)
    try:
        return read_archive(file.path, filename=file.filename)
    except BadUpload as exc:
        exc.param = PARAM
        raise


def _to_person(archive: Archive, suffix: str | None) -> Person:
    handle = archive.handle or suffix
    if handle is None:
        raise InvalidRequest(
            f"An archive in the format '{archive.format}' does not say whose posts it holds: give a handle with it.",
            param="handle",
        )
    if as_handle(handle) is None:  # `suffix` names the model, but the handle is shown too
        raise InvalidRequest(
            "A handle is made of ASCII letters, digits, '_', '.', '-' and '@'; one of those given is not.",
            param="handle",
        )
    cleaned = clean(archive)
    try:
        require_enough(cleaned, handle)
    except BadUpload as exc:
        exc.param = PARAM
        raise
    return Person(handle, archive.display_name, archive.format, dict(archive.left_out), cleaned, archive.avatar_url)


def _sha256(file: FileRecord) -> str:
    with file.path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
