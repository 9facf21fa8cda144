"""Bits that flip on the disk of a live service: how long until each is found, and what is served meanwhile and then.

A round of the scrub takes ROUND_S here instead of 20 hours; the rate at which it reads is measured apart.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import httpx

from serve.store.revisions import Store
from serve.store.scrub import Scrub
from serve.store.validate import WEIGHTS
from tests.deployments.conftest import BASE, import_tiny_model, start_service, stop_service
from tests.fakes.hub import fake_hub
from tests.fakes.models import write_tiny_gpt2

ROUND_S = 60.0
NUM_OWN, NUM_FETCHED = 30, 10


def flip_bit(path: Path, at: int) -> None:
    """As a disk does: neither size, time nor mode changes."""
    status = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
        os.fsync(file.fileno())
    path.chmod(status.st_mode & 0o777)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def run(flips: int, folder: Path, seed: int = 27) -> dict[str, Any]:
    """So many models at random, one bit each; half of them are from the Hub."""
    lot = random.Random(seed)
    data, sources = folder / "data", dict[str, Path]()
    import_tiny_model(data, BASE)
    with fake_hub() as hub:
        for number in range(NUM_OWN + NUM_FETCHED):
            model_id = f"{'own' if number < NUM_OWN else 'hub'}/m{number}"
            sources[model_id] = write_tiny_gpt2(folder / f"m{number}", seed=number)
            if number < NUM_OWN:
                Store(data, embedded={}).import_folder(sources[model_id], model_id)
            else:
                hub.add(model_id, sources[model_id])
        live = start_service(
            data,
            ROOKERY_SCRUB_HOURS=str(ROUND_S / 3600),
            ROOKERY_HUB_ENABLED="true",
            ROOKERY_HUB_ENDPOINT=hub.endpoint,
        )
        try:
            texts = {model_id: _text(live.url, model_id)[1] for model_id in sources}
            found_s, wrong = list[float](), list[str]()
            for number in range(flips):
                own = [model_id for model_id in sources if model_id.startswith("hub/" if number % 2 else "own/")]
                model_id = lot.choice(own)
                weights = Store(data, embedded={}).resolve(model_id).path / WEIGHTS
                flip_bit(weights, lot.randrange(weights.stat().st_size // 2, weights.stat().st_size))
                took_s = _wait_for(data, number + 1)
                found_s += [took_s] if took_s is not None else []
                wrong += _judge(live.url, model_id, texts[model_id], weights, sources[model_id] / WEIGHTS)
                sources.pop(model_id)  # one that was made here is served no more
            others = [model_id for model_id in sources if _text(live.url, model_id) != (200, texts[model_id])]
        finally:
            stop_service(live)
    return {
        "flips": flips,
        "found": len(found_s),
        "longest_s": round(max(found_s, default=0.0), 1),
        "round_s": ROUND_S,
        "wrong": wrong,
        "others_hurt": others,
        "bytes_per_s": round(_rate(folder)),
    }


def _text(url: str, model_id: str) -> tuple[int, str]:
    body = {"model": model_id, "prompt": "My dream is", "max_tokens": 8, "temperature": 0}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    said = reply.json()
    return reply.status_code, said["choices"][0]["text"] if reply.status_code == 200 else said["error"]["code"]


def _wait_for(data: Path, count: int) -> float | None:
    """The seconds until so many were found in all; None where that takes two rounds."""
    began = time.monotonic()
    while time.monotonic() < began + 2 * ROUND_S:
        lines = (data / "log.jsonl").read_text(encoding="utf-8").splitlines()
        if (
            sum(json.loads(line)["event"] == "revision_damaged" for line in lines if "revision_damaged" in line)
            >= count
        ):
            return time.monotonic() - began
        time.sleep(0.5)
    return None


def _judge(url: str, model_id: str, text: str, weights: Path, source: Path) -> list[str]:
    """What is served of it after it was found: nothing, or what the Hub has."""
    time.sleep(3)  # in which it is forgotten and fetched
    status, said = _text(url, model_id)
    if model_id.startswith("own/"):
        return [] if (status, said) == (422, "model_unusable") else [f"{model_id}: {status} {said}"]
    if (status, said) != (200, text) or weights.read_bytes() != source.read_bytes():
        return [f"{model_id}: {status} {said}, after it was fetched again"]
    return []


def _rate(folder: Path) -> float:
    """Bytes a second of one core and this disk, over a model of GPT-2's small shape."""
    store = Store(folder / "large", embedded={})
    source = write_tiny_gpt2(folder / "source", n_layer=12, n_embd=768, n_head=12)
    found = store.import_folder(source, "test/large")
    began = time.monotonic()
    Scrub(store, 1.0).step()
    return (found.path / WEIGHTS).stat().st_size / (time.monotonic() - began)
