"""What every importer gives: posts of one person, and how a new format joins.

Knows no format, no cleaning rule and no file: see `upload` for reading and `clean` for what is kept. Posts are kept in
a temporary file and not in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

from serve.errors import BadUpload
from serve.training.archives.mojibake import repair
from serve.training.archives.spool import Rows, Spool
from serve.training.archives.upload import Upload

# Nobody's own writing is larger; past this a file is made to fill the disk. 2 GiB of X's JSON hold 2 * 10^6 posts.
MAX_POSTS = 10_000_000
MAX_TEXT_CHARS = 1_000_000_000
# The longest post X sells has 25,000 characters, the longest Mastodon instances allow 100,000.
MAX_POST_CHARS = 100_000
MAX_OWN_CHARS = 1_000  # what X shows of a long tweet: 280 characters, escaped, and links
_MAX_VERSIONS = 100  # X allows five edits


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
    posts: Sequence[Post]
    left_out: Mapping[str, int] = field(default_factory=dict)
    avatar: bytes | None = field(default=None, repr=False)  # see `avatar.as_picture`


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


_SCHEMA = """
CREATE TABLE posts (
    seq INTEGER PRIMARY KEY, id TEXT UNIQUE, text TEXT, is_retweet INTEGER, created_at INTEGER, escaped INTEGER
);
CREATE TABLE rivals (text TEXT, created_at INTEGER);
CREATE TABLE edits (first TEXT, versions TEXT, num_versions INTEGER);
CREATE TABLE excluded (id TEXT PRIMARY KEY) WITHOUT ROWID;
"""
_TWEET_LONG = f"length(text) <= {MAX_OWN_CHARS}"
_OWN = f"escaped AND NOT is_retweet AND {_TWEET_LONG}"
# Each half in its index's order, so that the limit spares going through the rest.
_FIND_OWN = f"""
SELECT * FROM (SELECT seq, text FROM posts WHERE {_OWN} AND created_at BETWEEN ? AND ? ORDER BY created_at, seq LIMIT ?)
UNION ALL SELECT * FROM (
    SELECT NULL, text FROM rivals WHERE {_TWEET_LONG} AND created_at BETWEEN ? AND ? ORDER BY created_at LIMIT ?
)
"""
_INSERT = "INSERT OR IGNORE INTO posts (id, text, is_retweet, created_at, escaped) VALUES (?, ?, ?, ?, ?)"
_POSTS = "SELECT id, text, is_retweet, created_at, escaped FROM posts ORDER BY seq"


def join_posts(archives: Sequence[Archive]) -> tuple[Sequence[Post], int]:
    """The posts of several archives, in order, and how many were there twice."""
    spool = Spool(_SCHEMA)
    for archive in archives:
        for post in archive.posts:
            spool.run(_INSERT, *_to_row(post))
    posts = Rows(spool, _POSTS, _to_post)
    return posts, sum(len(archive.posts) for archive in archives) - len(posts)


class Collector:
    """Takes posts in file order and settles which of them count: one per id, the newest of an edit chain."""

    def __init__(self, upload_name: str) -> None:
        self._upload_name = upload_name
        self._spool = Spool(_SCHEMA)
        self._num_records = self._num_chars = self._num_excluded = 0
        self._num_foreign = self._num_mojibake = 0  # texts that are not ASCII; those of them that can be repaired
        self._has_time_index = False
        self._left_out: Counter[str] = Counter()

    def leave_out(self, reason: str, number: int = 1) -> None:
        """Counts records that are no posts of this archive."""
        self._left_out[reason] += number
        self._count(number, 0)

    def leave_out_post(self, post: Post | None, reason: str) -> None:
        """The same of a post, of which a note may be; see `find_own`."""
        self.leave_out(reason)
        if post is not None and post.created_at is not None and not post.is_retweet:
            self._spool.run("INSERT INTO rivals VALUES (?, ?)", post.text[: MAX_OWN_CHARS + 1], _to_us(post.created_at))

    def exclude(self, post_id: str | None) -> None:
        """A post of this id that comes later is passed over in silence."""
        if post_id is None:
            return
        self._num_excluded += 1
        self._spool.run("INSERT OR IGNORE INTO excluded VALUES (?)", post_id)

    def add(self, post: Post, versions: Sequence[str] = ()) -> None:
        """`versions`: the ids of all versions of an edited post, oldest first."""
        if self._num_excluded and self._has("excluded", post.id):
            return
        if len(post.text) > MAX_POST_CHARS:
            return self.leave_out("too_long")
        if not self._spool.run(_INSERT, *_to_row(post)).rowcount:
            return self.leave_out("duplicate")
        self._count(1, len(post.text))
        if not post.text.isascii():
            self._num_foreign += 1
            self._num_mojibake += repair(post.text) != post.text
        if post.id is not None and 1 < len(versions) <= _MAX_VERSIONS:
            chain = (versions[0], json.dumps(versions), len(versions))
            self._spool.run("INSERT INTO edits VALUES (?, ?, ?)", *chain)

    def find_own(self, since: datetime, until: datetime, limit: int) -> Iterator[tuple[int | None, str]]:
        """(number, text) of posts of that time that are the person's own and still as X escaped them, oldest first.

        Then those that are left out, whose number is None; at most `limit` of either.
        """
        if not self._has_time_index:
            self._spool.run(f"CREATE INDEX posts_by_time ON posts (created_at) WHERE {_OWN}")
            self._spool.run(f"CREATE INDEX rivals_by_time ON rivals (created_at) WHERE {_TWEET_LONG}")
            self._has_time_index = True
        bounds = _to_us(since), _to_us(until), limit
        return self._spool.stream(_FIND_OWN, *bounds, *bounds)

    def rewrite(self, number: int, text: str) -> None:
        """Gives a post its whole text, which is not escaped. Raises: BadUpload when texts become too many."""
        self._count(0, len(text))
        self._spool.run("UPDATE posts SET text = ?, escaped = 0 WHERE seq = ?", text, number)

    def finish(self) -> tuple[Sequence[Post], dict[str, int]]:
        """The posts that count, in file order, and what was left out."""
        self._drop_superseded()
        if self._num_mojibake * 2 > self._num_foreign:
            self._spool.define("repaired", repair)
            self._spool.run("UPDATE posts SET text = repaired(text)")
        return Rows(self._spool, _POSTS, _to_post), dict(self._left_out)

    def _drop_superseded(self) -> None:
        """All versions but the newest present go. An early version may not list the later ones."""
        longest = "SELECT versions, max(num_versions) FROM edits GROUP BY first"
        for versions, _ in self._spool.stream(longest):
            present = [version for version in dict.fromkeys(json.loads(versions)) if self._has("posts", version)]
            for version in present[:-1]:
                self._spool.run("DELETE FROM posts WHERE id = ?", version)
                self._left_out["superseded_edit"] += 1

    def _has(self, table: str, post_id: str | None) -> bool:
        return self._spool.run(f"SELECT 1 FROM {table} WHERE id = ?", post_id).fetchone() is not None

    def _count(self, num_records: int, num_chars: int) -> None:
        self._num_records += num_records
        self._num_chars += num_chars
        if self._num_records > MAX_POSTS or self._num_chars > MAX_TEXT_CHARS:
            raise BadUpload(
                f"{self._upload_name} has more than {MAX_POSTS:,} records or {MAX_TEXT_CHARS:,} characters of text; "
                "upload a part of it.",
                param="file",
            )


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def _to_us(time: datetime | None) -> int | None:
    return None if time is None else (time - _EPOCH) // _MICROSECOND


def _to_row(post: Post) -> tuple[str | None, str, bool, int | None, bool]:
    return post.id, post.text, post.is_retweet, _to_us(post.created_at), post.escaped


def _to_post(post_id: str | None, text: str, is_retweet: int, created_at: int | None, escaped: int) -> Post:
    time = None if created_at is None else _EPOCH + created_at * _MICROSECOND
    return Post(post_id, text, bool(is_retweet), time, bool(escaped))


def several_accounts(name: str) -> BadUpload:
    """For a file whose posts are not all one person's. `name`: of the upload."""
    return BadUpload(f"{name} has posts of several accounts; upload those of one at a time.", param="file")


class Agreement:
    """The one value that all who have one agree on. `value` is None when none has, or when they differ."""

    def __init__(self) -> None:
        self.value: str | None = None
        self.is_broken = False

    def add(self, value: str | None) -> None:
        """Case makes no difference; the last writing counts."""
        if value and not self.is_broken:
            self.is_broken = self.value is not None and self.value.lower() != value.lower()
            self.value = None if self.is_broken else value
