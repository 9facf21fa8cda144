"""Questions to a Hub over real sockets: what is repeated and what is not, who may be asked, and when it ends."""

from __future__ import annotations

import email.utils
import gzip
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import close_session, constants
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.errors import HubUnreachable, ModelGated, ModelNotFound, ModelUnusable, RookeryError, StoreUnavailable
from serve.hub.answers import Failure, Subject
from serve.hub.breaker import Breaker, Breakers
from serve.hub.pace import Deadline
from serve.hub.session import MAX_JSON_BYTES, Session
from tests.hub.scripted import Act, Server, answer, hang_up, head, json_answer, reset, scripted, trickle

ADA = "/api/models/huggingtweets/ada/revision/main"
FILE = f"/huggingtweets/ada/resolve/{'a' * 40}/config.json"
TOKEN = "hf_secret"
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
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def no_session_left() -> Iterator[None]:
    yield
    close_session()


def open_session(url: str, **options: Any) -> Session:
    """Without pauses between tries, unless the Hub asks for one."""
    calm: dict[str, Any] = {"breakers": Breakers(), "random": lambda: 0.0}
    return Session(url, TOKEN, **(calm | options))


def ask(server: Server, total_s: float = 20, path: str = ADA, **options: Any) -> Any:
    return open_session(server.url, **options).get_json(path, {"blobs": "true"}, Deadline(total_s))


def read(session: Session, path: str = FILE, total_s: float = 20, **options: Any) -> bytes:
    with session.stream(path, Deadline(total_s), **options) as got:
        return b"".join(got.chunks)


@contextmanager
def takes(least_s: float, most_s: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert least_s <= time.monotonic() - started <= most_s


def test_question_is_asked_as_huggingface_hub_asks_it() -> None:
    with scripted(json_answer(b'{"id": "huggingtweets/ada"}')) as server:
        assert ask(server) == {"id": "huggingtweets/ada"}
    (request,) = server.requests
    assert request.target == ADA + "?blobs=true"
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert request.headers["accept-encoding"] == "identity"
    assert "hf_hub/" in request.headers["user-agent"]


@pytest.mark.parametrize(
    "passing",
    [reset, hang_up, *(answer(status) for status in (408, 429, 500, 502, 503, 504)), answer(200, JSON, b"{", length=9)],
)
def test_passing_trouble_is_tried_again(passing: Act) -> None:
    with scripted(passing, passing, passing, json_answer(b"[1]")) as server:
        assert ask(server) == [1]
    assert len(server.requests) == 4


@pytest.mark.parametrize("passing", [reset, answer(503), answer(429)])
def test_trouble_that_stays_is_given_up_after_four_tries(passing: Act) -> None:
    with scripted(passing) as server, pytest.raises(StoreUnavailable) as caught:
        ask(server)
    assert len(server.requests) == 4
    assert (type(caught.value), caught.value.retry_after_s) == (StoreUnavailable, 30)
    assert "huggingtweets/ada" in caught.value.message and TOKEN not in caught.value.message


def test_pauses_grow_with_full_jitter_up_to_eight_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with scripted(answer(503)) as server, pytest.raises(StoreUnavailable):
        ask(server, 60, tries=7, random=lambda: 1.0, breakers=Breakers(lambda host: Breaker(host, failures=99)))
    assert pauses == [0.5, 1, 2, 4, 8, 8]


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (401, {"X-Error-Code": "RepoNotFound"}, ModelNotFound),
        (404, {"X-Error-Code": "RepoNotFound"}, ModelNotFound),
        (404, {"X-Error-Code": "RevisionNotFound"}, ModelNotFound),
        (404, {}, ModelNotFound),
        (401, {"X-Error-Code": "GatedRepo"}, ModelGated),
        (403, {"X-Error-Code": "GatedRepo"}, ModelGated),
        (401, {}, ModelGated),
        (403, {}, ModelGated),
        (451, {}, ModelGated),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, ModelUnusable),
        (400, {}, ModelUnusable),
        (410, {}, ModelUnusable),
        (418, {}, ModelUnusable),
        (404, {"X-Error-Message": "na\u00efve \u2026"}, ModelNotFound),
    ],
)
def test_refusal_is_final_and_has_its_own_name(status: int, headers: dict[str, str], kind: type[RookeryError]) -> None:
    with scripted(answer(status, headers, b"<secret>")) as server, pytest.raises(kind) as caught:
        ask(server)
    assert type(caught.value) is kind and len(server.requests) == 1
    assert "huggingtweets/ada" in caught.value.message and "secret" not in caught.value.message


