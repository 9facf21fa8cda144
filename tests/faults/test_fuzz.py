"""Bad requests over real sockets: none of them breaks the API, and what breaks an API is seen."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.api.conftest import Server
from tests.faults.fuzz.answers import NoAnswer, read_answers
from tests.faults.fuzz.case import MARK, Case, request
from tests.faults.fuzz.exchange import exchange
from tests.faults.fuzz.run import Tally, case_of, corpus, fuzz
from tests.faults.fuzz.surface import read_surface
from tests.faults.fuzz.world import build_world

# Not `misshapen`: here the server under the API says itself, in plain text, what is no HTTP.
FAULTS = ("status_5xx", "hangs", "echoes", "large", "garbage", "cut", "crossed")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = Server(build_world(tmp_path_factory.mktemp("fuzz")))
    thread = threading.Thread(target=server.serve_for_ever)
    thread.start()
    assert server.is_up.wait(30)
    yield server.url
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def test_some_hundred_bad_requests_are_refused_as_they_should_be(url: str, tmp_path: Path) -> None:
    figures = asyncio.run(fuzz(url, 300, 7, tmp_path, with_loris=False))
    assert {name: figures[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0), sorted(tmp_path.iterdir())
    assert figures["cases"] == 300 + len(corpus()) and figures["by_status"]["200"] < 150


def test_a_case_follows_from_the_seed_and_its_number(url: str) -> None:
    surface = read_surface(url)
    first, again = ([case_of(number, 5, surface) for number in range(50)] for _ in range(2))
    assert first == again != [case_of(number, 6, surface) for number in range(50)]


# --- What is wrong is seen ----------------------------------------------------------------------------------


def answer(status: int, body: bytes, kind: str = "application/json", more: bytes = b"") -> bytes:
    head = b"HTTP/1.1 %d X\r\ncontent-type: %s\r\ncontent-length: %d\r\n%s\r\n"
    return head % (status, kind.encode(), len(body), more) + body


def error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


@asynccontextmanager
async def server_that_says(*pieces: bytes) -> AsyncIterator[int]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for raw in pieces:
            writer.write(raw)
            await writer.drain()
            await asyncio.sleep(0.1 if raw != pieces[-1] else 0)
        if not any(pieces):
            await reader.read()  # until the other side has given up
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port: int = server.sockets[0].getsockname()[1]
        yield port


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (answer(500, error("broken")), "status_5xx"),
        (answer(400, error(f"what is {MARK.decode()}?")), "echo"),
        (answer(400, error(f"what is '{MARK.decode()}'?")), "echo"),
        (answer(404, error(f"there is no '<{MARK.decode()}>'")), "echo"),
        (answer(400, error("no"), more=b"x-said: %s\r\n" % MARK), "echo"),
        (answer(400, b"<p><%s>" % MARK, "text/html"), "echo"),
        (answer(400, error("x" * 5_000)), "large"),
        (answer(400, b"no"), "misshapen"),
        (answer(400, b"[]"), "misshapen"),
        (b"oh no\r\n\r\n", "garbage"),
        (answer(400, error("no"))[:-1], "cut"),
        (b"", "hangs"),
        (answer(404, error(f"Model '{MARK.decode()}' is not here.")), None),
        (answer(400, b'{"error":{"message":"\'%s\' is damaged.","code":"bad_upload"}}' % MARK), None),
        (answer(400, b"<p>&lt;%s&gt;" % MARK, "text/html"), None),
        (answer(400, error("no"), more=b"x-request-id: %s\r\n" % MARK), None),
        (answer(200, MARK), None),
    ],
)
async def test_each_fault_is_seen(tmp_path: Path, raw: bytes, fault: str | None) -> None:
    case, tally = Case("B1", (request(b"GET", b"/" + MARK),), max_s=0.2), Tally(tmp_path)
    async with server_that_says(raw) as port:
        outcome = await exchange("127.0.0.1", port, case)
    tally.add(1, case, outcome, baseline_s=10.0)
    assert set(tally.wrong) == ({fault} if fault else set())
    assert len(list(tmp_path.glob("*.http"))) == len(tally.wrong)


async def test_an_answer_after_the_first_is_given_its_time() -> None:
    later = answer(404, error("no"))
    async with server_that_says(answer(200, b"ab") + later[:-2], later[-2:-1], later[-1:]) as port:
        outcome = await exchange("127.0.0.1", port, Case("B14", (request(b"GET", b"/") * 2,)))
    assert [one.status for one in outcome.answers] == [200, 404] and outcome.answers[-1].is_whole


async def test_a_late_refusal_is_slow_only_where_others_are_not(tmp_path: Path) -> None:
    case, tally = Case("B1", (request(b"GET", b"/"),)), Tally(tmp_path)
    async with server_that_says(answer(400, error("no"))) as port:
        outcome = await exchange("127.0.0.1", port, case)
    late = type(outcome)(outcome.answers, 0.25)
    tally.add(1, case, late, baseline_s=0.2)
    assert not tally.wrong
    tally.add(2, case, late, baseline_s=0.01)
    assert tally.wrong == {"slow": 1}


@pytest.mark.parametrize(
    ("raw", "bodies"),
    [
        (answer(200, b"ab") * 2, [b"ab", b"ab"]),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + answer(200, b"ab"), [b"ab"]),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1;x\r\nc\r\n0\r\n\r\n", [b"abc"]),
        (b"HTTP/1.1 200 OK\r\n\r\nabc", [b"abc"]),
        (b"HTTP/1.1 200 OK\r\ncontent-le", []),
    ],
)
def test_answers_are_read_as_they_come(raw: bytes, bodies: list[bytes]) -> None:
    for end in range(len(raw)):
        read_answers(raw[:end], is_head=False, is_closed=False)
    assert [one.body for one in read_answers(raw, is_head=False, is_closed=False)] == bodies


def test_what_is_no_http_is_no_answer() -> None:
    with pytest.raises(NoAnswer):
        read_answers(b"SSH-2.0-x\r\n", is_head=False, is_closed=False)


def test_every_kept_request_is_whole_enough_to_be_sent() -> None:
    kept = corpus()
    assert len(kept) > 5 and all(case.pieces[0] for case in kept)
