"""Kept texts of one or more people -> what is trained on, what is held out, and what a user sees first.

Several people make a "cyborg": each has the same weight, however much each wrote. Knows no formats and no tokens.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from serve.errors import InvalidRequest, ModelNotFound
from serve.training.archives import Archive, Post, read_archive
from serve.training.clean import Cleaned, clean
from serve.types import ModelId, check_range

NAMESPACE = "huggingtweets"
NUM_SAMPLES = 5
HELD_OUT_SHARE = 0.1


# --- Training texts -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dataset:
    """Texts to train on and texts never trained on. `counts`: handle -> kept, train (before repeating), held_out."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]


def build_dataset(
    kept_by_handle: Mapping[str, Sequence[str]], *, seed: int, held_out_share: float = HELD_OUT_SHARE
) -> Dataset:
    """Splits each handle's texts, then repeats the train texts of shorter handles up to the longest's length.

    A text that was posted twice is on one side only. The split depends on seed and texts, not on their order.
    Raises: InvalidRequest.
    """
    check_range("held_out_share", held_out_share, 0.0, 0.5)
    splits = {handle: _split(kept_by_handle[handle], seed, held_out_share) for handle in sorted(kept_by_handle)}
    longest = max((len(train) for train, _ in splits.values()), default=0)
    return Dataset(
        train=tuple(
            text for handle, (train, _) in splits.items() for text in _repeat(train, longest, f"{seed}/{handle}")
        ),
        held_out=tuple(text for _, held_out in splits.values() for text in held_out),
        counts={
            handle: {"kept": len(train) + len(held_out), "train": len(train), "held_out": len(held_out)}
            for handle, (train, held_out) in splits.items()
        },
    )


def _split(texts: Sequence[str], seed: int, share: float) -> tuple[list[str], list[str]]:
    """(train, held out). At least one text is held out if there is a second one to train on."""
    distinct = sorted(set(texts), key=lambda text: hashlib.sha256(f"{seed}/{text}".encode()).digest())
    num_held_out = min(max(round(len(distinct) * share), 1 if share else 0), max(len(distinct) - 1, 0))
    held_out = set(distinct[:num_held_out])
    return [text for text in texts if text not in held_out], [text for text in texts if text in held_out]


def _repeat(texts: Sequence[str], length: int, seed: str) -> list[str]:
    """All texts as often as they go into `length`, and a random part of them once more."""
    if not texts:
        return []
    times, rest = divmod(length, len(texts))
    return [*texts] * times + random.Random(seed).sample(texts, rest)


def epoch_texts(dataset: Dataset, seed: int, epoch: int) -> list[str]:
    """The train texts in the order of one epoch: the same for the same seed and epoch."""
    texts = list(dataset.train)
    random.Random(f"{seed}/{epoch}").shuffle(texts)
    return texts


# --- People and their archives ------------------------------------------------------------------------------


def merge_archives(archives: Iterable[Archive]) -> dict[str | None, Archive]:
    """One archive a person, by handle without case, in order of appearance; a post in two of them counts once.

    Archives without a handle count as one person's, under None.
    """
    merged: dict[str | None, Archive] = {}
    names: dict[str | None, str | None] = {}  # the handle without case -> as its owner first wrote it
    for archive in archives:
        key = names.setdefault(archive.handle and archive.handle.lower(), archive.handle)
        merged[key] = _join(merged[key], archive) if key in merged else archive
    return merged


def _join(first: Archive, second: Archive) -> Archive:
    seen = {post.id for post in first.posts if post.id is not None}
    new = tuple(post for post in second.posts if post.id not in seen)
    left_out = dict(first.left_out)
    for reason, count in [*second.left_out.items(), ("duplicate", len(second.posts) - len(new))]:
        left_out[reason] = left_out.get(reason, 0) + count
    return replace(
        first,
        format=_join_names([first.format, second.format], "+"),
        posts=first.posts + new,
        left_out={reason: count for reason, count in left_out.items() if count},
    )


