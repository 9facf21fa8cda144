"""The archive that X gives its users, as a zip: 2018 to today.

Opens tweets, note tweets, the lists of deleted and community tweets, and the account's name and picture; nothing
else. Likes (other people's texts) and direct messages are never opened.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from serve.errors import BadUpload
from serve.training.archives.archive import Archive, Collector, unescape
from serve.training.archives.avatar import read_picture
from serve.training.archives.json_stream import as_mapping, as_text, read_assigned_values
from serve.training.archives.tweets import (
    as_display_name,
    as_handle,
    parse_time,
    plain_names,
    post_id,
    reason_to_leave_out,
    to_post,
    unwrap,
    versions_of,
)
from serve.training.archives.upload import Members, Upload, find_base

# Exact names, since deleted-tweets.js, tweet-headers.js and community-tweet.js lie beside them. In the zip's top
# (2018-19), in data/ (2020 on), or in a folder that a user has zipped again.
_PARTS = re.compile(r"tweets?(?:-part\d+)?\.js")
_TWEETS = re.compile(rf"(?P<base>(?:[^/]+/)?(?:data/)?){_PARTS.pattern}")
_NOTES = re.compile(r"note-tweets?(?:-part\d+)?\.js")
_DELETED = re.compile(r"deleted-tweets?(?:-part\d+)?\.js")
_DELETED_HEADERS = re.compile(r"deleted-tweet-headers?(?:-part\d+)?\.js")
_COMMUNITY = re.compile(r"community-tweets?(?:-part\d+)?\.js")

_LINK = re.compile(r"https?://\S+")
_NOTE_CLOCK_SLACK = timedelta(seconds=2)  # a note and its tweet carry clocks of their own
_MAX_CANDIDATES = 100  # tweets of one person within the slack; more are made up


class XArchive:
    """data/tweets.js and parts (2022 on), data/tweet.js (2020-22), tweet.js with bare objects (2018-19)."""

    expects = "an X archive (a zip with data/tweets.js)"

    def recognises(self, upload: Upload) -> bool:
        return upload.members is not None and any(map(_TWEETS.fullmatch, upload.members.names))

    def read(self, upload: Upload) -> Archive:
        """Raises: BadUpload."""
        assert upload.members is not None, "recognises() has seen members"
        members, name = upload.members, upload.name
        base = find_base(members, _TWEETS, name)
        collector = Collector(name)
        _read_deleted(members, base, collector)
        for record in _records(members, base, _COMMUNITY):
            collector.leave_out_post(to_post(unwrap(record)), "community")
        _read_tweets(members, base, collector)
        for note in _read_notes(members, base):
            attach_note(note, collector)
        posts, left_out = collector.finish()
        handle, display_name = _read_owner(members, base)
        url = as_text(_read_profile(members, base).get("avatarMediaUrl")) or ""
        return Archive(handle, display_name, "x-archive", posts, left_out, avatar=_read_avatar(members, base, url))


def _records(members: Members, base: str, pattern: re.Pattern[str]) -> Iterator[Mapping[str, Any]]:
    for member in members.names:
        if member.startswith(base) and pattern.fullmatch(member.removeprefix(base)):
            with members.open_text(member) as text:
                for record in read_assigned_values(text, f"'{member.removeprefix(base)}'"):
                    yield as_mapping(record)


def _read_deleted(members: Members, base: str, collector: Collector) -> None:
    for record in _records(members, base, _DELETED):
        tweet = unwrap(record)
        collector.leave_out_post(to_post(tweet), "deleted")
        for deleted_id in (_id_of(tweet), *versions_of(tweet)):
            collector.exclude(deleted_id)
    for record in _records(members, base, _DELETED_HEADERS):
        collector.exclude(post_id(unwrap(record).get("tweet_id")))


def _read_tweets(members: Members, base: str, collector: Collector) -> None:
    for record in _records(members, base, _PARTS):
        tweet = unwrap(record)
        post = to_post(tweet)
        if post is None:
            collector.leave_out("no_text")
        elif reason := reason_to_leave_out(plain_names(tweet)):
            collector.leave_out_post(post, reason)
        else:
            collector.add(post, versions_of(tweet))


def _id_of(tweet: Mapping[str, Any]) -> str | None:
    return post_id(tweet.get("id_str")) or post_id(tweet.get("id"))


def _read_owner(members: Members, base: str) -> tuple[str | None, str | None]:
    """account.js, else manifest.js. Of account.js, which has an e-mail address, only two names are taken."""
    for member, key, handle_key, name_key in (
        ("account.js", "account", "username", "accountDisplayName"),
        ("manifest.js", "userInfo", "userName", "displayName"),
    ):
        with contextlib.suppress(BadUpload):  # broken, it takes nothing from the tweets
            for record in _records(members, base, re.compile(re.escape(member))):
                owner = as_mapping(record.get(key))
                if handle := as_handle(owner.get(handle_key)):
                    return handle, as_display_name(owner.get(name_key))
    return None, None


def _read_profile(members: Members, base: str) -> Mapping[str, Any]:
    """Says which picture is the owner's. A mere ornament: without it an archive is as good."""
    with contextlib.suppress(BadUpload):
        for record in _records(members, base, re.compile(r"profile\.js")):
            return as_mapping(record.get("profile"))
    return {}


