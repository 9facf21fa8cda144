"""What every importer gives: posts of one person, and how a new format joins.

Knows no format, no cleaning rule and no file: see `upload` for reading and `clean` for what is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from serve.errors import BadUpload
from serve.training.archives.upload import Upload

# Nobody's own writing is larger; past this a file is made to fill memory. 10^6 posts of 200 characters.
MAX_POSTS = 1_000_000
MAX_TEXT_CHARS = 200_000_000
# The longest post X sells has 25,000 characters, the longest Mastodon instances allow 100,000.
MAX_POST_CHARS = 100_000


@dataclass(frozen=True, slots=True)
class Post:
    """One post as its archive has it. `escaped`: the text has `&amp; &lt; &gt;` for `& < >`."""

    id: str | None
    text: str
    is_retweet: bool
    created_at: datetime | None  # UTC
    escaped: bool = True


@dataclass(frozen=True, slots=True)
class Archive:
    """The public posts of one person. `left_out`: why and how many records are not among them."""

    handle: str | None
    display_name: str | None
    format: str
    posts: tuple[Post, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    avatar_url: str | None = None  # https, at X's own image host; never fetched


def unescape(text: str) -> str:
    """`&amp;`, then `&lt;`, then `&gt;`, nothing else: what X escapes, in huggingtweets' order."""
    return text.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")


class Importer(Protocol):
    """Reads one family of formats. A new one is a file here and a line in `IMPORTERS`."""

    @property
    def expects(self) -> str:
        """The format in a few words, for the sentence that says what could have been uploaded."""
        ...

    def recognises(self, upload: Upload) -> bool:
        """By content first, by name only where content cannot tell. Reads no more than `upload.head` and names."""
        ...

    def read(self, upload: Upload) -> Archive:
        """Raises: BadUpload."""
        ...


class Collector:
    """Takes posts in file order and settles which of them count: one per id, the newest of an edit chain."""

    def __init__(self, upload_name: str) -> None:
        self._upload_name = upload_name
        self._posts: list[Post] = []
        self._chains: dict[str, tuple[str, ...]] = {}  # id -> ids of all versions, for posts that were edited
        self._seen: set[str] = set()
        self._num_records = 0
        self._num_chars = 0
        self._left_out: Counter[str] = Counter()

    def leave_out(self, reason: str) -> None:
        """Counts a record that is not a post of this archive."""
        self._left_out[reason] += 1
        self.reserve(0)

    def add(self, post: Post, versions: Sequence[str] = ()) -> None:
        """`versions`: the ids of all versions of an edited post, oldest first."""
        if post.id is not None and post.id in self._seen:
            return self.leave_out("duplicate")
        if len(post.text) > MAX_POST_CHARS:
            return self.leave_out("too_long")
        self.reserve(len(post.text))
        self._posts.append(post)
        if post.id is not None:
            self._seen.add(post.id)
            if len(versions) > 1:
                self._chains[post.id] = tuple(versions)

    def reserve(self, num_chars: int) -> None:
        """Counts a record that is to be kept in memory. Raises: BadUpload when they become too many."""
        self._num_records += 1
        self._num_chars += num_chars
        if self._num_records > MAX_POSTS or self._num_chars > MAX_TEXT_CHARS:
            raise BadUpload(
                f"{self._upload_name} has more than {MAX_POSTS:,} records or {MAX_TEXT_CHARS:,} characters of text; "
                "upload a part of it.",
                param="file",
            )

    def finish(self) -> tuple[tuple[Post, ...], dict[str, int]]:
        """The posts that count, in file order, and what was left out."""
        superseded = _superseded(self._chains)
        left_out = self._left_out + Counter({"superseded_edit": len(superseded)})
        return tuple(post for post in self._posts if post.id not in superseded), dict(left_out)


def _superseded(chains: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Ids of all versions but the newest present. An early version may not list the later ones."""
    longest: dict[str, tuple[str, ...]] = {}
    for versions in chains.values():
        longest[versions[0]] = max(longest.get(versions[0], ()), versions, key=len)
    superseded: set[str] = set()
    for versions in longest.values():
        present = [version for version in dict.fromkeys(versions) if version in chains]
        superseded.update(present[:-1])
    return superseded


def the_only(values: Iterable[str | None]) -> str | None:
    """The one value that all who have one agree on; None when they differ."""
    distinct = {value.lower(): value for value in values if value}
    return next(iter(distinct.values())) if len(distinct) == 1 else None
