"""The unmodified openai client, sync and async, against the live application."""

from __future__ import annotations

import asyncio
import csv
import itertools
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.fine_tuning import FineTuningJob
from tokenizers import Tokenizer

from serve.store.revisions import Store
from tests.deployments.conftest import BASE, LiveService, import_tiny_model, start_service, stop_service, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ARCHIVE = Path(__file__).parents[2] / "deployments" / "archives" / "unit_seven.zip"
PROMPT = "My dream is"
END_OF_TEXT = 511

Asked = dict[str, Any]


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(live_url: str) -> Iterator[OpenAI]:
    with client_of(live_url) as client:
        yield client


@pytest.fixture
async def async_client(live_url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{live_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(live_service: LiveService) -> Tokenizer:
    return Tokenizer.from_file(str(Store(live_service.data, embedded={}).resolve(BASE).path / "tokenizer.json"))


def complete(client: OpenAI, **asked: Any) -> openai.types.Completion:
    """Greedy, of the base and with `max_tokens` 12, unless asked otherwise."""
    completion: openai.types.Completion = client.completions.create(
        **{"model": BASE, "prompt": PROMPT, "temperature": 0, "max_tokens": 12, **asked}
    )
    return completion


def text_of(client: OpenAI, **asked: Any) -> str:
    (choice,) = complete(client, **asked).choices
    return choice.text


def streamed(client: OpenAI, **asked: Any) -> list[openai.types.Completion]:
    return list(complete(client, stream=True, **asked))  # type: ignore[arg-type]


# --- Completions ------------------------------------------------------------------------------------------


def test_the_reply_is_a_whole_completion_object(client: OpenAI) -> None:
    reply = complete(client, user="somebody")
    assert (reply.object, reply.model, reply.id[:5]) == ("text_completion", BASE, "cmpl-")
    assert reply.system_fingerprint
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    (choice,) = reply.choices
    assert (choice.index, choice.logprobs) == (0, None) and choice.finish_reason in ("stop", "length")


def test_a_reply_has_one_request_id_the_clients_own_if_it_gave_one(client: OpenAI) -> None:
    given = client.with_options(default_headers={"x-request-id": "mine-1"})
    assert complete(given)._request_id == "mine-1"
    assert "," not in (complete(client)._request_id or ",")


@pytest.mark.parametrize("asked", [{}, {"temperature": 0.8}, {"top_p": 0.7}, {"n": 3}, {"extra_body": {"top_k": 20}}])
def test_a_seed_fixes_the_texts_and_another_one_changes_them(client: OpenAI, asked: Asked) -> None:
    first, same, other = (
        [choice.text for choice in complete(client, **{"temperature": 1, "seed": seed, **asked}).choices]
        for seed in (7, 7, 8)
    )
    assert first == same != other


def test_n_gives_so_many_choices_to_each_prompt_in_order(client: OpenAI) -> None:
    reply = complete(client, prompt=[PROMPT, "Today"], n=3, seed=5, temperature=1, echo=True)
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert [choice.text.startswith(PROMPT) for choice in reply.choices] == [True] * 3 + [False] * 3
    assert all(choice.text.startswith("Today") for choice in reply.choices[3:])
    assert len({choice.text for choice in reply.choices}) == 6


def test_best_of_returns_the_likeliest_of_all(client: OpenAI) -> None:
    everything = complete(client, n=5, seed=5, temperature=1, logprobs=0).choices
    best = complete(client, n=2, best_of=5, seed=5, temperature=1).choices

    def mean(choice: openai.types.CompletionChoice) -> float:
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(everything, key=mean, reverse=True)
    assert [choice.text for choice in best] == [choice.text for choice in ranked[:2]]


def test_echo_with_logprobs_tells_of_the_prompt_too(client: OpenAI, tokenizer: Tokenizer) -> None:
    (choice,) = complete(client, echo=True, logprobs=3, max_tokens=4).choices
    told = choice.logprobs
    assert told and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
    prompt = [tokenizer.decode([token]) for token in tokenizer.encode(PROMPT).ids]
    assert told.tokens[: len(prompt)] == prompt
    assert told.token_logprobs[0] is None and all(logprob < 0 for logprob in told.token_logprobs[1:])
    assert told.text_offset[: len(prompt)] == [PROMPT.index(text) for text in prompt]
    assert len(told.tokens) == len(told.top_logprobs) == len(prompt) + 4
    for token, top in zip(told.tokens[len(prompt) :], told.top_logprobs[len(prompt) :], strict=True):
        assert max(top, key=top.__getitem__) == token, "greedy text is the likeliest"
    assert text_of(client, echo=True, max_tokens=4) == PROMPT + text_of(client, max_tokens=4)


def test_stop_ends_the_text_before_it(client: OpenAI) -> None:
    whole = text_of(client, max_tokens=30)
    found = re.search("[a-z]{2,}", whole[3:])
    assert found
    stop, expected = found[0], whole[: whole.index(found[0])]
    for wanted in (stop, [stop, "no such text"]):
        (choice,) = complete(client, stop=wanted, max_tokens=30).choices
        assert (choice.text, choice.finish_reason) == (expected, "stop")
    chunks = streamed(client, stop=stop, max_tokens=30)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stream_is_the_whole_reply_in_pieces(client: OpenAI) -> None:
    asked: Asked = {"n": 2, "seed": 3, "temperature": 1, "logprobs": 1, "echo": True, "max_tokens": 20}
    whole = complete(client, **asked)
    *chunks, last = streamed(client, **asked, stream_options={"include_usage": True})
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in chunks) and len({chunk.id for chunk in [*chunks, last]}) == 1
    for choice in whole.choices:
        pieces = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [choice.finish_reason]
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [part for piece in pieces for part in getattr(piece.logprobs, name)]
            assert parts == getattr(choice.logprobs, name), name


def test_a_stream_without_include_usage_has_none(client: OpenAI) -> None:
    assert all(chunk.usage is None and chunk.choices for chunk in streamed(client))


def test_logit_bias_forces_a_token_and_forbids_one(client: OpenAI, tokenizer: Tokenizer) -> None:
    forced = tokenizer.token_to_id("the") or tokenizer.encode("t").ids[0]
    assert text_of(client, logit_bias={str(forced): 100}, max_tokens=5) == tokenizer.decode([forced] * 5)
    first = complete(client, logprobs=0, max_tokens=1).choices[0].logprobs
    assert first and first.tokens
    (likeliest,) = tokenizer.encode(first.tokens[0]).ids
    assert text_of(client, logit_bias={str(likeliest): -100}, max_tokens=1) != first.tokens[0]


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra_body": {"repetition_penalty": 2}}]
)
def test_penalties_make_a_text_repeat_itself_less(client: OpenAI, tokenizer: Tokenizer, penalty: Asked) -> None:
    repeated = tokenizer.encode("t").ids[0]
    asked: Asked = {"logit_bias": {str(repeated): 3, str(END_OF_TEXT): -100}, "max_tokens": 40, "logprobs": 0}

    def variety(**more: Any) -> int:
        logprobs = complete(client, **asked, **more).choices[0].logprobs
        assert logprobs and logprobs.tokens
        return len(set(logprobs.tokens))

    assert variety(**penalty) > variety()


