"""B10 and B12: what a request says is neither fetched nor told in the log."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from serve.errors import RookeryError
from serve.hub.pace import Deadline
from tests.faults.fuzz.__main__ import fuzz_live, service_to_fuzz
from tests.faults.fuzz.case import MARK
from tests.faults.fuzz.requests import b10_urls
from tests.faults.fuzz.run import Tally, send_all
from tests.faults.fuzz.surface import read_surface
from tests.faults.row import Measured, row
from tests.hub.asking import ADA, open_session
from tests.hub.scripted import answer, json_answer, scripted

_PLACES = (
    "http://{}/",
    "http://{}",
    "//{}/x",
    "http://localhost@{}/",
    "http:\\\\{}\\x",
    "https://{}/",
    "HTTP://{}/%2e",
)


@row(
    "B10",
    did="4,000 requests with an address of ours in each place that takes text; 500 redirects of a Hub to it",
    expected="nobody asks that address",
    minutes=3,
)
def fetched_addresses(folder: Path, share: float) -> Measured:
    num_cases, num_redirects, rng = max(50, round(4_000 * share)), max(20, round(500 * share)), random.Random(1)
    with _listener() as (place, askers):
        tally = Tally(folder)
        with service_to_fuzz(folder) as service:
            surface = read_surface(service.url)
            cases = [b10_urls(rng, surface, rng.choice(_PLACES).format(place)) for _ in range(num_cases)]
            asyncio.run(send_all(service.url, cases, tally, at_once=12))
        by_service = len(askers)
        for _ in range(num_redirects):
            _ask_a_hub_that_sends_to(rng.choice(_PLACES).format(place), rng)
        by_hub = len(askers) - by_service
        with socket.create_connection(("127.0.0.1", int(place.partition(":")[2]))):
            is_listening = _waits(lambda: len(askers) == by_service + by_hub + 1)  # it would have noticed
    figure = (
        f"{num_cases:,} requests: {by_service} connections to it; {num_redirects} redirects: {by_hub}; "
        f"{tally.wrong['status_5xx']} 5xx"
    )
    holds = by_service == by_hub == tally.wrong["status_5xx"] == 0 and is_listening
    return Measured(figure, holds, {"by_status": dict(tally.by_status)})


@contextmanager
def _listener() -> Iterator[tuple[str, list[str]]]:
    """Its place, host:port, and who has connected."""
    askers: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, asker = server.accept()
                except OSError:
                    return
                askers.append(str(asker))
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}", askers
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def _ask_a_hub_that_sends_to(location: str, rng: random.Random) -> None:
    moved = answer(rng.choice((301, 302, 303, 307, 308)), {"Location": location})
    with scripted(moved, json_answer()) as hub:
        try:
            open_session(hub.url).get_json(ADA, {}, Deadline(5))
        except RookeryError:
            return


def _waits(is_so: Callable[[], bool]) -> bool:
    over = threading.Event()
    return any(is_so() or over.wait(0.05) for _ in range(100)) and is_so()


# --- Logs (B12) ---------------------------------------------------------------------------------------------

_PROMPT, _KEY = "zqCANARYPROMPTqz", "sk-zqCANARYKEYqz"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


@row(
    "B12",
    did="6,000 requests with marks, line ends and terminal codes in each place, prompts and keys among them",
    expected="each line of the log is one JSON object; no prompt, key or mark in log or metrics",
    minutes=4,
)
def forged_logs(folder: Path, share: float) -> Measured:
    num_cases = max(60, round(6_000 * share))
    with service_to_fuzz(folder) as service:
        figures = fuzz_live(
            service, num_cases, seed=12, kept=folder, families=("B1", "B2", "B6", "B11", "B13"), with_loris=False
        )
        _ask_with_canaries(service.url)
        metrics = httpx.get(f"{service.url}/metrics", timeout=30).text
        log = (service.data / "log.jsonl").read_text(encoding="utf-8")
    lines = log.splitlines()
    broken = [line[:200] for line in lines if not _is_object(line) or _CONTROL.search(line)]
    canaries = (_PROMPT, _KEY, MARK.decode())
    told = [canary for canary in canaries for text in (_without_ids(lines), metrics) if canary in text]
    figure = f"{figures['cases']:,} requests, {len(lines):,} lines: {len(broken)} broken, {len(told)} told"
    holds = not broken and not told and len(lines) > num_cases // 2 and not figures["status_5xx"]
    return Measured(figure, holds, {"broken": broken[:5], "told": told})


def _ask_with_canaries(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60, headers={"authorization": f"Bearer {_KEY}"}) as client:
        for model in ("tiny/base", "no/body", _PROMPT + "\n\x1b[31m"):
            for stream in (False, True):
                body = {"model": model, "prompt": _PROMPT, "max_tokens": 2, "stream": stream}
                client.post("/v1/completions", json=body)
        client.post("/generate", content=b'{"inputs": ' + _PROMPT.encode())
        client.get("/nothing", params={"q": _PROMPT, "api_key": _KEY})
        archive = "text\n" + "\n".join(f"{_PROMPT} {number}" for number in range(50))
        client.post("/v1/archives/preview", files={"archive": ("a.csv", archive)}).raise_for_status()


def _without_ids(lines: list[str]) -> str:
    """A request's own id is the caller's word for it, and told; so is the id of a model that was asked for."""
    told = [json.loads(line) for line in lines if _is_object(line)]
    return "\n".join(json.dumps({k: v for k, v in one.items() if k not in ("request_id", "model")}) for one in told)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
