"""Pulling over HTTP: statuses of what is refused at once, lines of JSON of what comes, and who may ask."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from serve.api import pull as pull_api
from serve.api.access import Access
from serve.api.app import build_api
from serve.errors import ModelGated, ModelNotFound, ModelUnusable, StoreUnavailable
from serve.metrics import Metrics
from serve.types import ModelId, ModelInfo, PullProgress
from tests.fakes.generator import EchoGenerator
from tests.fakes.keys import MemoryKeys
from tests.fakes.memory import MemoryCatalogue, MemoryFiles, MemoryJobs

ADA = "huggingtweets/ada"
INFO = ModelInfo(ADA, "c" * 40, 1_700_000_000, 10, "huggingtweets", from_hub=True)


class ScriptedPuller:
    """Tells `steps`, then ends as `end` says; a None among the steps waits for `go_on`, a number so many seconds."""

    def __init__(self, *steps: PullProgress | float | None, end: ModelInfo | Exception = INFO) -> None:
        self.steps, self.end = steps, end
        self.go_on = threading.Event()
        self.ended = threading.Event()
        self.asked: list[str] = []

    def pull(self, model_id: str, on_progress: Callable[[PullProgress], None] = lambda _: None) -> ModelInfo:
        ModelId.parse(model_id)
        self.asked.append(model_id)
        try:
            for step in self.steps:
                if isinstance(step, PullProgress):
                    on_progress(step)
                elif step is None:
                    assert self.go_on.wait(10)
                else:
                    time.sleep(step)
            if isinstance(self.end, Exception):
                raise self.end
            return self.end
        finally:
            self.ended.set()


def client_of(puller: ScriptedPuller | None, folder: Path, *keys: str) -> httpx.AsyncClient:
    files = MemoryFiles(folder / "files")
    app = build_api(
        generator=EchoGenerator(),
        catalogue=MemoryCatalogue(ADA),
        files=files,
        jobs=MemoryJobs(files),
        upload_dir=folder / "uploads",
        metrics=Metrics(),
        puller=puller,
        access=Access(MemoryKeys(*keys)),
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://rookery")


def lines(response: httpx.Response) -> list[dict[str, object]]:
    return [json.loads(line) for line in response.text.splitlines()]


RESOLVING, DOWNLOADING = PullProgress("resolving"), PullProgress("downloading", "model.safetensors", 5, 10)


async def test_a_pull_tells_how_far_it_is_and_ends_with_the_model(tmp_path: Path) -> None:
    puller = ScriptedPuller(RESOLVING, DOWNLOADING, None, PullProgress("publishing", "", 10, 10))
    async with client_of(puller, tmp_path) as client:
        asked = asyncio.create_task(client.post(f"/v1/models/{ADA}/pull"))
        await asyncio.sleep(0)
        puller.go_on.set()
        response = await asked
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-ndjson")
    told = lines(response)
    assert all(line["object"] == "model.pull" and line["model"] == ADA for line in told[:-1])
    assert (told[-1]["object"], told[-1]["id"], told[-1]["revision"]) == ("model", ADA, "c" * 40)
    assert puller.asked == [ADA]


async def test_a_revision_can_be_named_and_a_percent_encoded_slash(tmp_path: Path) -> None:
    puller = ScriptedPuller(DOWNLOADING)
    async with client_of(puller, tmp_path) as client:
        await client.post("/v1/models/huggingtweets%2Fada@v1/pull")
    assert puller.asked == [f"{ADA}@v1"]


async def test_a_thousand_reports_are_a_few_lines(tmp_path: Path) -> None:
    steps = [PullProgress("downloading", "model.safetensors", done, 1000) for done in range(1000)]
    async with client_of(ScriptedPuller(*steps), tmp_path) as client:
        response = await client.post(f"/v1/models/{ADA}/pull")
    assert 1 <= len(lines(response)) <= 4


async def test_a_silent_pull_is_heard_of_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_api, "_HEARTBEAT_S", 0.01)
    monkeypatch.setattr(pull_api, "_LINE_S", 0.01)
    async with client_of(ScriptedPuller(PullProgress("converting"), 0.5), tmp_path) as client:
        told = lines(await client.post(f"/v1/models/{ADA}/pull"))
    assert [line["phase"] for line in told[:3]] == ["converting"] * 3


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModelNotFound("There is no 'huggingtweets/ada'."), 404),
        (ModelGated("Only for some."), 403),
        (ModelUnusable("No GPT-2."), 422),
        (StoreUnavailable("The Hub is away.", retry_after_s=17), 503),
    ],
)
async def test_what_is_refused_before_anything_comes_has_its_status(
    tmp_path: Path, error: Exception, status: int
) -> None:
    async with client_of(ScriptedPuller(RESOLVING, end=error), tmp_path) as client:
        response = await client.post(f"/v1/models/{ADA}/pull")
    assert response.status_code == status
    assert response.json()["error"]["message"] == str(error)
    assert response.headers.get("retry-after") == ("17" if status == 503 else None)


@pytest.mark.parametrize("error", [ModelUnusable("The weights are damaged."), ZeroDivisionError()])
async def test_what_fails_on_the_way_is_the_last_line(tmp_path: Path, error: Exception) -> None:
    async with client_of(ScriptedPuller(DOWNLOADING, 0.3, end=error), tmp_path) as client:
        response = await client.post(f"/v1/models/{ADA}/pull")
    assert response.status_code == 200
    told = lines(response)[-1]["error"]
    assert isinstance(told, dict) and set(told) == {"message", "type", "param", "code"}
    assert told["message"] == (str(error) or f"The server failed to pull '{ADA}'; its log says why.")


@pytest.mark.parametrize("model", ["a/b/c", "..", "huggingtweets/a..b", "x" * 300])
async def test_an_impossible_id_is_asked_of_nobody(tmp_path: Path, model: str) -> None:
    puller = ScriptedPuller()
    async with client_of(puller, tmp_path) as client:
        response = await client.post(f"/v1/models/{model.replace('..', '%2E%2E')}/pull")
    assert response.status_code in (404, 405) and puller.asked == []


async def test_without_a_hub_the_answer_says_so(tmp_path: Path) -> None:
    async with client_of(None, tmp_path) as client:
        response = await client.post(f"/v1/models/{ADA}/pull")
    assert response.status_code == 409 and "ROOKERY_HUB_ENABLED" in response.json()["error"]["message"]


async def test_where_there_are_keys_one_is_needed(tmp_path: Path) -> None:
    puller = ScriptedPuller(DOWNLOADING)
    async with client_of(puller, tmp_path, "sk-one") as client:
        for header in ({}, {"authorization": "Bearer sk-two"}):
            refused = await client.post(f"/v1/models/{ADA}/pull", headers=header)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
        assert puller.asked == []
        taken = await client.post(f"/v1/models/{ADA}/pull", headers={"authorization": "Bearer sk-one"})
    assert taken.status_code == 200


async def test_a_pull_goes_on_when_its_caller_leaves(tmp_path: Path) -> None:
    puller = ScriptedPuller(RESOLVING, None)
    async with client_of(puller, tmp_path) as client:
        asked = asyncio.create_task(client.post(f"/v1/models/{ADA}/pull"))
        while not puller.asked:
            await asyncio.sleep(0.01)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert not puller.ended.is_set()
        puller.go_on.set()
        assert await asyncio.to_thread(puller.ended.wait, 10)


@pytest.fixture
async def busy(tmp_path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedPuller]]:
    puller = ScriptedPuller(DOWNLOADING, None)
    async with client_of(puller, tmp_path) as client:
        yield client, puller
        puller.go_on.set()


async def begin(busy: tuple[httpx.AsyncClient, ScriptedPuller], *models: str) -> list[asyncio.Task[httpx.Response]]:
    """A caller of each, whose pulls are then under way."""
    client, puller = busy
    callers = [asyncio.create_task(client.post(f"/v1/models/{model}/pull")) for model in models]
    while len(puller.asked) < len({model.lower() for model in models}):
        await asyncio.sleep(0.01)
    return callers


async def test_too_many_pulls_at_once_are_asked_to_come_back(busy: tuple[httpx.AsyncClient, ScriptedPuller]) -> None:
    client, puller = busy
    under_way = await begin(busy, *(f"{ADA}{number}" for number in range(pull_api.MAX_PULLS)))
    refused = await client.post(f"/v1/models/{ADA}/pull")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
    joined = asyncio.create_task(client.post(f"/v1/models/{ADA}0/pull"))
    await asyncio.sleep(0)
    puller.go_on.set()
    assert [(await task).status_code for task in (*under_way, joined)] == [200] * (pull_api.MAX_PULLS + 1)
    assert len(puller.asked) == pull_api.MAX_PULLS
    assert (await client.post(f"/v1/models/{ADA}/pull")).status_code == 200


async def test_all_who_ask_for_one_model_hear_of_one_pull(
    busy: tuple[httpx.AsyncClient, ScriptedPuller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_api, "_LINE_S", 0.01)
    _, puller = busy
    callers = await begin(busy, *[ADA] * (2 * pull_api.MAX_PULLS), ADA.title())
    puller.go_on.set()
    for caller in callers:
        told = lines(await caller)
        assert (told[0]["phase"], told[0]["bytes"], told[-1]["revision"]) == ("downloading", 5, "c" * 40)
    assert puller.asked == [ADA]


async def test_another_revision_is_a_pull_of_its_own(busy: tuple[httpx.AsyncClient, ScriptedPuller]) -> None:
    _, puller = busy
    callers = await begin(busy, ADA, f"{ADA}@v1")
    puller.go_on.set()
    await asyncio.gather(*callers)
    assert sorted(puller.asked) == [ADA, f"{ADA}@v1"]


async def test_every_listener_gets_the_refusal_and_the_next_caller_asks_anew(tmp_path: Path) -> None:
    puller = ScriptedPuller(RESOLVING, None, end=ModelGated("Only for some."))
    async with client_of(puller, tmp_path) as client:
        callers = await begin((client, puller), ADA, ADA, ADA)
        puller.go_on.set()
        assert [(await caller).status_code for caller in callers] == [403] * 3
        assert puller.asked == [ADA]
        assert (await client.post(f"/v1/models/{ADA}/pull")).status_code == 403
    assert puller.asked == [ADA, ADA]


@pytest.mark.parametrize(("end", "outcome"), [(INFO, "ok"), (ModelGated("Only for some."), "model_gated")])
async def test_pulls_are_counted_by_how_they_end(tmp_path: Path, end: ModelInfo | Exception, outcome: str) -> None:
    async with client_of(ScriptedPuller(end=end), tmp_path) as client:
        await client.post(f"/v1/models/{ADA}/pull")
        text = (await client.get("/metrics")).text
    assert f'rookery_pull_duration_seconds_count{{outcome="{outcome}"}} 1.0' in text
