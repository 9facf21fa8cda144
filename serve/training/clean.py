"""huggingtweets' rules for which posts to learn from and what is left of them.

Exact to the byte, since a model is only comparable with the original's if its text is. Knows no formats.
Source: huggingtweets' notebook (fix_text, clean_tweet, boring_tweet).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import nsmallest
from itertools import groupby
from typing import Literal

from serve.errors import TooFewTweets
from serve.training.archives.archive import Archive, unescape
from serve.training.archives.spool import Texts

MIN_CHARS = 6_000  # huggingtweets refuses to train on less
WARN_CHARS = 40_000  # below, it trains with a warning: the model will repeat its material
MIN_OWN_WORDS = 3  # a post with fewer is left out
SEPARATOR = "<|endoftext|>"

_NOT_OWN = ("http", "@", "#")

Status = Literal["ok", "warn_few", "too_few"]


@dataclass(frozen=True)
class Cleaned:
    """What a model learns from, in the archive's order. Always: downloaded = retweets + short + set_aside + kept.

    `set_aside`: texts as good as those kept, which are in the validation file, or more than are needed to judge by.
    """

    kept: Sequence[str]
    downloaded: int
    retweets: int
    short: int
    set_aside: int = 0

    def __post_init__(self) -> None:
        found = self.retweets + self.short + self.set_aside + len(self.kept)
        assert self.downloaded == found, "a post was lost or counted twice"

    @cached_property
    def num_chars(self) -> int:
        """Characters of the kept texts joined with the separator: what `status` is measured by."""
        return sum(map(len, self.kept)) + len(SEPARATOR) * max(len(self.kept) - 1, 0)

    @property
    def status(self) -> Status:
        if self.num_chars < MIN_CHARS:
            return "too_few"
        return "warn_few" if self.num_chars < WARN_CHARS else "ok"

    @cached_property
    def kept_sorted_sha256(self) -> str:
        """Of the kept texts, sorted by code point and joined with newlines: independent of the order of posts."""
        digest, separator = hashlib.sha256(), b""
        for text in _sorted(self.kept):
            digest.update(separator + text.encode())
            separator = b"\n"
        return digest.hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        return {
            "downloaded": self.downloaded,
            "retweets": self.retweets,
            "short": self.short,
            **({"set_aside": self.set_aside} if self.set_aside else {}),
            "kept": len(self.kept),
        }


def clean(archive: Archive, *, without: Set[str] = frozenset()) -> Cleaned:
    """Drops retweets, cleans the rest, drops what is then short. What is kept lies on disk, as the posts do.

    `without`: cleaned texts to set aside.
    """
    num_own = num_set_aside = 0

    def kept_texts() -> Iterator[str]:
        nonlocal num_own, num_set_aside
        for post in archive.posts:
            if not post.is_retweet:
                num_own += 1
                text = clean_text(post.text, escaped=post.escaped)
                if text in without:
                    num_set_aside += 1
                elif not is_short(text):
                    yield text

    kept, num_posts = Texts(kept_texts()), len(archive.posts)
    num_short = num_own - num_set_aside - len(kept)
    return Cleaned(kept, num_posts, retweets=num_posts - num_own, short=num_short, set_aside=num_set_aside)


def sample(cleaned: Cleaned, most: int) -> Cleaned:
    """At most that many of the texts, the rest set aside: always the same, in whatever order they were posted."""
    if len(cleaned.kept) <= most:
        return cleaned
    distinct = (text for text, _ in groupby(_sorted(cleaned.kept)))
    kept = tuple(nsmallest(most, distinct, key=lambda text: hashlib.sha256(text.encode()).digest()))
    return replace(cleaned, kept=kept, set_aside=cleaned.set_aside + len(cleaned.kept) - len(kept))


def _sorted(texts: Sequence[str]) -> Iterable[str]:
    return texts.sorted() if isinstance(texts, Texts) else sorted(texts)


def clean_text(text: str, *, escaped: bool = True) -> str:
    """Plain characters, no links, white space as single spaces."""
    return " ".join(remove_links(unescape(text) if escaped else text).split())


# In this order for `http:`, then for `https:`. A link takes one blank with it: the one before, else the one after.
_LINK_RULES = tuple(
    (re.compile(pattern.format(scheme)), kept)
    for scheme in ("http:", "https:")
    for pattern, kept in (
        (r" {}\S+", ""),
        # Only with a blank after it. The original's `https:\S+ ` tries every start of a long word: quadratic.
        (r"({}\S+)( ?)", None),
        (r"\n{}\S+ ", ""),
        (r"\n{}\S+", ""),
        (r"{}\S+", ""),
    )
)


def remove_links(text: str) -> str:
    """Takes out everything from `http:` or `https:` to the next white space. Linear in the text's length."""
    if "http" not in text:
        return text
    for pattern, replacement in _LINK_RULES:
        text = pattern.sub(_unless_blank_follows if replacement is None else replacement, text)
    return text


def _unless_blank_follows(link: re.Match[str]) -> str:
    return "" if link[2] else link[1]


def is_short(text: str) -> bool:
    """Fewer than three words that are the author's own: no link, no mention, no hashtag in them."""
    own_words = [word for word in text.lower().split() if not any(mark in word for mark in _NOT_OWN)]
    return len(own_words) < MIN_OWN_WORDS


def require_enough(cleaned: Cleaned, name: str) -> None:
    """Raises: TooFewTweets naming what was found and what is needed."""
    if cleaned.status != "too_few":
        return
    shared = f", {cleaned.set_aside:,} are in the validation file too" if cleaned.set_aside else ""
    raise TooFewTweets(
        f"'{name}' has {cleaned.num_chars:,} characters of usable text in {len(cleaned.kept):,} posts; at least "
        f"{MIN_CHARS:,} characters are needed. Of {cleaned.downloaded:,} posts, {cleaned.retweets:,} are retweets"
        f"{shared} and {cleaned.short:,} are too short. Add an archive with more posts in the person's own words.",
        param="file",
    )
