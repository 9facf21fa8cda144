"""The API over the real parts: engine, pool, store and job table, with tiny models, by the real clients."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
import torch
from fastapi import FastAPI
from openai import AsyncOpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve.api.app import build_api
from serve.database.connection import Database
from serve.generator import LocalGenerator
from serve.metrics import Metrics
from serve.settings import Settings
from serve.store.revisions import Store
from serve.training.dataset import preview
from serve.training.jobs.store import JobStore
from serve.types import Catalogue, Files, GenerationRequest, Generator, Jobs, SamplingOverrides
from tests.fakes.logs import logging_to, read_lines
from tests.fakes.models import write_tiny_gpt2
from tests.store.test_convert import write_old_checkpoint

ADA = "huggingtweets/ada"
ARCHIVE = Path(__file__).parents[2] / "deployments" / "archives" / "unit_seven.zip"


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[FastAPI]:
    for seed, name in enumerate(("ada", "bob", "base")):
        write_tiny_gpt2(tmp_path / "models" / "huggingtweets" / name, seed=seed)
    settings = Settings(
        data=tmp_path, base="huggingtweets/base", dtype="float32", memory_bytes=1 << 28, hub_enabled=False
    )
    metrics = Metrics()
    local = LocalGenerator(settings, metrics=metrics)
    generator: Generator = local
    catalogue: Catalogue = Store(tmp_path, embedded={})
    store = JobStore(Database(settings.sql_url), tmp_path / "files")
    files: Files = store
    jobs: Jobs = store
    yield build_api(
        generator=generator,
        catalogue=catalogue,
        files=files,
        jobs=jobs,
        upload_dir=tmp_path / "uploads",
        default_base=settings.base,
        metrics=metrics,
        preview=preview,
    )
    await local.close()


@pytest.fixture
async def ai(app: FastAPI) -> AsyncIterator[AsyncOpenAI]:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
    async with AsyncOpenAI(base_url="http://rookery/v1", api_key="any", http_client=http, max_retries=0) as client:
        yield client


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://rookery") as client:
        yield client


async def test_each_request_is_two_lines_of_its_id_and_no_word_of_its_text(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    key, prompt = "CANARYKEY", "CANARYPROMPT"
    headers = {"authorization": f"Bearer {key}"}
    archive = tmp_path / "canary.csv"
    archive.write_text("text\n" + "\n".join(f"CANARYTWEET {number}" for number in range(50)))
    log = tmp_path / "log"
    with logging_to(log):
        body = {"model": ADA, "prompt": prompt, "max_tokens": 4, "n": 2, "ignore_eos": True}
        answer = await client.post("/v1/completions", json=body, headers={**headers, "x-request-id": "mine"})
        assert answer.status_code == 200 and answer.headers["x-request-id"] == "mine"
        streamed = await client.post("/v1/completions", json={**body, "stream": True}, headers=headers)
        for wrong in ({"model": "no/body"}, {"max_tokens": 2000}, {"model": prompt}):
            await client.post("/v1/completions", json={**body, **wrong}, headers=headers)
        await client.post("/v1/completions", content=b'{"prompt": CANARYPROMPT', headers=headers)
        await client.post("/v1/archives/preview", files={"archive": archive.read_bytes()}, headers=headers)
        await client.get(f"/nothing/{prompt}/x/y/z", params={"q": prompt}, headers=headers)
        for path in ("/healthz", "/readyz", "/metrics"):
            await client.get(path)
    lines, text = read_lines(log), log.read_text()
    assert all({"timestamp", "level", "event", "part"} <= line.keys() for line in lines)
    mine = {line["event"]: line for line in lines if line.get("request_id") == "mine"}
    assert mine.keys() == {"model_loaded", "generated", "request"}
    generated, request = mine["generated"], mine["request"]
    told = {"model", "revision", "tier", "queue_ms", "load_ms", "duration_ms", "finish", "prompt_tokens"}
    assert told <= generated.keys()
    assert (generated["outcome"], generated["tokens"], generated["choices"]) == ("ok", 8, 2)
    assert (request["method"], request["route"], request["status"]) == ("POST", "/v1/completions", 200)
    assert {line.get("request_id") for line in lines} >= {streamed.headers["x-request-id"]}
    assert "model_not_found" in {line.get("outcome") for line in lines}
    assert "context_length_exceeded" in {line.get("outcome") for line in lines}
    assert not {"/healthz", "/readyz", "/metrics"} & {line.get("route") for line in lines}
    for canary in (key, prompt, "CANARYTWEET"):
        assert canary not in text.replace(f'"model":"{prompt}"', ""), canary  # a model may be called anything


async def test_who_leaves_before_the_end_is_told_as_left(app: FastAPI, tmp_path: Path) -> None:
    model = "huggingtweets/tireless"  # on a busy machine a short text may be whole before its first part is read
    write_tiny_gpt2(tmp_path / "models" / model, n_positions=1024)
    with logging_to(tmp_path / "log"):
        generator = LocalGenerator(Settings(data=tmp_path, base=ADA, dtype="float32", hub_enabled=False))
        sampling: SamplingOverrides = {"max_new_tokens": 1000, "ignore_eos": True}
        texts = generator.generate(GenerationRequest(model, ("a",) * 8, sampling, request_id="gone"))
        await anext(texts)
        await texts.aclose()  # type: ignore[attr-defined]
        await generator.check_ready()
        await generator.close()
    [left] = [line for line in read_lines(tmp_path / "log") if line["event"] == "generated"]  # none of the readiness
    assert (left["request_id"], left["outcome"], left["model"]) == ("gone", "left", model)
    assert left["tokens"] >= 1


async def test_greedy_text_and_logprobs_are_those_of_transformers(ai: AsyncOpenAI, tmp_path: Path) -> None:
    folder = tmp_path / "models" / ADA
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("My dream is", return_tensors="pt").input_ids
    with torch.inference_mode():
        full = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0]
        logprobs = model(full[None]).logits[0].log_softmax(-1)
    expected = [float(logprobs[i, token]) for i, token in enumerate(full.tolist()[1:])]
    [choice] = (
        await ai.completions.create(
            model=ADA, prompt="My dream is", max_tokens=12, temperature=0, logprobs=2, echo=True
        )
    ).choices
    assert choice.text == tokenizer.decode(full, skip_special_tokens=True)
    assert choice.logprobs and choice.logprobs.token_logprobs
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)


async def test_a_prompt_alone_is_scored_as_with_a_token_after_it(ai: AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": ADA, "prompt": "My dream is", "temperature": 0, "logprobs": 1, "echo": True}
    alone = await ai.completions.create(**asked, max_tokens=0)
    longer = await ai.completions.create(**asked, max_tokens=1)
    scores, more = alone.choices[0].logprobs, longer.choices[0].logprobs
    assert scores and more and scores.token_logprobs and more.token_logprobs
    assert scores.token_logprobs == pytest.approx(more.token_logprobs[:-1])
    assert (alone.choices[0].text, alone.usage and alone.usage.completion_tokens) == ("My dream is", 0)


async def test_a_dropped_folder_with_pickled_weights_writes_what_its_weights_say(
    ai: AsyncOpenAI, tmp_path: Path
) -> None:
    write_old_checkpoint(tmp_path / "models/huggingtweets/old", seed=0)  # ada's weights
    asked: dict[str, Any] = {"prompt": "My dream is", "max_tokens": 8, "temperature": 0}
    old, ada = await asyncio.gather(
        ai.completions.create(model="huggingtweets/old", **asked), ai.completions.create(model=ADA, **asked)
    )
    assert old.choices[0].text == ada.choices[0].text


async def test_a_stream_and_a_whole_answer_of_one_seed_are_the_same_text(
    ai: AsyncOpenAI, client: httpx.AsyncClient
) -> None:
    asked: dict[str, Any] = {"model": ADA, "prompt": ["My dream", "Today"], "n": 3, "seed": 5, "max_tokens": 40}
    whole = await ai.completions.create(**asked)
    texts = [""] * 6
    async for chunk in await ai.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    body = {"inputs": "My dream", "parameters": {"seed": 5, "max_new_tokens": 40, "details": True}}
    told = (await client.post(f"/models/{ADA}", json=body)).json()[0]
    streamed = await client.post(f"/models/{ADA}", json={**body, "stream": True})
    events = [httpx.Response(200, content=line[5:]).json() for line in streamed.text.splitlines() if line]
    assert "My dream" + "".join(event["token"]["text"] for event in events) == told["generated_text"]
    assert events[-1]["generated_text"] == told["generated_text"]
    assert events[-1]["details"]["finish_reason"] == told["details"]["finish_reason"]
    assert len(events) == told["details"]["generated_tokens"] == len(told["details"]["tokens"])


async def test_many_models_answer_at_once(ai: AsyncOpenAI) -> None:
    names = ["ada", "bob", "base"] * 4
    answers = await asyncio.gather(
        *(ai.completions.create(model=f"huggingtweets/{name}", prompt="a", temperature=0) for name in names)
    )
    texts = {name: {a.choices[0].text for n, a in zip(names, answers, strict=True) if n == name} for name in names}
    assert all(len(found) == 1 for found in texts.values())


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"model": "huggingtweets/none"}, "model_not_found"),
        ({"prompt": "word " * 200}, "context_length_exceeded"),
        ({"max_tokens": 1000}, "context_length_exceeded"),
        ({"prompt": [100_000]}, "invalid_value"),
        ({"logit_bias": {"100000": 1}}, "invalid_value"),
    ],
)
async def test_what_the_model_cannot_do_is_a_clear_4xx(ai: AsyncOpenAI, asked: dict[str, Any], code: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as refused:
            await ai.completions.create(**{"model": ADA, "prompt": "a", **asked}, stream=stream)
        assert refused.value.code == code and refused.value.status_code in (400, 404)


async def test_ready_models_and_metrics_are_the_real_ones(client: httpx.AsyncClient) -> None:
    assert (await client.get("/readyz")).status_code == 200
    listed = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    assert {ADA, "huggingtweets/bob", "huggingtweets/base"} <= set(listed)
    assert (await client.delete(f"/v1/models/{ADA.replace('/', '%2F')}")).json()["deleted"]
    answer = await client.post("/v1/completions", json={"model": ADA, "prompt": "a"})
    assert answer.status_code == 404
    text = (await client.get("/metrics")).text
    assert re.search(r'rookery_model_loads_total\{outcome="ok",tier="\w+"\} 1\.0', text)  # the base, for /readyz


async def test_what_is_no_archive_is_refused_by_the_real_job_table_and_not_kept(
    ai: AsyncOpenAI, client: httpx.AsyncClient
) -> None:
    file = await ai.files.create(file=("ada.zip", b"no archive"), purpose="fine-tune")
    assert [found.id async for found in ai.files.list()] == [file.id]
    with pytest.raises(openai.BadRequestError) as refused:
        await ai.fine_tuning.jobs.create(model="fledgling", training_file=file.id, metadata={"handle": "ada"})
    assert refused.value.code in ("bad_upload", "too_few_tweets"), refused.value.message
    answer = await client.post("/v1/bots", files={"archive": ("a.zip", b"no archive")}, data={"handle": "ada"})
    assert answer.status_code == 400
    assert [found.id async for found in ai.files.list()] == [file.id]
    assert [job async for job in ai.fine_tuning.jobs.list(metadata={"a": "b"})] == []


async def test_a_bot_that_is_sent_twice_is_one_job_with_all_that_was_asked(
    ai: AsyncOpenAI, client: httpx.AsyncClient
) -> None:
    async def send(key: str, **more: str) -> httpx.Response:
        files = [("archive", ("a.zip", ARCHIVE.read_bytes())), ("validation", ("v.txt", b"Only to judge by.\n"))]
        data = {"handle": "@ada", "priority": "high", "batch_size": "2", **more}
        return await client.post("/v1/bots", files=files, data=data, headers={"idempotency-key": key})

    first, second = [(await send("key-1")).json() for _ in range(2)]
    assert first == second and (first["priority"], first["hyperparameters"]["batch_size"]) == ("high", 2)
    assert first["result"]["counts"]["ada"]["kept"] == 479
    files = {file.id async for file in ai.files.list()}
    assert files == {first["training_file"], first["validation_file"]}
    other = await send("key-1", seed="7")
    assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")
    assert (await send("key-2")).json()["id"] != first["id"]


async def test_jobs_are_found_by_their_metadata_or_by_having_none(ai: AsyncOpenAI) -> None:
    file = await ai.files.create(file=ARCHIVE, purpose="fine-tune")
    asked: dict[str, Any] = {"model": "huggingtweets/base", "training_file": file.id}
    labelled = await ai.fine_tuning.jobs.create(**asked, metadata={"team": ""})
    plain = await ai.fine_tuning.jobs.create(**asked)
    for query, expected in (
        ({"metadata": {"team": ""}}, [labelled.id]),
        ({"metadata": {"team": "b"}}, []),
        ({"extra_query": {"metadata": "null"}}, [plain.id]),
        ({}, [plain.id, labelled.id]),
    ):
        assert [job.id async for job in ai.fine_tuning.jobs.list(limit=1, **query)] == expected  # type: ignore[arg-type]
    paused = await ai.fine_tuning.jobs.pause(plain.id)
    assert paused.to_dict()["status"] == "paused"
    assert (await ai.fine_tuning.jobs.resume(plain.id)).status == "queued"
    assert [one async for one in ai.fine_tuning.jobs.checkpoints.list(plain.id)] == []
    assert [event.message async for event in ai.fine_tuning.jobs.list_events(plain.id, limit=1)][-1].startswith(
        "The job"
    )


async def test_a_preview_is_that_of_the_command(client: httpx.AsyncClient) -> None:
    with ARCHIVE.open("rb") as archive:
        answer = await client.post("/v1/archives/preview", files={"archive": (ARCHIVE.name, archive)})
    assert answer.json() == preview([ARCHIVE], None)
    refused = await client.post("/v1/archives/preview", files={"archive": ("cat.png", b"\x89PNG\r\n\x1a\n" * 100)})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_upload")


async def test_a_version_that_main_names_answers_whichever_came_last(
    ai: AsyncOpenAI, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    async def text(model: str) -> str:
        return (
            (await ai.completions.create(model=model, prompt="My dream is", max_tokens=8, temperature=0))
            .choices[0]
            .text
        )

    store, texts = Store(tmp_path, embedded={}), {}
    for seed in (1, 2):
        revision = store.import_folder(write_tiny_gpt2(tmp_path / f"v{seed}", seed=seed), "huggingtweets/eve").revision
        texts[revision] = await text("huggingtweets/eve")
    listed = (await client.get("/v1/models/huggingtweets%2Feve/versions")).json()["data"]
    assert {one["revision"] for one in listed} == texts.keys() and len(set(texts.values())) == 2
    for one in [*listed, *listed]:
        body = {"revision": one["revision"]}
        assert (await client.post("/v1/models/huggingtweets/eve/rollback", json=body)).json()["is_main"]
        assert await text("huggingtweets/eve") == await text(one["id"]) == texts[one["revision"]]
