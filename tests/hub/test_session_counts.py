"""Every HTTP request to the Hub is counted by how it ended."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import pytest

from serve.errors import RookeryError
from serve.hub.answers import Failure
from tests.hub.asking import ask, open_session, read
from tests.hub.scripted import Act, answer, hang_up, json_answer, reset, scripted


@pytest.mark.parametrize(
    ("act", "outcome"),
    [
        (json_answer(b"[1]"), "ok"),
        (answer(404), "not_found"),
        (answer(401), "denied"),
        (answer(403), "denied"),
        (answer(429), "rate_limited"),
        (answer(503), "server_error"),
        (answer(418), "refused"),
        (reset, "connection"),
        (hang_up, "connection"),
    ],
)
def test_the_outcome_is_the_answers_or_the_networks(act: Act, outcome: str) -> None:
    told: Counter[str] = Counter()
    with scripted(act) as server, suppress(RookeryError):
        ask(server, tries=2, on_request=lambda how: told.update([how]))
    assert told == {outcome: len(server.requests)}


def test_an_answer_that_breaks_off_is_the_networks() -> None:
    told: list[str] = []
    cut = answer(200, {}, b"half", length=9)
    with scripted(cut) as server, pytest.raises(Failure):
        read(open_session(server.url, on_request=told.append))
    assert told == ["connection"]
