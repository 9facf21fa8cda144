"""Fine-tuning jobs in full, by the unmodified openai client: keys, pauses, checkpoints, trackers, runs, filters."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.fine_tuning.job_create_params import IntegrationWandb

from serve.types import JobEvent, JobStatus, Page
from tests.api.conftest import World

WANDB: IntegrationWandb = {"project": "tweets", "name": "a run", "entity": "team", "tags": ["x", "y"]}


@pytest.fixture
async def ai(world: World) -> AsyncIterator[AsyncOpenAI]:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=world.app))
    async with AsyncOpenAI(base_url="http://rookery/v1", api_key="sk-ada", http_client=http, max_retries=0) as client:
        yield client


async def upload(ai: AsyncOpenAI, content: bytes = b"tweets") -> str:
    return (await ai.files.create(file=("ada.zip", content), purpose="fine-tune")).id


# --- What a job object tells ------------------------------------------------------------------------------


async def test_everything_that_a_caller_asks_for_reaches_the_jobs_and_is_told_again(
    ai: AsyncOpenAI, world: World
) -> None:
    files = [await upload(ai), await upload(ai)]
    job = await ai.fine_tuning.jobs.create(
        model="gpt2",
        training_file=files[0],
        validation_file=files[1],
        suffix="ada-2",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}},
        integrations=[{"type": "wandb", "wandb": WANDB}],
        metadata={"team": "a"},
        extra_body={"priority": "high"},
    )
    assert job.validation_file == files[1] and job.integrations
    assert job.integrations[0].to_dict() == {"type": "wandb", "wandb": WANDB}
    assert job.to_dict()["priority"] == "high" and job.to_dict()["suffix"] == "ada-2"
    request = world.jobs.jobs[job.id].request
    assert (request.validation_file, request.suffix, request.priority) == (files[1], "ada-2", 1)
    assert request.integrations[0].tags == ("x", "y") and request.hyperparameters.batch_size is None


async def test_a_tracker_needs_no_settings_and_may_be_ours(client: httpx.AsyncClient, ai: AsyncOpenAI) -> None:
    asked = [{"type": "trackio", "trackio": {"project": "tweets"}}, {"type": "wandb"}]
    body = {"model": "gpt2", "training_file": await upload(ai), "integrations": asked}
    told = (await client.post("/v1/fine_tuning/jobs", json=body)).json()["integrations"]
    assert told[0]["trackio"]["project"] == "tweets" and told[1]["wandb"]["project"] is None


async def test_auto_is_told_as_what_it_meant_once_the_job_knows(ai: AsyncOpenAI, world: World) -> None:
    job = await ai.fine_tuning.jobs.create(
        model="gpt2", training_file=await upload(ai), hyperparameters={"n_epochs": 2, "batch_size": "auto"}
    )
    asked = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    used = {"n_epochs": 2, "batch_size": 1, "learning_rate_multiplier": 1.5}
    assert job.hyperparameters.to_dict() == asked
    world.jobs.jobs[job.id] = replace(
        world.jobs.jobs[job.id], result={"hyperparameters": used, "result_files": ["file-9"]}, estimated_finish=1_800
    )
    job = await ai.fine_tuning.jobs.retrieve(job.id)
    assert job.hyperparameters.to_dict() == used and job.method and job.method.supervised
    assert job.method.supervised.hyperparameters and job.method.supervised.hyperparameters.to_dict() == used
    assert (job.result_files, job.estimated_finish) == (["file-9"], 1_800)


async def test_another_method_is_refused_in_a_sentence(ai: AsyncOpenAI) -> None:
    for method in ("dpo", "reinforcement"):
        with pytest.raises(openai.BadRequestError, match="'supervised', the only method") as caught:
            await ai.fine_tuning.jobs.create(model="gpt2", training_file="file-0", method={"type": method})
        assert caught.value.param == "method.type"


async def test_the_owner_of_a_job_is_the_caller_of_its_texts(ai: AsyncOpenAI, world: World) -> None:
    await ai.fine_tuning.jobs.create(model="gpt2", training_file=await upload(ai))
    await ai.completions.create(model="fledgling", prompt="a")
    owner = world.jobs.jobs["ftjob-0"].request.owner
    assert owner == world.generator.requests[-1].caller and re.fullmatch("[0-9a-f]{16}", owner)


# --- Idempotency ------------------------------------------------------------------------------------------


async def test_the_same_key_makes_one_job_and_another_request_under_it_is_a_conflict(
    ai: AsyncOpenAI, world: World
) -> None:
    asked: dict[str, Any] = {"model": "gpt2", "training_file": await upload(ai), "seed": 1}
    keyed: dict[str, Any] = {**asked, "extra_headers": {"Idempotency-Key": "key-1"}}
    first, second = [await ai.fine_tuning.jobs.create(**keyed) for _ in range(2)]
    assert first == second and len(world.jobs.jobs) == 1
    with pytest.raises(openai.ConflictError) as caught:
        await ai.fine_tuning.jobs.create(**{**keyed, "seed": 2})
    assert caught.value.response.headers["x-should-retry"] == "false"
    other = ai.with_options(api_key="sk-bob")
    assert (await other.fine_tuning.jobs.create(**keyed)).id != first.id  # keys are each caller's own
    assert (await ai.fine_tuning.jobs.create(**asked)).id != first.id


async def test_a_key_outlives_the_clients_own_retries_which_send_none_of_their_own(world: World) -> None:
    sent: list[httpx2.Request] = []

    class LosesFirstAnswer(httpx2.ASGITransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            sent.append(request)
            answer = await super().handle_async_request(request)
            if len(sent) == 1:
                raise httpx2.ReadError("the connection broke off")
            return answer

    (world.upload_dir / "a").write_bytes(b"tweets")
    file = world.files.create_file(world.upload_dir / "a", "a.zip", "fine-tune")
    http = httpx2.AsyncClient(transport=LosesFirstAnswer(app=world.app))
    async with AsyncOpenAI(base_url="http://rookery/v1", api_key="any", http_client=http) as ai:
        headers = {"Idempotency-Key": "key-1"}
        job = await ai.fine_tuning.jobs.create(model="gpt2", training_file=file.id, extra_headers=headers)
    assert [job.id] == list(world.jobs.jobs) == ["ftjob-0"]
    assert [request.headers.get("x-stainless-retry-count") for request in sent] == ["0", "1"]
    assert {request.headers["idempotency-key"] for request in sent} == {"key-1"}


@pytest.mark.parametrize("route", ["/v1/fine_tuning/jobs", "/v1/bots"])
@pytest.mark.parametrize("key", ["", "x" * 256, "caf\xe9", "a\tb"])
async def test_a_key_that_is_none_is_refused_by_its_name(client: httpx.AsyncClient, route: str, key: str) -> None:
    answer = await client.post(route, json={}, headers={b"idempotency-key": key.encode("latin-1")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "idempotency-key")


# --- Pauses -----------------------------------------------------------------------------------------------


async def test_a_job_is_paused_and_resumed(ai: AsyncOpenAI) -> None:
    job = await ai.fine_tuning.jobs.create(model="gpt2", training_file=await upload(ai))
    assert str((await ai.fine_tuning.jobs.pause(job.id)).status) == "paused"  # a word that the client does not list
    assert (await ai.fine_tuning.jobs.resume(job.id)).status == "queued"
    with pytest.raises(openai.ConflictError, match="not paused") as caught:
        await ai.fine_tuning.jobs.resume(job.id)
    assert caught.value.response.headers["x-should-retry"] == "false"
    await ai.fine_tuning.jobs.cancel(job.id)
    for act in (ai.fine_tuning.jobs.pause, ai.fine_tuning.jobs.cancel):
        with pytest.raises(openai.ConflictError, match="already ended"):
            await act(job.id)
    for unknown in (ai.fine_tuning.jobs.pause, ai.fine_tuning.jobs.resume, ai.fine_tuning.jobs.cancel):
        with pytest.raises(openai.NotFoundError):
            await unknown("ftjob-99")


# --- Lists ------------------------------------------------------------------------------------------------


async def test_checkpoints_are_paged_newest_first(ai: AsyncOpenAI) -> None:
    job = await ai.fine_tuning.jobs.create(model="gpt2", training_file=await upload(ai))
    found = [one async for one in ai.fine_tuning.jobs.checkpoints.list(job.id, limit=2)]
    assert [one.step_number for one in found] == [30, 20, 10]
    first = found[0]
    assert (first.object, first.fine_tuning_job_id) == ("fine_tuning.job.checkpoint", job.id)
    assert first.fine_tuned_model_checkpoint == "huggingtweets/ada@step30"
    assert first.metrics.to_dict() == {"step": 30, "train_loss": 3.5, "valid_loss": 3.75, "full_valid_loss": 3.75}
    with pytest.raises(openai.NotFoundError):
        await ai.fine_tuning.jobs.checkpoints.list("ftjob-99")


async def test_an_event_with_a_number_that_json_lacks_is_told_without_it(ai: AsyncOpenAI, world: World) -> None:
    def list_events(job_id: str, *, limit: int, after: str | None = None) -> Page[JobEvent]:
        data = {"step": 1, "train_loss": float("nan"), "valid_loss": None}
        return Page((JobEvent("ftevent-0", job_id, 1, "info", "Step 1", "metrics", data),), has_more=False)

    job = await ai.fine_tuning.jobs.create(model="gpt2", training_file=await upload(ai))
    world.jobs.list_events = list_events  # type: ignore[method-assign]
    (event,) = [event async for event in ai.fine_tuning.jobs.list_events(job.id)]
    assert event.data == {"step": 1, "train_loss": None, "valid_loss": None}


async def test_metadata_null_finds_jobs_without_any(ai: AsyncOpenAI) -> None:
    file_id = await upload(ai)
    for metadata in ({"team": "a"}, {}, {"team": ""}):
        await ai.fine_tuning.jobs.create(model="gpt2", training_file=file_id, metadata=metadata)

    async def found(**asked: Any) -> list[str]:
        return [job.id async for job in ai.fine_tuning.jobs.list(**asked)]

    assert await found(metadata={"team": ""}) == ["ftjob-2"]
    assert await found(metadata={}) == ["ftjob-2", "ftjob-1", "ftjob-0"]
    assert await found(extra_query={"metadata": "null"}) == ["ftjob-1"]
    assert (await ai.fine_tuning.jobs.retrieve("ftjob-1")).metadata is None
    for wrong in ("metadata=x", "metadata=null&metadata[team]=a", f"metadata[{'k' * 65}]=v", "metadata[k]=%00"):
        answer = await ai.with_options(max_retries=0)._client.get(f"http://rookery/v1/fine_tuning/jobs?{wrong}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata"), wrong


@pytest.mark.parametrize("path", ["", "/ftjob-0/events", "/ftjob-0/checkpoints"])
@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=many", "after=%00", "after=a b", "after=" + "x" * 257]
)
async def test_a_wrong_page_is_refused_by_its_name(client: httpx.AsyncClient, path: str, query: str) -> None:
    answer = await client.get(f"/v1/fine_tuning/jobs{path}?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, query.partition("=")[0])


@pytest.mark.parametrize("job_id", ["%00", "a%20b", "x" * 129])
async def test_an_impossible_job_id_asks_nobody(client: httpx.AsyncClient, world: World, job_id: str) -> None:
    world.jobs.get_job = None  # type: ignore[method-assign, assignment]
    for path in ("", "/events", "/checkpoints", "/runs"):
        assert (await client.get(f"/v1/fine_tuning/jobs/{job_id}{path}")).status_code == 400
    for act in ("pause", "resume", "cancel"):
        assert (await client.post(f"/v1/fine_tuning/jobs/{job_id}/{act}")).status_code == 400


# --- Runs -------------------------------------------------------------------------------------------------


async def test_both_runs_of_a_finished_job_tell_what_they_used_and_made(
    client: httpx.AsyncClient, ai: AsyncOpenAI, world: World
) -> None:
    job = await ai.fine_tuning.jobs.create(model="gpt2", training_file=await upload(ai))
    path = f"/v1/fine_tuning/jobs/{job.id}/runs"
    assert (await client.get(path)).json()["data"] == []
    world.jobs.jobs[job.id] = replace(world.jobs.jobs[job.id], status=JobStatus.SUCCEEDED)
    listed = (await client.get(path)).json()
    preprocess, train = listed["data"]
    assert [run["name"] for run in listed["data"]] == ["@ada-preprocess", "@ada-train"] and not listed["has_more"]
    assert [one["id"] for one in preprocess["inputs"]] == ["tweets-ada:v0"]
    assert preprocess["outputs"] == train["inputs"] and train["inputs"][0]["id"] == "dataset-ada:v1"
    assert (train["outputs"][0]["type"], train["outputs"][0]["id"]) == ("finetuned-model", "ada:v2")
    assert train["config"] == {"n_epochs": 4} and train["summary"] == {"train_loss": 3.5}
    assert train["tables"]["examples"]["columns"] == ["Input", "Prediction"]
    assert train["history"]["train_loss"] == [4.0, None]
    assert (await client.get("/v1/fine_tuning/jobs/ftjob-99/runs")).status_code == 404
    for query, job_type, has_more in (
        (f"limit=1&after={job.id}/preprocess", "train", False),
        ("limit=1", "preprocess", True),
    ):
        page = (await client.get(f"{path}?{query}")).json()
        assert ([run["job_type"] for run in page["data"]], page["has_more"]) == ([job_type], has_more)


# --- Bots -------------------------------------------------------------------------------------------------


async def test_one_call_takes_all_that_a_job_takes(client: httpx.AsyncClient, world: World) -> None:
    data = {
        "handle": "@ada",
        "n_epochs": "auto",
        "batch_size": "2",
        "learning_rate_multiplier": "0.5",
        "suffix": "ada-2",
        "priority": "low",
        "metadata[team]": "a",
        "metadata[empty]": "",
        "integrations": '[{"type": "wandb", "wandb": {"project": "tweets"}}]',
    }
    files = [("archive", ("a.zip", b"a")), ("validation", ("v.txt", b"v"))]
    answer = await client.post("/v1/bots", files=files, data=data, headers={"authorization": "Bearer sk-ada"})
    assert answer.status_code == 201, answer.text
    request = world.jobs.jobs["ftjob-0"].request
    chosen = request.hyperparameters
    assert (chosen.n_epochs, chosen.batch_size, chosen.learning_rate_multiplier) == (None, 2, 0.5)
    assert (request.suffix, request.priority, request.metadata) == ("ada-2", -1, {"team": "a", "empty": ""})
    assert request.integrations[0].project == "tweets" and request.owner
    assert request.validation_file == "file-1"
    assert {record.purpose for record in world.files.records.values()} == {"bot"}


async def test_a_retried_upload_makes_one_job_and_leaves_one_copy(client: httpx.AsyncClient, world: World) -> None:
    async def post(content: bytes) -> httpx.Response:
        headers = {"idempotency-key": "key-1"}
        return await client.post("/v1/bots", files=[("archive", ("a.zip", content))], headers=headers)

    first, second = await post(b"a"), await post(b"a")
    assert first.status_code == second.status_code == 201 and first.json() == second.json()
    assert list(world.files.records) == ["file-0"]
    other = await post(b"b")
    assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")
    assert list(world.files.records) == ["file-0"] and not list(world.upload_dir.iterdir())


async def test_a_preview_sees_the_files_under_their_own_names_and_keeps_none(
    client: httpx.AsyncClient, world: World
) -> None:
    names = ["ada.zip", "ada.zip", "../../etc/passwd", "é" * 200 + ".csv"]
    files = [("archive", (name, str(i).encode())) for i, name in enumerate(names)]
    answer = await client.post("/v1/archives/preview", files=files, data={"handle": ["@ada", "bob"]})
    assert answer.status_code == 200 and answer.json()["handles"] == ["ada", "bob"]
    assert answer.json()["files"] == [["ada.zip", "0"], ["ada.zip", "1"], ["passwd", "2"], [names[3], "3"]]
    refused = await client.post("/v1/archives/preview", files=files[:1], data={"handle": ["ada", "bob"]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "handle")
    assert not world.files.records and not list(world.upload_dir.iterdir())


async def test_a_preview_of_what_is_no_archive_is_refused(client: httpx.AsyncClient, world: World) -> None:
    for files in ([("archive", ("a", b"junk"))], [("other", ("a", b"a"))], [("archive", ("a", b"a"))] * 9):
        answer = await client.post("/v1/archives/preview", files=files)
        assert answer.status_code == 400 and "junk" not in answer.text
    assert not list(world.upload_dir.iterdir())


async def test_many_previews_at_once_are_all_answered(client: httpx.AsyncClient) -> None:
    files = [("archive", ("a", b"a"))]
    answers = await asyncio.gather(*(client.post("/v1/archives/preview", files=files) for _ in range(10)))
    assert {answer.status_code for answer in answers} == {200}
