"""JSON of the API, of scrapers and of Rookery's own schema: JSON Lines, arrays, pages, a lone tweets.js.

Reads one tweet an object, or `{data, includes}` pages of API v2, of which `includes.tweets` (other people's) is
left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from serve.errors import BadUpload
from serve.training.archives.archive import Archive, Collector, the_only
from serve.training.archives.json_stream import as_list, as_mapping, read_assigned_values, read_values
from serve.training.archives.tweets import as_display_name, as_handle, author_of, to_post, unwrap, versions_of
from serve.training.archives.upload import Upload

_JSON_START = re.compile(r"\s*(?:\[\s*(?:[{\]]|\Z)|\{\s*(?:[\"}]|\Z))")
_SCRIPT_START = re.compile(r"\s*(?:window\.YTD\.|Grailbird\.data\.)(\w+)")
_TWEETS_SCRIPT = re.compile(r"tweets?|tweets_\d{4}_\d\d")


class Records:
    """JSON objects, one a tweet."""

    expects = "JSON or JSON Lines with a text in each record"

    def recognises(self, upload: Upload) -> bool:
        if upload.members is not None:
            return False
        head = upload.head_text
        return bool(_JSON_START.match(head) or _SCRIPT_START.match(head))

    def read(self, upload: Upload) -> Archive:
        """Raises: BadUpload."""
        collector = Collector(upload.name)
        authors: dict[tuple[str | None, str | None], None] = {}
        num_posts = 0
        for record in _records(upload):
            for tweet, author in _tweets_in(record):
                post = to_post(tweet)
                if post is None:
                    collector.leave_out("no_text")
                    continue
                num_posts += 1
                authors[author] = None
                collector.add(post, versions_of(tweet))
        if not num_posts:
            raise BadUpload(
                f"{upload.name} is JSON, but no record of it has a text ('full_text' or 'text').", param="file"
            )
        posts, left_out = collector.finish()
        handle = the_only(handle for handle, _ in authors)
        display_name = the_only(name for _, name in authors) if handle else None
        return Archive(handle, display_name, _format_of(upload), posts, left_out)


def _records(upload: Upload) -> Iterator[Mapping[str, Any]]:
    script = _SCRIPT_START.match(upload.head_text)
    if script and not _TWEETS_SCRIPT.fullmatch(script[1]):
        raise BadUpload(f"{upload.name} is a part of an X archive, but not its tweets (tweets.js).", param="file")
    with upload.open_text() as text:
        values = read_assigned_values(text, upload.name) if script else read_values(text, upload.name)
        yield from map(as_mapping, values)


def _format_of(upload: Upload) -> str:
    if _SCRIPT_START.match(upload.head_text):
        return "x-tweets-js"
    return "json" if upload.head_text.lstrip().startswith("[") else "jsonl"


Author = tuple[str | None, str | None]


def _tweets_in(record: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Author]]:
    if "data" not in record:
        tweet = unwrap(record)
        yield tweet, author_of(tweet)
        return
    users = {
        user.get("id"): (as_handle(user.get("username")), as_display_name(user.get("name")))
        for user in map(as_mapping, as_list(as_mapping(record.get("includes")).get("users")))
        if isinstance(user.get("id"), str)
    }
    data = record["data"]
    for tweet in map(as_mapping, data if isinstance(data, list) else [data]):
        author_id = tweet.get("author_id")
        yield tweet, users.get(author_id, (None, None)) if isinstance(author_id, str) else (None, None)