def test_missing_file_is_told_from_a_missing_model() -> None:
    with scripted(answer(404, {"X-Error-Code": "EntryNotFound"})) as server, pytest.raises(ModelUnusable) as caught:
        read(open_session(server.url))
    assert "config.json" in caught.value.message


def test_endless_body_of_a_refusal_is_not_read() -> None:
    with scripted() as server:
        server.acts.append(trickle([server], head(404, length=10**9), every_s=0.01, drop=b"x" * 1000))
        with takes(0, 4), pytest.raises(ModelNotFound):
            ask(server)


# --- Retry-After and the breaker ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "asked_s"),
    [
        ({"Retry-After": "1"}, 1.0),
        ({"Retry-After": "0"}, 0.0),
        ({"ratelimit": '"api";r=0;t=1'}, 1.0),
        ({"ratelimit": '"api";r=7;t=300'}, 0.0),
        ({"Retry-After": "soon"}, 0.0),
        ({"Retry-After": "Mon, 01 Jan 2024 00:00:00 GMT"}, 0.0),
        ({"Retry-After": "Mon, 01 Jan 99999 00:00:00 +99999999999999999999"}, 0.0),
        ({"ratelimit": f'"api";r=0;t={"9" * 5000}'}, 0.0),
    ],
)
def test_retry_after_is_the_least_pause(headers: dict[str, str], asked_s: float) -> None:
    with scripted(answer(429, headers), json_answer()) as server, takes(asked_s, asked_s + 3):
        ask(server)


def test_retry_after_may_be_a_date() -> None:
    with scripted() as server:
        server.acts += [
            answer(503, {"Retry-After": email.utils.formatdate(time.time() + 2, usegmt=True)}),
            json_answer(),
        ]
        with takes(0.9, 5):  # dates have whole seconds
            ask(server)


def test_absurd_retry_after_is_an_hour() -> None:
    with scripted(answer(503, {"Retry-After": "9" * 400})) as server, pytest.raises(StoreUnavailable) as caught:
        ask(server)
    assert caught.value.retry_after_s == 3600


def test_retry_after_beyond_the_deadline_ends_it_at_once_and_is_handed_on() -> None:
    with scripted(answer(503, {"Retry-After": "77"})) as server, takes(0, 4), pytest.raises(StoreUnavailable) as caught:
        ask(server)
    assert caught.value.retry_after_s == 77 and len(server.requests) == 1


def test_host_that_keeps_failing_is_left_alone_until_a_probe_succeeds() -> None:
    now = [0.0]
    breakers = Breakers(lambda host: Breaker(host, failures=3, clock=lambda: now[0], jitter=lambda: 0.0))
    with scripted(answer(503), answer(503), answer(503), answer(503), json_answer()) as server:
        for _ in range(3):
            with pytest.raises(StoreUnavailable) as caught:
                ask(server, breakers=breakers)
            assert len(server.requests) == 3, "the fourth try was made though the breaker had opened"
        assert caught.value.retry_after_s == 5
        now[0] = 5
        with pytest.raises(StoreUnavailable) as caught:
            ask(server, breakers=breakers)
        assert len(server.requests) == 4 and caught.value.retry_after_s == 10
        now[0] = 15
        assert ask(server, breakers=breakers) == {} == ask(server, breakers=breakers)


