"""A person who is erased is found nowhere; a model that is disabled writes nothing more on any replica."""

from __future__ import annotations

import json
import secrets
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from serve.store.revisions import Store
from tests.deployments.conftest import BASE, import_tiny_model, start_service, stop_service, wait_until
from tests.fakes.models import write_tiny_gpt2
from tests.faults import canary
from tests.faults.row import Measured, row
from tests.training.archive_files import script, tweet, x_zip
from tests.training.making import made_up_texts

_FOUND_NOWHERE_S = 60.0
_STOPPED_S = 1.0
_JOB_S = 240.0
_NUM_MODELS = 20
_PROBES = 4  # callers that ask for the model again and again, beside those who wait for a long text of it


@row(
    "F16b",
    did="a person erased, whose archive has a random word in its texts, names, file name and labels; 10 people, each "
    "trained, told to a tracker, and written by on 2 generators with copies of their own",
    expected="the word is found in no file and no free page within 60 s, and no bot of them can be made",
    minutes=12,
)
def erased(folder: Path, share: float) -> Measured:
    data, cache, temporary = (folder / name for name in ("data", "cache", "tmp"))
    for place in (data, temporary):
        place.mkdir()
    import_tiny_model(data, BASE)
    variables = {"ROOKERY_CACHE": str(cache), "ROOKERY_TRACKERS": "trackio", "ROOKERY_LOG_FILE": str(folder / "log")}
    service = start_service(data, "--generators", "2", "--gateways", "2", **variables, TMPDIR=str(temporary))
    people: list[dict[str, Any]] = []
    try:
        with httpx.Client(base_url=service.url, timeout=60) as client:
            for number in range(max(1, round(10 * share))):
                people.append(_erase_one(client, f"ada{number}", folder))
    finally:
        stop_service(service)
    at_rest = [path for person in people for path in canary.find(person["word"], folder)]
    slowest_s = max(person["gone_s"] for person in people)
    wrong = [person for person in people if person["left"] or not person["planted"] or person["came_back"]]
    return Measured(
        f"{len(people)} people: found in {min(person['planted'] for person in people)} files or more before, in "
        f"{len(at_rest)} after at most {slowest_s:.1f} s; {len(wrong)} of them left anything or came back",
        not wrong and not at_rest and slowest_s <= _FOUND_NOWHERE_S,
        {"people": people, "at_rest": at_rest},
    )


def _erase_one(client: httpx.Client, handle: str, folder: Path) -> dict[str, Any]:
    word = f"quetzal{secrets.token_hex(8)}"
    model = f"huggingtweets/{handle}"
    job = _train(client, handle, word)
    assert job["status"] == "succeeded", job
    asked = {"model": model, "prompt": "I think", "max_tokens": 20}
    with ThreadPoolExecutor(8) as callers:  # more than one generator takes
        replies = list(callers.map(lambda _: client.post("/v1/completions", json=asked), range(32)))
    assert all(reply.status_code == 200 for reply in replies)
    wait_until(lambda: bool(canary.find(job["id"], folder / "data" / "trackers")), 120, 0.5)
    planted = canary.find(word, folder)

    began = time.monotonic()
    receipt = client.post("/v1/erasures", json={"handle": f"@{handle}"}).json()
    while receipt["status"] == "running" and time.monotonic() - began < 2 * _FOUND_NOWHERE_S:
        time.sleep(0.1)
        receipt = client.get(f"/v1/erasures/{receipt['id']}").json()
    while (left := canary.find(word, folder)) and time.monotonic() - began < 2 * _FOUND_NOWHERE_S:
        time.sleep(0.2)
    gone_s = time.monotonic() - began

    weights = [str(path) for place in ("data/models/huggingtweets", "cache") for path in (folder / place).rglob(handle)]
    again = _train(client, handle, "nothing")
    asked_again = client.post("/v1/completions", json=asked)
    return {
        "word": word,
        "planted": len(planted),
        "gone_s": gone_s,
        "left": [*left, *weights],
        "came_back": again["status"] == "succeeded" or asked_again.status_code != 404,
        "receipt": receipt,
    }


def _archive(handle: str, word: str) -> bytes:
    """As X makes them."""
    texts = [f"{text} {word}" if number % 5 == 0 else text for number, text in enumerate(made_up_texts(150))]
    said = {"account": {"username": handle, "accountDisplayName": f"Ada {word}", "email": f"{word}@mail.example"}}
    with tempfile.TemporaryDirectory() as folder:
        tweets = [tweet(number, text) for number, text in enumerate(texts)]
        more = {"data/account.js": script("account.part0", [said])}
        return x_zip(Path(folder) / "archive.zip", tweets, more).read_bytes()


def _train(client: httpx.Client, handle: str, word: str) -> Mapping[str, Any]:
    """The job as it ended."""
    archive = {"file": (f"{word}.zip", _archive(handle, word))}
    sent = client.post("/v1/files", data={"purpose": "fine-tune"}, files=archive).json()
    wanted = {
        "model": BASE,
        "training_file": sent["id"],
        "metadata": {"handle": handle, "note": word},
        "hyperparameters": {"n_epochs": 1},
    }
    reply = client.post("/v1/fine_tuning/jobs", json=wanted)
    if reply.is_error and reply.json()["error"]["code"] == "erased":
        return {"status": "erased"}
    assert reply.status_code == 200, reply.text
    job: dict[str, Any] = reply.json()
    deadline = time.monotonic() + _JOB_S
    while job["status"] not in ("succeeded", "failed", "cancelled") and time.monotonic() < deadline:
        time.sleep(0.5)
        job = client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
    return job


