"""Questions to a Hub over real sockets: what is repeated and what is not, and how its answers are read."""

from __future__ import annotations

import gzip
import time

import pytest

from serve.errors import ModelGated, ModelNotFound, ModelUnusable, RookeryError, StoreUnavailable
from serve.hub.answers import Subject
from serve.hub.breaker import Breaker, Breakers
from serve.hub.session import MAX_JSON_BYTES
from tests.hub.asking import ADA, JSON, TOKEN, ask, open_session, read, takes
from tests.hub.scripted import Act, answer, hang_up, head, json_answer, reset, scripted, trickle


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


# --- Words --------------------------------------------------------------------------------------------------


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