def test_refusals_do_not_open_the_breaker() -> None:
    breakers = Breakers(lambda host: Breaker(host, failures=1))
    with scripted(answer(404), answer(403), answer(401), json_answer()) as server:
        for _ in range(3):
            with pytest.raises((ModelNotFound, ModelGated)):
                ask(server, breakers=breakers)
        assert ask(server, breakers=breakers) == {}


@pytest.mark.parametrize("bad", [answer(500), answer(200, {"Content-Type": "text/html"}, b"<html>"), json_answer(b"{")])
def test_one_bad_repository_asked_for_again_and_again_shuts_nobody_out(bad: Act) -> None:
    breakers = Breakers()
    with scripted() as server:
        server.acts.append(
            lambda conn, request: (bad if "/ada/" in request.target else json_answer(b"1"))(conn, request)
        )
        for path in (ADA, ADA.upper().replace("/API/MODELS/", "/api/models/"), FILE) * 3:
            with pytest.raises((StoreUnavailable, Failure)):
                open_session(server.url, breakers=breakers).get_json(path.replace("ADA", "ada"), {}, Deadline(20))
        assert breakers.of(server.url).state == "closed" and len(server.requests) > 9
        assert ask(server, path="/api/models/huggingtweets/bob", breakers=breakers) == 1


@pytest.mark.parametrize("bad", [answer(500), answer(200, {"Content-Type": "text/html"}, b"<html>")])
def test_trouble_with_several_repositories_is_the_hosts(bad: Act) -> None:
    breakers = Breakers(lambda host: Breaker(host, failures=3))
    with scripted(bad) as server:
        for name in "abc":
            assert breakers.of(server.url).state == "closed"
            with pytest.raises(StoreUnavailable):
                ask(server, path=f"/api/models/huggingtweets/{name}", breakers=breakers)
        assert breakers.of(server.url).state == "open"


@pytest.mark.parametrize("down", [*map(answer, (429, 502, 503, 504)), reset, None], ids=repr)
def test_f13_at_a_dead_hub_everybody_is_told_at_once_also_when_all_want_one_model(down: Act | None) -> None:
    breakers = Breakers()
    with scripted(down or reset) as server:
        pass
    with scripted(down) if down else nullcontext(server) as server:
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                ask(server, breakers=breakers)
        assert breakers.of(server.url).state == "open" and len(server.requests) in (0, 5)
        with takes(0, 0.1), pytest.raises(StoreUnavailable):
            ask(server, breakers=breakers)


def test_retry_after_binds_all_at_once_for_a_minute_at_most_and_who_was_told_for_all_of_it() -> None:
    breakers = Breakers()
    with scripted(answer(429, {"Retry-After": "3000"})) as server:
        told = []
        for name in "ab":
            with pytest.raises(StoreUnavailable) as caught:
                ask(server, path=f"/api/models/huggingtweets/{name}", breakers=breakers)
            told.append(caught.value.retry_after_s)
    assert len(server.requests) == 1 and told == [3000, pytest.approx(60, abs=1)]


def test_probe_lets_the_others_in_when_the_head_of_its_answer_is_good() -> None:
    now = [0.0]
    breaker = Breaker("hub", failures=1, clock=lambda: now[0])
    with scripted(answer(503), answer(200, body=b"x" * 100_000), json_answer(b"1")) as server:
        session = open_session(server.url, breakers=Breakers(lambda host: breaker))
        with pytest.raises(Failure):
            read(session)
        now[0] = 9
        with session.stream(FILE, Deadline(5)) as got:
            assert breaker.state == "half-open", "nobody has found the answer good yet"
            next(got.chunks)
            others: list[Any] = []
            thread = threading.Thread(target=lambda: others.append(session.get_json(ADA, {}, Deadline(5))))
            thread.start()
            thread.join()
            assert others == [1] and breaker.state == "closed"


