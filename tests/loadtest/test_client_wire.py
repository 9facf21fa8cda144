from __future__ import annotations

import json
from typing import Any

import pytest

from loadtest.client.target import Target
from loadtest.client.wire import Answer, code_of, question
from loadtest.traffic.plan import Api, Call, Requests
from tests.loadtest.client_server import event, token, usage

CALL = Call(0, "f", 0.0, "bench/m0", "My dream is", 12, num_choices=2, seed=3)
TARGET = Target("http://x")


def asked(requests: Requests, call: Call = CALL, target: Target = TARGET) -> tuple[str, dict[str, Any]]:
    path, body = question(call, requests, target)
    found: dict[str, Any] = json.loads(body)
    return path, found


def test_completions_ask_for_exactly_so_many_tokens_unless_texts_end_freely() -> None:
    path, body = asked(Requests())
    assert path == "/v1/completions"
    assert (body["max_tokens"], body["min_tokens"], body["n"]) == (12, 12, 2)
    assert "min_tokens" not in asked(Requests(ends_freely=True))[1]


def test_chat_is_asked_as_transformers_serve_takes_it() -> None:
    path, body = asked(Requests(api="chat"))
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "My dream is"}]
    assert json.loads(body["generation_config"])["min_new_tokens"] == 12
    assert not {"n", "stream_options"} & body.keys()  # it refuses both


def test_tgi_has_a_path_of_its_own_for_streams() -> None:
    path, body = asked(Requests(api="tgi", top_p=1.0))
    assert path == "/generate_stream"
    parameters = body["parameters"]
    assert (parameters["max_new_tokens"], parameters["min_new_tokens"]) == (12, 12)
    assert "top_p" not in parameters  # its bound is exclusive
    assert asked(Requests(api="tgi"), Call(0, "f", 0, "m", "a", 1, is_streaming=False))[0] == "/generate"


def test_a_target_has_its_own_format_and_fields_and_leaves_some_out() -> None:
    target = Target("http://x/", api="openai", extra={"ignore_eos": True, "min_tokens": None})
    path, body = asked(Requests(api="tgi"), target=target)
    assert path == "/v1/completions"
    assert body["ignore_eos"] is True and "min_tokens" not in body
    assert target.at("/v1/models") == "http://x/v1/models"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_are_read_whatever_pieces_they_come_in(size: int) -> None:
    stream = token("ä") + b": a comment\r\n\r\n" + token("", "length") + usage(4, 12)
    answer = Answer("openai")
    has_token = [answer.feed(stream[at : at + size]) for at in range(0, len(stream), size)]
    assert sum(has_token) == 1
    assert (answer.prompt_tokens, answer.output_tokens, answer.is_complete, answer.error) == (4, 12, True, "")


def test_a_token_without_text_is_a_token_but_an_end_without_text_is_none() -> None:
    answer = Answer("openai")
    assert answer.feed(token(""))
    assert not answer.feed(token("", "stop"))


@pytest.mark.parametrize(
    ("api", "event_", "is_first"),
    [
        ("openai", {"choices": [{"text": "", "finish_reason": None}]}, True),  # a part of a character
        ("chat", {"choices": [{"delta": {"content": ""}, "finish_reason": None}]}, True),
        ("tgi", {"token": {"text": "", "special": False}}, True),
        ("openai", {"choices": [{"text": "a", "finish_reason": "stop"}]}, True),
        ("chat", {"choices": [{"delta": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}]}, True),
        ("openai", {"choices": [{"text": "", "finish_reason": "stop"}]}, False),
        ("chat", {"choices": [{"delta": {"content": ""}, "finish_reason": "stop"}]}, False),
        ("chat", {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}, False),
        ("tgi", {"token": {"text": "", "special": True}}, False),
        ("openai", {"choices": [{"finish_reason": None}]}, False),
        ("chat", {"choices": [{"delta": {}, "finish_reason": None}]}, False),
        ("tgi", {"index": 0}, False),
    ],
)
def test_the_first_token_is_the_same_for_all_formats(api: Api, event_: dict[str, Any], is_first: bool) -> None:
    assert Answer(api).feed(event(event_)) is is_first