@row(
    "F16c",
    did=f"each of {_NUM_MODELS} models disabled, then enabled, on 2 generators under load: {_PROBES} callers ask for "
    "it without a pause, and two long texts of it are being written",
    expected="no text of it is begun or goes on more than 1 s after the call; others' texts do not fail",
    minutes=3,
)
def disabled(folder: Path, share: float) -> Measured:
    data = folder / "data"
    data.mkdir()
    import_tiny_model(data, BASE)
    models = [f"bots/bot{number}" for number in range(_NUM_MODELS)]
    others = [f"bots/other{number}" for number in range(3)]
    for number, model in enumerate(models + others):
        tiny = write_tiny_gpt2(folder / "tiny", seed=number, n_positions=1024, n_layer=4, n_embd=128)
        Store(data, embedded={}).import_folder(tiny, model)
    service = start_service(data, "--generators", "2", "--gateways", "2")
    try:
        with _Asking(service.url, others, 3) as bystanders:
            taken = [
                _disable(service.url, model)
                for model in models[: max(2, round(_NUM_MODELS * share))][:-3] or models[:2]
            ]
    finally:
        stop_service(service)
    failed = [status for status, _, _ in bystanders.answers if status != 200]
    accepted_s = max(one["accepted_s"] for one in taken)
    ended_s = max(one["ended_s"] for one in taken)
    wrong = [one for one in taken if not one["codes"] <= {"model_disabled"} or not one["is_back"] or not one["streams"]]
    details = [{**one, "codes": sorted(one["codes"])} for one in taken]
    return Measured(
        f"{len(taken)} models: the last text was begun {accepted_s:.2f} s after the call, the last running one ended "
        f"after {ended_s:.2f} s; {len(wrong)} ended otherwise; {len(failed)} of {len(bystanders.answers):,} texts of "
        "others failed",
        max(accepted_s, ended_s) <= _STOPPED_S and not wrong and not failed and len(bystanders.answers) > 0,
        {"models": details},
    )


def _disable(url: str, model: str) -> dict[str, Any]:
    streams: list[tuple[float, str]] = []  # when one ended, and by which error
    with _Asking(url, [model], _PROBES) as probes, httpx.Client(base_url=url, timeout=60) as client:
        readers = [threading.Thread(target=_read_long_text, args=(url, model, streams)) for _ in range(2)]
        for reader in readers:
            reader.start()
        time.sleep(1.0)
        called = time.monotonic()
        client.post(f"/v1/models/{model}/disable", json={"reason": "a test"}).raise_for_status()
        time.sleep(2 * _STOPPED_S)
        for reader in readers:
            reader.join(60)
    answers = [(status, began - called, code) for status, began, code in probes.answers]
    with httpx.Client(base_url=url, timeout=60) as client:
        client.post(f"/v1/models/{model}/enable").raise_for_status()
        back = client.post("/v1/completions", json={"model": model, "prompt": "I", "max_tokens": 4})
    running = [(ended - called, code) for ended, code in streams if ended > called]
    return {
        "model": model,
        "accepted_s": max((began for status, began, _ in answers if status == 200), default=0.0),
        "ended_s": max((ended for ended, _ in running), default=0.0),
        "codes": {code for status, _, code in answers if status != 200} | {code for _, code in running if code},
        "streams": len([code for _, code in running if code == "model_disabled"]),
        "refused": sum(status != 200 for status, _, _ in answers),
        "is_back": back.status_code == 200,
    }


def _read_long_text(url: str, model: str, ended: list[tuple[float, str]]) -> None:
    """One text after another until one ends in an error."""
    body = {"model": model, "prompt": "I think", "max_tokens": 1000, "min_tokens": 1000, "stream": True}
    with httpx.Client(base_url=url, timeout=60) as client:
        while True:
            code = ""
            with client.stream("POST", "/v1/completions", json=body) as reply:
                if reply.status_code != 200:
                    ended.append((time.monotonic(), _code(json.loads(reply.read()))))
                    return
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        code = _code(json.loads(line.removeprefix("data: "))) or code
            if code:
                ended.append((time.monotonic(), code))
                return


class _Asking:
    """Callers who ask for short texts without a pause. `answers`: status, when it was asked, code of the error."""

    def __init__(self, url: str, models: list[str], num_callers: int) -> None:
        self.answers: list[tuple[int, float, str]] = []
        self._url, self._models = url, models
        self._over = threading.Event()
        self._callers = [threading.Thread(target=self._ask) for _ in range(num_callers)]

    def __enter__(self) -> _Asking:
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for caller in self._callers:
            caller.join(60)

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            number = 0
            while not self._over.is_set():
                number += 1
                model, began = self._models[number % len(self._models)], time.monotonic()
                reply = client.post("/v1/completions", json={"model": model, "prompt": "I", "max_tokens": 8})
                self.answers.append((reply.status_code, began, _code(reply.json())))


def _code(said: Mapping[str, Any]) -> str:
    return str((said.get("error") or {}).get("code", ""))
