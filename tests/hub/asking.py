"""Questions to a scripted Hub, as a session asks them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serve.hub.breaker import Breakers
from serve.hub.pace import Deadline
from serve.hub.session import Session
from tests.hub.scripted import Server

ADA = "/api/models/huggingtweets/ada/revision/main"
FILE = f"/huggingtweets/ada/resolve/{'a' * 40}/config.json"
TOKEN = "hf_secret"
JSON = {"Content-Type": "application/json"}


def open_session(url: str, **options: Any) -> Session:
    """Without pauses between tries, unless the Hub asks for one."""
    calm: dict[str, Any] = {"breakers": Breakers(), "random": lambda: 0.0}
    return Session(url, TOKEN, **(calm | options))


def ask(server: Server, total_s: float = 20, path: str = ADA, **options: Any) -> Any:
    return open_session(server.url, **options).get_json(path, {"blobs": "true"}, Deadline(total_s))


def read(session: Session, path: str = FILE, total_s: float = 20, **options: Any) -> bytes:
    with session.stream(path, Deadline(total_s), **options) as got:
        return b"".join(got.chunks)


@contextmanager
def takes(least_s: float, most_s: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert least_s <= time.monotonic() - started <= most_s
