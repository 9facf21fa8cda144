"""JSON of the API, of scrapers and of Rookery's own schema: JSON Lines, arrays, pages, a lone tweets.js.

Reads one tweet an object, or `{data, includes}` pages of API v2, of which `includes.tweets` (other people's) is
left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from serve.errors import BadUpload
from serve.training.archives.archive import Archive, Collector
from serve.training.archives.json_stream import as_list, as_mapping, read_assigned_values, read_values
from serve.training.archives.tweets import (
    Owner,
    as_display_name,
    as_handle,
    author_of,
    plain_names,
    post_id,
    reason_to_leave_out,
    to_post,
    unwrap,
    versions_of,
)
from serve.training.archives.upload import Upload

_JSON_START = re.compile(r"\s*(?:\[\s*(?:[{\]]|\Z)|\{\s*(?:[\"}]|\Z))")
_SCRIPT_START = re.compile(r"\s*(?:window\.YTD\.|Grailbird\.data\.)(\w+)")
# What holds the tweets of a page, in API v2, in v1.1's searches, and in files made of them; then what else a page has.
_TWEETS_KEYS = ("data", "tweets", "statuses")
_BESIDE_TWEETS = ("includes", "meta", "errors", "search_metadata")
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
        collector, owner = Collector(upload.name), Owner(upload.name)
        num_texts = 0
        for record in _records(upload):
            for tweet in _tweets_in(record):
                post = to_post(tweet)
                if post is None:
                    collector.leave_out("no_text")
                    continue
                num_texts += 1
                if reason := reason_to_leave_out(plain_names(tweet)):
                    collector.leave_out(reason)
                    continue
                if not post.is_retweet:  # some scrapers give those under the name of who wrote them
                    owner.see(*author_of(tweet))
                collector.add(post, versions_of(tweet))
            _see_users(as_list(as_mapping(record.get("includes")).get("users")), owner)
        if not num_texts:
            raise BadUpload(
                f"{upload.name} is JSON, but no record of it has a text ('full_text' or 'text').", param="file"
            )
        posts, left_out = collector.finish()
        return Archive(owner.handle, owner.display_name, _format_of(upload), posts, left_out)


def _see_users(users: list[Any], owner: Owner) -> None:
    """Pages of API v2 name the author beside the tweets; the others are people that the tweets mention."""
    for user in map(as_mapping, users):
        if owner.id is not None and post_id(user.get("id")) == owner.id:
            owner.see(owner.id, as_handle(user.get("username")), as_display_name(user.get("name")))


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


def _tweets_in(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    key = next((key for key in _TWEETS_KEYS if key in record), None)
    if key is not None:
        tweets = record[key]
        yield from map(unwrap, tweets if isinstance(tweets, list) else [tweets])
    elif not any(key in record for key in _BESIDE_TWEETS):
        yield unwrap(record)