def test_top_k_1_is_greedy_and_min_tokens_puts_the_end_off(client: OpenAI) -> None:
    assert text_of(client, temperature=1, extra_body={"top_k": 1}) == text_of(client)
    eager: Asked = {"logit_bias": {str(END_OF_TEXT): 100}}
    ended = complete(client, **eager)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    later = complete(client, **eager, extra_body={"min_tokens": 6}, logprobs=0).choices[0].logprobs
    assert later and later.tokens and len(later.tokens) == 7  # six, then the end


def test_add_bos_begins_the_prompt_with_the_end_of_text(client: OpenAI, tokenizer: Tokenizer) -> None:
    plain, begun = complete(client), complete(client, extra_body={"add_bos": True})
    assert plain.usage and begun.usage
    assert begun.usage.prompt_tokens == plain.usage.prompt_tokens + 1
    by_ids = text_of(client, prompt=[END_OF_TEXT, *tokenizer.encode(PROMPT).ids])
    assert begun.choices[0].text == by_ids != plain.choices[0].text


def test_a_prompt_may_be_text_or_tokens_one_or_many_or_nothing(client: OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT).ids
    expected = text_of(client)
    for one in ([PROMPT], ids, [ids]):
        assert text_of(client, prompt=one) == expected
    today = tokenizer.encode("Today").ids
    of_texts, of_tokens = (
        [choice.text for choice in complete(client, prompt=prompt).choices]
        for prompt in ([PROMPT, "Today"], [ids, today])
    )
    assert of_texts == of_tokens == [expected, text_of(client, prompt="Today")]
    nothing = complete(client, prompt=None)
    assert nothing.usage is not None and nothing.usage.prompt_tokens == 1
    assert nothing.choices[0].text == text_of(client, prompt=[END_OF_TEXT])


