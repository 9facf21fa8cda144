"""One tweet as an object, in every shape that X and its API have given: object -> `Post`.

Knows no files. Shapes: X archives of all years, API v1.1, API v2 (flat), scrapers' JSON, and
`{id, created_at, full_text, retweeted}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from serve.training.archives.archive import Post
from serve.training.archives.json_stream import as_list, as_mapping, as_text

RETWEET_START = "RT @"  # with a blank: "RT by hand" is no retweet, and handles may begin with RT_

_TEXT_KEYS = ("full_text", "text", "rawContent", "content", "tweet")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# "Sat Nov 09 12:14:18 +0000 2024"
_API_TIME = re.compile(
    r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) (\d\d) (\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d) (\d{4})", re.ASCII
)
_SPOILT_ID = re.compile(r"[\d.,]+E\+?\d+|\d+\.\d*", re.IGNORECASE)  # 1.45E+18: Excel keeps 15 digits
_MAX_ID_CHARS = 128


def unwrap(record: Any) -> Mapping[str, Any]:
    """The tweet in `{"tweet": {...}}` (2020 on) or bare (before)."""
    mapping = as_mapping(record)
    inner = mapping.get("tweet")
    return inner if isinstance(inner, dict) else mapping


def to_post(record: Mapping[str, Any]) -> Post | None:
    """None when the record has no text: a header, a like, another thing."""
    note = as_text(as_mapping(record.get("note_tweet")).get("text"))
    text = note or as_text(as_mapping(record.get("extended_tweet")).get("full_text"))
    text = text or next(filter(None, (as_text(record.get(key)) for key in _TEXT_KEYS)), None)
    if text is None:
        return None
    return Post(
        id=post_id(record.get("id_str")) or post_id(record.get("id")),
        text=text,
        is_retweet=_is_retweet(record, text),
        created_at=parse_time(as_text(record.get("created_at")) or as_text(record.get("date"))),
        escaped=note is None,
    )


def _is_retweet(record: Mapping[str, Any], text: str) -> bool:
    references = as_list(record.get("referenced_tweets"))
    return (
        text.startswith(RETWEET_START)
        or bool(record.get("retweeted_status") or record.get("retweetedTweet"))
        or any(as_mapping(reference).get("type") == "retweeted" for reference in references)
        # X's own objects have id_str, and their `retweeted` means "by the account that asked".
        or (record.get("retweeted") is True and "id_str" not in record)
    )


def versions_of(record: Mapping[str, Any]) -> Sequence[str]:
    """Ids of all versions of an edited tweet, oldest first; empty where nothing is said of edits."""
    info = as_mapping(record.get("edit_info"))
    edit = as_mapping(info.get("edit"))
    control = as_mapping(edit.get("editControlInitial")) or as_mapping(info.get("initial"))
    listed = as_list(control.get("editTweetIds")) or as_list(record.get("edit_history_tweet_ids"))
    versions = [version for version in map(post_id, listed) if version]
    initial = post_id(edit.get("initialTweetId"))
    return versions if initial is None or initial in versions else [initial, *versions]


def author_of(record: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The handle and the display name of the account whose timeline this is, where the record says."""
    user = as_mapping(record.get("user") or record.get("author"))
    handle = user.get("screen_name") or user.get("username") or record.get("username")
    return as_handle(handle), as_display_name(user.get("name") or user.get("displayname"))


_HANDLE = re.compile(r"@?([A-Za-z0-9_][A-Za-z0-9_.@-]{0,127})", re.ASCII)


def as_handle(value: Any) -> str | None:
    """The handle as its owner writes it, without `@`; None for what cannot be one."""
    match = _HANDLE.fullmatch(value.strip()) if isinstance(value, str) else None
    return match[1] if match else None


def as_display_name(value: Any) -> str | None:
    text = as_text(value)
    return "".join(char for char in text if char.isprintable())[:100].strip() or None if text else None


def post_id(value: Any) -> str | None:
    """An id as text; None where it is missing or spoilt, since a spoilt id would make two posts one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        return None
    text = (as_text(value) or "").strip()
    return text if 0 < len(text) <= _MAX_ID_CHARS and not _SPOILT_ID.fullmatch(text) else None


def parse_time(value: str | None) -> datetime | None:
    """UTC, from the API's form, ISO 8601 or `2015-01-24 02:02:37 +0000`; None for anything else.

    A time without zone is taken as UTC, a day as its midnight.
    """
    if value is None or len(value) > 64:
        return None
    try:
        time = _api_time(value) or datetime.fromisoformat(re.sub(r" (?=[+-]\d\d:?\d\d$)", "", value.strip()))
        return time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _api_time(value: str) -> datetime | None:
    # Not strptime: its month names depend on the process's locale.
    match = _API_TIME.fullmatch(value.strip())
    if match is None:
        return None
    month, day, hour, minute, second, sign, zone_hours, zone_minutes, year = match.groups()
    offset = timedelta(hours=int(zone_hours), minutes=int(zone_minutes)) * (-1 if sign == "-" else 1)
    clock = (int(hour), int(minute), int(second))
    return datetime(int(year), _MONTHS.index(month) + 1, int(day), *clock, tzinfo=timezone(offset))
