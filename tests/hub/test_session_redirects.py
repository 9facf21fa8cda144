"""Where a Hub may send its askers, who of them learns the token, and what a stream tells of its file."""

from __future__ import annotations

import re

import httpx2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.errors import ModelUnusable
from serve.hub.answers import Subject
from serve.hub.pace import Deadline
from tests.hub.asking import FILE, TOKEN, ask, open_session
from tests.hub.scripted import answer, json_answer, scripted

PIECES = [
    "https://",
    "//",
    "\\\\",
    "hub.test",
    "cdn.hf.co",
    ".hf.co",
    "evil.example",
    "127.0.0.1",
    ":80",
    "%2f",
    "a:b@",
]


# --- Redirects -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_moved_repository_is_followed_with_the_token(status: int) -> None:
    with scripted(answer(status, {"Location": "/api/models/huggingtweets/new"}), json_answer(b'"new"')) as server:
        assert ask(server) == "new"
    assert server.requests[1].target == "/api/models/huggingtweets/new"
    assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {TOKEN}"] * 2


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest",
        "https://evil.example/x",
        "https://hf.co.evil.example/x",
        "https://evil-hf.co/x",
        "https://evil.example\\@cdn.hf.co/x",
        "https://evil.example#@cdn.hf.co/x",
        "http://cdn.hf.co/x",
        "//evil.example/x",
        "file:///etc/passwd",
        "http://[",
        "https://127.0.0.1:1/",
        "https://evil.example\\.hf.co/",
        "https://evil.example%2f.hf.co/",
        "https://evil.example\u3002\u2100.hf.co/",
        "https://cdn.hf.co:22/",
        "https://cdn.hf.co./",
        "https://a@cdn.hf.co/",
    ],
)
def test_redirect_elsewhere_is_not_followed(location: str) -> None:
    with scripted(answer(302, {"Location": location})) as server, pytest.raises(ModelUnusable):
        ask(server)
    assert len(server.requests) == 1


@settings(max_examples=300)
@given(st.text(max_size=30) | st.lists(st.sampled_from([*"htp:/@.\\[]%#?-x", *PIECES]), max_size=9).map("".join))
@example("https://[::1]/")
@example("https://a.hf.co:99999/")
@example("https://\u2100.hf.co/")
@example("https://evil.example\\.hf.co/")
@example("https://evil.example%2f.hf.co/")
@example("https://user:password@hub.test/")
def test_whatever_a_redirect_says_only_hosts_of_the_hub_are_asked(location: str) -> None:
    session = open_session("https://hub.test")
    try:
        target = session._next(session._home, location, Subject.of(FILE))
    except ModelUnusable:
        return
    # As the client itself will read it: where the request goes, and whose name it says.
    request = httpx2.Request("GET", target)
    assert request.url.scheme == "https"
    assert re.fullmatch(r"hub\.test|[a-z0-9.-]+\.(hf|huggingface)\.co", request.url.host)
    assert request.headers["Host"] == request.url.host and request.url.userinfo == b""
    assert ("authorization" in session._headers(target)) == (request.url.netloc == b"hub.test")


def test_redirect_to_another_port_of_the_same_machine_is_elsewhere() -> None:
    with scripted(json_answer()) as other, scripted(answer(302, {"Location": other.url + "/x"})) as server:
        with pytest.raises(ModelUnusable, match="not a host of the Hub"):
            ask(server)
        assert other.requests == []


def test_storage_is_asked_without_the_token() -> None:
    session = open_session("https://hub.test")
    home = session._home
    assert "authorization" in session._headers(home.join("/a"))
    for url in ("https://cdn-lfs.hf.co/a", "https://cas-bridge.xethub.hf.co/a", "https://cdn.huggingface.co/a"):
        target = session._next(home, url, Subject.of(FILE))
        assert "authorization" not in session._headers(target)
    for url in ("http://hub.test/a", "https://hub.test:444/a", "https://sub.hub.test/a", "https://a:b@hub.test/a"):
        with pytest.raises(ModelUnusable):
            session._next(home, url, Subject.of(FILE))


def test_redirects_end() -> None:
    with scripted(answer(302, {"Location": "x"})) as server, pytest.raises(ModelUnusable, match="5 redirects"):
        ask(server)
    assert len(server.requests) == 6


# --- Streams ---------------------------------------------------------------------------------------------------


def test_stream_asks_for_the_rest_and_tells_what_the_hub_says_of_the_file() -> None:
    linked = {
        "Location": "/stored",
        "X-Linked-Etag": '"digest"',
        "X-Repo-Commit": "a" * 40,
        "ETag": '"of the redirect"',
    }
    stored = answer(206, {"ETag": '"of the storage"', "Content-Range": "bytes 3-5/6"}, b"def")
    with (
        scripted(answer(302, linked), stored) as server,
        open_session(server.url).stream(FILE, Deadline(5), start=3, etag='"mine"') as got,
    ):
        assert b"".join(got.chunks) == b"def"
        assert (got.status, got.etag, got.commit) == (206, "digest", "a" * 40)
        assert got.headers["ETag"] == '"of the storage"'
    for request in server.requests:
        assert (request.headers["range"], request.headers["if-range"]) == ("bytes=3-", '"mine"')


def test_weak_etag_loses_its_mark() -> None:
    with (
        scripted(answer(200, {"ETag": 'W/"abc"'})) as server,
        open_session(server.url).stream(FILE, Deadline(5)) as got,
    ):
        assert got.etag == "abc"
