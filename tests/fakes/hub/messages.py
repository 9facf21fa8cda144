"""What goes over the wire, as values: a handler turns a Request into an Answer, and knows no socket."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # unquoted, without the query
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]  # their names in lower case
    body: bytes = b""

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return token if kind == "Bearer" else None


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A request as the Hub remembers it. `at`: time.monotonic()."""

    method: str
    path: str
    authorization: str | None
    range: str | None = None
    at: float = 0.0


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(status, json.dumps(value).encode(), kind | dict(headers or {}))


def refusal(status: int, code: str, message: str) -> Answer:
    """An error as the Hub tells it: in headers, and again in the body."""
    return as_json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})
