"""How long a Hub in trouble is left alone: its own word for it, and the breaker's."""

from __future__ import annotations

import email.utils
import threading
import time
from contextlib import nullcontext
from typing import Any

import pytest

from serve.errors import ModelGated, ModelNotFound, StoreUnavailable
from serve.hub.answers import Failure
from serve.hub.breaker import Breaker, Breakers
from serve.hub.pace import Deadline
from tests.hub.asking import ADA, FILE, ask, open_session, read, takes
from tests.hub.scripted import Act, answer, json_answer, reset, scripted


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


_DOWN = {"429": answer(429), "502": answer(502), "503": answer(503), "504": answer(504), "reset": reset, "none": None}


@pytest.mark.parametrize("down", _DOWN.values(), ids=_DOWN.keys())
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