def test_bodies_of_several_repositories_that_break_off_open_the_breaker() -> None:
    breakers = Breakers(lambda host: Breaker(host, failures=3))
    with scripted(answer(200, {}, b"x", length=9)) as server:
        session = open_session(server.url, breakers=breakers)
        for name in "aabbc":
            assert breakers.of(server.url).state == "closed"
            with pytest.raises(Failure):
                read(session, f"/huggingtweets/{name}/resolve/main/config.json")
        assert breakers.of(server.url).state == "open"


def test_errors_of_the_reader_leave_no_probe_behind() -> None:
    now = [0.0]
    breaker = Breaker("hub", failures=1, clock=lambda: now[0])
    with scripted(answer(503), answer(200, body=b"x")) as server:
        session = open_session(server.url, breakers=Breakers(lambda host: breaker))
        with pytest.raises(Failure):
            read(session)
        now[0] = 9
        with pytest.raises(KeyError), session.stream(FILE, Deadline(5)):
            raise KeyError
        assert read(session) == b"x" and breaker.state == "closed"


# --- JSON ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unreadable",
    [
        answer(200, {"Content-Type": "text/html"}, b"<html>"),
        answer(200, {}, b"{}"),
        json_answer(b"{"),
        json_answer(b"[" * 100_000),
        json_answer(b'{"a": ' + b"9" * 5000 + b"}"),
        json_answer(b"\xff"),
    ],
)
def test_answer_that_is_no_json_is_asked_for_once_more_only(unreadable: Act) -> None:
    with scripted(unreadable) as server, pytest.raises(StoreUnavailable, match="not readable") as caught:
        ask(server)
    assert len(server.requests) == 2 and caught.value.retry_after_s == 60


def test_overlong_json_is_refused_before_all_of_it_is_read() -> None:
    with scripted() as server:
        start = head(200, {"Content-Type": "application/json"}, 10**12)
        server.acts.append(trickle([server], start, every_s=0.0, drop=b" " * 500_000))
        with takes(0, 5), pytest.raises(ModelUnusable, match=f"{MAX_JSON_BYTES:,}"):
            ask(server)


def test_compressed_answer_is_not_unpacked() -> None:
    packed = gzip.compress(b"0" * 10_000_000)
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    with scripted(answer(200, headers, packed), json_answer(b"7")) as server:
        assert ask(server) == 7


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


@settings(max_examples=300, deadline=None, derandomize=True)
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


# --- Time ------------------------------------------------------------------------------------------------------


def deadlines() -> dict[str, bytes]:
    return {
        "nothing": b"",
        "headers": b"HTTP/1.1 200 OK\r\nX-",
        "interim answers": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 1",
        "a body": head(200, {"Content-Type": "application/json"}, 10**6),
        "an error's body": head(503, length=10**6),
    }


@pytest.mark.parametrize("start", deadlines().values(), ids=deadlines().keys())
@pytest.mark.parametrize("every_s", [0.3, 60])
def test_trickle_ends_at_the_deadline(start: bytes, every_s: float) -> None:
    with scripted() as server:
        server.acts.append(trickle([server], start, every_s=every_s))
        with takes(0, 2), pytest.raises(StoreUnavailable) as caught:
            ask(server, 1)
        assert type(caught.value) is StoreUnavailable
    assert sum(thread.name == "hub-request" for thread in threading.enumerate()) < 20


def test_trickled_headers_are_given_up_long_before_the_deadline_and_asked_for_again() -> None:
    with scripted() as server:
        server.acts += [trickle([server], b"HTTP/1.1 200 OK\r\nX-", every_s=0.1), json_answer(b"1")]
        with takes(0.5, 5):
            assert ask(server, 60, head_s=0.5) == 1


