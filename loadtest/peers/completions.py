"""OpenAI's completions as the two servers written here speak them: what a request says, and the events of an answer.

It knows no model and no server.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one request asks for."""

    model: str
    prompt: str
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    is_streaming: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Wanted:
        names = ("model", "prompt", "max_tokens", "min_tokens", "temperature", "top_p", "seed")
        given = {name: body[name] for name in names if body.get(name) is not None}
        return cls(**given, is_streaming=bool(body.get("stream")))

    @property
    def sampling(self) -> dict[str, Any]:
        """For `model.generate`: nothing but what was asked for, so no top-k of 50."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


def event(wanted: Wanted, text: str, finish_reason: str | None = None) -> str:
    """A piece of a stream."""
    return f"data: {json.dumps(_completion(wanted, text, finish_reason))}\n\n"


def ending(wanted: Wanted, num_prompt: int, num_tokens: int) -> str:
    """The last events: why it ended, what it cost, and that it is over."""
    last = event(wanted, "", _reason(wanted, num_tokens))
    cost = _completion(wanted, "", None) | {"choices": [], "usage": _usage(num_prompt, num_tokens)}
    return f"{last}data: {json.dumps(cost)}\n\n{DONE}"


def whole(wanted: Wanted, text: str, num_prompt: int, num_tokens: int) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    return _completion(wanted, text, _reason(wanted, num_tokens)) | {"usage": _usage(num_prompt, num_tokens)}


def _completion(wanted: Wanted, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {
        "id": wanted.id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": wanted.model,
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}],
    }


def _reason(wanted: Wanted, num_tokens: int) -> str:
    return "length" if num_tokens >= wanted.max_tokens else "stop"


def _usage(num_prompt: int, num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "total_tokens": num_prompt + num_tokens}
