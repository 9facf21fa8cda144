"""Bluesky posts as JSON: records as `com.atproto.repo.listRecords` gives them, one a line, in an array or in pages.

Counts posts and reposts; likes, follows and all other collections are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from serve.errors import BadUpload
from serve.training.archives.archive import Archive, Collector, Post
from serve.training.archives.json_stream import as_list, as_mapping, as_text, read_values
from serve.training.archives.tweets import parse_time
from serve.training.archives.upload import Upload

_POST = "app.bsky.feed.post"
_REPOST = "app.bsky.feed.repost"
_START = re.compile(r'[\s\[]*\{\s*(?:"records"\s*:\s*\[\s*\{\s*)?"uri"\s*:\s*"at://')


class Bluesky:
    """`{uri: at://did/collection/rkey, cid, value}` objects. They name a DID, never a handle."""

    expects = "Bluesky records as JSON Lines"

    def recognises(self, upload: Upload) -> bool:
        return upload.members is None and _START.match(upload.head_text) is not None

    def read(self, upload: Upload) -> Archive:
        """Raises: BadUpload."""
        collector = Collector(upload.name)
        owners = set()
        for record in _records(upload):
            did, collection = _place_of(record)
            value = as_mapping(record.get("value"))
            if collection in (_POST, _REPOST):
                owners.add(did)
                collector.add(to_post(value, str(record.get("uri")), is_repost=collection == _REPOST))
            else:
                collector.leave_out("other_record")
        if len(owners) > 1:
            raise BadUpload(f"{upload.name} has posts of {len(owners)} accounts; upload one at a time.", param="file")
        posts, left_out = collector.finish()
        return Archive(None, None, "bluesky-jsonl", posts, left_out)


def _records(upload: Upload) -> Iterator[Mapping[str, Any]]:
    with upload.open_text() as text:
        for value in map(as_mapping, read_values(text, upload.name)):
            yield from map(as_mapping, as_list(value["records"])) if "records" in value else [value]


def _place_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """(DID, collection) of `at://did:plc:.../app.bsky.feed.post/3k...`."""
    parts = (as_text(record.get("uri")) or "").removeprefix("at://").split("/")
    return (parts[0], parts[1]) if len(parts) == 3 else ("", "")


def to_post(value: Mapping[str, Any], post_id: str, *, is_repost: bool) -> Post:
    """A record's value as a post. A repost is a reference and has no text. Nothing is HTML-escaped."""
    text = "" if is_repost else expand_links(as_text(value.get("text")) or "", as_list(value.get("facets")))
    return Post(post_id, text, is_repost, parse_time(as_text(value.get("createdAt"))), escaped=False)


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
