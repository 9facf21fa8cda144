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
from serve.training.archives import Archive, read_archive
from serve.training.archives.archive import join_posts
from serve.training.archives.spool import Texts
from serve.training.archives.tweets import as_handle
from serve.training.clean import MIN_CHARS, WARN_CHARS, Cleaned, clean
from serve.types import ModelId, check_range

NAMESPACE = "huggingtweets"
NUM_SAMPLES = 8
HELD_OUT_SHARE = 0.1


# --- Training texts -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dataset:
    """Texts to train on and texts never trained on. `counts`: handle -> kept, train (before repeating), held_out."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]


def build_dataset(
    kept_by_handle: Mapping[str, Sequence[str]],
    *,
    seed: int,
    held_out_share: float = HELD_OUT_SHARE,
    validation: Sequence[str] | None = None,
) -> Dataset:
    """Splits each handle's texts, then repeats the train texts of shorter handles up to the longest's length.

    `validation`: texts to hold out instead of a share. A text that was posted twice is on one side only. The split
    depends on seed and texts, not on their order. Raises: InvalidRequest where no text is left to learn from.
    """
    check_range("held_out_share", held_out_share, 0.0, 0.5)
    if validation is not None:
        return _hold_out(kept_by_handle, tuple(validation), seed)
    splits = {handle: _split(kept_by_handle[handle], seed, held_out_share) for handle in sorted(kept_by_handle)}
    secret = {text for _, held_out in splits.values() for text in held_out}  # two people may have posted the same
    unseen = {
        handle: ([text for text in train if text not in secret], held_out)
        for handle, (train, held_out) in splits.items()
    }
    return _join_splits(unseen, seed)


def _hold_out(kept_by_handle: Mapping[str, Sequence[str]], validation: tuple[str, ...], seed: int) -> Dataset:
    given = set(validation)
    splits = {
        handle: ([text for text in kept_by_handle[handle] if text not in given], list[str]())
        for handle in sorted(kept_by_handle)
    }
    if not all(train for train, _ in splits.values()):
        raise InvalidRequest(
            "The validation file holds every text of a training file: nothing is left to learn from.",
            param="validation_file",
        )
    return replace(_join_splits(splits, seed), held_out=validation)


def _join_splits(splits: Mapping[str, tuple[list[str], list[str]]], seed: int) -> Dataset:
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
    by_person: dict[str | None, list[Archive]] = {}
    for archive in archives:
        by_person.setdefault(archive.handle and archive.handle.lower(), []).append(archive)
    # The key is the handle as its owner first wrote it.
    return {own[0].handle: own[0] if len(own) == 1 else _join(own) for own in by_person.values()}


def _join(archives: Sequence[Archive]) -> Archive:
    posts, num_duplicates = join_posts(archives)
    return replace(
        archives[0],
        format=_join_names((archive.format for archive in archives), "+"),
        posts=posts,
        left_out=_sum_counts([*(archive.left_out for archive in archives), {"duplicate": num_duplicates}]),
        avatar=next((archive.avatar for archive in archives if archive.avatar), None),
    )


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for reason, count in ((reason, count) for one in counts for reason, count in one.items() if count):
        total[reason] = total.get(reason, 0) + count
    return total


# --- What a user sees first -----------------------------------------------------------------------------------

# Why a record of an archive is none of its posts, in the words of a preview.
REASONS = {
    "community": "posts in a community, which are not on the timeline",
    "deleted": "posts that their author has deleted",
    "duplicate": "posts that were there twice",
    "missing": "posts that the archive lists without having them",
    "no_text": "records without a text",
    "not_public": "posts that were not public: to followers only, or direct messages",
    "other_account": "posts of another account",
    "other_record": "records that are no posts, such as likes",
    "superseded_edit": "earlier versions of edited posts",
    "too_long": "posts too long to be posts",
}


def preview(
    paths: Sequence[Path],
    handle: str | Sequence[str | None] | None = None,
    *,
    filenames: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What training on these files would learn from, for people to look at first.

    `handle`: whose the files are, in their order; a lone one is the first file's. Where it has none, the archive says
    whose it is. `filenames`: the users' own names of the files, where they are stored under others. Several files: sums
    over all people; `archives` then tells of each file alone.
    Raises: BadUpload; InvalidRequest for no files, too many handles or what is no handle.
    """
    if not paths:
        raise InvalidRequest("There is no file to look at; name at least one archive.", param="file")
    given = [handle] if handle is None or isinstance(handle, str) else handle
    if len(given) > len(paths):
        raise InvalidRequest(
            f"There are {len(given)} handles for {len(paths)} archives; give at most one for each.", param="handle"
        )
    handles = [None if one is None else check_handle(one) for one in given] + [None] * (len(paths) - len(given))
    names = [path.name for path in paths] if filenames is None else filenames
    read = [read_archive(path, filename=name) for path, name in zip(paths, names, strict=True)]
    archives = [replace(archive, handle=own or archive.handle) for archive, own in zip(read, handles, strict=True)]
    cleaned = [clean(archive) for archive in archives]
    if len(archives) == 1:
        return {**_report(archives[0], cleaned[0]), "samples": _samples(cleaned[0].kept)}
    people = list(merge_archives(archives).values())
    # Whoever has one archive is that archive.
    parts = [next((c for a, c in zip(archives, cleaned, strict=True) if a is p), None) or clean(p) for p in people]
    total = Cleaned(
        kept=Texts(text for part in parts for text in part.kept),
        downloaded=sum(part.downloaded for part in parts),
        retweets=sum(part.retweets for part in parts),
        short=sum(part.short for part in parts),
    )
    return {
        **_report(_summary(people), total),
        "samples": _samples(total.kept),
        "archives": [_report(archive, own) for archive, own in zip(archives, cleaned, strict=True)],
    }