def _read_avatar(members: Members, base: str, url: str) -> bytes | None:
    """The picture `<account id>-<name in the url>` in profile_media, where the page's wide header lies beside it."""
    wanted = re.split(r"_(?:normal|bigger|mini|\d+x\d+)\.|\.", url.rpartition("/")[2])[0]
    for name in members.names:
        in_folder = name.removeprefix(f"{base}profile_media/")
        if in_folder != name and wanted and in_folder.partition("-")[2].partition(".")[0] == wanted:
            return read_picture(members, name)
    return None


# --- Long tweets --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Note:
    """The whole text of a long tweet. It does not say of which tweet, and it is not HTML-escaped."""

    text: str
    created_at: datetime


def _read_notes(members: Members, base: str) -> Iterator[Note]:
    for record in _records(members, base, _NOTES):
        note = as_mapping(record.get("noteTweet"))
        text = as_text(as_mapping(note.get("core")).get("text"))
        created_at = parse_time(as_text(note.get("createdAt")))
        if text and created_at:
            yield Note(text, created_at)


def attach_note(note: Note, collector: Collector) -> None:
    """Puts the note in the place of the tweet that has its beginning and its time.

    A thread may be posted within a second, so of all tweets that fit by time the longest beginning wins. Tweets that
    are left out take part: what belongs to one of them is left out too.
    """
    body = _without_links(note.text)
    best, best_length = None, 0
    since, until = (_moved(note.created_at, slack) for slack in (-_NOTE_CLOCK_SLACK, _NOTE_CLOCK_SLACK))
    for number, text in collector.find_own(since, until, _MAX_CANDIDATES):
        beginning = _beginning(text)
        fits = body.startswith(beginning) and (len(beginning) == len(body) or "…" in text)
        if fits and len(beginning) > best_length:
            best, best_length = number, len(beginning)
    if best is not None:
        collector.rewrite(best, note.text)


def _moved(time: datetime, by: timedelta) -> datetime:
    try:
        return time + by
    except OverflowError:  # a made-up year 1 or 9999
        return time


@lru_cache(100 * _MAX_CANDIDATES)  # of at most MAX_OWN_CHARS each; neighbouring notes have the same candidates
def _beginning(text: str) -> str:
    """No links (the tweet's own, a picture's), no ellipsis, plain characters."""
    return _without_links(unescape(text)).removesuffix("…").rstrip()


def _without_links(text: str) -> str:
    return " ".join(_LINK.sub("", text).split())
