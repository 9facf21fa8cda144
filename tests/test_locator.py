"""Where models are, as one event loop asks: each thing once, answers for everybody, and no word of what is private."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from serve import locator as locator_module
from serve.errors import (
    HubUnreachable,
    ModelDisabled,
    ModelGated,
    ModelNotFound,
    ModelUnusable,
    RookeryError,
    StoreUnavailable,
)
from serve.exposition import render
from serve.hub.fetch import PARALLEL_DOWNLOADS, Hub
from serve.locator import Locator
from serve.metrics import Metrics
from serve.store.revisions import Store
from serve.types import EVERYBODY, Viewer, Visibility
from tests.fakes.hub import FakeHub, Fault, fake_hub
from tests.fakes.models import write_tiny_gpt2
from tests.store.test_convert import write_old_checkpoint

ADA = "huggingtweets/ada"
WEIGHTS = "model.safetensors"
SLOW = Fault(path=WEIGHTS, pace=(20_000, 0.05))

Open = Callable[[], Locator]


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with fake_hub() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data", embedded={})


@pytest.fixture
async def open_locator(server: FakeHub, store: Store) -> AsyncIterator[Open]:
    """Each call is a process that has just started."""
    opened: list[Locator] = []

    def open_one() -> Locator:
        hub = Hub(store, endpoint=server.endpoint, token="hf_secret", deadline_s=10)
        opened.append(Locator(store, hub, Metrics()))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


@pytest.fixture
def locator(open_locator: Open) -> Locator:
    return open_locator()


async def test_a_hundred_who_ask_at_once_are_answered_by_one_fetch(
    server: FakeHub, locator: Locator, tmp_path: Path
) -> None:
    sha = server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    server.fail(ADA, SLOW)
    names = (ADA, "HuggingTweets/Ada", ADA.upper())
    answers = await asyncio.gather(*(locator.locate(names[i % 3]) for i in range(100)))
    assert {revision.revision for revision, _ in answers} == {sha} and answers[0][1] > 0
    num_requests = server.num_requests()
    assert max(server.num_requests(name) for name in ("/config.json", "/merges.txt")) == 1
    assert await locator.locate(ADA) == (answers[0][0], 0.0)
    assert server.num_requests() == num_requests


@pytest.mark.parametrize(
    ("status", "kind"), [(404, ModelNotFound), (403, ModelGated), (503, StoreUnavailable)], ids=str
)
async def test_all_who_wait_for_a_fetch_that_fails_are_told_why(
    server: FakeHub, locator: Locator, tmp_path: Path, status: int, kind: type[RookeryError]
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    server.fail(ADA, Fault(status, head_pace=(5, 0.05)))  # slow enough for all to have asked
    results = await asyncio.gather(*(locator.locate(ADA) for _ in range(20)), return_exceptions=True)
    assert {type(result) for result in results} == {kind}
    assert len({id(result) for result in results}) == 20
    assert len({str(result) for result in results}) == 1
    assert server.num_requests() <= 4


async def test_f12_verdict_of_the_hub_is_believed_for_a_minute_or_until_forgotten(
    server: FakeHub, locator: Locator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        with pytest.raises(ModelNotFound):
            await locator.locate(ADA)
    assert server.num_requests() == 1
    sha = server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    await locator.forget("HuggingTweets/Ada")
    assert (await locator.locate(ADA))[0].revision == sha

    monkeypatch.setattr(locator_module, "NEGATIVE_TTL_S", 0.0)
    num_requests = server.num_requests()
    for _ in range(2):
        with pytest.raises(ModelNotFound):
            await locator.locate("huggingtweets/bob")
    assert server.num_requests() == num_requests + 2


async def test_what_the_hub_cannot_give_now_is_asked_for_again(
    server: FakeHub, locator: Locator, tmp_path: Path
) -> None:
    sha = server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    server.fail(ADA, Fault(500, headers={"Retry-After": "60"}))
    with pytest.raises(StoreUnavailable) as busy:
        await locator.locate(ADA)
    assert busy.value.retry_after_s == pytest.approx(60, abs=1)
    server.recover()
    assert (await locator.locate(ADA))[0].revision == sha


async def test_private_model_is_none_for_strangers_in_the_very_words_of_one_that_is_not_there(
    server: FakeHub, locator: Locator, store: Store, tmp_path: Path
) -> None:
    server.add("x/private", write_tiny_gpt2(tmp_path / "private"), private=True)
    trained = store.publish("x/trained", write_tiny_gpt2(store.stage()), visibility=Visibility.PRIVATE)

    async def words(name: str) -> str:
        with pytest.raises(ModelNotFound) as denied:
            await locator.locate(name, viewer=EVERYBODY)
        return denied.value.message.lower().replace(name.lower(), "?")

    expected = await words("x/nobody")
    assert {await words("x/private"), await words("x/trained"), await words("X/Trained")} == {expected}
    assert {await words(f"x/trained@{trained.revision}"), await words("x/trained@v9")} == {expected}
    assert server.num_requests(".json") == 0, "a stranger had a private model fetched"
    for _ in range(2):
        assert (await locator.locate("x/private"))[0].is_private
        assert (await locator.locate("x/trained"))[0].is_private
        assert {await words("x/private"), await words("x/trained")} == {expected}


async def test_private_model_that_was_disabled_or_deleted_is_none_for_strangers_either(
    server: FakeHub, locator: Locator, store: Store
) -> None:
    ada, bob = Viewer("ada"), Viewer("bob")
    for name in ("x/disabled", "x/deleted"):
        store.publish(name, write_tiny_gpt2(store.stage()), visibility=Visibility.PRIVATE, viewer=ada)
    store.disable("x/disabled")
    store.delete_model("x/deleted")

    async def words(name: str, viewer: Viewer) -> str:
        with pytest.raises(ModelNotFound) as denied:
            await locator.locate(name, viewer=viewer)
        return denied.value.message.replace(name, "?")

    for viewer in (bob, EVERYBODY):
        expected = await words("x/nobody", viewer)
        num_requests = server.num_requests()
        assert {await words(name, viewer) for name in ("x/disabled", "x/deleted")} == {expected}
        assert server.num_requests() == num_requests + 2, "it is to be like a model that is nowhere, in time as well"
    with pytest.raises(ModelDisabled):
        await locator.locate("x/disabled", viewer=ada)
    for name, error in (("x/disabled", ModelDisabled), ("x/deleted", ModelNotFound)):
        with pytest.raises(error, match="disabled|deleted here"):
            await locator.locate(name)


async def test_offline_machine_without_models_of_a_hub_has_no_such_model_and_says_so_at_once(
    server: FakeHub, locator: Locator, store: Store
) -> None:
    server.close_door()
    store.publish("x/trained", write_tiny_gpt2(store.stage()), visibility=Visibility.PRIVATE)
    took_s = []
    for number in range(5):
        started = time.monotonic()
        with pytest.raises(ModelNotFound, match="cannot be reached"):
            await locator.locate(f"x/nobody{number}")
        took_s.append(time.monotonic() - started)
    assert sum(took_s) < 2.5  # about 50 ms each on a machine that is not busy; with repetitions it would be 9 s
    words = set()
    for name in ("x/nobody", "x/trained"):
        with pytest.raises(ModelNotFound) as denied:
            await locator.locate(name, viewer=EVERYBODY)
        words.add(denied.value.message.replace(name, "?"))
    assert len(words) == 1


async def test_hub_that_once_gave_something_and_cannot_be_reached_is_an_outage(
    server: FakeHub, open_locator: Open, tmp_path: Path
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    first = open_locator()
    here, _ = await first.locate(ADA)
    server.close_door()
    for after_outage in (first, open_locator()):
        with pytest.raises(HubUnreachable) as outage:
            await after_outage.locate("huggingtweets/bob")
        assert outage.value.retry_after_s is not None
        assert await after_outage.locate(ADA) == (here, 0.0)


async def test_models_of_an_earlier_version_tell_that_there_is_a_hub(
    server: FakeHub, open_locator: Open, tmp_path: Path
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    await open_locator().locate(ADA)
    (tmp_path / "data/models/.fetching/answered").unlink()
    server.close_door()
    with pytest.raises(HubUnreachable):
        await open_locator().locate("huggingtweets/bob")


async def test_unknown_name_is_so_at_once_while_many_downloads_hang(
    server: FakeHub, store: Store, tmp_path: Path
) -> None:
    names = [f"x/slow{number}" for number in range(5 * PARALLEL_DOWNLOADS)]
    for name in names:
        server.add(name, write_tiny_gpt2(tmp_path / name))
        server.fail(name, Fault(path=WEIGHTS, pace=(1, 0.2)))
    locator = Locator(store, Hub(store, endpoint=server.endpoint, deadline_s=3))
    started = time.monotonic()
    slow = [asyncio.create_task(locator.locate(name)) for name in names]
    while server.num_requests(WEIGHTS) < PARALLEL_DOWNLOADS:
        await asyncio.sleep(0.01)
    asked = time.monotonic()
    with pytest.raises(ModelNotFound):
        await locator.locate("x/nobody")
    assert time.monotonic() - asked < 1
    assert len({seen.path for seen in server.requests if seen.path.startswith("/storage/")}) <= PARALLEL_DOWNLOADS
    results = await asyncio.gather(*slow, return_exceptions=True)
    assert {type(result) for result in results} == {StoreUnavailable}
    assert time.monotonic() - started < 10, "the time in the queue did not count"  # else five times 3 s
    locator.close()


async def test_what_is_here_is_found_while_all_other_threads_wait(locator: Locator, store: Store) -> None:
    here = store.publish("x/trained", write_tiny_gpt2(store.stage()))
    over = threading.Event()
    waiting = [asyncio.create_task(asyncio.to_thread(over.wait, 30)) for _ in range(50)]
    async with asyncio.timeout(10):
        assert await locator.locate("x/trained") == (here, 0.0)
    over.set()
    await asyncio.gather(*waiting)


async def test_strangers_have_nothing_converted_that_they_may_not_see(
    locator: Locator, store: Store, tmp_path: Path
) -> None:
    home = write_old_checkpoint(tmp_path / "data/models/x/hand")
    store.set_visibility("x/hand", Visibility.PRIVATE)
    with pytest.raises(ModelNotFound):
        await locator.locate("x/hand", viewer=EVERYBODY)
    assert not (tmp_path / "data/models/.converted").exists()
    assert (await locator.locate("x/hand"))[0].path == home


async def test_closing_ends_a_long_download_and_the_next_process_goes_on_with_it(
    server: FakeHub, open_locator: Open, tmp_path: Path
) -> None:
    repo = write_tiny_gpt2(tmp_path / "repo")
    server.add(ADA, repo)
    server.fail(ADA, Fault(path=WEIGHTS, pace=(10_000, 0.2)))
    first = open_locator()
    fetch = asyncio.create_task(first.locate(ADA))
    while sum(sent for path, sent in server.bytes_sent.items() if path.endswith(WEIGHTS)) < 40_000:
        await asyncio.sleep(0.005)
    started = time.monotonic()
    first.close()
    with pytest.raises(StoreUnavailable):
        await fetch
    assert time.monotonic() - started < 2
    server.recover()
    await open_locator().locate(ADA)
    ranges = [seen.range for seen in server.requests if seen.path.startswith("/storage/")]
    assert len(ranges) == 2 and re.fullmatch(r"bytes=[1-9]\d+-", ranges[1] or "")


async def test_what_cannot_be_an_id_is_not_asked_for(server: FakeHub, locator: Locator) -> None:
    for name in ("../x", "a/b/c", "", "a" * 300, "x@"):
        with pytest.raises(ModelNotFound):
            await locator.locate(name)
    assert server.requests == []


async def test_outcomes_are_counted_by_kind_alone(server: FakeHub, store: Store, tmp_path: Path) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    server.add("x/llama", write_tiny_gpt2(tmp_path / "llama"))
    (tmp_path / "llama/config.json").write_text('{"model_type": "llama"}')
    metrics = Metrics()
    locator = Locator(store, Hub(store, endpoint=server.endpoint), metrics)
    await locator.locate(ADA)
    with pytest.raises(ModelUnusable):
        await locator.locate("x/llama")
    with pytest.raises(ModelNotFound):
        await locator.locate("x/nobody")
    locator.close()
    text = render(metrics)[0].decode()
    counts = re.findall(r'rookery_hub_fetch_duration_seconds_count{outcome="(\w+)"} ([\d.]+)', text)
    assert sorted(counts) == [("not_found", "1.0"), ("ok", "1.0"), ("unusable", "1.0")]
