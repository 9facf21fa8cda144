"""The unmodified huggingface_hub clients against the API on a real socket, and what they do not show."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import GenerationError, HfHubHTTPError, OverloadedError, ValidationError

from tests.api.conftest import Server, World

ADA = "huggingtweets/ada"


def test_text_generation_by_the_models_url_returns_the_full_text(server: Server) -> None:
    client = InferenceClient(base_url=f"{server.url}/models/{ADA}")
    full = client.text_generation("My dream", seed=1, max_new_tokens=5)
    assert full.startswith("My dream") and len(full) > len("My dream")
    assert client.text_generation("My dream", seed=1, max_new_tokens=5, return_full_text=False) == full[8:]


def test_generate_leaves_the_prompt_out(server: Server) -> None:
    client = InferenceClient(base_url=f"{server.url}/generate")
    assert not client.text_generation("My dream", seed=1).startswith("My dream")


def test_a_model_comes_from_adapter_id_then_the_body_then_the_default(server: Server, world: World) -> None:
    client = InferenceClient(base_url=server.url)
    client.text_generation("a", adapter_id=ADA)
    client.text_generation("a")
    httpx.post(f"{server.url}/generate", json={"inputs": "a", "model": "huggingtweets/bob"})
    assert [request.model_id for request in world.generator.requests] == [ADA, "fledgling", "huggingtweets/bob"]


def test_details_tell_every_token_the_seed_and_the_reason(server: Server, world: World) -> None:
    client = InferenceClient(base_url=f"{server.url}/models/{ADA}")
    output = client.text_generation(
        "a b", details=True, decoder_input_details=True, max_new_tokens=3, do_sample=False, top_n_tokens=2
    )
    details = output.details
    assert details is not None and output.generated_text == "a b the the the"
    assert (details.finish_reason, details.generated_tokens) == ("length", 3)
    assert details.seed == world.generator.requests[0].seed
    assert [token.text for token in details.prefill] == ["a", " b"]
    assert [(token.text, token.logprob, token.special) for token in details.tokens] == [(" the", -0.25, False)] * 3
    assert details.top_tokens and [token["text"] for token in details.top_tokens[0]] == [" the", "?"]


def test_finish_reasons_have_their_own_words(server: Server) -> None:
    client = InferenceClient(base_url=f"{server.url}/generate")

    def reason(**asked: Any) -> str:
        details = client.text_generation("a", details=True, **asked).details
        assert details is not None
        return str(details.finish_reason)

    assert reason(max_new_tokens=2) == "length"
    assert reason(max_new_tokens=100) == "eos_token"
    assert reason(do_sample=False, stop=["the the"]) == "stop_sequence"


def test_best_of_returns_the_best_and_details_of_the_others(server: Server) -> None:
    client = InferenceClient(base_url=f"{server.url}/generate")
    details = client.text_generation("a", best_of=3, do_sample=True, details=True, max_new_tokens=4).details
    assert details is not None and details.best_of_sequences is not None and len(details.best_of_sequences) == 2

    def mean(tokens: Any) -> float:
        return float(sum(token.logprob for token in tokens) / len(tokens))

    assert all(mean(details.tokens) >= mean(other.tokens) for other in details.best_of_sequences)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_the_texts_of_a_stream_are_exactly_the_whole_text(server: Server, seed: int) -> None:
    client = InferenceClient(base_url=f"{server.url}/generate")
    whole = client.text_generation("a", seed=seed, max_new_tokens=100)
    assert "".join(client.text_generation("a", seed=seed, max_new_tokens=100, stream=True)) == whole


def test_the_last_event_of_a_stream_has_the_whole_text_and_details(server: Server) -> None:
    client = InferenceClient(base_url=f"{server.url}/models/{ADA}")
    events = list(client.text_generation("a b", stream=True, details=True, seed=6, max_new_tokens=60))
    *others, last = events
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert all(event.generated_text is None and event.details is None for event in others)
    assert last.generated_text == "a b" + "".join(event.token.text for event in events)
    assert last.details is not None and last.details.finish_reason == "eos_token"
    assert (last.details.seed, last.details.input_length) == (6, 2)
    assert last.details.generated_tokens == len(events) and last.token.special


async def test_the_async_client_gets_the_same(server: Server) -> None:
    async with AsyncInferenceClient(base_url=f"{server.url}/generate") as client:
        whole = await client.text_generation("a", seed=2)
        stream = await client.text_generation("a", seed=2, stream=True)
        assert "".join([text async for text in stream]) == whole


def test_errors_are_the_clients_own_exceptions(server: Server) -> None:
    def ask(model: str, prompt: str = "a", **asked: Any) -> None:
        client = InferenceClient(base_url=f"{server.url}/models/{model}")  # closes its streams when it goes
        list(client.text_generation(prompt, **asked))

    with pytest.raises(ValidationError, match="best_of"):
        ask(ADA, best_of=2, do_sample=True, seed=1)
    with pytest.raises(ValidationError, match="inputs"):
        ask(ADA, prompt="")
    with pytest.raises(GenerationError):
        ask("nan")
    with pytest.raises(GenerationError):
        ask("halfway", stream=True)
    with pytest.raises(OverloadedError):
        ask("busy")
    with pytest.raises(HfHubHTTPError, match="no such model"):
        ask("missing")


@pytest.mark.parametrize(
    "parameters",
    [
        {"watermark": True},
        {"grammar": {"type": "json", "value": {}}},
        {"temperature": 0},
        {"top_k": 0},
        {"repetition_penalty": 0},
        {"top_p": 0},
        {"best_of": 2, "do_sample": False},
        {"num_return_sequences": 2, "best_of": 2},
        {"stop": ["a"] * 17},
        {"stop": [""]},
        {"decoder_input_details": True, "stream": True},
    ],
)
async def test_what_text_generation_inference_refuses_is_refused(
    client: httpx.AsyncClient, parameters: dict[str, Any]
) -> None:
    stream = parameters.pop("stream", False)
    answer = await client.post("/", json={"inputs": "a", "parameters": parameters, "stream": stream})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert f"parameters.{next(iter(parameters))}" in answer.text or next(iter(parameters)) in answer.text


async def test_parameters_that_ask_for_nothing_are_accepted(client: httpx.AsyncClient, world: World) -> None:
    parameters: dict[str, Any] = {
        "watermark": False,
        "grammar": None,
        "do_sample": False,
        "best_of": None,
        "stop": [],
        "strange": 1,
    }
    body = {"inputs": "a", "parameters": parameters, "options": {"wait_for_model": True, "use_gpu": False}}
    assert (await client.post("/generate", json=body)).status_code == 200
    assert world.generator.requests[0].sampling == {"temperature": 0.0}


async def test_do_sample_false_with_a_temperature_still_samples(client: httpx.AsyncClient, world: World) -> None:
    await client.post("/generate", json={"inputs": "a", "parameters": {"do_sample": False, "temperature": 0.7}})
    assert world.generator.requests[0].sampling == {"temperature": 0.7}


async def test_num_return_sequences_gives_a_list_as_a_pipeline_does(client: httpx.AsyncClient) -> None:
    body = {"inputs": "a", "parameters": {"num_return_sequences": 3}}
    assert len((await client.post(f"/models/{ADA}", json=body)).json()) == 3
    assert (await client.post("/generate", json=body)).status_code == 422


async def test_headers_tell_times_tier_and_tokens(client: httpx.AsyncClient) -> None:
    body = {"inputs": "a b", "parameters": {"max_new_tokens": 4}}
    headers = (await client.post("/generate", json=body)).headers
    assert headers["x-model-tier"] == "disk" and headers["x-model-load-time"] == "125"
    assert headers["x-queue-time"] == "250" and headers["x-prompt-tokens"] == "2"
    assert headers["x-generated-tokens"] == "4" and headers["x-compute-characters"] == "3"
    assert float(headers["x-compute-time"]) >= 0 and int(headers["x-total-time"]) >= 0
    stream = await client.post("/generate_stream", json=body)
    assert stream.headers["x-accel-buffering"] == "no" and stream.headers["x-model-tier"] == "disk"
    assert stream.headers["content-type"].startswith("text/event-stream")


async def test_giving_up_says_when_to_come_back(client: httpx.AsyncClient) -> None:
    answer = await client.post("/models/away", json={"inputs": "a"})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "7"
    assert answer.json() == {"error": "The disk is away.", "estimated_time": 7}


async def test_info_and_health_answer_as_text_generation_inference_does(client: httpx.AsyncClient) -> None:
    info = (await client.get("/info")).json()
    assert (info["model_id"], info["model_sha"], info["max_total_tokens"]) == ("fledgling", "abc123", 1024)
    assert (await client.get("/health")).status_code == 200
