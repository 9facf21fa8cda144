"""The fault matrix: whatever the Hub does, callers get the right answer in time, and what is here does not notice.

Each row is one fault, set on every answer of a real server, with what becomes of a request for a model that is not
here. The product's times are shortened by one measure; the true ones are under the mark `slow`.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from serve.api.status import status_of
from serve.errors import HubUnreachable, ModelGated, ModelNotFound, ModelUnusable, RookeryError, StoreUnavailable
from serve.generator import LocalGenerator
from serve.hub.breaker import Breakers
from serve.hub.session import TRIES, Session
from serve.settings import Settings
from serve.types import GenerationRequest
from tests.fakes.hub import FakeHub, Fault
from tests.fakes.models import write_tiny_gpt2

ADA, HERE, OTHER = "huggingtweets/ada", "huggingtweets/here", "huggingtweets/other"
WEIGHTS = "model.safetensors"
INFO = "/main"  # how the path ends that asks for the model's commit and files
DEADLINE_S = 5.0
HEAD_S, WINDOW_S = 0.8, 0.6  # instead of 15 s and 10 s
PAGE = b"<html><body>Log in to this network</body></html>"


@dataclass(frozen=True)
class Row:
    """A fault, and what a caller gets who wants a model that is not here: `error` None is the text."""

    name: str
    faults: tuple[Fault, ...]
    error: type[RookeryError] | None = None
    status: int = 200
    retry_after_s: float | None = None
    tries: int = TRIES  # most requests for any one path
    within_s: float = DEADLINE_S + 1
    is_remembered: bool = False  # asked again at once, the Hub hears nothing
    is_binding: bool = False  # asked for another model at once, it hears nothing either


def told(status: int, code: str = "", message: str = "", *, path: str | None = None) -> tuple[Fault, ...]:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return (Fault(status, path, {name: value for name, value in headers.items() if value}),)


def in_an_hour() -> str:
    return email.utils.formatdate(time.time() + 3600, usegmt=True)


def moved_to(address: str) -> Fault:
    return Fault(302, WEIGHTS, {"Location": address})


def final(name: str, faults: tuple[Fault, ...], error: type[RookeryError], status: int, tries: int = 1) -> Row:
    """An answer that a second question would not change."""
    return Row(name, faults, error, status, tries=tries, within_s=1.5, is_remembered=True)


def passing(name: str, *faults: Fault, retry_after_s: float | None = None, **more: Any) -> Row:
    """Trouble that will be over some time."""
    return Row(name, faults, StoreUnavailable, 503, retry_after_s, **more)


def comes(name: str, *faults: Fault, **more: Any) -> Row:
    return Row(name, faults, **more)


F12 = [
    final("no repository", told(404, "RepoNotFound"), ModelNotFound, 404),
    final("no repository, to strangers", told(401, "RepoNotFound"), ModelNotFound, 404),
    final("no revision", told(404, "RevisionNotFound"), ModelNotFound, 404),
    final("not found without a word", told(404), ModelNotFound, 404),
    final("gated", told(403, "GatedRepo"), ModelGated, 403),
    final("gated, to strangers", told(401, "GatedRepo"), ModelGated, 403),
    final("gated weights", told(403, "GatedRepo", path=WEIGHTS), ModelGated, 403),
    final("forbidden", told(403), ModelGated, 403),
    final("forbidden by law", told(451), ModelGated, 403),
    final("disabled", told(403, message="Access to this resource is disabled."), ModelUnusable, 422),
]
F13 = [
    passing("too many requests", Fault(429)),
    passing(
        "too many for an hour",
        Fault(429, headers={"Retry-After": "3000"}),
        retry_after_s=3000,
        tries=1,
        within_s=1,
        is_binding=True,
    ),
    passing(
        "too many until then", Fault(429, headers={"Retry-After": in_an_hour()}), tries=1, within_s=1, is_binding=True
    ),
    passing("unreadable Retry-After", Fault(503, headers={"Retry-After": "soon"})),
    *[passing(f"status {status}", Fault(status)) for status in (500, 502, 503, 504)],
    passing("status 503 for weights", Fault(503, WEIGHTS)),
    passing("status 503 where large files are", Fault(503, prefix="/storage/")),
    passing("reset", Fault(reset="before")),
    passing("reset in the middle of weights", Fault(path=WEIGHTS, reset="middle")),
    comes("too many for a second", Fault(429, INFO, {"Retry-After": "1"}, times=1)),
    comes("status 502 three times", Fault(502, INFO, times=TRIES - 1)),
    comes("reset once", Fault(reset="before", times=1)),
    comes("reset once in the middle of weights", Fault(path=WEIGHTS, reset="middle", times=1)),
]
F14 = [
    passing("silence", Fault(silent_s=60)),
    passing("silence in weights", Fault(path=WEIGHTS, silent_s=60)),
    passing("trickle", Fault(pace=(1, 0.2))),
    passing("trickle of weights", Fault(path=WEIGHTS, pace=(1, 0.2))),
    passing("slower than is borne", Fault(path=WEIGHTS, pace=(2_000, 0.1))),
    passing("trickled headers", Fault(head_pace=(1, 0.1))),
    passing("trickled headers of weights", Fault(path=WEIGHTS, head_pace=(1, 0.1))),
    passing("a page instead of an answer", Fault(path=INFO, body=PAGE), tries=2),
    passing("JSON that is no answer", Fault(path=INFO, body=b"[]")),
    passing("half of an answer", Fault(path=INFO, body=b'{"id": "hugging'), tries=2),
    passing("truncated weights", Fault(path=WEIGHTS, truncate=True)),
    passing("a page instead of weights", Fault(path=WEIGHTS, body=PAGE)),
    passing("a page instead of the config", Fault(path="config.json", body=PAGE)),
    Row("longer than it should be", (Fault(path=WEIGHTS, extra=b"more"),), ModelUnusable, 422),
    Row("longer, without a length", (Fault(path=WEIGHTS, extra=b"more", is_unsized=True),), ModelUnusable, 422),
    Row("other weights under the right name", (Fault(path=WEIGHTS, body=bytes(100)),), ModelUnusable, 422),
    Row("another commit's", (Fault(path="config.json", headers={"X-Repo-Commit": "0" * 40}),), ModelUnusable, 422),
    Row(
        "kept elsewhere", (Fault(302, WEIGHTS, {"Location": "http://169.254.169.254/x"}),), ModelUnusable, 422, tries=1
    ),
    Row("kept in a loop", (Fault(302, WEIGHTS, {"Location": "?"}),), ModelUnusable, 422, tries=6),
    comes("slow but fine", Fault(path=WEIGHTS, pace=(10_000, 0.1)), tries=1),
    comes("truncated once", Fault(path=WEIGHTS, truncate=True, times=1)),
    comes("wrong once", Fault(path=WEIGHTS, body=bytes(100), times=1)),
    comes("a page once", Fault(path=INFO, body=PAGE, times=1)),
    comes("compressed once", Fault(path=INFO, is_gzipped=True, times=1)),
]


@asynccontextmanager
async def generator_over(
    server: FakeHub, data: Path, *, is_patient: bool = False, **changes: Any
) -> AsyncIterator[LocalGenerator]:
    settings: dict[str, Any] = {"hub_endpoint": server.endpoint, "hub_token": "hf_secret", "hub_deadline_s": DEADLINE_S}
    settings |= {"base": HERE, "dtype": "float32", "memory_bytes": 1 << 28, "threads": 1}
    quick = functools.partial(Session, breakers=Breakers(), head_s=HEAD_S, window_s=WINDOW_S, random=lambda: 0.1)
    generator = LocalGenerator(Settings(data=data, **settings | changes), open_session=Session if is_patient else quick)
    try:
        yield generator
    finally:
        await generator.close()


async def ask(generator: LocalGenerator, model_id: str) -> None:
    async for _ in generator.generate(GenerationRequest(model_id, ("My dream is",), {"max_new_tokens": 2})):
        pass


async def refused(generator: LocalGenerator, model_id: str) -> RookeryError | None:
    try:
        await ask(generator, model_id)
    except RookeryError as error:
        return error
    return None


def about(server: FakeHub, model_id: str) -> Counter[str]:
    """How often which path of the model was asked for."""
    return Counter(seen.path for seen in list(server.requests) if f"/{model_id}/" in f"{seen.path}/")


def left_in(data: Path, folder: str) -> list[str]:
    """Files of models that did not come."""
    return [path.name for path in (data / "models" / folder).rglob("*") if path.suffix in (".safetensors", ".bin")]


def some_slow(rows: list[Row]) -> list[Any]:
    """Two of three of them only where there is time: all are in the table of faults too."""
    return [pytest.param(row, marks=[pytest.mark.slow] if at % 3 else []) for at, row in enumerate(rows)]


@pytest.mark.parametrize("row", [*some_slow(F12), *some_slow(F13), *some_slow(F14)], ids=lambda row: row.name)
async def test_trouble_has_its_answer_in_time_and_what_is_here_does_not_notice(
    server: FakeHub, tmp_path: Path, row: Row
) -> None:
    sha = server.add(HERE, write_tiny_gpt2(tmp_path / "here", seed=1))
    server.add(ADA, write_tiny_gpt2(tmp_path / "ada", seed=2))
    data = tmp_path / "data"
    async with generator_over(server, data) as generator:
        await ask(generator, HERE)
        num_asked, residents = about(server, HERE), [one.model_id for one in generator.view().residents]

        server.fail_everywhere(*row.faults)
        started = time.monotonic()
        error, *_ = await asyncio.gather(
            refused(generator, ADA), *(ask(generator, name) for name in (HERE, f"{HERE}@{sha}", HERE.upper()))
        )
        duration_s = time.monotonic() - started

        asked = about(server, ADA)
        assert duration_s < row.within_s
        assert max(asked.values()) <= row.tries, asked
        assert about(server, HERE) == num_asked, "the Hub was asked for a model that is here"
        assert os.listdir(data / "models/.staging") == []
        if row.error is None:
            assert error is None
            return
        assert type(error) is row.error and status_of(error, "/v1/completions") == row.status, error
        if row.status == 503:
            assert error.retry_after_s, "a caller is not told when to come back"
        if row.retry_after_s:
            assert error.retry_after_s == pytest.approx(row.retry_after_s, abs=1)
        assert [one.model_id for one in generator.view().residents] == residents, "a failed fetch evicted a model"
        if row.error is not StoreUnavailable:
            assert left_in(data, ".fetching") == []
        if row.is_remembered:
            again = await refused(generator, ADA)
            assert type(again) is row.error and about(server, ADA) == asked
        if row.is_binding:
            other = await refused(generator, OTHER)
            assert type(other) is row.error and other.retry_after_s == pytest.approx(60, abs=3)
            assert about(server, OTHER) == {}
            return

        server.recover()
        await generator.forget(ADA)
        await ask(generator, ADA)
        assert left_in(data, ".fetching") == left_in(data, ".staging") == []


async def test_hub_that_refuses_connections_for_a_while_is_an_outage_and_its_models_come_after_it(
    server: FakeHub, tmp_path: Path
) -> None:
    server.add(HERE, write_tiny_gpt2(tmp_path / "here", seed=1))
    server.add(ADA, write_tiny_gpt2(tmp_path / "ada", seed=2))
    async with generator_over(server, tmp_path / "data") as generator:
        await ask(generator, HERE)
        server.close_door()
        started = time.monotonic()
        error, _ = await asyncio.gather(refused(generator, ADA), ask(generator, HERE))
        assert type(error) is HubUnreachable and status_of(error, "/v1/completions") == 503
        assert error.retry_after_s and time.monotonic() - started < DEADLINE_S + 1
        server.open_door()
        await ask(generator, ADA)


async def test_hub_whose_name_is_unknown_is_told_from_one_that_lacks_the_model(server: FakeHub, tmp_path: Path) -> None:
    server.add(HERE, write_tiny_gpt2(tmp_path / "here", seed=1))
    async with generator_over(server, tmp_path / "data") as generator:
        await ask(generator, HERE)
    async with generator_over(server, tmp_path / "data", hub_endpoint="http://hub.invalid") as generator:
        error, _ = await asyncio.gather(refused(generator, ADA), ask(generator, HERE))
        assert type(error) is HubUnreachable
    async with generator_over(server, tmp_path / "new", hub_endpoint="http://hub.invalid") as generator:
        assert type(await refused(generator, ADA)) is ModelNotFound, "no Hub has ever answered here"


async def test_after_some_failures_everybody_is_told_at_once_and_the_hub_is_left_alone(
    server: FakeHub, tmp_path: Path
) -> None:
    server.add(HERE, write_tiny_gpt2(tmp_path / "here", seed=1))
    async with generator_over(server, tmp_path / "data") as generator:
        await ask(generator, HERE)
        server.fail_everywhere(Fault(503))
        for i in range(2):
            assert type(await refused(generator, f"huggingtweets/away-{i}")) is StoreUnavailable
        num_requests, started = len(server.requests), time.monotonic()
        errors = [await refused(generator, f"huggingtweets/far-{i}") for i in range(10)]
        assert len(server.requests) == num_requests
        assert time.monotonic() - started < 2
        assert all(type(error) is StoreUnavailable and error.retry_after_s for error in errors)


async def test_weights_that_broke_off_go_on_where_they_were(server: FakeHub, tmp_path: Path) -> None:
    repo = write_tiny_gpt2(tmp_path / "ada", n_embd=192)
    sha = server.add(ADA, repo)
    server.fail(ADA, Fault(path=WEIGHTS, truncate=True, times=1))
    async with generator_over(server, tmp_path / "data") as generator:
        await ask(generator, ADA)
    stored, size = f"/storage/{ADA}/resolve/{sha}/{WEIGHTS}", (repo / WEIGHTS).stat().st_size
    assert server.bytes_sent[stored] == size
    assert [seen.range is None for seen in server.requests if seen.path == stored] == [True, False]


@pytest.mark.parametrize("has_resolve_cache", [False, True])
async def test_model_that_has_moved_comes_under_the_name_it_was_asked_for(
    server: FakeHub, tmp_path: Path, has_resolve_cache: bool
) -> None:
    server.has_resolve_cache = has_resolve_cache
    server.add(ADA, write_tiny_gpt2(tmp_path / "ada"))
    server.move(ADA, "lovelace/ada")
    async with generator_over(server, tmp_path / "data") as generator:
        await ask(generator, ADA)
        assert [one.model_id for one in generator.view().residents] == [ADA]
        num_requests = len(server.requests)
        await ask(generator, ADA)
        assert len(server.requests) == num_requests


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", [INFO, WEIGHTS])
async def test_trickle_of_a_byte_in_nine_seconds_ends_by_the_deadline(
    server: FakeHub, tmp_path: Path, path: str
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "ada"))
    server.fail_everywhere(Fault(path=path, pace=(1, 9.0)))
    async with generator_over(server, tmp_path / "data", is_patient=True, hub_deadline_s=120.0) as generator:
        started = time.monotonic()
        assert type(await refused(generator, ADA)) is StoreUnavailable
        assert time.monotonic() - started <= 121
        assert max(about(server, ADA).values()) <= TRIES


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_weights_that_come_just_fast_enough_for_too_long_end_at_the_deadline(
    server: FakeHub, tmp_path: Path
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "ada", n_layer=1, n_embd=1024))
    server.fail_everywhere(Fault(path=WEIGHTS, pace=(30_000, 0.5)))
    async with generator_over(server, tmp_path / "data", is_patient=True, hub_deadline_s=120.0) as generator:
        started = time.monotonic()
        assert type(await refused(generator, ADA)) is StoreUnavailable
        assert 119 < time.monotonic() - started <= 121