def test_slow_body_is_given_up_after_the_window_and_asked_for_again() -> None:
    with scripted() as server:
        slow = trickle([server], head(200, {"Content-Type": "application/json"}, 10**6), every_s=0.1)
        server.acts += [slow, json_answer(b"1")]
        with takes(0.5, 5):
            assert ask(server, 60, window_s=0.5) == 1


def test_time_the_reader_takes_is_not_held_against_the_hub() -> None:
    with scripted(answer(200, body=b"x" * 500_000)) as server:
        session = open_session(server.url, window_s=0.2, min_bytes_per_s=100_000)
        with session.stream(FILE, Deadline(20)) as got:
            total = 0
            for chunk in got.chunks:
                total += len(chunk)
                time.sleep(0.05)  # a slow disk: 8 chunks take twice the window
        assert total == 500_000


def test_unknown_name_and_closed_door_are_unreachable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for url in ("http://hub.invalid", f"http://127.0.0.1:{unused.getsockname()[1]}"):
            with pytest.raises(HubUnreachable) as caught:
                open_session(url).get_json(ADA, {}, Deadline(60))
            assert caught.value.retry_after_s == 30


def test_name_look_up_that_hangs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hang(*args: Any, **options: Any) -> Any:
        over.wait(10)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with takes(0.5, 4), pytest.raises(HubUnreachable):
        open_session("http://hub.test", head_s=0.5, tries=1).get_json(ADA, {}, Deadline(60))
    over.set()


def test_full_waiting_queue_is_unreachable_soon() -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as full,
        socket.create_connection(full.getsockname()),
        takes(4.5, 7),
        pytest.raises(HubUnreachable),
    ):
        open_session(f"http://127.0.0.1:{full.getsockname()[1]}").get_json(ADA, {}, Deadline(60))


def test_offline_mode_is_unreachable_and_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with scripted(json_answer()) as server, pytest.raises(HubUnreachable):
        ask(server)
    assert server.requests == []


# --- TLS -------------------------------------------------------------------------------------------------------


STORAGE = "cdn-lfs.hf.co"


