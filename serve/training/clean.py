"""huggingtweets' rules for which posts to learn from and what is left of them.

Exact to the byte, since a model is only comparable with the original's if its text is. Knows no formats.
Source: huggingtweets' notebook (fix_text, clean_tweet, boring_tweet).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
    """What a model learns from, in the archive's order. Always: downloaded = retweets + short + kept."""

    kept: Sequence[str]
    downloaded: int
    retweets: int
    short: int

    def __post_init__(self) -> None:
        assert self.downloaded == self.retweets + self.short + len(self.kept), "a post was lost or counted twice"

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
        for text in self.kept.sorted() if isinstance(self.kept, Texts) else sorted(self.kept):
            digest.update(separator + text.encode())
            separator = b"\n"
        return digest.hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        return {
            "downloaded": self.downloaded,
            "retweets": self.retweets,
            "short": self.short,
            "kept": len(self.kept),
        }


def clean(archive: Archive) -> Cleaned:
    """Drops retweets, cleans the rest, drops what is then short. What is kept lies on disk, as the posts do."""
    num_own = 0

    def kept_texts() -> Iterator[str]:
        nonlocal num_own
        for post in archive.posts:
            if not post.is_retweet:
                num_own += 1
                text = clean_text(post.text, escaped=post.escaped)
                if not is_short(text):
                    yield text

    kept, num_posts = Texts(kept_texts()), len(archive.posts)
    return Cleaned(kept, downloaded=num_posts, retweets=num_posts - num_own, short=num_own - len(kept))


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
    raise TooFewTweets(
        f"'{name}' has {cleaned.num_chars:,} characters of usable text in {len(cleaned.kept):,} posts; at least "
        f"{MIN_CHARS:,} characters are needed. Of {cleaned.downloaded:,} posts, {cleaned.retweets:,} are retweets "
        f"and {cleaned.short:,} are too short. Add an archive with more posts in the person's own words.",
        param="file",
    )
