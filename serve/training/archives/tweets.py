"""One tweet as an object, in every shape that X and its API have given: object -> `Post`, or why it is none.

Knows no files. Shapes: X archives of all years, API v1.1, API v2 (flat), scrapers' JSON, and
`{id, created_at, full_text, retweeted}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache
from typing import Any

from serve.training.archives.archive import Agreement, Post, several_accounts
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
        or any(as_mapping(reference).get("type") == "retweeted" for reference in references)
        or is_marked_retweet(plain_names(record))
    )


# --- What a record says of itself, in JSON and in tables ------------------------------------------------------

_MAX_NAME_CHARS = 60
_YES = ("true", "t", "yes", "y")
_NOTHING = ("", "nan", "none", "null", "na", "false", "0")
_RETWEET_FLAGS = ("isretweet", "retweeted", "retweet")
_RETWEET_OF = (
    "retweetedstatusid",
    "retweetedstatus",
    "retweetedtweet",
    "referencedtweetsretweetedid",
    "retweetid",
    "reblog",
)
_DELETED = ("deletedat", "deleted", "isdeleted")
_COMMUNITY = ("communityid", "communityidstr")
# Only messages have a sender or a recipient. (`to` is in a scraper's table whom a tweet replies to.)
_MESSAGE = (
    "recipient",
    "recipients",
    "recipientid",
    "recipientidstr",
    "recipientscreenname",
    "sender",
    "senderid",
    "senderidstr",
    "senderscreenname",
    "dmconversationid",
)
_VISIBLE = ("public", "unlisted", "home", "everyone")  # in the fediverse; `home` is Misskey's word for unlisted
_PUBLIC = ("https://www.w3.org/ns/activitystreams#Public", "as:Public", "Public")


def plain_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record by names as `plain_name` writes them."""
    return {plain_name(name): value for name, value in record.items() if len(name) <= _MAX_NAME_CHARS}


@lru_cache(1024)
def plain_name(name: str) -> str:
    """Without case, blanks and punctuation: `isRetweet`, `is_retweet` and `Is Retweet` are one name."""
    return re.sub(r"[\W_]", "", name.lower())


def is_marked_retweet(fields: Mapping[str, Any]) -> bool:
    """By what `plain_names` or a table's columns give. The text is not looked at."""
    # X's own objects have id_str, and their `retweeted` means "by the account that asked".
    flags = (name for name in _RETWEET_FLAGS if name != "retweeted" or "idstr" not in fields)
    return (
        any(_word(fields.get(name)) in _YES for name in flags)
        or _word(fields.get("isretweet")) == "1"
        or _has_any(fields, _RETWEET_OF)
    )


def reason_to_leave_out(fields: Mapping[str, Any]) -> str | None:
    """Why a text is none of its author's public posts; None where it is one. `fields`: as for `is_marked_retweet`."""
    if _has_any(fields, _DELETED):
        return "deleted"
    if _has_any(fields, _COMMUNITY):
        return "community"
    is_hidden = _word(fields.get("visibility")) not in (*_VISIBLE, *_NOTHING)
    return "not_public" if is_hidden or _has_any(fields, _MESSAGE) or _is_sent_to_few(fields) else None


def is_to_everybody(record: Mapping[str, Any]) -> bool:
    """In ActivityPub public posts are `to` everybody, unlisted ones `cc` everybody."""
    return any(one in _PUBLIC for one in _audience(record))


def _is_sent_to_few(fields: Mapping[str, Any]) -> bool:
    is_addressed = fields.get("type") in ("Note", "Question") and ("to" in fields or "cc" in fields)
    is_addressed = is_addressed or any(isinstance(one, str) and "://" in one for one in _audience(fields))
    return is_addressed and not is_to_everybody(fields)


def _audience(record: Mapping[str, Any]) -> list[Any]:
    return [one for name in ("to", "cc") for one in as_list(record.get(name)) or [record.get(name)]]


def _has_any(fields: Mapping[str, Any], names: Sequence[str]) -> bool:
    return any(_word(fields.get(name)) not in _NOTHING for name in names)


def _word(value: Any) -> str:
    """A flag, a number or a short text in one writing; of an object or a list only whether there is anything in it."""
    if isinstance(value, str | bool | float | int):
        return str(value).strip().lower()
    return "something" if value else ""


# --- Whose it is, and when ------------------------------------------------------------------------------------


def versions_of(record: Mapping[str, Any]) -> Sequence[str]:
    """Ids of all versions of an edited tweet, oldest first; empty where nothing is said of edits."""
    info = as_mapping(record.get("edit_info"))
    edit = as_mapping(info.get("edit"))
    control = as_mapping(edit.get("editControlInitial")) or as_mapping(info.get("initial"))
    listed = as_list(control.get("editTweetIds")) or as_list(record.get("edit_history_tweet_ids"))
    versions = [version for version in map(post_id, listed) if version]
    initial = post_id(edit.get("initialTweetId"))
    return versions if initial is None or initial in versions else [initial, *versions]


def author_of(record: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    """The id, the handle and the display name of the account whose timeline this is, where the record says."""
    user = as_mapping(record.get("user") or record.get("author") or record.get("account"))
    ids = (
        record.get("author_id"),
        record.get("user_id_str"),
        record.get("user_id"),
        user.get("id_str"),
        user.get("id"),
    )
    handle = user.get("screen_name") or user.get("username") or record.get("username")
    name = as_display_name(user.get("name") or user.get("displayname"))
    return next(filter(None, map(post_id, ids)), None), as_handle(handle), name


class Owner:
    """Whose posts they are, where all agree. Another name under the same id is one that the account had before."""

    def __init__(self, upload_name: str) -> None:
        self._upload_name = upload_name
        self._ids, self._handles, self._names, self._without_id = Agreement(), Agreement(), Agreement(), Agreement()

    @property
    def id(self) -> str | None:
        return self._ids.value

    @property
    def handle(self) -> str | None:
        return self._handles.value

    @property
    def display_name(self) -> str | None:
        return self._names.value if self.handle else None

    def see(self, account_id: str | None, handle: str | None, name: str | None = None) -> None:
        """Raises: BadUpload for the first post of a second account."""
        self._ids.add(account_id)
        self._handles.add(handle)
        self._names.add(name)
        if account_id is None:
            self._without_id.add(handle)
        if self._ids.is_broken or self._without_id.is_broken:
            raise several_accounts(self._upload_name)


_HANDLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)


def as_handle(value: Any) -> str | None:
    """`Ada` of `@Ada`, `ada.social.example` of `@ada@social.example`; None for what cannot be a handle.

    No model's name may have an `@`.
    """
    bare = value.strip().removeprefix("@").replace("@", ".", 1) if isinstance(value, str) else ""
    return bare if _HANDLE.fullmatch(bare) else None


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
