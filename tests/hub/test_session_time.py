"""When a question to a Hub ends that is slow, silent or not there, and many threads that ask at once."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest
from huggingface_hub import constants

from serve.errors import HubUnreachable, StoreUnavailable
from serve.hub.pace import Deadline
from tests.hub.asking import ADA, FILE, ask, open_session, takes
from tests.hub.scripted import answer, head, json_answer, scripted, trickle


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


# --- Threads ------------------------------------------------------------------------------------------------


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