# --- Refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"suffix": " the end"}, "suffix"),
        ({"n": 0}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"temperature": 9}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"logprobs": 6}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"stop": list("abcde")}, "stop"),
        ({"logit_bias": {"tea": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prompt": [99_999]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"extra_body": {"min_tokens": 13}}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_name(client: OpenAI, asked: Asked, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **asked)
    assert (caught.value.param or "").startswith(param)
    assert caught.value.code == "invalid_value" and caught.value.type == "invalid_request_error"


def test_what_does_not_fit_the_context_is_refused(client: OpenAI) -> None:
    for asked in ({"prompt": "secret words " * 50}, {"max_tokens": 64}):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="64 tokens") as caught:
                complete(client, **asked, stream=stream)
            assert caught.value.code == "context_length_exceeded"
            assert "secret" not in caught.value.message


def test_an_unknown_model_is_not_found_and_evicts_nothing(client: OpenAI, live_url: str) -> None:
    def residents() -> set[tuple[str, str, str]]:
        data = httpx.get(f"{live_url}/v1/residents", timeout=30).json()["data"]
        return {(one["replica"], one["model"], one["revision"]) for one in data}

    complete(client)
    before = residents()
    for unknown in ("huggingtweets/nobody", "nobody", "../../etc/passwd", "a/b/c", f"{BASE}@0000000"):
        for stream in (False, True):
            with pytest.raises(openai.NotFoundError) as caught:
                complete(client, model=unknown, stream=stream)
            assert caught.value.code == "model_not_found"
    assert before and residents() == before


# --- Models -----------------------------------------------------------------------------------------------


def check_models(client: OpenAI, data: Path) -> None:
    """Lists, retrieves and deletes a model whose name the client sends with a percent-encoded slash."""
    import_tiny_model(data, "tiny/doomed", seed=4)
    assert text_of(client, model="tiny/doomed", max_tokens=2) is not None
    listed = {model.id: model for model in client.models.list()}
    assert {"fledgling", BASE, "tiny/doomed"} <= listed.keys()
    assert client.models.retrieve("tiny/doomed") == listed["tiny/doomed"]
    assert listed["tiny/doomed"].owned_by == "tiny" and listed["tiny/doomed"].object == "model"
    deleted = client.models.delete("tiny/doomed")
    assert (deleted.id, deleted.deleted) == ("tiny/doomed", True)
    for ask in (client.models.retrieve, client.models.delete, lambda model: complete(client, model=model)):
        with pytest.raises(openai.NotFoundError) as caught:
            ask("tiny/doomed")
        assert caught.value.code == "model_not_found"
    assert "tiny/doomed" not in {model.id for model in client.models.list()}


def test_models_are_listed_retrieved_and_deleted(client: OpenAI, live_service: LiveService) -> None:
    check_models(client, live_service.data)


@pytest.mark.slow
def test_models_are_listed_retrieved_and_deleted_without_haproxy_too(tmp_path: Path) -> None:
    import_tiny_model(tmp_path, BASE)
    service = start_service(tmp_path, RAY_SERVE_ENABLE_HA_PROXY="0")
    try:
        with client_of(service.url) as client:
            check_models(client, tmp_path)
            assert "," not in (complete(client)._request_id or ",")
    finally:
        left = stop_service(service)
    assert left == []


def test_the_embedded_base_cannot_be_deleted(client: OpenAI) -> None:
    with pytest.raises(openai.ConflictError, match="fledgling") as caught:
        client.models.delete("fledgling")
    assert caught.value.response.headers["x-should-retry"] == "false"


# --- Async ------------------------------------------------------------------------------------------------


async def test_the_async_client_gets_the_same_texts_many_at_once(client: OpenAI, async_client: AsyncOpenAI) -> None:
    seeds = range(8)
    replies = await asyncio.gather(
        *(async_client.completions.create(model=BASE, prompt=PROMPT, max_tokens=12, seed=seed) for seed in seeds)
    )
    alone = [text_of(client, seed=seed, temperature=1) for seed in seeds]
    assert [reply.choices[0].text for reply in replies] == alone


async def test_the_async_client_streams(async_client: AsyncOpenAI) -> None:
    whole = await async_client.completions.create(model=BASE, prompt=PROMPT, max_tokens=20, seed=3)
    stream = await async_client.completions.create(
        model=BASE, prompt=PROMPT, max_tokens=20, seed=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


async def test_the_async_client_raises_the_same_errors(async_client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await async_client.completions.create(model="no/such", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError):
        await async_client.completions.create(model=BASE, prompt=PROMPT, suffix="!")
    assert BASE in {model.id async for model in async_client.models.list()}


# --- Files and training -----------------------------------------------------------------------------------


def start_job(client: OpenAI, handle: str, n_epochs: int) -> FineTuningJob:
    file = client.files.create(file=ARCHIVE, purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model=BASE, training_file=file.id, metadata={"handle": handle}, hyperparameters={"n_epochs": n_epochs}, seed=1
    )


def test_files_are_kept_listed_read_and_deleted(client: OpenAI) -> None:
    file = client.files.create(file=ARCHIVE, purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose) == (ARCHIVE.name, ARCHIVE.stat().st_size, "fine-tune")
    assert client.files.retrieve(file.id) == file
    assert file.id in {one.id for one in client.files.list(purpose="fine-tune", limit=1)}  # the client pages
    assert client.files.content(file.id).content == ARCHIVE.read_bytes()
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


@pytest.mark.filterwarnings("default")  # of transformers' own
def test_an_archive_becomes_a_model_that_answers_at_once(client: OpenAI, live_service: LiveService) -> None:
    parts = ("gateway", "generator", "trainer")
    pids = {part: live_service.replica_pids(part) for part in parts}

    # 1. An archive becomes a job, which tells how far it is.
    job = start_job(client, "@Unit_Seven", n_epochs=1)
    assert (job.object, job.model, job.fine_tuned_model, job.seed) == ("fine_tuning.job", BASE, None, 1)
    assert job.status in ("queued", "running") and job.hyperparameters.n_epochs == 1
    assert job.id in {one.id for one in client.fine_tuning.jobs.list(metadata={"handle": "@Unit_Seven"})}
    assert job.id not in {one.id for one in client.fine_tuning.jobs.list(metadata={"handle": "nobody"})}
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed", "cancelled"), 90)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.fine_tuned_model, job.error) == ("succeeded", "huggingtweets/unit_seven", None)
    assert job.trained_tokens and job.finished_at
    result = job.to_dict()["result"]
    assert isinstance(result, dict)
    assert result["losses"]["held_out_after"] < result["losses"]["held_out_before"]
    assert len(result["samples"]) == 5 and all(text.startswith(PROMPT) for text in result["samples"])

    # 2. Its history, read in pages.
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert len({event.id for event in events}) == len(events) >= 5
    assert "The job was created." in events[-1].message and "is ready" in events[0].message
    metrics: list[Any] = [event.to_dict()["data"] for event in events if event.type == "metrics"]
    last, *others, first = metrics
    for told in (last, *others):
        assert 1 <= told["step"] <= told["total_steps"] and told["train_loss"] > 0 and told["seconds_left"] >= 0
    assert (first["step"], last["step"]) == (0, last["total_steps"])
    assert last["valid_loss"] == result["losses"]["held_out_after"] < first["valid_loss"]
    assert list(last["samples"]) == result["samples"]

    # 3. The model answers, from the processes that were there before.
    assert text_of(client, model=job.fine_tuned_model, temperature=1, seed=1) != text_of(client, temperature=1, seed=1)
    assert {part: live_service.replica_pids(part) for part in parts} == pids

    # 4. It is a plain folder for transformers.
    from transformers import pipeline

    folder = Store(live_service.data, embedded={}).resolve("huggingtweets/unit_seven").path
    texts = pipeline("text-generation", model=str(folder), device="cpu")(PROMPT, num_return_sequences=5)
    assert len(texts) == 5 and all(text["generated_text"].startswith(PROMPT) for text in texts)

    # 5. Deleted, it is gone at once, from memory too.
    assert client.models.delete("huggingtweets/unit_seven").deleted
    with pytest.raises(openai.NotFoundError):
        text_of(client, model="huggingtweets/unit_seven")


@pytest.mark.timeout(600)  # two trainings
@pytest.mark.slow  # a minute; its parts are tested by themselves above
def test_the_whole_life_of_a_job_and_its_model(client: OpenAI, live_url: str) -> None:
    jobs, model, suffix = client.fine_tuning.jobs, "huggingtweets/phoenix", "phoenix"

    def voice(name: str) -> str:  # greedy, all tiny models say the same
        return text_of(client, model=name, temperature=1, seed=1, max_tokens=40)

    # 1. However often it is asked for, it is made once.
    file = client.files.create(file=ARCHIVE, purpose="fine-tune")
    asked: Asked = {
        "model": BASE,
        "training_file": file.id,
        "suffix": suffix,
        "seed": 1,
        "metadata": {"life": "first"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 6, "batch_size": "auto"}}},
        "extra_headers": {"Idempotency-Key": "life-1"},
    }
    job, same = jobs.create(**asked), jobs.create(**asked)
    assert job.id == same.id and job.estimated_finish is None and job.trained_tokens is None
    with pytest.raises(openai.ConflictError) as conflict:
        jobs.create(**{**asked, "seed": 2})
    assert conflict.value.response.headers["x-should-retry"] == "false"

    # 2. It tells how far it is, and when it will be ready.
    def steps() -> list[Asked]:
        events = itertools.islice(jobs.list_events(job.id, limit=3), 20)  # the client pages
        return [event.to_dict()["data"] for event in events if event.type == "metrics"]  # type: ignore[misc]

    wait_until(lambda: any(told["step"] for told in steps()), 90)
    told = steps()[0]
    assert told["train_loss"] > 0 and told["learning_rate"] > 0 and told["step"] <= told["total_steps"]
    assert (jobs.retrieve(job.id).estimated_finish or 0) >= job.created_at

    # 3. It rests when it is told to, and goes on where it was.
    assert jobs.pause(job.id).status in ("running", "paused")
    wait_until(lambda: str(jobs.retrieve(job.id).status) == "paused", 30)
    rested = steps()[0]["step"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(f"{model}@main")
    assert jobs.resume(job.id).status in ("queued", "running")
    job = finish(client, job.id)
    assert job.fine_tuned_model == model and job.trained_tokens and job.error is None
    messages = [event.message for event in jobs.list_events(job.id, limit=100)]
    assert any(message.startswith("Training goes on from checkpoint") for message in messages)
    assert steps()[0]["step"] == steps()[0]["total_steps"] > rested > 0
    used = job.hyperparameters.to_dict()
    assert (used["n_epochs"], used["batch_size"]) == (6, 1) and used["learning_rate_multiplier"] != "auto"
    assert job.method and job.method.supervised and job.method.supervised.hyperparameters
    assert job.method.supervised.hyperparameters.to_dict() == used

    # 4. Its checkpoints can be asked, and are not the model.
    checkpoints = list(jobs.checkpoints.list(job.id, limit=2))
    assert checkpoints and len({one.id for one in checkpoints}) == len(checkpoints)
    assert [one.step_number for one in checkpoints] == sorted((one.step_number for one in checkpoints), reverse=True)
    last = voice(model)
    for one in (checkpoints[0], checkpoints[-1]):
        name, _, revision = one.fine_tuned_model_checkpoint.partition("@")
        assert name == model and revision and one.fine_tuning_job_id == job.id
        assert one.metrics.step == one.step_number and (one.metrics.train_loss or 0) > 0
        assert voice(one.fine_tuned_model_checkpoint) != last
    assert (checkpoints[-1].metrics.full_valid_loss or 0) > 0

    # 5. Its numbers are a table.
    (result_file,) = job.result_files
    assert client.files.retrieve(result_file).purpose == "fine-tune-results"
    rows = list(csv.DictReader(client.files.content(result_file).text.splitlines()))
    assert {"step", "train_loss", "valid_loss", "learning_rate"} <= rows[0].keys()
    numbers = [int(row["step"]) for row in rows]
    assert numbers == sorted(set(numbers)) and numbers[-1] == steps()[0]["total_steps"]
    assert all(float(row["train_loss"]) > 0 for row in rows if row["train_loss"])

    # 6. It is found by what was written on it, also page by page.
    again = jobs.create(**{**asked, "seed": 2, "metadata": {"life": "second"}, "extra_headers": {}})
    assert [one.id for one in jobs.list(metadata={"life": "first"})] == [job.id]
    listed = [one.id for one in jobs.list(limit=1)]
    assert len(set(listed)) == len(listed) and listed.index(again.id) < listed.index(job.id)

    # 7. Learnt anew it is a new version; the old one answers as before, and under the name again if that is wanted.
    assert finish(client, again.id).fine_tuned_model == model
    newer = voice(model)
    versions = httpx.get(f"{live_url}/v1/models/huggingtweets%2Fphoenix/versions", timeout=30).json()["data"]
    new, old = (one for one in versions if one["step"] is None)
    assert (new["is_main"], old["is_main"]) == (True, False) and (new["job_id"], old["job_id"]) == (again.id, job.id)
    assert voice(old["id"]) == last and voice(new["id"]) == newer != last
    for version, text in ((old, last), (new, newer), (old, last)):
        answer = httpx.post(
            f"{live_url}/v1/models/{model}/rollback", json={"revision": version["revision"]}, timeout=30
        )
        assert answer.json()["is_main"], answer.text
        assert voice(model) == text
    assert client.models.retrieve(model).to_dict()["revision"] == old["revision"]
    picture = httpx.get(f"{live_url}/v1/models/{old['id']}/picture", timeout=30)
    assert picture.content.startswith(b"\x89PNG") and picture.headers["cache-control"] == "no-cache"

    # 8. What it was made from and of is on record.
    preprocess, train = httpx.get(f"{live_url}/v1/fine_tuning/jobs/{job.id}/runs", timeout=30).json()["data"]
    assert (preprocess["job_type"], train["job_type"]) == ("preprocess", "train")
    assert preprocess["outputs"][0]["id"] in {one["id"] for one in train["inputs"]}
    assert train["tables"]["examples"]["columns"] == ["Input", "Prediction"]

    # 9. Deleted, all its versions are gone; the archive can go too.
    assert client.models.delete(model).deleted
    for gone in (model, old["id"], new["id"], checkpoints[0].fine_tuned_model_checkpoint):
        with pytest.raises(openai.NotFoundError):
            voice(gone)
    assert client.files.delete(file.id).deleted


def finish(client: OpenAI, job_id: str) -> FineTuningJob:
    """The job when it has succeeded."""
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status in ("succeeded", "failed", "cancelled"), 180)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "succeeded", job.error
    return job


def test_an_archive_is_looked_into_without_being_kept(client: OpenAI, live_url: str) -> None:
    before = [file.id for file in client.files.list()]
    with ARCHIVE.open("rb") as archive:
        report = httpx.post(f"{live_url}/v1/archives/preview", files={"archive": archive}, timeout=60).json()
    assert (report["handle"], report["format"], report["kept"]) == ("unit_seven", "x-archive", 479)
    assert len(report["samples"]) == 8
    assert [file.id for file in client.files.list()] == before


def test_a_running_job_is_cancelled_and_leaves_no_model(client: OpenAI) -> None:
    job = start_job(client, "cancelled", n_epochs=50)
    wait_until(lambda: any(e.type == "metrics" for e in client.fine_tuning.jobs.list_events(job.id, limit=5)), 90)
    with pytest.raises(openai.ConflictError, match="cancel the job first"):
        client.files.delete(job.training_file)
    assert client.fine_tuning.jobs.cancel(job.id).status in ("running", "cancelled")
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "cancelled", 30)
    with pytest.raises(openai.ConflictError, match="already ended"):
        client.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huggingtweets/cancelled")
    assert client.files.delete(job.training_file).deleted


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        ("cat.png", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "bad_upload", "Expected: an X archive"),
        ("page.html", b"<!doctype html><title>Nothing</title>" * 20, "bad_upload", "Expected: an X archive"),
        ("records.json", b'{"colour": "blue"}', "bad_upload", "no record of it has a text"),
        ("letter.txt", b"Dear diary, nothing happened today.\n" * 20, "too_few_tweets", "has 947 .* least 6,000 char"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_in_a_sentence(
    client: OpenAI, name: str, content: bytes, code: str, said: str
) -> None:
    file = client.files.create(file=(name, content), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.fine_tuning.jobs.create(model=BASE, training_file=file.id, metadata={"handle": "nobody"})
    assert (caught.value.code, caught.value.param) == (code, "training_file")
    assert "diary" not in caught.value.message


def test_a_job_without_its_file_or_for_an_unknown_base_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no file of that id") as caught:
        client.fine_tuning.jobs.create(model=BASE, training_file="file-0")
    assert caught.value.param == "training_file"
    file = client.files.create(file=ARCHIVE, purpose="fine-tune")
    with pytest.raises(openai.NotFoundError, match="no/such") as caught:
        client.fine_tuning.jobs.create(model="no/such", training_file=file.id)
    assert caught.value.code == "model_not_found"
    for job_id in ("ftjob-0", "../jobs"):
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.retrieve(job_id)
