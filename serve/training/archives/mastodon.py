"""Mastodon's archive, as a zip or (older servers) as a .tar.gz, and its outbox.json alone.

Opens outbox.json, actor.json and the avatar. The outbox has everything that its owner sent, direct messages included:
only what is public or unlisted counts. Likes and bookmarks (other people's posts) are never opened.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from selectolax.lexbor import LexborHTMLParser

from serve.errors import BadUpload
from serve.training.archives.archive import MAX_POST_CHARS, Agreement, Archive, Collector, Post, several_accounts
from serve.training.archives.avatar import read_picture
from serve.training.archives.json_stream import as_list, as_mapping, as_text, read_values
from serve.training.archives.tweets import as_display_name, as_handle, is_to_everybody, parse_time, post_id
from serve.training.archives.upload import Members, Upload, find_base

_OUTBOX = re.compile(r"(?P<base>(?:[^/]+/)?)outbox\.json")
_AVATAR = re.compile(r"avatar\.(?:png|jpe?g|gif|webp)")
_LONE_OUTBOX = re.compile(r'\s*\{(?s:.){0,4096}?"(?:type"\s*:\s*"OrderedCollection(?:Page)?"|orderedItems"\s*:)')
_ACTOR = re.compile(r"/(?:users/|@)([^/]+)")  # ".../users/ada"; other servers say ".../@ada"

_MAX_HTML_CHARS = 10 * MAX_POST_CHARS
_LINE_END = re.compile(r"<br\b[^<>]*>|</li\s*>", re.IGNORECASE)
_BLOCK_END = re.compile(r"</(?:p|div|ul|ol|blockquote|pre|h[1-6])\s*>", re.IGNORECASE)
_TAG = re.compile(
    r"""<(?:(/?)([a-zA-Z][^\s/<>]*+)((?:\s+[\w:-]+(?:="[^"<>]*"|='[^'<>]*')?)*+\s*/?>)?|[!?/])""", re.ASCII
)
_WITHOUT_END = ("br", "hr", "img")
_MAX_STEPS = 10_000  # for a short text; deep enough for 140 tags in each other
_MAX_STEPS_A_CHAR = 10
_NO_TEXT = "script, style, .quote-inline"  # the last: a quoted post's address, for servers that show no quotes


class Mastodon:
    """`Create` of a Note or Question is a post, `Announce` a boost."""

    expects = "a Mastodon archive (a zip or .tar.gz with outbox.json)"

    def recognises(self, upload: Upload) -> bool:
        if upload.members is not None:
            return any(map(_OUTBOX.fullmatch, upload.members.names))
        return _LONE_OUTBOX.match(upload.head_text) is not None

    def read(self, upload: Upload) -> Archive:
        """Raises: BadUpload."""
        outbox = _Outbox(upload.name)
        if upload.members is None:
            with upload.open_text() as text:
                outbox.read(read_values(text, upload.name))
            return outbox.finish()
        base = find_base(upload.members, _OUTBOX, upload.name)
        owner = _read_owner(upload.members, base)
        outbox.owner_id = as_text(owner.get("id"))
        with upload.members.open_text(f"{base}outbox.json") as text:
            outbox.read(read_values(text, f"'outbox.json' in {upload.name}"))
        return replace(
            outbox.finish(owner.get("preferredUsername")),
            display_name=as_display_name(owner.get("name")),
            avatar=_read_avatar(upload.members, base),
        )


def _read_owner(members: Members, base: str) -> Mapping[str, Any]:
    """Broken or absent, it takes nothing from the posts."""
    with contextlib.suppress(BadUpload), members.open_text(f"{base}actor.json") as text:
        return as_mapping(next(read_values(text, "'actor.json'"), None))
    return {}


def _read_avatar(members: Members, base: str) -> bytes | None:
    names = (name for name in members.names if name.startswith(base) and _AVATAR.fullmatch(name.removeprefix(base)))
    return next((picture for name in names if (picture := read_picture(members, name))), None)


def _handle_of(actor_url: str | None, name: Any = None) -> str | None:
    """`ada.social.example` of `https://social.example/users/ada`: in a model's name there is no `@`."""
    try:
        place = urlsplit(actor_url or "")
        host = place.hostname or ""
    except ValueError:  # of a made-up address
        return None
    in_path = _ACTOR.match(place.path)
    name = as_text(name) or (in_path[1] if in_path else None)
    return as_handle(f"{name}.{host}") if name and host else None


# --- The outbox ---------------------------------------------------------------------------------------------


class _Outbox:
    """Collects what one account did. `owner_id`: which one; where nothing says so, all must be of the same."""

    def __init__(self, upload_name: str) -> None:
        self.owner_id: str | None = None
        self._upload_name, self._collector, self._actor = upload_name, Collector(upload_name), Agreement()

    def read(self, pages: Iterator[Any]) -> None:
        """Raises: BadUpload."""
        for page in pages:
            for activity in map(as_mapping, as_list(as_mapping(page).get("orderedItems"))):
                self._read_activity(activity)

    def finish(self, name: Any = None) -> Archive:
        posts, left_out = self._collector.finish()
        handle = _handle_of(self.owner_id, name) or _handle_of(self._actor.value)
        return Archive(handle, None, "mastodon", posts, left_out)

    def _read_activity(self, activity: Mapping[str, Any]) -> None:
        note, kind = as_mapping(activity.get("object")), activity.get("type")
        if kind not in ("Create", "Announce"):
            return self._collector.leave_out("other_record")
        if not all(is_to_everybody(one) for one in (activity, note) if "to" in one or "cc" in one or one is activity):
            return self._collector.leave_out("not_public")
        if not self._is_own(
            _ids_in(activity.get("actor")), _ids_in(note.get("attributedTo") if kind == "Create" else ())
        ):
            return self._collector.leave_out("other_account")
        post = _to_post(activity, note, is_boost=kind == "Announce")
        return self._collector.leave_out("too_long") if post is None else self._collector.add(post)

    def _is_own(self, actors: list[str], authors: list[str]) -> bool:
        owner = self.owner_id or next(iter(actors or authors), None)
        if self.owner_id is None:
            self._actor.add(owner)
            if self._actor.is_broken:
                raise several_accounts(self._upload_name)
        return all(owner in ids for ids in (actors, authors) if ids)


def _ids_in(value: Any) -> list[str]:
    """Of an account by its address, as an object, or of a list of such."""
    ids = (as_text(as_mapping(one).get("id")) or as_text(one) for one in (as_list(value) or [value]))
    return list(filter(None, ids))


def _to_post(activity: Mapping[str, Any], note: Mapping[str, Any], *, is_boost: bool) -> Post | None:
    """None where its text would take too long to read.

    A boost is a reference, and whatever text it comes with is another's. A poll's options are not its text.
    """
    text = "" if is_boost else html_to_text(as_text(note.get("content")) or "")
    return (
        None
        if text is None
        else Post(
            id=post_id(activity.get("id")) if is_boost else post_id(note.get("id")) or post_id(activity.get("id")),
            text=text,
            is_retweet=is_boost,
            created_at=parse_time(as_text(note.get("published")) or as_text(activity.get("published"))),
            escaped=False,
        )
    )


def html_to_text(html: str) -> str | None:
    """What a reader sees and the full addresses of links, of which Mastodon hides parts. Lines end as shown.

    None for what is too long or nested too deep to be a post.
    """
    if len(html) > _MAX_HTML_CHARS or not _is_quickly_parsed(html):
        return None
    tree = LexborHTMLParser(_BLOCK_END.sub(r"\g<0>\n\n", _LINE_END.sub(r"\g<0>\n", html)))
    for node in tree.css(_NO_TEXT):
        node.decompose()
    return as_text(tree.body.text() if tree.body else "") or ""


def _is_quickly_parsed(html: str) -> bool:
    """A parser's work at each tag grows with how deep it lies: the sum may not outgrow the text.

    An end tag counts only where it ends the last tag begun, and none does where comments or quoted `<` may hide some:
    so nothing lies deeper than is counted here.
    """
    open_tags, steps, is_plain = list[str](), 0, True
    for match in _TAG.finditer(html):
        is_end, name, is_closed = match[1] == "/", (match[2] or "").lower(), match[3] is not None
        is_plain = is_plain and is_closed
        if is_end and is_plain and open_tags and open_tags[-1] == name:
            open_tags.pop()
        elif not is_end and name and name not in _WITHOUT_END:
            open_tags.append(name)
        steps += len(open_tags)
    return steps <= _MAX_STEPS + _MAX_STEPS_A_CHAR * len(html)
