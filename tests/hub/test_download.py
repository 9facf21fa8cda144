"""Files over real sockets: whole or not at all, continued where they ended, and never one that is not as promised."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import DiskFull, ModelGated, ModelUnusable, RookeryError, StoreUnavailable
from serve.hub.breaker import Breakers
from serve.hub.download import ETAG_SUFFIX, Expected, download
from serve.hub.pace import Deadline
from serve.hub.session import Session
from tests.hub.scripted import Act, Request, Server, answer, file_answer, hang_up, head, reset, scripted, trickle

SHA = "a" * 40
PATH = f"/huggingtweets/ada/resolve/{SHA}/model.safetensors"
CONTENT = random.Random(5).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB_ID = hashlib.sha1(f"blob {len(CONTENT)}\0".encode() + CONTENT, usedforsecurity=False).hexdigest()
WHOLE = Expected("model.safetensors", len(CONTENT), SHA256, None, 10**6)
WRONG = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def fetch(
    server: Server,
    target: Path,
    expected: Expected = WHOLE,
    total_s: float = 20,
    on_bytes: Callable[[int], None] = lambda n: None,
    **options: Any,
) -> bytes:
    calm: dict[str, Any] = {"breakers": Breakers(), "random": lambda: 0.0}
    session = Session(server.url, None, **(calm | options))
    download(session, PATH, expected, target, Deadline(total_s), on_bytes)
    assert os.listdir(target.parent) == [target.name]
    return target.read_bytes()


def ranges(server: Server) -> list[str | None]:
    return [request.headers.get("range") for request in server.requests]


@pytest.mark.parametrize(
    "expected",
    [
        WHOLE,
        Expected("x", len(CONTENT), None, BLOB_ID, 10**6),
        Expected("x", len(CONTENT), None, None, 10**6),
        Expected("x", None, SHA256, None, 10**6),
        Expected("x", None, None, None, 10**6),
    ],
)
def test_file_arrives_whole_and_its_length_is_told(target: Path, expected: Expected) -> None:
    told: list[int] = []
    with scripted(file_answer(CONTENT)) as server:
        assert fetch(server, target, expected, on_bytes=told.append) == CONTENT
    assert sum(told) == len(CONTENT) and min(told) > 0 and ranges(server) == [None]


def test_empty_file_is_not_asked_for(target: Path) -> None:
    empty = Expected("x", 0, None, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", 10)
    with scripted(hang_up) as server:
        assert fetch(server, target, empty) == b"" and server.requests == []


# --- Going on where it ended ---------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [file_answer(CONTENT, cut=100_000), answer(200, {}, CONTENT[:100_000], length=300_000)])
def test_broken_transfer_is_continued_within_one_call(target: Path, end: Act) -> None:
    with scripted(end, file_answer(CONTENT, cut=70_000), file_answer(CONTENT)) as server:
        assert fetch(server, target) == CONTENT
    assert ranges(server) == [None, "bytes=100000-", "bytes=170000-"]


def test_transfer_that_ends_early_without_a_word_is_continued(target: Path) -> None:
    def end(connection: Any, _: Request) -> None:
        connection.sendall(head(200, length=None) + CONTENT[:1000])

    with scripted(end, file_answer(CONTENT)) as server:
        assert fetch(server, target) == CONTENT
    assert ranges(server) == [None, "bytes=1000-"]


def test_what_an_earlier_call_got_is_kept_and_continued_by_the_next(target: Path) -> None:
    named = {"ETag": f'"{SHA256}"'}
    with scripted(file_answer(CONTENT, named, cut=1000), reset) as server:
        with pytest.raises(StoreUnavailable):
            fetch(server, target)
        assert target.read_bytes() == CONTENT[:1000] and len(server.requests) == 4
    assert target.with_name(target.name + ETAG_SUFFIX).read_text() == f'"{SHA256}"'

    told: list[int] = []
    with scripted(file_answer(CONTENT, named)) as server:
        assert fetch(server, target, on_bytes=told.append) == CONTENT
    assert ranges(server) == ["bytes=1000-"] and server.requests[0].headers["if-range"] == f'"{SHA256}"'
    assert told[0] == 1000 and sum(told) == len(CONTENT)


def test_whole_file_from_an_earlier_call_is_only_checked(target: Path) -> None:
    target.write_bytes(CONTENT)
    with scripted(hang_up) as server:
        assert fetch(server, target) == CONTENT and server.requests == []


@pytest.mark.parametrize("rest", [WRONG[:1000], b"y" * len(CONTENT), CONTENT + b"more"])
def test_wrong_rest_of_an_earlier_call_is_thrown_away(target: Path, rest: bytes) -> None:
    target.write_bytes(rest)
    told: list[int] = []
    with scripted(file_answer(CONTENT)) as server:
        assert fetch(server, target, on_bytes=told.append) == CONTENT
    assert ranges(server)[-1] is None and sum(told) == len(CONTENT)


def test_server_that_knows_no_ranges_starts_over(target: Path) -> None:
    target.write_bytes(CONTENT[:1000])
    told: list[int] = []
    with scripted(answer(200, {}, CONTENT)) as server:
        assert fetch(server, target, on_bytes=told.append) == CONTENT
    assert ranges(server) == ["bytes=1000-"] and sum(told) == len(CONTENT)


def test_range_that_the_server_does_not_have_starts_over(target: Path) -> None:
    target.write_bytes(CONTENT[:1000])
    with scripted(answer(416, {"Content-Range": "bytes */500"}), file_answer(CONTENT)) as server:
        assert fetch(server, target) == CONTENT
    assert ranges(server) == ["bytes=1000-", None]


@pytest.mark.parametrize("said", ["bytes 999-299999/300000", "bytes 1000-299999/300001", "bytes", ""])
def test_another_range_than_was_asked_for_is_damage(target: Path, said: str) -> None:
    target.write_bytes(CONTENT[:1000])
    with scripted(answer(206, {"Content-Range": said}, CONTENT[1000:]), file_answer(CONTENT)) as server:
        assert fetch(server, target) == CONTENT
    assert ranges(server) == ["bytes=1000-", None]


def test_weak_etag_is_not_used_to_continue(target: Path) -> None:
    named = {"ETag": f'W/"{SHA256}"'}
    with scripted(file_answer(CONTENT, named, cut=1000), file_answer(CONTENT, named)) as server:
        assert fetch(server, target) == CONTENT
    assert "if-range" not in server.requests[1].headers


# --- Never what was not promised -----------------------------------------------------------------------------


def damages() -> dict[str, Act]:
    linked = {"X-Linked-Etag": f'"{"0" * 64}"'}
    return {
        "wrong bytes": file_answer(WRONG),
        "longer by its own account": answer(200, {}, CONTENT + b"x"),
        "longer than its account": lambda connection, _: connection.sendall(head(200, length=None) + CONTENT + b"x"),
        "shorter by its own account": answer(200, {}, CONTENT[:-1]),
        "another etag": answer(200, {"ETag": f'"{"0" * 64}"'}, CONTENT),
        "another linked etag": answer(200, {"ETag": f'"{SHA256}"'} | linked, CONTENT),
        "another commit": answer(200, {"X-Repo-Commit": "b" * 40}, CONTENT),
    }


@pytest.mark.parametrize("damage", damages().values(), ids=damages().keys())
def test_damage_is_fetched_once_more_and_then_refused(target: Path, damage: Act) -> None:
    with scripted(damage, file_answer(CONTENT)) as server:
        assert fetch(server, target) == CONTENT
    assert ranges(server) == [None, None]
    target.unlink()

    with scripted(damage) as server, pytest.raises(ModelUnusable, match="model.safetensors of 'huggingtweets/ada'"):
        fetch(server, target)
    assert len(server.requests) == 2 and os.listdir(target.parent) == []


SMALL = CONTENT[:5000]
EXPECTED = Expected("x", 5000, hashlib.sha256(SMALL).hexdigest(), None, 10**6)


def evils() -> st.SearchStrategy[Act]:
    """What a Hub may do to one request for SMALL, from the honest to the malicious."""
    lengths = st.integers(0, 5000)
    named = st.sampled_from([{}, {"ETag": f'"{EXPECTED.sha256}"'}, {"ETag": '"other"'}, {"X-Repo-Commit": "b" * 40}])
    ends = st.sampled_from([b"", b"\r\n", bytes(70_000)])
    return st.one_of(
        st.sampled_from([reset, hang_up, answer(503), answer(416), answer(404), answer(200), answer(206)]),
        st.builds(lambda said, cut: file_answer(SMALL, said, cut=cut), named, lengths),
        st.builds(lambda at: file_answer(SMALL[:at] + b"?" + SMALL[at + 1 :]), st.integers(0, 4999)),
        st.builds(lambda said, cut: answer(200, said, SMALL[:cut], length=5000), named, lengths),
        st.builds(
            lambda start, body, end: answer(206, {"Content-Range": f"bytes {start}-4999/5000"}, SMALL[body:] + end),
            lengths,
            lengths,
            ends,
        ),
        st.builds(
            lambda said: answer(206, {"Content-Range": said}, SMALL), st.text("bytes 0123456789-/*", max_size=20)
        ),
        st.builds(lambda cut, end: answer(200, {}, SMALL[:cut] + end), lengths, ends),
    )


@settings(max_examples=150)
@given(before=st.none() | st.binary(max_size=20) | st.integers(0, 5000), acts=st.lists(evils(), min_size=1, max_size=5))
def test_whatever_the_hub_does_the_file_is_right_or_not_there(before: bytes | int | None, acts: list[Act]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "x"
        if before is not None:
            target.write_bytes(SMALL[:before] if isinstance(before, int) else before)
        told: list[int] = []
        with scripted(*acts) as server:
            try:
                assert fetch(server, target, EXPECTED, on_bytes=told.append) == SMALL
            except RookeryError as exc:
                assert isinstance(exc, StoreUnavailable) or not target.exists()
            assert len(server.requests) <= 4
        if target.exists():
            assert sum(told) == target.stat().st_size <= 5000
        with scripted(file_answer(SMALL)) as server:  # whatever was left behind does no harm
            assert fetch(server, target, EXPECTED) == SMALL


def test_endless_file_is_cut_off_at_its_promised_length(target: Path) -> None:
    most: list[int] = []

    def endless(connection: Any, _: Request) -> None:
        connection.sendall(head(200, length=None))
        while True:
            connection.sendall(bytes(100_000))

    with scripted(endless) as server, pytest.raises(ModelUnusable, match="longer"):
        fetch(server, target, on_bytes=lambda n: most.append(target.stat().st_size))
    assert max(most) <= len(CONTENT)


def test_answer_with_another_etag_is_refused_before_its_body(target: Path) -> None:
    with scripted() as server:
        server.acts.append(trickle([server], head(200, {"ETag": '"other"'}, len(CONTENT)), every_s=9))
        started = time.monotonic()
        with pytest.raises(ModelUnusable, match="ETag"):
            fetch(server, target)
        assert time.monotonic() - started < 2


def test_too_large_a_file_is_not_asked_for(target: Path) -> None:
    with scripted(file_answer(CONTENT)) as server, pytest.raises(ModelUnusable, match="300,000 bytes; 299,999"):
        fetch(server, target, Expected("x", len(CONTENT), SHA256, None, len(CONTENT) - 1))
    assert server.requests == []


def test_file_of_unknown_length_is_limited_too(target: Path) -> None:
    with scripted(file_answer(CONTENT)) as server, pytest.raises(ModelUnusable):
        fetch(server, target, Expected("x", None, None, None, 1000))
    assert not target.exists()


def test_web_page_instead_of_a_file_is_an_outage(target: Path) -> None:
    page = answer(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>")
    with scripted(page) as server, pytest.raises(StoreUnavailable, match="web page"):
        fetch(server, target)
    assert len(server.requests) == 2


def test_refused_file_is_not_tried_again(target: Path) -> None:
    with scripted(answer(403)) as server, pytest.raises(ModelGated):
        fetch(server, target)
    assert len(server.requests) == 1


# --- Time and disk -------------------------------------------------------------------------------------------


def test_trickle_is_continued_by_a_faster_connection(target: Path) -> None:
    with scripted() as server:
        server.acts += [
            trickle([server], head(200, length=len(CONTENT)) + CONTENT[:5000], every_s=0.1, drop=b""),
            file_answer(CONTENT),
        ]
        assert fetch(server, target, window_s=0.5) == CONTENT
    assert ranges(server) == [None, "bytes=5000-"]


@pytest.mark.parametrize("every_s", [0.2, 60])
def test_trickle_ends_at_the_deadline_and_keeps_what_came(target: Path, every_s: float) -> None:
    with scripted() as server:
        start = head(200, length=len(CONTENT)) + CONTENT[:5000]
        server.acts.append(trickle([server], start, every_s=every_s, drop=CONTENT[5000:5001]))
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="longer than 1 s"):
            fetch(server, target, total_s=1)
        assert time.monotonic() - started < 2
    assert target.stat().st_size >= 5000


@pytest.mark.slow
@pytest.mark.parametrize("at", [b"", head(200, length=len(CONTENT))], ids=["headers", "body"])
def test_one_byte_every_nine_seconds_is_given_up_by_the_real_limits(target: Path, at: bytes) -> None:
    with scripted() as server:
        server.acts.append(trickle([server], at or b"HTTP/1.1 200 OK\r\nX-", every_s=9))
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            fetch(server, target, total_s=40)
        assert time.monotonic() - started < 41
    assert len(server.requests) > 1


def test_full_disk_is_said_and_what_came_is_removed(target: Path) -> None:
    target.symlink_to("/dev/full")  # every write to it ends in ENOSPC
    with scripted(file_answer(CONTENT, {"ETag": f'"{SHA256}"'})) as server, pytest.raises(DiskFull):
        fetch(server, target)
    assert os.listdir(target.parent) == [] and len(server.requests) == 1


def test_disk_that_refuses_is_said_and_does_not_speak_against_the_hub(target: Path) -> None:
    breakers = Breakers()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with scripted(file_answer(CONTENT)) as server, pytest.raises(StoreUnavailable, match="disk answers"):
            fetch(server, target, breakers=breakers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, before)
    assert breakers.of(server.url).state == "closed" and len(server.requests) == 1


def test_many_files_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    failed: list[RookeryError] = []
    with scripted(file_answer(CONTENT, cut=250_000)) as server:
        session = Session(server.url, None, breakers=Breakers(), random=lambda: 0.0)

        def work(i: int) -> None:
            try:
                download(session, PATH, WHOLE, tmp_path / str(i), Deadline(20))
            except RookeryError as exc:
                failed.append(exc)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed and [path.read_bytes() == CONTENT for path in tmp_path.iterdir()] == [True] * 4