@pytest.fixture
def ports() -> dict[str, int]:
    """Where the hosts are that are asked at a port of this machine and not at their own."""
    return {}


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ports: dict[str, int]) -> ssl.SSLContext:
    """For servers that are hub.test and the Hub's storage to this process: both names are this machine's."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on the PATH")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    names = "subjectAltName=DNS:hub.test,DNS:*.hf.co"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=hub.test"]
    command += ["-addext", names, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    find = socket.getaddrinfo

    def find_here(host: str, port: int, *rest: Any, **more: Any) -> Any:
        return find("127.0.0.1", ports.get(host, port), *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", find_here)
    close_session()  # certificates are read once
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def named(server: Server, host: str) -> str:
    return f"https://{host}:{port_of(server)}"


def port_of(server: Server) -> int:
    return int(server.url.rsplit(":", 1)[1])


def test_large_file_comes_from_the_storage_which_never_sees_the_token(
    tls: ssl.SSLContext, ports: dict[str, int]
) -> None:
    linked = {"X-Linked-Etag": '"digest"', "X-Repo-Commit": "a" * 40}
    with scripted(answer(200, {"ETag": '"of the storage"'}, b"abc"), tls=tls) as storage:
        ports[STORAGE] = port_of(storage)
        location = {"Location": f"https://{STORAGE}/file?signed"}
        with scripted(answer(302, linked | location), tls=tls) as server:
            session = open_session(named(server, "hub.test"))
            with session.stream(FILE, Deadline(20)) as got:
                assert (got.etag, got.commit, b"".join(got.chunks)) == ("digest", "a" * 40, b"abc")
    assert server.requests[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert storage.requests[0].target == "/file?signed" and "authorization" not in storage.requests[0].headers


def test_trouble_of_the_storage_does_not_close_the_hub(tls: ssl.SSLContext, ports: dict[str, int]) -> None:
    breakers = Breakers(lambda host: Breaker(host, failures=1))
    with scripted(answer(503), tls=tls) as storage:
        ports[STORAGE] = port_of(storage)
        location = {"Location": f"https://{STORAGE}/file"}
        with scripted(answer(302, location), tls=tls) as server:
            session = open_session(named(server, "hub.test"), breakers=breakers)
            with pytest.raises(Failure):
                read(session)
            assert breakers.of(named(server, "hub.test")).state == "closed"
            assert breakers.of(location["Location"]).state == "open"


def test_expired_address_of_the_storage_is_asked_for_anew(tls: ssl.SSLContext, ports: dict[str, int]) -> None:
    with scripted(answer(403), answer(200, body=b"abc"), tls=tls) as storage:
        ports[STORAGE] = port_of(storage)
        location = {"Location": f"https://{STORAGE}/file"}
        with scripted(answer(302, location), tls=tls) as server:
            session = open_session(named(server, "hub.test"))
            assert session.retrying(lambda: read(session), Deadline(20)) == b"abc"
    assert len(server.requests) == 2


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX-", head(200, JSON, 10**6)], ids=["headers", "body"])
def test_trickle_through_tls_ends_at_the_deadline(tls: ssl.SSLContext, start: bytes) -> None:
    with scripted(tls=tls) as server:
        server.acts.append(trickle([server], start, every_s=0.1))
        session = open_session(named(server, "hub.test"))
        with takes(0.9, 2), pytest.raises(StoreUnavailable, match="longer than"):
            session.get_json(ADA, {}, Deadline(1))


def test_handshake_that_never_ends_is_bounded(tls: ssl.SSLContext) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://hub.test:{silent.getsockname()[1]}"
        with takes(0.4, 4), pytest.raises(StoreUnavailable):
            open_session(url, head_s=0.5, tries=1).get_json(ADA, {}, Deadline(60))


@pytest.mark.parametrize(
    ("message", "kind"),
    [("Repository not found", ModelNotFound), ("Invalid credentials in Authorization header", ModelGated)],
)
def test_strangers_are_told_that_there_is_no_such_model_and_bad_tokens_are_not(
    tls: ssl.SSLContext, message: str, kind: type[RookeryError]
) -> None:
    with scripted(answer(401, {"X-Error-Message": message}), tls=tls) as server, pytest.raises(kind):
        open_session(named(server, "hub.test")).get_json(ADA, {}, Deadline(20))


def test_certificate_of_another_is_no_way_there(tls: ssl.SSLContext) -> None:
    with scripted(json_answer(), tls=tls) as server, pytest.raises(HubUnreachable):
        open_session(named(server, "other.test")).get_json(ADA, {}, Deadline(20))
    assert server.requests == []


# --- Threads and words -----------------------------------------------------------------------------------------


def test_many_threads_share_one_session() -> None:
    with scripted(json_answer(json.dumps({"a": "b" * 100_000}).encode())) as server:
        session = open_session(server.url)
        got: list[Any] = []

        def work() -> None:
            got.extend(len(session.get_json(ADA, {}, Deadline(20))["a"]) for _ in range(5))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == [100_000] * 20


@pytest.mark.parametrize(
    ("path", "repo", "revision", "file"),
    [
        ("/api/models/gpt2", "gpt2", None, None),
        ("/api/models/gpt2/revision/main", "gpt2", "main", None),
        ("/api/models/a/b/revision/refs%2Fpr%2F1?blobs=true", "a/b", "refs/pr/1", None),
        ("/a/b/resolve/main/config.json", "a/b", "main", "config.json"),
        ("/gpt2/resolve/main/x/y.json", "gpt2", "main", "x/y.json"),
        ("///", "///", None, None),
    ],
)
def test_paths_are_put_in_words(path: str, repo: str, revision: str | None, file: str | None) -> None:
    assert Subject.of(path) == Subject(repo, revision, file)