def preview(paths: Sequence[Path], handle: str | None) -> dict[str, Any]:
    """What training on these files would learn from, for people to look at first. `handle`: whose they all are.

    An archive that names nobody goes by its file's name, where that could be a handle. Several files: sums over all
    people; `archives` then tells of each file alone. Raises: BadUpload; InvalidRequest for no files or no handle.
    """
    if not paths:
        raise InvalidRequest("There is no file to look at; name at least one archive.", param="file")
    given = None if handle is None else check_handle(handle)
    archives = [_with_owner(read_archive(path), given, path) for path in paths]
    if len(archives) == 1:
        return {**_report(archives[0], clean(archives[0])), "samples": _samples(clean(archives[0]).kept)}
    people = list(merge_archives(archives).values())
    cleaned = [clean(person) for person in people]
    total = Cleaned(
        kept=tuple(text for one in cleaned for text in one.kept),
        downloaded=sum(one.downloaded for one in cleaned),
        retweets=sum(one.retweets for one in cleaned),
        short=sum(one.short for one in cleaned),
    )
    return {
        **_report(_summary(people), total),
        "samples": _samples(total.kept),
        "archives": [_report(archive, clean(archive)) for archive in archives],
    }


def _with_owner(archive: Archive, given: str | None, path: Path) -> Archive:
    stem = path.name.partition(".")[0]
    return replace(archive, handle=given or archive.handle or (stem if _X_HANDLE.fullmatch(stem) else None))


def _summary(people: Sequence[Archive]) -> Archive:
    left_out: dict[str, int] = {}
    for person in people:
        for reason, count in person.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + count
    handles = sorted((person.handle for person in people if person.handle), key=str.lower)
    posts: tuple[Post, ...] = ()
    formats = [name for person in people for name in person.format.split("+")]
    return Archive("-".join(handles) or None, None, _join_names(formats, "+"), posts, left_out)


def _report(archive: Archive, cleaned: Cleaned) -> dict[str, Any]:
    return {
        "handle": archive.handle,
        "format": archive.format,
        **cleaned.counts,
        "status": cleaned.status,
        "kept_sorted_sha256": cleaned.kept_sorted_sha256,
        "left_out": dict(archive.left_out),
    }


def _samples(kept: Sequence[str]) -> list[str]:
    """Spread over the whole, the same each time."""
    step = max(len(kept) // NUM_SAMPLES, 1)
    return list(islice(kept[::step], NUM_SAMPLES))


def _join_names(names: Iterable[str], separator: str) -> str:
    return separator.join(sorted({part for name in names for part in name.split(separator)}))


# --- Names --------------------------------------------------------------------------------------------------

_X_HANDLE = re.compile(r"[A-Za-z0-9_]{1,15}", re.ASCII)
# A Bluesky handle is a host name; so is a fediverse one when written name.host.
_HOST_HANDLE = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9-]+)+", re.ASCII)


def model_name(handles: Sequence[str]) -> str:
    """`huggingtweets/a-b`: lower case, sorted, joined. Raises: InvalidRequest for what is no handle."""
    names = sorted({check_handle(handle).lower() for handle in handles})
    name = f"{NAMESPACE}/{'-'.join(names)}"
    try:
        return str(ModelId.parse(name))
    except ModelNotFound as exc:
        raise InvalidRequest(
            f"These {len(names)} handles make no model name, which has 1 to 96 characters and no '--'; "
            "train fewer people together, or choose a name with 'suffix'.",
            param="handle",
        ) from exc


def check_handle(handle: str) -> str:
    """The handle as it is written, without `@`. Raises: InvalidRequest."""
    bare = handle.strip().removeprefix("@")
    if not _X_HANDLE.fullmatch(bare) and not _HOST_HANDLE.fullmatch(bare):
        raise InvalidRequest(
            "A handle is 1 to 15 letters, digits and '_' on X, or a host name such as 'ada.bsky.social'; "
            "one of those given is neither.",
            param="handle",
        )
    return bare
