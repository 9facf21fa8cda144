"""huggingface_hub's unmodified InferenceClient against the live application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient, TextGenerationOutput, TextGenerationStreamOutput
from huggingface_hub.errors import HfHubHTTPError, ValidationError

from tests.deployments.conftest import BASE, LiveService, import_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

WREN = "huggingtweets/wren"
PROMPT = "My dream is"
REFUSED = [
    ({"temperature": -1.0}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"best_of": 2, "seed": 1}, "best_of"),
    ({"watermark": True}, "watermark"),
    ({"max_new_tokens": 500}, "maximum context length is 64 tokens"),
]


@pytest.fixture(scope="module")
def url(live_service: LiveService) -> str:
    """The address of one model, as people give it to a client."""
    import_tiny_model(live_service.data, WREN, seed=2)
    return f"{live_service.url}/models/{WREN}"


@pytest.fixture
def client(url: str) -> InferenceClient:
    return InferenceClient(base_url=url, timeout=60)


@pytest.fixture
async def async_client(url: str) -> AsyncIterator[AsyncInferenceClient]:
    async with AsyncInferenceClient(base_url=url, timeout=60) as client:
        yield client


def test_a_text_is_the_same_for_the_same_seed_and_another_for_another(client: InferenceClient) -> None:
    texts = [client.text_generation(PROMPT, max_new_tokens=12, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_the_prompt_is_part_of_the_text_unless_it_is_not_wanted(client: InferenceClient) -> None:
    default, full, rest = (
        client.text_generation(PROMPT, max_new_tokens=12, seed=3, return_full_text=wanted)
        for wanted in (None, True, False)
    )
    assert default == full == PROMPT + rest


def test_generate_gives_the_continuation_alone_and_finds_the_model_by_its_adapter_id(
    client: InferenceClient, live_url: str
) -> None:
    rest = client.text_generation(PROMPT, max_new_tokens=12, seed=3, return_full_text=False)
    generate, root = (InferenceClient(base_url=live_url + path, timeout=60) for path in ("/generate", ""))
    assert generate.text_generation(PROMPT, max_new_tokens=12, seed=3, adapter_id=WREN) == rest
    assert root.text_generation(PROMPT, max_new_tokens=12, seed=3, adapter_id=WREN) == PROMPT + rest


def test_without_a_model_the_base_answers(live_url: str) -> None:
    text = InferenceClient(base_url=live_url).text_generation(PROMPT, max_new_tokens=12, seed=3)
    of_base = InferenceClient(base_url=f"{live_url}/models/{BASE}").text_generation(PROMPT, max_new_tokens=12, seed=3)
    assert text == of_base


def test_details_tell_every_token_of_the_prompt_and_of_the_text(client: InferenceClient) -> None:
    told = client.text_generation(
        PROMPT, max_new_tokens=12, seed=3, details=True, decoder_input_details=True, top_n_tokens=2, do_sample=True
    )
    assert isinstance(told, TextGenerationOutput) and told.details is not None
    details = told.details
    assert (details.seed, details.generated_tokens, len(details.tokens)) == (
        3,
        len(details.tokens),
        len(details.tokens),
    )
    assert details.finish_reason in ("length", "eos_token")
    assert "".join(token.text for token in details.prefill) == PROMPT
    assert [token.logprob is None for token in details.prefill] == [True] + [False] * (len(details.prefill) - 1)
    assert all(token.logprob < 0 for token in details.tokens)
    assert details.top_tokens is not None and {len(top) for top in details.top_tokens} == {2}


def test_best_of_returns_the_likeliest_and_tells_of_the_others(client: InferenceClient) -> None:
    told = client.text_generation(PROMPT, max_new_tokens=8, best_of=3, do_sample=True, details=True)
    assert told.details is not None and told.details.best_of_sequences is not None
    sequences: list[Any] = [told.details, *told.details.best_of_sequences]  # two classes with the same fields
    means = [sum(token.logprob for token in one.tokens) / len(one.tokens) for one in sequences]
    assert len(means) == 3 and means[0] == max(means)


def test_a_stream_is_the_whole_text_in_pieces(client: InferenceClient) -> None:
    rest = client.text_generation(PROMPT, max_new_tokens=20, seed=5, return_full_text=False)
    assert "".join(client.text_generation(PROMPT, max_new_tokens=20, seed=5, stream=True)) == rest


def test_a_stream_with_details_ends_in_the_whole_text_and_why_it_ended(client: InferenceClient) -> None:
    events: list[TextGenerationStreamOutput] = list(
        client.text_generation(PROMPT, max_new_tokens=20, seed=5, stream=True, details=True, return_full_text=False)
    )
    *others, last = events
    assert all(event.details is None and event.generated_text is None for event in others)
    assert last.generated_text == "".join(event.token.text for event in events)
    assert last.details is not None
    assert (last.details.seed, last.details.generated_tokens) == (5, len(events))
    assert [event.index for event in events] == list(range(1, len(events) + 1))


def test_a_stop_string_ends_the_text_and_is_named_as_the_reason(client: InferenceClient) -> None:
    whole = client.text_generation(PROMPT, max_new_tokens=30, seed=5, return_full_text=False)
    stop = next(letter for letter in whole[2:] if letter.isascii() and letter.isalpha())
    told = client.text_generation(PROMPT, max_new_tokens=30, seed=5, stop=[stop], details=True, return_full_text=False)
    assert told.details is not None and told.details.finish_reason == "stop_sequence"
    assert told.generated_text == whole[: whole.index(stop)]
    pieces = client.text_generation(PROMPT, max_new_tokens=30, seed=5, stop=[stop], stream=True)
    assert "".join(pieces) == told.generated_text


def test_what_the_client_can_say_besides_is_understood(client: InferenceClient) -> None:
    greedy = client.text_generation(PROMPT, max_new_tokens=12, do_sample=False)
    assert greedy == client.text_generation(PROMPT, max_new_tokens=12, top_k=1, seed=8)
    assert greedy.startswith(PROMPT)
    other = client.text_generation(
        PROMPT,
        max_new_tokens=12,
        temperature=0.7,
        top_p=0.9,
        typical_p=0.9,
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        truncate=3,
        do_sample=True,
        watermark=False,
    )
    assert other.startswith(PROMPT)


@pytest.mark.parametrize(("asked", "said"), REFUSED)
def test_a_wrong_parameter_is_a_validation_error_that_names_it(
    client: InferenceClient, asked: dict[str, float], said: str
) -> None:
    for stream in (False, True):
        with pytest.raises(ValidationError, match=said):
            list(client.text_generation(PROMPT, **asked, stream=stream))  # type: ignore[call-overload]


def test_an_unknown_model_is_a_404(live_url: str) -> None:
    for stream in (False, True):
        with pytest.raises(HfHubHTTPError, match="no/such") as caught:
            list(InferenceClient(base_url=f"{live_url}/models/no/such").text_generation(PROMPT, stream=stream))
        assert caught.value.response.status_code == 404


def test_info_and_health_are_those_that_the_client_asks_for(live_url: str) -> None:
    client = InferenceClient(model=live_url, provider="hf-inference")
    told = client.get_endpoint_info()
    assert (told["model_id"], told["max_total_tokens"]) == (BASE, 64)
    assert client.health_check()


async def test_the_async_client_gets_the_same_texts_many_at_once(
    client: InferenceClient, async_client: AsyncInferenceClient
) -> None:
    texts = await asyncio.gather(
        *(async_client.text_generation(PROMPT, max_new_tokens=12, seed=seed) for seed in range(8))
    )
    assert len(set(texts)) > 1
    assert texts[3] == await asyncio.to_thread(client.text_generation, PROMPT, max_new_tokens=12, seed=3)


async def test_the_async_client_streams(async_client: AsyncInferenceClient) -> None:
    told = await async_client.text_generation(
        PROMPT, max_new_tokens=20, seed=5, details=True, decoder_input_details=True, return_full_text=False
    )
    pieces = await async_client.text_generation(PROMPT, max_new_tokens=20, seed=5, stream=True)
    assert "".join([piece async for piece in pieces]) == told.generated_text
    events = await async_client.text_generation(PROMPT, max_new_tokens=20, seed=5, stream=True, details=True)
    assert told.details is not None
    assert [event.token.id async for event in events] == [token.id for token in told.details.tokens]


async def test_the_async_client_raises_the_same_errors(async_client: AsyncInferenceClient, live_url: str) -> None:
    with pytest.raises(ValidationError, match="top_p"):
        await async_client.text_generation(PROMPT, top_p=1.5)
    async with AsyncInferenceClient(base_url=f"{live_url}/models/no/such") as unknown:
        with pytest.raises(HfHubHTTPError, match="no/such"):
            await unknown.text_generation(PROMPT)