ODD = [
    b'{"choices": ["x"]}', b'{"choices": 5}', b'{"choices": [{"delta": 5, "text": []}], "usage": "x"}',
    b'{"usage": {"completion_tokens": [1]}, "choices": []}', b'{"usage": {"completion_tokens": 1e999}}',
    b'{"usage": {"completion_tokens": NaN}}', b'{"usage": {"completion_tokens": -1}}',
    b'{"details": {"generated_tokens": 1.5}, "token": "t", "usage": [1]}', b"[" * 100_000, b'{"a":' * 100_000,
    b'{"usage": {"completion_tokens": ' + b"9" * 5000 + b"}}", b"\xff",
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("api", ["openai", "chat", "tgi"])
def test_no_answer_is_too_odd_to_be_read(api: Api, odd: bytes) -> None:
    piece, at_once = Answer(api), Answer(api)
    piece.feed(b"data: " + odd + b"\n")
    at_once.read_whole(odd)
    assert {piece.error, at_once.error} <= {"unreadable", ""}
    if api == "openai":
        assert piece.error == "unreadable" or b"details" in odd
    assert code_of(odd) == ""


def test_a_line_without_end_is_given_up_in_linear_time() -> None:
    answer, size = Answer("openai"), 0
    while not answer.error and size < 2**22:
        answer.feed(b"data: aa")
        size += 8
    assert answer.error == "too_large"
    assert size == 2**20 + 8


def test_without_a_usage_events_are_counted() -> None:
    answer = Answer("openai")
    answer.feed(token() + token() + token("", "stop"))
    assert answer.output_tokens == 2


def test_the_role_of_a_chat_is_no_token_and_its_finish_reason_the_end() -> None:
    def chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
        return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    answer = Answer("chat")
    assert not answer.feed(chunk({"role": "assistant"}))
    assert not answer.is_complete
    assert answer.feed(chunk({"content": "a"}))
    end = {"choices": [{"delta": {}, "finish_reason": "length"}], "usage": {"prompt_tokens": 1, "completion_tokens": 5}}
    answer.feed(event(end))
    assert (answer.is_complete, answer.output_tokens) == (True, 5)


def test_tgi_counts_by_the_details_of_its_last_event() -> None:
    answer = Answer("tgi")
    first = {"token": {"text": "a", "special": False}, "details": None}
    last = {"token": {"text": "b", "special": False}, "details": {"generated_tokens": 2, "input_length": 4}}
    assert answer.feed(event(first).replace(b"data: ", b"data:"))
    assert not answer.is_complete
    assert answer.feed(event(last))
    assert (answer.is_complete, answer.prompt_tokens, answer.output_tokens) == (True, 4, 2)


@pytest.mark.parametrize(
    ("api", "body", "tokens"),
    [
        ("openai", {"choices": [{"text": "a"}], "usage": {"prompt_tokens": 1, "completion_tokens": 3}}, 3),
        ("chat", {"choices": [{"message": {}}], "usage": {"prompt_tokens": 1, "completion_tokens": 3}}, 3),
        ("tgi", {"generated_text": "a", "details": {"generated_tokens": 3}}, 3),
    ],
)
def test_whole_answers_are_read(api: Api, body: dict[str, Any], tokens: int) -> None:
    answer = Answer(api)
    answer.read_whole(json.dumps(body).encode())
    assert (answer.is_complete, answer.output_tokens, answer.error) == (True, tokens, "")


@pytest.mark.parametrize("body", [b"", b"[]", b"nonsense", b'{"choices": []}', b'"a"', b"\xff"])
def test_a_whole_answer_that_is_none_is_not_complete(body: bytes) -> None:
    answer = Answer("openai")
    answer.read_whole(body)
    assert not answer.is_complete


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"error": {"code": "model_not_found", "type": "t", "message": "m"}}, "model_not_found"),
        ({"error": {"code": None, "type": "server_error"}}, "server_error"),
        ({"error": "a sentence", "error_type": "overloaded"}, "overloaded"),
        ({"error": "a sentence that repeats the prompt"}, "error"),
        ({"error": {"code": "a sentence as a code"}}, ""),
        ({"detail": "no"}, ""),
        ({"error": {"code": "b\u00f6se\n"}}, ""),
        ({"error": {"code": 10**30}}, ""),
    ],
)
def test_codes_are_words_never_sentences(body: dict[str, Any], code: str) -> None:
    assert code_of(json.dumps(body).encode()) == code
    assert code_of(b"<html>") == ""
