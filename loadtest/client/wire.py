"""Three wire formats: what a call is as an HTTP body, and what can be read of an answer, whole or in pieces.

Texts are looked at only for whether they are there. It does not know sockets or time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from loadtest.client.target import Target
from loadtest.traffic.plan import Api, Call, Requests

Question = tuple[str, bytes]
"""Path and body."""

_MOST_LINE = 2**20  # bytes of an event
_MOST_COUNT = 2**53  # of tokens, models or bytes


class Unreadable(ValueError):
    """An answer that is not what its format says."""


def question(call: Call, requests: Requests, target: Target) -> Question:
    """What is sent for `call` of a flow with these `requests`."""
    api = target.api or requests.api
    path, body = _QUESTIONS[api](call, requests)
    if target.extra:
        body = {name: value for name, value in {**body, **target.extra}.items() if value is not None}
    return path, json.dumps(body).encode()


def _completion(call: Call, requests: Requests) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {
        "model": call.model,
        "prompt": call.prompt,
        "max_tokens": call.num_tokens,
        "temperature": requests.temperature,
        "top_p": requests.top_p,
        "seed": call.seed,
    }
    if not requests.ends_freely:
        body["min_tokens"] = call.num_tokens
    if call.num_choices > 1:
        body["n"] = call.num_choices
    if call.is_streaming:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return "/v1/completions", body


def _chat(call: Call, requests: Requests) -> tuple[str, dict[str, Any]]:
    """As `transformers serve` takes it: it refuses `n` and `stream_options`, and sends the usage unasked."""
    sampling: dict[str, Any] = {
        "max_new_tokens": call.num_tokens,
        "do_sample": requests.temperature > 0,
        "top_p": requests.top_p,
    }
    if not requests.ends_freely:
        sampling["min_new_tokens"] = call.num_tokens
    if requests.temperature > 0:
        sampling["temperature"] = requests.temperature
    body = {
        "model": call.model,
        "messages": [{"role": "user", "content": call.prompt}],
        "max_tokens": call.num_tokens,
        "generation_config": json.dumps(sampling),
        "seed": call.seed,
        "stream": call.is_streaming,
    }
    return "/v1/chat/completions", body


def _tgi(call: Call, requests: Requests) -> tuple[str, dict[str, Any]]:
    """One text a request: its streams hold no more, whatever `num_choices` says."""
    parameters: dict[str, Any] = {"max_new_tokens": call.num_tokens, "seed": call.seed, "details": True}
    if not requests.ends_freely:
        parameters["min_new_tokens"] = call.num_tokens
    if requests.temperature > 0:
        parameters |= {"do_sample": True, "temperature": requests.temperature}
        if requests.top_p < 1:  # its bound is exclusive
            parameters["top_p"] = requests.top_p
    body = {"inputs": call.prompt, "model": call.model, "parameters": parameters}
    return "/generate_stream" if call.is_streaming else "/generate", body


_QUESTIONS: Mapping[Api, Callable[[Call, Requests], tuple[str, dict[str, Any]]]] = {
    "openai": _completion,
    "chat": _chat,
    "tgi": _tgi,
}


class Answer:
    """What is known of an answer with status 200 so far. Feed it what arrives, until it has an error; it keeps no text.

    The first token is that of the first event that carries one, alike for all formats: one with text, or with an empty
    text (a token may be a part of a character) where the event does nothing else, as to open or to end an answer.
    """

    __slots__ = ("_api", "_num_pieces", "_rest", "error", "is_complete", "output_tokens", "prompt_tokens")

    def __init__(self, api: Api) -> None:
        self._api: Api = api
        self._rest = bytearray()  # of a line whose end has not come
        self._num_pieces = 0
        self.prompt_tokens = 0
        self.output_tokens = 0  # as the server counts them; where it does not, events with text
        self.is_complete = False
        self.error = ""

    def feed(self, data: bytes) -> bool:
        """Reads server-sent events as they arrive, in any pieces; whether there was a token among them."""
        *lines, rest = data.split(b"\n")
        if lines and self._rest:
            lines[0] = bytes(self._rest + lines[0])
            self._rest.clear()
        self._rest += rest
        if len(self._rest) > _MOST_LINE:
            self.error = "too_large"
            return False
        has_token = False
        try:
            for line in lines:
                if line.startswith(b"data:"):
                    has_token |= self._read_event(line[5:].strip())
        except Unreadable:
            self.error = "unreadable"
        return has_token

    def read_whole(self, data: bytes) -> None:
        """Reads an answer that is one JSON object."""
        try:
            found = read_object(data)
            if "error" in found:
                self.error = code_of(found) or "error"
            elif self._api == "tgi":
                self._read_details(found)
            else:
                self._read_usage(found)
                self.is_complete = bool(objects(found.get("choices")))
        except Unreadable:
            self.error = "unreadable"

    def _read_event(self, data: bytes) -> bool:
        if data == b"[DONE]":
            self.is_complete = True
            return False
        event = read_object(data)
        if event.get("error"):
            self.error = code_of(event) or "error"
            return False
        has_token = self._read_token(event) if self._api == "tgi" else self._read_choices(event)
        self._num_pieces += has_token
        if has_token and self.output_tokens < self._num_pieces:
            self.output_tokens = self._num_pieces
        return has_token

    def _read_choices(self, event: dict[str, Any]) -> bool:
        self._read_usage(event)
        has_token = False
        for choice in objects(event.get("choices")):
            is_end = choice.get("finish_reason") is not None
            if self._api == "chat":
                delta = _object(choice.get("delta"))
                has_token |= _carries_token(delta.get("content"), is_end or "role" in delta)
                self.is_complete |= is_end
            else:
                has_token |= _carries_token(choice.get("text"), is_end)
        return has_token

    def _read_usage(self, found: dict[str, Any]) -> None:
        if usage := _object(found.get("usage")):
            self.prompt_tokens = count(usage.get("prompt_tokens"))
            self.output_tokens = count(usage.get("completion_tokens"))

    def _read_token(self, event: dict[str, Any]) -> bool:
        self._read_details(event)
        token = _object(event.get("token"))
        return not token.get("special") and _carries_token(token.get("text"), False)

    def _read_details(self, found: dict[str, Any]) -> None:
        if details := _object(found.get("details")):
            self.is_complete = True
            self.output_tokens = count(details.get("generated_tokens"))
            self.prompt_tokens = count(details.get("input_length"))


def _carries_token(text: Any, is_mark: bool) -> bool:
    return isinstance(text, str) and (text != "" or not is_mark)


def code_of(body: bytes | dict[str, Any]) -> str:
    """The server's own word for what went wrong, of any of the three formats; "" where it has none."""
    try:
        found = read_object(body) if isinstance(body, bytes) else body
    except Unreadable:
        return ""
    error = found.get("error")
    if isinstance(error, dict):
        return word_of(error.get("code")) or word_of(error.get("type"))
    return word_of(found.get("error_type")) or ("error" if error else "")


def word_of(value: Any) -> str:
    """Codes are words; a sentence may repeat what was sent, and is not kept."""
    text = str(value) if isinstance(value, str) or (isinstance(value, int) and abs(value) < _MOST_COUNT) else ""
    return text if len(text) <= 64 and text.isascii() and text.isprintable() and " " not in text else ""


def read_object(data: bytes) -> dict[str, Any]:
    """A JSON object whose numbers are finite.

    Raises: Unreadable
    """
    try:
        found = _decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise Unreadable("no JSON") from exc
    if not isinstance(found, dict):
        raise Unreadable("no object")
    return found


def objects(value: Any) -> list[dict[str, Any]]:
    """A list of objects; what is not there is an empty one.

    Raises: Unreadable
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise Unreadable("no list")
    return [_object(each) for each in value]


def count(value: Any) -> int:
    """A whole number of things; what is not there is 0.

    Raises: Unreadable
    """
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST_COUNT:
        raise Unreadable("no count")
    return value


def _object(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Unreadable("no object")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise Unreadable("no finite number")
    return value


def _refuse(constant: str) -> NoReturn:
    raise Unreadable(f"{constant} is no number of JSON")


_decode = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse).decode  # `json.loads` makes one for each call
