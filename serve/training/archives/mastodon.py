"""Mastodon's archive, as a zip or (older servers) as a .tar.gz, and its outbox.json alone.

Opens outbox.json, actor.json and the avatar. The outbox has everything that its owner sent, direct messages included:
only what is public or unlisted counts. Likes and bookmarks (other people's posts) are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from selectolax.lexbor import LexborHTMLParser

from serve.errors import BadUpload
from serve.training.archives.archive import MAX_POST_CHARS, Agreement, Archive, Collector, Post
from serve.training.archives.avatar import read_picture
from serve.training.archives.json_stream import as_list, as_mapping, as_text, read_values
from serve.training.archives.tweets import as_display_name, as_handle, parse_time, post_id
from serve.training.archives.upload import Members, Upload

_OUTBOX = re.compile(r"(?P<base>(?:[^/]+/)?)outbox\.json")
_AVATAR = re.compile(r"avatar\.(?:png|jpe?g|gif|webp)")
_LONE_OUTBOX = re.compile(r'\s*\{(?s:.){0,4096}?"(?:type"\s*:\s*"OrderedCollection(?:Page)?"|orderedItems"\s*:)')
_PUBLIC = ("https://www.w3.org/ns/activitystreams#Public", "as:Public", "Public")
_ACTOR = re.compile(r"/(?:users/|@)([^/]+)")  # ".../users/ada"; other servers say ".../@ada"

_MAX_HTML_CHARS = 10 * MAX_POST_CHARS
_LINE_END = re.compile(r"<br\b[^<>]*>|</li\s*>", re.IGNORECASE)
_BLOCK_END = re.compile(r"</(?:p|div|ul|ol|blockquote|pre|h[1-6])\s*>", re.IGNORECASE)
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
        collector, actor = Collector(upload.name), Agreement()
        if upload.members is None:
            with upload.open_text() as text:
                _read_outbox(read_values(text, upload.name), collector, actor)
            posts, left_out = collector.finish()
            return Archive(_handle_of(actor.value), None, "mastodon", posts, left_out)
        base = _find_base(upload.members, upload.name)
        with upload.members.open_text(f"{base}outbox.json") as text:
            _read_outbox(read_values(text, f"'outbox.json' in {upload.name}"), collector, actor)
        posts, left_out = collector.finish()
        owner = _read_owner(upload.members, base)
        handle = _handle_of(as_text(owner.get("id")), owner.get("preferredUsername")) or _handle_of(actor.value)
        avatar = _read_avatar(upload.members, base)
        return Archive(handle, as_display_name(owner.get("name")), "mastodon", posts, left_out, avatar=avatar)


def _find_base(members: Members, name: str) -> str:
    bases = {match["base"] for match in map(_OUTBOX.fullmatch, members.names) if match}
    if len(bases) > 1:
        raise BadUpload(f"{name} has an outbox in {len(bases)} folders; upload one archive at a time.", param="file")
    return bases.pop()


def _read_owner(members: Members, base: str) -> Mapping[str, Any]:
    if f"{base}actor.json" not in members:
        return {}
    with members.open_text(f"{base}actor.json") as text:
        return as_mapping(next(read_values(text, "'actor.json'"), None))


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


def _read_outbox(pages: Iterator[Any], collector: Collector, actor: Agreement) -> None:
    for page in pages:
        for activity in map(as_mapping, as_list(as_mapping(page).get("orderedItems"))):
            _read_activity(activity, collector, actor)


def _read_activity(activity: Mapping[str, Any], collector: Collector, actor: Agreement) -> None:
    note = as_mapping(activity.get("object"))
    kind, owner = activity.get("type"), as_text(activity.get("actor"))
    is_theirs = owner is not None and note.get("attributedTo", owner) != owner
    if kind not in ("Create", "Announce") or is_theirs:
        return collector.leave_out("other_record")
    if not all(_is_public(one) for one in (activity, note) if "to" in one or "cc" in one or one is activity):
        return collector.leave_out("not_public")
    actor.add(owner)
    collector.add(_to_post(activity, note, is_boost=kind == "Announce"))


def _is_public(record: Mapping[str, Any]) -> bool:
    """Public posts are `to` everybody, unlisted ones `cc` everybody."""
    audience = (record.get("to"), record.get("cc"))
    return any(one in _PUBLIC for field in audience for one in (field if isinstance(field, list) else [field]))


def _to_post(activity: Mapping[str, Any], note: Mapping[str, Any], *, is_boost: bool) -> Post:
    """A boost is a reference, and whatever text it comes with is another's. A poll's options are not its text."""
    return Post(
        id=post_id(activity.get("id")) if is_boost else post_id(note.get("id")) or post_id(activity.get("id")),
        text="" if is_boost else html_to_text(as_text(note.get("content")) or ""),
        is_retweet=is_boost,
        created_at=parse_time(as_text(note.get("published")) or as_text(activity.get("published"))),
        escaped=False,
    )


def html_to_text(html: str) -> str:
    """What a reader sees and the full addresses of links, of which Mastodon hides parts. Lines end as shown."""
    if len(html) > _MAX_HTML_CHARS:
        return html  # no longer a post; the collector leaves it out as such
    tree = LexborHTMLParser(_BLOCK_END.sub(r"\g<0>\n\n", _LINE_END.sub(r"\g<0>\n", html)))
    for node in tree.css(_NO_TEXT):
        node.decompose()
    return as_text(tree.body.text() if tree.body else "") or ""
