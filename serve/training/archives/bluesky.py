"""Bluesky: the repository as a CAR file, and records as `com.atproto.repo.listRecords` gives them in JSON.

Counts posts and reposts; likes, follows and all other collections are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from serve.errors import BadUpload
from serve.training.archives.archive import Agreement, Archive, Collector, Post, several_accounts
from serve.training.archives.car import Repository, looks_like_car
from serve.training.archives.json_stream import as_list, as_mapping, as_text, read_values
from serve.training.archives.tweets import parse_time
from serve.training.archives.upload import Upload

_POST = "app.bsky.feed.post"
_REPOST = "app.bsky.feed.repost"
_JSON_START = re.compile(r"[\s\[]*\{")
_URI = re.compile(r'"uri"\s*:\s*"at://[^"/]+/[a-zA-Z0-9.-]+/[^"/]+"')
_URI_WITHIN_CHARS = 4096  # of the beginning: `cursor`, `cid` and a value may come before
_TID = re.compile(r"[2-7a-j][2-7a-z]{12}")
_TID_DIGITS = "234567abcdefghijklmnopqrstuvwxyz"
_TID_CLOCK_BITS = 10  # the lowest: which of several clocks it was


class BlueskyRepository:
    """`com.atproto.sync.getRepo`. It names a DID, never a handle."""

    expects = "a Bluesky repository (a .car file)"

    def recognises(self, upload: Upload) -> bool:
        return upload.members is None and looks_like_car(upload.head)

    def read(self, upload: Upload) -> Archive:
        """Raises: BadUpload."""
        collector = Collector(upload.name)
        with upload.open_bytes() as stream:
            repository = Repository(stream, upload.name)
        for key, cid in repository.entries():
            collection, _, _ = key.partition("/")
            if collection not in (_POST, _REPOST):
                collector.leave_out("other_record")
            elif (record := repository.record(cid)) is None:
                collector.leave_out("missing")
            else:
                uri = f"at://{repository.did}/{key}"
                collector.add(to_post(record, uri, is_repost=collection == _REPOST))
        posts, left_out = collector.finish()
        return Archive(None, None, "bluesky-car", posts, left_out)


class BlueskyRecords:
    """`{uri: at://did/collection/rkey, cid, value}` objects, one a line, in an array or in pages."""

    expects = "Bluesky records as JSON Lines"

    def recognises(self, upload: Upload) -> bool:
        head = upload.head_text[:_URI_WITHIN_CHARS]
        return upload.members is None and bool(_JSON_START.match(head) and _URI.search(head))

    def read(self, upload: Upload) -> Archive:
        """Raises: BadUpload."""
        collector, owner, num_records = Collector(upload.name), Agreement(), 0
        for record in _records(upload):
            num_records += 1
            uri = as_text(record.get("uri")) or ""
            did, collection = _place_of(uri)
            if collection not in (_POST, _REPOST):
                collector.leave_out("other_record")
                continue
            owner.add(did)
            collector.add(to_post(as_mapping(record.get("value")), uri, is_repost=collection == _REPOST))
        if owner.is_broken:
            raise several_accounts(upload.name)
        if not num_records:  # a feed, for one, which has other people's posts too
            raise BadUpload(
                f"{upload.name} is JSON of Bluesky, but not the records of an account: upload what "
                "'com.atproto.repo.listRecords' gives, or the repository (a .car file).",
                param="file",
            )
        posts, left_out = collector.finish()
        return Archive(None, None, "bluesky-jsonl", posts, left_out)


def _records(upload: Upload) -> Iterator[Mapping[str, Any]]:
    with upload.open_text() as text:
        for value in map(as_mapping, read_values(text, upload.name)):
            if "uri" in value and "value" in value:
                yield value
            else:  # a page, or the part of one that has its `cursor`
                yield from map(as_mapping, as_list(value.get("records")))


def _place_of(uri: str) -> tuple[str, str]:
    """(DID, collection) of `at://did:plc:.../app.bsky.feed.post/3k...`."""
    parts = uri.removeprefix("at://").split("/")
    return (parts[0], parts[1]) if len(parts) == 3 else ("", "")


def to_post(value: Mapping[str, Any], uri: str, *, is_repost: bool) -> Post:
    """A record's value as a post. A repost is a reference and has no text. Nothing is HTML-escaped."""
    text = "" if is_repost else expand_links(as_text(value.get("text")) or "", as_list(value.get("facets")))
    created_at = tid_time(uri.rpartition("/")[2]) or parse_time(as_text(value.get("createdAt")))
    return Post(uri, text, is_repost, created_at, escaped=False)


def tid_time(key: str) -> datetime | None:
    """The time that a record key was made at, which is truer than what the client wrote; None for another key."""
    if not _TID.fullmatch(key):
        return None
    number = 0
    for digit in key:
        number = number << 5 | _TID_DIGITS.index(digit)
    try:
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=number >> _TID_CLOCK_BITS)
    except OverflowError:
        return None


def expand_links(text: str, facets: list[Any]) -> str:
    """Puts each full link where the text shows a short one. Facets count bytes of UTF-8, not characters."""
    data = text.encode("utf-8")
    pieces, position = [], 0
    for start, end, uri in sorted(link for link in map(_link_of, facets) if link):
        if position <= start < end <= len(data):  # facets of strangers may overlap or lie outside
            pieces += [data[position:start], uri.encode("utf-8")]
            position = end
    return b"".join([*pieces, data[position:]]).decode("utf-8", "replace")


def _link_of(facet: Any) -> tuple[int, int, str] | None:
    index = as_mapping(as_mapping(facet).get("index"))
    start, end = index.get("byteStart"), index.get("byteEnd")
    uris = [as_text(as_mapping(feature).get("uri")) for feature in as_list(as_mapping(facet).get("features"))]
    uri = next(filter(None, uris), None)
    if uri is None or not isinstance(start, int) or not isinstance(end, int):
        return None
    return start, end, uri
