"""Traffic of every kind, so that every metric has something to tell: what callers do, do wrong, and leave."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from serve.store.revisions import Store
from tests.fakes.hub import FakeHub, Fault
from tests.fakes.models import write_tiny_gpt2

BASE = "tiny/base"
KEY = "key-of-the-check"
NUM_MODELS = 36  # of 4 MB each; the service has room for a dozen
MEMORY_BYTES = 50_000_000
HUB_BYTES = 3_000_000  # of models from the Hub, a tenth of that each
LEASE_TIMEOUT_S = 2.0  # a model from the Hub is not dropped within a minute and this of its last use
NUM_HUB_MODELS = 24
ARCHIVE = Path(__file__).parents[2] / "deployments" / "archives" / "capt_barnacle.zip"
PROMPT = "My dream is"  # which no label and no line of a log may hold
_WORKERS = 6
_NUM_LARGE = 6
_PULLS_AT_ONCE = 9  # one more than the service takes


def write_models(data: Path, scratch: Path) -> list[str]:
    """A base that can be trained, many names of one model, and some models that no memory here holds."""
    Store(data, embedded={}).import_folder(write_tiny_gpt2(scratch / "base", n_positions=1024), BASE)
    small = write_tiny_gpt2(scratch / "small", seed=1, n_embd=192)
    large = write_tiny_gpt2(scratch / "large", seed=2, n_embd=768, n_layer=3)
    for folder, namespace, count in ((small, "tweets", NUM_MODELS), (large, "large", _NUM_LARGE)):
        (folder / "model.safetensors").chmod(0o444)
        for i in range(count):
            _link(folder, data / "models" / namespace / f"bot-{i}")
    return [f"tweets/bot-{i}" for i in range(NUM_MODELS)]


def add_hub_models(hub: FakeHub, scratch: Path) -> None:
    folder = write_tiny_gpt2(scratch / "from-hub", seed=3, n_embd=64)
    for i in range(NUM_HUB_MODELS):
        hub.add(f"huggingtweets/away-{i}", folder)


class Traffic:
    """Callers of the service at `url`, whose Hub is `hub`. `statuses` counts the answers they got; 0: they left."""

    def __init__(self, url: str, hub: FakeHub, models: list[str], seed: int = 0) -> None:
        self._url, self._hub, self._models = url, hub, models
        self._random = random.Random(seed)
        self._weights = [1 / (rank + 1) for rank in range(len(models))]  # Zipf
        self._client = httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=32))
        self.statuses: Counter[int] = Counter()
        self.failed: Counter[str] = Counter()

    async def run(self, duration_s: float, say: Callable[[str], None]) -> None:
        """For so long: callers that want texts all the time, a training, and the rest by turns."""
        until = time.monotonic() + duration_s
        async with self._client:
            job = await self._train()
            callers = [asyncio.create_task(self._call(until)) for _ in range(_WORKERS)]
            await self._use_hub(range(0, 4))
            while time.monotonic() < until:
                await self._misbehave()
                await self._look_around()
                await self._load_too_large()
            await self._use_hub(range(4, 10))  # by now those of before may be dropped
            await self._pull_too_many()
            await self._lose_hub()
            await asyncio.gather(*callers)
            await self._finish(job)
        say(f"answers: {dict(sorted(self.statuses.items()))}")
        if self.failed:
            say(f"failed: {dict(self.failed)}")

    async def _call(self, until: float) -> None:
        kinds: list[Callable[[], Awaitable[None]]]
        kinds = [self._write, self._write, self._stream, self._choices, self._leave]
        while time.monotonic() < until:
            await self._guard(self._random.choice(kinds))

    async def _guard(self, act: Callable[[], Awaitable[None]]) -> None:
        try:
            await act()
        except httpx.HTTPError as exc:
            self.failed[f"{act.__name__}: {type(exc).__name__}"] += 1

    # --- Texts ------------------------------------------------------------------------------------------

    def _body(self, **more: Any) -> dict[str, Any]:
        model = self._random.choices(self._models, self._weights)[0]
        return {"model": model, "prompt": PROMPT, "max_tokens": self._random.randint(4, 24), **more}

    async def _ask(self, method: str, path: str, *, key: str = KEY, **arguments: Any) -> httpx.Response:
        headers = {**({"authorization": f"Bearer {key}"} if key else {}), **arguments.pop("headers", {})}
        reply = await self._client.request(method, path, headers=headers, **arguments)
        self.statuses[reply.status_code] += 1
        return reply

    async def _write(self) -> None:
        await self._ask("POST", "/v1/completions", json=self._body())

    async def _choices(self) -> None:
        await self._ask("POST", "/v1/completions", json=self._body(n=3))

    async def _stream(self) -> None:
        async with self._client.stream("POST", "/v1/completions", json=self._body(stream=True)) as reply:
            async for _ in reply.aiter_lines():
                pass
            self.statuses[reply.status_code] += 1

    async def _leave(self) -> None:
        body = self._body(stream=True) | {"max_tokens": 48, "ignore_eos": True}
        async with self._client.stream("POST", "/v1/completions", json=body) as reply:
            async for _ in reply.aiter_lines():
                break
            self.statuses[0] += 1

    async def _load_too_large(self) -> None:
        for i in range(_NUM_LARGE):
            await self._ask("POST", "/v1/completions", json=self._body(model=f"large/bot-{i}"))

    # --- What is refused, and what is not there --------------------------------------------------------

    async def _misbehave(self) -> None:
        is_json = {"content-type": "application/json"}
        await self._ask("POST", "/v1/completions", content=b"x" * (2 << 20), headers=is_json)
        await self._ask("POST", "/v1/completions", content=b"{", headers=is_json)
        await self._ask("POST", "/v1/completions", content=b"text", headers={"content-type": "text/plain"})
        await self._ask("POST", "/v1/completions", json=self._body(max_tokens=-1))
        await self._ask("GET", "/v1/files", key="a-key-of-nobody")
        await self._ask("GET", "/v1/files", key="")
        await self._ask("POST", "/v1/files", headers={"sec-fetch-site": "cross-site"})
        await self._ask("GET", "/v1/models", headers={"host": "elsewhere.example"})
        await self._ask("GET", "/no/such/page")

    async def _look_around(self) -> None:
        for path in ("/", "/v1/models", "/v1/status", "/v1/residents", "/readyz", "/healthz", "/api/models"):
            await self._ask("GET", path)
        await self._ask("POST", "/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 4}})

    # --- Training and the Hub ----------------------------------------------------------------------------

    async def _train(self) -> str:
        fields = {"handle": "barney", "n_epochs": "1"}
        with ARCHIVE.open("rb") as archive:
            reply = await self._ask("POST", "/v1/bots", data=fields, files={"archive": archive})
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])

    async def _finish(self, job: str) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            status = (await self._ask("GET", f"/v1/fine_tuning/jobs/{job}")).json()["status"]
            if status in ("succeeded", "failed", "cancelled"):
                assert status == "succeeded", status
                return
            await asyncio.sleep(0.5)
        raise AssertionError("the training did not end")

    async def _use_hub(self, numbers: range) -> None:
        for i in numbers:
            await self._ask("POST", "/v1/completions", json=self._body(model=f"huggingtweets/away-{i}"))
        await self._ask("POST", "/v1/completions", json=self._body(model="huggingtweets/nobody"))
        await self._pull(f"huggingtweets/away-{numbers.stop}")
        await self._pull("huggingtweets/nobody-either")

    async def _pull(self, model: str) -> None:
        await self._ask("POST", f"/v1/models/{model}/pull")

    async def _pull_too_many(self) -> None:
        self._hub.fail_everywhere(Fault(head_pace=(16, 0.05)))
        pulls = [self._pull(f"huggingtweets/away-{NUM_HUB_MODELS - 1 - i}") for i in range(_PULLS_AT_ONCE)]
        await asyncio.gather(*pulls)
        self._hub.recover()

    async def _lose_hub(self) -> None:
        self._hub.fail_everywhere(Fault(503))
        await self._ask("POST", "/v1/completions", json=self._body(model="huggingtweets/away-11"))
        self._hub.close_door()
        await self._ask("POST", "/v1/completions", json=self._body(model="huggingtweets/away-12"))
        await self._pull("huggingtweets/away-13")
        self._hub.recover()
        self._hub.open_door()


def _link(folder: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in folder.iterdir():
        os.link(file, target / file.name)
