"""How much a key may ask for: over fakes, but with real keys in a real database, and a real Redis."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest

from serve.api.access import Access
from serve.api.app import build_api
from serve.api.quota import Allowance, Quota, as_duration, max_cost
from serve.api.rates import Rates
from serve.database.connection import Database
from serve.keys.store import KeyStore
from serve.keys.table import KeyTable
from serve.metrics import Metrics
from serve.planning import plan
from serve.settings import BadSetting
from serve.store.defaults import GenerationDefaults
from serve.training.dataset import preview
from serve.types import GenerationRequest, KeyLimits, Scope
from serve.web.router import add_pages
from tests.fakes.generator import EchoGenerator
from tests.fakes.memory import MemoryCatalogue, MemoryFiles, MemoryJobs

NONE = KeyLimits()
Ask = Callable[..., httpx.AsyncClient]


class Gateway:
    """An API of its own over a database, as one of several replicas."""

    def __init__(self, folder: Path, quota: Quota, metrics: Metrics) -> None:
        self.database = Database(f"sqlite:///{folder}/rookery.db")
        self.table = KeyTable(self.database, b"secret")
        self.keys = KeyStore(self.database, b"secret")
        self.generator, self.uploads = EchoGenerator(), folder / "uploads"
        self.files = files = MemoryFiles(Path(mkdtemp(dir=folder)) / "files")
        self.app = build_api(
            generator=self.generator,
            catalogue=MemoryCatalogue("fledgling", "huggingtweets/ada"),
            files=files,
            jobs=MemoryJobs(files),
            upload_dir=self.uploads,
            metrics=metrics,
            add_pages=add_pages,
            preview=preview,
            access=Access(self.keys),
            quota=quota,
        )

    def client(self, limits: KeyLimits | None = None, address: str = "127.0.0.1") -> httpx.AsyncClient:
        """With a fresh key of these limits; None: without one."""
        headers = {}
        if limits is not None:
            _, text = self.table.create(
                "", scopes={Scope.GENERATE, Scope.READ, Scope.TRAIN}, tenant="ada", limits=limits
            )
            self.keys.refresh()
            headers["authorization"] = f"Bearer {text}"
        transport = httpx.ASGITransport(app=self.app, client=(address, 1))
        return httpx.AsyncClient(transport=transport, base_url="http://rookery", headers=headers)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def start(tmp_path: Path, metrics: Metrics) -> AsyncIterator[Callable[..., Gateway]]:
    started: list[Gateway] = []
    quotas: list[Quota] = []

    def start(of_keys: KeyLimits = NONE, of_strangers: KeyLimits = NONE, url: str = "", header: str = "") -> Gateway:
        quota = Quota(of_keys, of_strangers, rates=Rates(url), address_header=header, metrics=metrics)
        quotas.append(quota)
        started.append(Gateway(tmp_path, quota, metrics))
        return started[-1]

    yield start
    for gateway in started:
        gateway.database.close()
    for quota in quotas:
        await quota.close()


async def complete(client: httpx.AsyncClient, model: str = "huggingtweets/ada", **more: object) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": model, "prompt": "My dream", "max_tokens": 8, **more})


async def test_a_key_may_ask_twice_its_second_at_once_and_is_told_when_to_come_back(
    start: Callable[..., Gateway], metrics: Metrics
) -> None:
    gateway = start()
    async with gateway.client(KeyLimits(requests_per_s=1.5)) as client, gateway.client(NONE) as another:
        answers = [await client.get("/v1/models") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0"]
        refused, told = answers[-1], answers[-1].headers
        assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-reset-requests"]) == ("3", "2s")
        assert told["retry-after"] in ("1", "2")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "1.5 requests a second" in refused.json()["error"]["message"]
        assert (await client.get("/healthz")).status_code == 200  # in no limit
        page = await client.get("/", headers={"accept": "text/html"})
        assert page.status_code == 429 and "1.5 requests a second" in page.text
        whole = await another.get("/v1/models")
        assert whole.status_code == 200 and not [name for name in whole.headers if name.startswith("x-ratelimit")]
    assert metrics.registry.get_sample_value("rookery_rate_limited_total", {"limit": "requests"}) == 2


async def test_tokens_are_taken_before_and_what_was_not_used_is_given_back(start: Callable[..., Gateway]) -> None:
    gateway = start()
    async with gateway.client(KeyLimits(tokens_per_min=200)) as client:
        first = await complete(client, max_tokens=150, n=1)
        used = first.json()["usage"]["total_tokens"]
        assert first.headers["x-ratelimit-remaining-tokens"] == str(200 - used) and used < 150
        streamed = await complete(client, max_tokens=20, stream=True)
        assert streamed.headers["x-ratelimit-remaining-tokens"] == str(200 - used - 22)  # it has only begun
        asked = len(gateway.generator.requests)
        refused = await complete(client, max_tokens=45, n=4)
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 120
        assert "200 tokens a minute" in refused.json()["error"]["message"]
        never = await complete(client, max_tokens=100, n=4)
        assert never.status_code == 400 and never.json()["error"]["param"] == "max_tokens"
        before = (await complete(client)).headers["x-ratelimit-remaining-tokens"]
        assert len(gateway.generator.requests) == asked + 1  # nothing was begun of what was refused
        assert (await complete(client, model="huggingtweets/busy", max_tokens=20)).status_code == 429
        after = int((await complete(client)).headers["x-ratelimit-remaining-tokens"])
        assert after > int(before) - 20  # a generation that never began costs nothing


async def test_what_was_not_foreseen_is_paid_for_as_well(start: Callable[..., Gateway]) -> None:
    gateway = start()
    async with gateway.client(KeyLimits(tokens_per_min=60)) as client:
        longer = await complete(client, prompt="a " * 60)  # a token each letter
        assert longer.json()["usage"]["total_tokens"] > 60
        assert longer.headers["x-ratelimit-remaining-tokens"] == "0"
        assert (await complete(client)).status_code == 429


@pytest.mark.parametrize(("is_stream", "status"), [(False, 429), (True, 200)])
async def test_who_leaves_before_a_whole_answer_pays_for_all_of_it(
    start: Callable[..., Gateway], is_stream: bool, status: int
) -> None:
    gateway = start()
    async with gateway.client(KeyLimits(tokens_per_min=200)) as client:
        left = asyncio.create_task(complete(client, model="huggingtweets/stuck", max_tokens=150, stream=is_stream))
        while not gateway.generator.requests:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)  # its first token has come
        left.cancel()
        with suppress(asyncio.CancelledError):
            await left
        assert (await complete(client, max_tokens=100)).status_code == status


async def test_so_many_generations_run_at_once(start: Callable[..., Gateway]) -> None:
    gateway = start(of_keys=KeyLimits(in_flight=1))
    async with gateway.client(NONE) as client, gateway.client(KeyLimits(in_flight=0)) as unlimited:
        stuck = asyncio.create_task(complete(client, model="huggingtweets/stuck"))
        while not gateway.generator.requests:
            await asyncio.sleep(0)
        refused = await complete(client)
        assert refused.status_code == 429 and "1 generation at once" in refused.json()["error"]["message"]
        assert (await client.get("/v1/models")).status_code == 200
        others = [asyncio.create_task(complete(unlimited, model="huggingtweets/stuck")) for _ in range(3)]
        while len(gateway.generator.requests) < 4:
            await asyncio.sleep(0)
        for task in (stuck, *others):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        assert (await complete(client)).status_code == 200


@pytest.mark.parametrize(("address", "same"), [("10.0.0.1", "10.0.0.1"), ("2001:db8::1", "2001:db8::ffff")])
async def test_strangers_are_limited_by_their_address(start: Callable[..., Gateway], address: str, same: str) -> None:
    gateway = start(of_strangers=KeyLimits(requests_per_s=0.5))
    async with gateway.client(address=address) as first, gateway.client(address=same) as again:
        assert (await first.get("/v1/models")).status_code == 200
        assert (await again.get("/v1/models", headers={"x-forwarded-for": "10.9.9.9"})).status_code == 429
        async with gateway.client(KeyLimits(), address=address) as known:
            assert (await known.get("/v1/models")).status_code == 200


async def test_a_proxy_of_ours_says_whom_it_asks_for(start: Callable[..., Gateway]) -> None:
    gateway = start(of_strangers=KeyLimits(requests_per_s=0.5), header="x-forwarded-for")
    told = [
        (["10.0.0.1"], 200),
        (["10.0.0.2"], 200),
        (["10.0.0.3, 10.0.0.1"], 429),
        (["10.0.0.3", "10.0.0.1"], 429),  # HAProxy adds a line of its own behind the caller's
        (["no address"], 200),
        ([""], 200),
    ]
    async with gateway.client() as proxy:
        for lines, status in told:
            answer = await proxy.get("/v1/models", headers=[("x-forwarded-for", line) for line in lines])
            assert answer.status_code == status, lines


async def test_nobody_keeps_more_than_they_may(start: Callable[..., Gateway]) -> None:
    gateway = start()
    async with gateway.client(KeyLimits(storage_bytes=2500)) as client, gateway.client(NONE) as unlimited:

        async def upload(by: httpx.AsyncClient, num_bytes: int) -> httpx.Response:
            return await by.post("/v1/files", files={"file": ("a.zip", b"x" * num_bytes)})

        assert (await upload(client, 1000)).status_code == 200
        refused = await upload(client, 1400)  # with what is around it in the form
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "insufficient_quota"
        assert refused.headers["x-should-retry"] == "false"
        whole = client.build_request("POST", "/v1/files", files={"file": ("a.zip", b"x" * 2000)})

        async def chunks() -> AsyncIterator[bytes]:  # nobody said how many
            yield whole.read()

        unannounced = {"content-type": whole.headers["content-type"]}
        assert (await client.post("/v1/files", content=chunks(), headers=unannounced)).status_code == 429
        assert len(gateway.files.records) == 1 and not list(gateway.uploads.iterdir())
        assert (await upload(unlimited, 2000)).status_code == 200  # of the same tenant
        job = {"training_file": next(iter(gateway.files.records)), "model": "fledgling"}
        assert (await client.post("/v1/fine_tuning/jobs", json=job)).json()["error"]["code"] == "insufficient_quota"


async def test_of_uploads_that_come_together_no_more_are_kept_than_there_is_room_for(
    start: Callable[..., Gateway],
) -> None:
    gateway, num_begun = start(), 0
    async with gateway.client(KeyLimits(storage_bytes=2500)) as client:
        whole = client.build_request("POST", "/v1/files", files={"file": ("a.zip", b"x" * 1000)})
        body = whole.read()

        async def chunks() -> AsyncIterator[bytes]:  # their end comes when all have been let in
            nonlocal num_begun
            num_begun += 1
            while num_begun < 4:
                await asyncio.sleep(0)
            yield body

        headers = {"content-type": whole.headers["content-type"], "content-length": str(len(body))}
        async with asyncio.timeout(10):
            answers = await asyncio.gather(
                *(client.post("/v1/files", content=chunks(), headers=headers) for _ in range(4))
            )
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
    assert gateway.files.bytes_of("ada") == 2000 and not list(gateway.uploads.iterdir())


async def test_who_has_no_room_left_trains_nothing_by_a_page_either(start: Callable[..., Gateway]) -> None:
    gateway = start()
    async with gateway.client(NONE) as unlimited, gateway.client(KeyLimits(storage_bytes=2500)) as client:
        await unlimited.post("/v1/files", files={"file": ("a.txt", b"I dream of rooks in an old elm.\n" * 100)})
        wish = {"file": list(gateway.files.records), "handle": ["ada"], "consent": ["yes"]}
        refused = await client.post("/make/review", data=wish)
        assert refused.status_code == 429 and "is the limit" in refused.text
        assert (await unlimited.post("/make/review", data=wish)).headers["location"].startswith("/jobs/")


async def test_where_nothing_is_limited_nothing_is_counted(start: Callable[..., Gateway]) -> None:
    async with start().client() as client:
        answers = [await complete(client) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}
    assert not [name for name in answers[-1].headers if name.startswith("x-ratelimit")]


# --- Counted for several gateways together ----------------------------------------------------------------


@pytest.fixture
async def redis_url(tmp_path: Path) -> AsyncIterator[str]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not on the PATH")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--dir", str(tmp_path), "--save", "", "--bind", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            await asyncio.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
        server.terminate()


async def test_gateways_with_one_redis_count_together(start: Callable[..., Gateway], redis_url: str) -> None:
    first, second = start(url=redis_url), start(url=redis_url)
    async with first.client(KeyLimits(requests_per_s=1, tokens_per_min=100)) as client:
        second.keys.refresh()
        transport = httpx.ASGITransport(app=second.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://other", headers=client.headers) as other:
            answers = [await complete(one, max_tokens=50) for one in (client, other, client)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    used = sum(answer.json()["usage"]["total_tokens"] for answer in answers[:2])
    assert answers[1].headers["x-ratelimit-remaining-tokens"] == str(100 - used)


async def test_a_redis_that_is_away_lets_everybody_through() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        rates = Rates(f"redis://127.0.0.1:{nobody.getsockname()[1]}/0")
        assert [await rates.request("ada", 0.5) for _ in range(3)] == [None] * 3
        await rates.close()


def test_another_address_than_a_redis_is_a_bad_setting() -> None:
    with pytest.raises(BadSetting, match="ROOKERY_LIMITS_URL"):
        Rates("ftp://somewhere")


# --- The arithmetic ---------------------------------------------------------------------------------------


async def test_who_waits_as_long_as_told_is_let_in_and_no_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000_030.0
    monkeypatch.setattr("time.time", lambda: now)
    rates = Rates()
    assert (await rates.tokens("ada", 1000, 900)).wait_s == 0  # type: ignore[union-attr]
    for cost in (200, 700, 1000):
        wait_s = (await rates.tokens("ada", 1000, cost)).wait_s  # type: ignore[union-attr]
        came, now = now, now + wait_s - 1
        assert (await rates.tokens("ada", 1000, cost)).wait_s > 0  # type: ignore[union-attr]
        now += 1.01
        assert (await rates.tokens("ada", 1000, cost)).wait_s == 0  # type: ignore[union-attr]
        await rates.correct("ada", 1000, -cost, int(now // 60))
        assert now - came <= 120.1
        now = came


async def test_tokens_go_back_into_the_minute_they_were_taken_from(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 60_000_000 * 60 + 59.0
    monkeypatch.setattr("time.time", lambda: now)
    rates = Rates()
    taken = await rates.tokens("ada", 1000, 900)
    assert taken is not None
    now += 31  # of those 900, half hold
    assert (await rates.correct("ada", 1000, -800, taken.minute)).remaining == 950  # type: ignore[union-attr]
    assert (await rates.tokens("ada", 1000, 951)).wait_s > 0  # type: ignore[union-attr]
    now += 30
    assert (await rates.tokens("ada", 1000, 1000)).remaining == 0  # type: ignore[union-attr]
    await rates.correct("ada", 1000, -100, taken.minute)  # of a minute that does not hold any more
    assert (await rates.tokens("ada", 1000, 1)).wait_s > 0  # type: ignore[union-attr]
    await rates.correct("bob", 1000, -500, taken.minute + 1)  # of a count that is lost
    await rates.tokens("bob", 1000, 1000)
    assert (await rates.tokens("bob", 1000, 1)).wait_s > 0  # type: ignore[union-attr]


async def test_what_could_not_be_taken_is_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, limits = Rates(), KeyLimits(tokens_per_min=100)
    allowance = Allowance(Quota(rates=rates), "ada", limits)
    with monkeypatch.context() as away:
        away.setattr(rates, "tokens", AsyncMock(return_value=None))
        async with allowance.generating(GenerationRequest("ada", ("",), {"max_new_tokens": 90}), lambda: 30):
            pass
    assert (await rates.tokens("ada", 100, 0)).remaining == 70  # type: ignore[union-attr]


def test_durations_are_written_as_openai_writes_them() -> None:
    assert [as_duration(seconds) for seconds in (0, 0.2, 1, 59.5, 360, 61)] == [
        "0s",
        "1s",
        "1s",
        "1m0s",
        "6m0s",
        "1m1s",
    ]


def test_a_request_costs_its_prompts_and_its_texts_at_their_longest() -> None:
    request = GenerationRequest("ada", ("eight ch", (1, 2, 3)), {"max_new_tokens": 10}, num_choices=2)
    assert max_cost(request) == 2 + 3 + 2 * 2 * 10


@pytest.mark.parametrize(
    "defaults", [GenerationDefaults({"max_new_tokens": 900}), GenerationDefaults(max_length=900), GenerationDefaults()]
)
def test_a_text_of_unsaid_length_is_no_longer_than_it_costs(defaults: GenerationDefaults) -> None:
    facts: Any = SimpleNamespace(
        defaults=defaults,
        shape=SimpleNamespace(vocab_size=50257, n_positions=1024),
        vocabulary=SimpleNamespace(eos_id=50256, size=50257),
    )
    request = GenerationRequest("ada", ((1, 2, 3),))
    (planned,) = plan(request, facts)
    assert len(planned.prompt_ids) + planned.params.max_new_tokens <= max_cost(request)


def test_a_prompt_in_other_letters_is_longer_than_it_looks() -> None:
    assert max_cost(GenerationRequest("ada", ("夢" * 300,), {"max_new_tokens": 1})) > 600