def _summary(people: Sequence[Archive]) -> Archive:
    return Archive(
        handle="-".join(sorted((person.handle for person in people if person.handle), key=str.lower)) or None,
        display_name=None,
        format=_join_names((person.format for person in people), "+"),
        posts=(),
        left_out=_sum_counts(person.left_out for person in people),
    )


def _report(archive: Archive, cleaned: Cleaned) -> dict[str, Any]:
    return {
        "handle": archive.handle,
        "display_name": archive.display_name,
        "format": archive.format,
        **cleaned.counts,
        "status": cleaned.status,
        "kept_sorted_sha256": cleaned.kept_sorted_sha256,
        "left_out": dict(archive.left_out),
        "reasons": {reason: REASONS[reason] for reason in archive.left_out},
        "warnings": _warnings(archive, cleaned),
    }


def _warnings(archive: Archive, cleaned: Cleaned) -> list[str]:
    found = f"{cleaned.num_chars:,} characters of usable text"
    checks = {
        "Nothing says whose posts these are: give a handle.": archive.handle is None,
        f"There are {found}; training needs at least {MIN_CHARS:,}.": cleaned.status == "too_few",
        f"There are only {found}: below {WARN_CHARS:,} a model repeats its material.": cleaned.status == "warn_few",
        "Most posts have fewer than three words of their own between blanks and are not learnt from; in a language "
        "written without blanks that is nearly all of them.": cleaned.short > len(cleaned.kept),
    }
    return [warning for warning, applies in checks.items() if applies]


def _samples(kept: Sequence[str]) -> list[str]:
    """Spread over the whole, the same each time."""
    step = max(len(kept) // NUM_SAMPLES, 1)
    return list(islice(kept, 0, step * NUM_SAMPLES, step))


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
    bare = as_handle(handle) or ""
    if not _X_HANDLE.fullmatch(bare) and not _HOST_HANDLE.fullmatch(bare):
        raise InvalidRequest(
            "A handle is 1 to 15 letters, digits and '_' on X, or a host name such as 'ada.bsky.social'; "
            "one of those given is neither.",
            param="handle",
        )
    return bare
