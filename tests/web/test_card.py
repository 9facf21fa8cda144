"""Cards come from strangers: what they show is plain, asks no other host for anything, and is made in bounded time."""

from __future__ import annotations

import time

import pytest
from selectolax.lexbor import LexborHTMLParser

from serve.web.card import MAX_CHARS, MAX_HTML_BYTES, Cards, render_card
from tests.fakes.memory import MemoryCatalogue

FOLDER = "/huggingtweets/ada/resolve/abc123/"
ALLOWED = {
    "a": {"href", "title", "rel"},
    "img": {"src", "alt", "title", "loading"},
    "ol": {"start"},
    "pre": {"tabindex"},
}


def html(text: str) -> str:
    return render_card(text, FOLDER).html


def test_markdown_becomes_html_without_its_front_matter() -> None:
    shown = html("---\nlicense: mit\n---\n# Ada\n\n| a | b |\n|---|---|\n| *1* | 2 |\n\n```py\nx < 1\n```\n")
    assert "license" not in shown
    assert "<h3>Ada</h3>" in shown and "<td><em>1</em></td>" in shown and "x &lt; 1" in shown


def test_headings_go_below_those_of_the_page() -> None:
    shown = html("# one\n\n<h2 class=x>two</h2>\n\n###### six\n\n<p title='<h1>'>h1</p>")
    assert [node.tag for node in LexborHTMLParser(shown).css("h1, h2, h3, h4, h5, h6")] == ["h3", "h4", "h6"]


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "<ScRiPt src=//evil.com></ScRiPt>",
        "<img src=x.png onerror=alert(1)>",
        "<!--\n<img src=x onerror=alert(1)>--> <a title='--><img src=x onerror=y>'>a</a>",
        "<svg><style><img src=x onerror=alert(1)></style></svg>",
        "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
        "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
        "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
        "<form action=/logout method=post><button>b</button><input name=do value=delete></form>",
        "<div id=main class=notice style='position:fixed;inset:0;background:url(//evil.com)'>x</div>",
        "<a href='javascript:alert(1)'>x</a> [y](javascript:alert(1)) <a href='java&#10;script:alert(1)'>z</a>",
        "<a href='data:text/html,<script>alert(1)</script>'>x</a> <a href='vbscript:x'>y</a>",
        "[a](\\\\\\\\evil.com) <a href='/\\evil.com'>b</a> <a href='//evil.com'>c</a> <a href='../../logout'>d</a>",
        "<meta http-equiv=refresh content='0;url=//evil.com'><base href=//evil.com>",
        "<link rel=stylesheet href=//evil.com>",
        "<template><img src=x onerror=alert(1)></template><textarea><img src=y onerror=alert(1)></textarea>",
        "![a](http://evil.com/track.png) <img srcset='//evil.com/1x.png 1x'> <video poster=//evil.com></video>",
    ],
)
def test_nothing_breaks_out_of_a_card(hostile: str) -> None:
    body = LexborHTMLParser(f"<div id=card>{html(hostile)}</div>").css_first("#card")
    assert body is not None
    for node in body.css("*")[1:]:
        assert node.tag not in ("script", "style", "iframe", "form", "input", "svg", "meta", "base", "link", "video")
        assert set(node.attributes) <= ALLOWED.get(node.tag or "", set()), node.html
        target = node.attributes.get("href") or ""
        assert not target or target.startswith(("http://", "https://", "mailto:", FOLDER)), node.html
        if node.tag == "img":
            assert (node.attributes["src"] or "").startswith(FOLDER)


def test_links_are_followed_without_our_blessing() -> None:
    link = LexborHTMLParser(html("[x](https://example.org/a?b=1&c=2 't')")).css_first("a")
    assert link is not None
    assert link.attributes == {"href": "https://example.org/a?b=1&c=2", "title": "t", "rel": "nofollow noopener"}


def test_own_pictures_are_shown_and_those_of_others_are_linked() -> None:
    shown = LexborHTMLParser(
        html(
            "![mine](./img/my%20face.png?raw=true) ![theirs](https://example.org/a.png) [![badge](//x.org/b)](http://y.org)"
        )
    )
    assert [node.attributes for node in shown.css("img")] == [
        {"src": f"{FOLDER}img/my%20face.png", "alt": "mine", "loading": "lazy"}
    ]
    assert [(node.attributes["href"], node.text()) for node in shown.css("a")] == [
        ("https://example.org/a.png", "theirs"),
        ("http://y.org", "badge"),
    ]


def test_a_picture_without_words_has_an_empty_alternative() -> None:
    assert '<img src="/huggingtweets/ada/resolve/abc123/a.png" alt="" loading="lazy">' in html("<img src=a.png>")


def test_a_long_card_is_cut() -> None:
    assert render_card("a " * MAX_CHARS, FOLDER).is_cut
    assert not render_card(f"---\nx: {'y' * MAX_CHARS}\n---\nshort", FOLDER).is_cut


@pytest.mark.parametrize("piece", ["![", "*a ", "<div>", "<img src=//x>"])
def test_hostile_nesting_takes_bounded_time(piece: str) -> None:
    started = time.thread_time()
    render_card(piece * (1_000_000 // len(piece)), FOLDER)
    assert time.thread_time() - started < 10  # 0.7 s at most, 2026-11


@pytest.mark.parametrize("piece", ["[](a)", "![](a)", "&", "<a href=x>", "<b>"])
def test_what_becomes_much_html_is_cut_to_what_is_shown(piece: str) -> None:
    card = render_card(piece * (MAX_CHARS // len(piece)), FOLDER)
    assert len(card.html.encode()) <= MAX_HTML_BYTES
    assert card.is_cut is (piece in ("[](a)", "![](a)", "&", "<a href=x>"))


class Counting(MemoryCatalogue):
    """Knows whose card was read."""

    def __init__(self, *model_ids: str) -> None:
        super().__init__(*model_ids)
        self.read: list[str] = []

    def read_card(self, model_id: str) -> str:
        self.read.append(model_id)
        return super().read_card(model_id)


def test_cards_in_memory_are_bounded_by_their_bytes() -> None:
    catalogue = Counting(*(names := [f"bot{number}" for number in range(4)]))
    cards = Cards(catalogue, max_bytes=3500)  # three small ones
    for name in ("bot0", "bot1", "bot0", "bot2", "bot3", "bot0", "bot1"):
        cards.render(name, "abc123")
    assert [read.partition("@")[0] for read in catalogue.read] == [*names, "bot1"]
    none = Cards(catalogue, max_bytes=0)
    assert none.render("bot0", "abc123").html


def test_a_revision_is_rendered_once() -> None:
    catalogue = Counting("huggingtweets/ada")
    cards = Cards(catalogue)
    assert cards.render("huggingtweets/ada", "abc123") is cards.render("huggingtweets/ada", "abc123")
    cards.render("huggingtweets/ada", "abc122")
    assert catalogue.read == ["huggingtweets/ada@abc123", "huggingtweets/ada@abc122"]
