"""The unmodified openai client against the API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.api.conftest import Server, World

ADA = "huggingtweets/ada"


@pytest.fixture
async def ai(world: World) -> AsyncIterator[AsyncOpenAI]:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=world.app))
    async with AsyncOpenAI(base_url="http://rookery/v1", api_key="any", http_client=http, max_retries=0) as client:
        yield client


async def test_a_completion_has_text_usage_and_the_models_revision(ai: AsyncOpenAI) -> None:
    completion = await ai.completions.create(model=ADA, prompt="My dream", max_tokens=5, seed=1)
    [choice] = completion.choices
    assert completion.id.startswith("cmpl-") and completion.object == "text_completion" and completion.model == ADA
    assert completion.system_fingerprint == "abc123"
    assert choice.text and choice.finish_reason == "length" and choice.logprobs is None
    assert completion.usage and completion.usage.to_dict() == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
    }
    assert completion._request_id


async def test_the_same_seed_gives_the_same_text_and_none_a_random_one(ai: AsyncOpenAI, world: World) -> None:
    texts = [(await ai.completions.create(model=ADA, prompt="a", seed=-7)).choices[0].text for _ in range(2)]
    assert texts[0] == texts[1]
    await ai.completions.create(model=ADA, prompt="a")
    await ai.completions.create(model=ADA, prompt="a")
    seeds = [request.seed for request in world.generator.requests]
    assert seeds[0] == seeds[1] == 2**64 - 7
    assert seeds[2] != seeds[3]  # equal once in 2^53 runs


async def test_max_tokens_is_16_unless_said(ai: AsyncOpenAI, world: World) -> None:
    await ai.completions.create(model=ADA, prompt="a")
    assert world.generator.requests[0].sampling == {"max_new_tokens": 16, "stop": ()}


async def test_every_parameter_reaches_the_generator(ai: AsyncOpenAI, world: World) -> None:
    await ai.completions.create(
        model=ADA,
        prompt="a",
        max_tokens=9,
        temperature=0.001,
        top_p=0.9,
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        logit_bias={"50256": -100},
        stop=["\n", "!!"],
        seed=5,
        user="u",
        suffix=None,
        extra_body={
            "top_k": 50,
            "min_p": 0.01,
            "typical_p": 0.95,
            "repetition_penalty": 1.2,
            "min_tokens": 2,
            "add_bos": True,
            "truncate": 100,
            "unknown": 1,
        },
    )
    [request] = world.generator.requests
    assert request.sampling == {
        "max_new_tokens": 9,
        "temperature": 0.001,
        "top_p": 0.9,
        "frequency_penalty": 0.1,
        "presence_penalty": -0.1,
        "logit_bias": ((50256, -100.0),),
        "stop": ("\n", "!!"),
        "top_k": 50,
        "min_p": 0.01,
        "typical_p": 0.95,
        "repetition_penalty": 1.2,
        "min_new_tokens": 2,
    }
    assert (request.seed, request.add_bos, request.truncate) == (5, True, 100)


@pytest.mark.parametrize(
    ("prompt", "as_sent"),
    [
        ("a", ("a",)),
        ("", ("",)),
        (None, ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
async def test_prompts_come_as_text_lists_token_ids_or_nothing(
    ai: AsyncOpenAI, world: World, prompt: str, as_sent: object
) -> None:
    await ai.completions.create(model=ADA, prompt=prompt)
    assert world.generator.requests[0].prompts == as_sent


async def test_choices_run_prompt_major(ai: AsyncOpenAI) -> None:
    both = await ai.completions.create(model=ADA, prompt=["a", "b"], n=2, seed=3)
    alone = [await ai.completions.create(model=ADA, prompt=prompt, n=2, seed=3) for prompt in ("a", "b")]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices] == [choice.text for one in alone for choice in one.choices]
    assert both.usage and both.usage.prompt_tokens == 2


async def test_best_of_returns_the_likeliest_by_mean_logprob(ai: AsyncOpenAI) -> None:
    best = await ai.completions.create(model=ADA, prompt="a", n=2, best_of=8, seed=3, logprobs=0)
    every = await ai.completions.create(model=ADA, prompt="a", n=8, seed=3, logprobs=0)

    def mean(choice: object) -> float:
        logprobs = choice.logprobs.token_logprobs  # type: ignore[attr-defined]
        return float(sum(logprobs) / len(logprobs))

    ranked = sorted(every.choices, key=mean, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage and best.usage.completion_tokens == 8 * 16


async def test_offsets_of_tokens_are_the_same_in_a_stream_where_a_character_spans_two_tokens(ai: AsyncOpenAI) -> None:
    asked: Any = {"model": ADA, "prompt": "a b", "seed": 5, "max_tokens": 40, "logprobs": 0}
    [choice] = (await ai.completions.create(**asked)).choices
    assert "\N{WAVING HAND SIGN}" in choice.text and choice.logprobs
    chunks = [chunk async for chunk in await ai.completions.create(**asked, stream=True)]
    parts = [piece.logprobs.text_offset for chunk in chunks for piece in chunk.choices]
    assert [offset for part in parts for offset in part] == choice.logprobs.text_offset


async def test_logprobs_list_alternatives_and_the_token_itself(ai: AsyncOpenAI) -> None:
    [choice] = (await ai.completions.create(model=ADA, prompt="a b", temperature=0, max_tokens=2, logprobs=3)).choices
    assert choice.logprobs and choice.logprobs.tokens == [" the", " the"]
    assert choice.logprobs.token_logprobs == [-0.25, -0.25]
    assert choice.logprobs.top_logprobs == [{" the": -0.25, "?": -9.0}] * 2
    assert choice.logprobs.text_offset == [0, 4]


async def test_echo_with_logprobs_scores_the_prompt(ai: AsyncOpenAI) -> None:
    [choice] = (
        await ai.completions.create(model=ADA, prompt="a b", temperature=0, max_tokens=1, logprobs=1, echo=True)
    ).choices
    assert choice.text == "a b the"
    assert choice.logprobs and choice.logprobs.tokens == ["a", " b", " the"]
    assert choice.logprobs.token_logprobs == [None, -1.0, -0.25]
    assert choice.logprobs.top_logprobs and choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.text_offset == [0, 1, 3]


@pytest.mark.parametrize("stream", [False, True])
async def test_no_new_tokens_with_echo_scores_the_prompt_alone(client: httpx.AsyncClient, stream: bool) -> None:
    asked = {"model": ADA, "prompt": ["a b", "c"], "max_tokens": 0, "logprobs": 1, "echo": True, "stream": stream}
    if stream:
        asked["stream_options"] = {"include_usage": True}
    answer = await client.post("/v1/completions", json=asked)
    assert answer.status_code == 200
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:7] == "data: {"] or [answer.json()]
    choices = [choice for event in events for choice in event["choices"] if choice["text"]]
    assert [choice["text"] for choice in choices] == ["a b", "c"]
    assert choices[0]["logprobs"]["token_logprobs"] == [None, -1.0]
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]
    assert reasons == ["length", "length"]
    assert events[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}


async def test_a_stop_string_ends_with_stop_and_is_not_in_the_text(ai: AsyncOpenAI) -> None:
    [choice] = (await ai.completions.create(model=ADA, prompt="a", temperature=0, stop="e the t")).choices
    assert choice.text == " th" and choice.finish_reason == "stop"


@pytest.mark.parametrize("echo", [False, True])
async def test_a_stream_says_what_the_whole_answer_says(ai: AsyncOpenAI, echo: bool) -> None:
    asked = {"model": ADA, "prompt": ["a b", "c"], "n": 2, "seed": 9, "max_tokens": 100, "logprobs": 1, "echo": echo}
    whole = await ai.completions.create(**asked)  # type: ignore[call-overload]
    texts, tokens, reasons = ["", "", "", ""], [[], [], [], []], ["", "", "", ""]  # type: ignore[var-annotated]
    usage = None
    stream = await ai.completions.create(**asked, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    async for chunk in stream:
        assert chunk.object == "text_completion"
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices] == ["stop"] * 4
    assert usage == whole.usage


async def test_errors_are_the_clients_own_exceptions(ai: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        await ai.completions.create(model="missing", prompt="a")
    assert not_found.value.code == "model_not_found" and not_found.value.param == "model"
    with pytest.raises(openai.RateLimitError) as busy:
        await ai.completions.create(model="busy", prompt="a")
    assert busy.value.response.headers["retry-after"] == "3" and busy.value.code == "rate_limit_exceeded"
    with pytest.raises(openai.InternalServerError) as nan:
        await ai.completions.create(model="nan", prompt="a")
    assert nan.value.response.headers["x-should-retry"] == "false" and nan.value.code == "generation_failed"
    with pytest.raises(openai.BadRequestError) as suffix:
        await ai.completions.create(model=ADA, prompt="a", suffix="b")
    assert suffix.value.param == "suffix"


@pytest.mark.parametrize("model", ["missing", "busy", "away"])
async def test_an_error_before_the_first_token_of_a_stream_is_an_http_error(ai: AsyncOpenAI, model: str) -> None:
    with pytest.raises(openai.APIStatusError):
        await ai.completions.create(model=model, prompt="a", stream=True)


@pytest.mark.parametrize("model", ["halfway", "crash", "nan"])
async def test_an_error_inside_a_stream_is_an_event_and_no_done(
    ai: AsyncOpenAI, client: httpx.AsyncClient, model: str
) -> None:
    with pytest.raises(openai.APIError):
        async for _ in await ai.completions.create(model=model, prompt="a", stream=True):
            pass
    answer = await client.post("/v1/completions", json={"model": model, "prompt": "a", "stream": True})
    assert answer.status_code == 200 and answer.headers["x-accel-buffering"] == "no"
    assert '"error"' in answer.text.strip().splitlines()[-1]
    assert "[DONE]" not in answer.text and "secret" not in answer.text


async def test_models_are_listed_read_and_deleted(ai: AsyncOpenAI, world: World) -> None:
    listed = [model async for model in ai.models.list()]
    assert [model.id for model in listed] == ["fledgling", ADA, "huggingtweets/bob"]
    assert listed[0].object == "model" and listed[0].owned_by == "rookery" and listed[0].created == 1_700_000_000
    assert (await ai.models.retrieve(ADA)).id == ADA
    deleted = await ai.models.delete(ADA)
    assert (deleted.id, deleted.deleted) == (ADA, True) and world.generator.forgotten == [ADA]
    with pytest.raises(openai.NotFoundError):
        await ai.models.retrieve(ADA)


async def test_a_model_deleted_under_another_case_is_forgotten_under_its_own(ai: AsyncOpenAI, world: World) -> None:
    assert (await ai.models.delete(ADA.upper())).id == ADA
    assert world.generator.forgotten == [ADA]


async def test_deleting_the_base_is_a_conflict_that_is_not_tried_again(ai: AsyncOpenAI) -> None:
    with pytest.raises(openai.ConflictError) as conflict:
        await ai.models.delete("fledgling")
    assert conflict.value.response.headers["x-should-retry"] == "false"


async def test_models_page_by_limit_after_and_query(client: httpx.AsyncClient) -> None:
    first = (await client.get("/v1/models", params={"limit": 2})).json()
    assert first["has_more"] and first["last_id"] == ADA
    second = (await client.get("/v1/models", params={"limit": 2, "after": first["last_id"]})).json()
    assert [model["id"] for model in second["data"]] == ["huggingtweets/bob"] and not second["has_more"]
    found = (await client.get("/v1/models", params={"q": "bob"})).json()
    assert [model["id"] for model in found["data"]] == ["huggingtweets/bob"]


def test_the_blocking_client_works_over_a_real_socket(server: Server) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as ai:
        asked = {"model": ADA, "prompt": "a", "seed": 4, "max_tokens": 30}
        whole = ai.completions.create(**asked)  # type: ignore[call-overload]
        with ai.completions.create(**asked, stream=True) as stream:  # type: ignore[call-overload]
            assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
        assert ai.models.retrieve(ADA).id == ADA
