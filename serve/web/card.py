"""A model's card as safe HTML: Markdown and HTML from a stranger go in, a few plain elements come out.

Nothing in it runs, looks like a part of the page, or has a browser ask another host: pictures are this server's own
files, or links. Knows nothing of the rest of the page.
"""

from __future__ import annotations

import posixpath
import re
import sys
import threading
from collections import OrderedDict
from html import escape
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

import nh3
from markdown_it import MarkdownIt
from markupsafe import Markup
from selectolax.lexbor import LexborHTMLParser, LexborNode

from serve.types import Catalogue

# The longest part of a card that is rendered, in characters. The worst of 30 kinds of hostile cards this long takes
# 0.7 s (2026-11, 2 cores of an EPYC): time grows with the square of some nestings, so this is the bound on it.
MAX_CHARS = 64 << 10

MAX_HTML_BYTES = 256 << 10  # of what is shown: five characters can become a link of a hundred
_MAX_CACHE_BYTES = 8 << 20  # of cards, rendered, in memory: those that are looked at again and again
_ENTRY_BYTES = 1 << 10  # that one takes there beside its HTML
_MAX_IMAGES = 200
_MAX_DEPTH = 8  # in which an image is looked for inside a link

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n.*?\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_HEADING = re.compile(r"<(/?)h([1-6])>")
_TAGS = {"a", "b", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "ins"}
_TAGS |= {"kbd", "li", "ol", "p", "pre", "s", "strong", "sub", "sup", "ul"}
_TAGS |= {"table", "tbody", "td", "tfoot", "th", "thead", "tr"}
_DROPPED = {"script", "style", "template", "iframe", "noscript", "object", "textarea", "title", "select", "svg", "math"}
_ATTRIBUTES: dict[str, set[str]] = {"*": set(), "a": {"href", "title"}, "img": {"src", "alt", "title"}, "ol": {"start"}}
_SCHEMES = {"http", "https", "mailto"}

_markdown = MarkdownIt("commonmark", {"html": True}).enable("table")


class Card(NamedTuple):
    """What is shown of a card; "" where there is none."""

    html: Markup
    is_cut: bool


class Cards:
    """Those of one catalogue, each revision's rendered once, while it is looked at again and again."""

    def __init__(self, catalogue: Catalogue, max_bytes: int = _MAX_CACHE_BYTES) -> None:
        self._catalogue, self._max_bytes = catalogue, max_bytes
        self._lock = threading.Lock()
        self._cards: OrderedDict[tuple[str, str], Card] = OrderedDict()  # the one that was looked at last is last
        self._num_bytes = 0

    def render(self, model_id: str, revision: str) -> Card:
        """Raises: ModelNotFound."""
        key = (model_id, revision)
        with self._lock:
            if card := self._cards.get(key):
                self._cards.move_to_end(key)
                return card
        text = self._catalogue.read_card(f"{model_id}@{revision}")
        card = render_card(text, f"/{quote(model_id)}/resolve/{quote(revision)}/")
        with self._lock:
            if key not in self._cards:  # nobody was faster
                self._cards[key] = card
                self._num_bytes += _size_of(card)
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= _size_of(self._cards.popitem(last=False)[1])
        return card


def _size_of(card: Card) -> int:
    return sys.getsizeof(card.html) + _ENTRY_BYTES


def render_card(text: str, folder: str) -> Card:
    """`folder`: the address below which the model's files are, "/" at its end."""
    body = _FRONT_MATTER.sub("", text, count=1)
    max_chars = MAX_CHARS
    while len((html := _render(body[:max_chars], folder)).encode()) > MAX_HTML_BYTES:
        max_chars //= 2
    return Card(Markup(html), len(body) > max_chars)


def _render(text: str, folder: str) -> str:
    clean = nh3.clean(
        _with_own_images(_markdown.render(text), folder),
        tags=_TAGS,
        clean_content_tags=_DROPPED,
        attributes=_ATTRIBUTES,
        attribute_filter=lambda tag, name, value: _address(value, folder, tag) if name in ("href", "src") else value,
        link_rel="nofollow noopener",
        # What is wide scrolls sideways, by keyboard too; a picture loads when somebody unfolds the card.
        set_tag_attribute_values={"pre": {"tabindex": "0"}, "img": {"loading": "lazy"}},
        url_schemes=_SCHEMES,
    )
    return _HEADING.sub(_lower, clean).strip()


def _with_own_images(html: str, folder: str) -> str:
    """The same, with a link in the place of every image that is not a file of the model's."""
    body = LexborHTMLParser(html).body
    if body is None:
        return ""
    for number, image in enumerate(body.css("img")):
        source = (image.attributes.get("src") or "").strip()
        if number < _MAX_IMAGES and source and _address(source, folder, "img"):
            image.attrs["alt"] = image.attributes.get("alt") or ""
            continue
        text = image.attributes.get("alt") or "picture"
        link = _address(source, folder, "a")
        image.replace_with(_new_link(link, text) if link and not _is_in_link(image) else text)
    return body.html or ""


def _new_link(address: str, text: str) -> LexborNode | str:
    found = LexborHTMLParser(f'<a href="{escape(address)}">{escape(text)}</a>').css_first("a")
    return found if found is not None else text


def _is_in_link(node: LexborNode) -> bool:
    above = node.parent
    for _ in range(_MAX_DEPTH):
        if above is None or above.tag == "a":
            break
        above = above.parent
    return above is not None and above.tag == "a"


def _address(said: str, folder: str, tag: str) -> str | None:
    """Where a link or an image of a card may lead: links anywhere on the web, images only to the model's own files."""
    said = said.strip()
    try:
        scheme, host, path, _, _ = urlsplit(said)
    except ValueError:
        return None
    if scheme or host:
        return said if tag == "a" and (scheme in _SCHEMES) else None
    path = unquote(path)
    if not path.isprintable() or "\\" in path or path.startswith("/"):
        return None
    name = posixpath.normpath(path)
    return folder + quote(name) if path and name.split("/")[0] not in ("..", ".") else None


def _lower(tag: re.Match[str]) -> str:
    """A heading two steps down: the page has its own title, and one above the card."""
    return f"<{tag[1]}h{min(6, int(tag[2]) + 2)}>"
