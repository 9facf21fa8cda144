"""Many processes of a node and one model: it is fetched once (F15), and what failed or died is gone on with."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from serve.errors import DeadlineExceeded, ModelNotFound, StoreUnavailable
from serve.hub.claims import MAX_LEFT, Claims
from serve.hub.fetch import Hub, _read
from serve.store.revisions import Store
from serve.types import PullProgress
from tests.fakes.hub import FakeHub, Fault
from tests.fakes.models import write_tiny_gpt2
from tests.hub.processes import fetching

ADA = "huggingtweets/ada"
WEIGHTS = "model.safetensors"
SLOW = (8192, 0.05)  # of a pace: the tiny weights take about a second


def open_hub(tmp_path: Path, server: FakeHub, is_locking: bool = True) -> Hub:
    """As a process that has just started has it."""
    return Hub(Store(tmp_path / "data", embedded={}), endpoint=server.endpoint, deadline_s=20, is_locking=is_locking)


def gets(server: FakeHub) -> Counter[str]:
    return Counter(seen.path for seen in server.requests)


def left(tmp_path: Path) -> list[Path]:
    """What fetches have left for the next ones."""
    return [path for path in (tmp_path / "data/models/.fetching").glob("*/*") if path.is_dir()]


def nothing_is_under_way(tmp_path: Path) -> bool:
    models = tmp_path / "data/models"
    under_way = [path for path in (models / ".fetching").iterdir() if path.is_dir() or len(path.stem) == 32]
    return os.listdir(models / ".staging") == [] and under_way == []


# --- One download per node -----------------------------------------------------------------------------------


def test_f15_eight_processes_that_want_one_model_fetch_each_file_once(server: FakeHub, tmp_path: Path) -> None:
    repo = write_tiny_gpt2(tmp_path / "repo")
    sha = server.add(ADA, repo)
    server.fail(ADA, Fault(path=WEIGHTS, pace=SLOW))  # so that none comes too late to compete
    with fetching(8, tmp_path / "data", server.endpoint, ADA) as (_, found):
        assert [found.get(timeout=60) for _ in range(8)] == [sha] * 8
    assert set(gets(server).values()) == {1}, "a file, or what the Hub knows of the model, was asked for twice"
    assert (
        sum(server.bytes_sent[path] for path in server.bytes_sent if path.endswith(WEIGHTS))
        == (repo / WEIGHTS).stat().st_size
    )
    assert nothing_is_under_way(tmp_path)


def test_f15_without_the_lock_all_have_the_right_model_and_none_sees_half_of_it(
    server: FakeHub, tmp_path: Path
) -> None:
    repo = write_tiny_gpt2(tmp_path / "repo")
    sha = server.add(ADA, repo)
    server.fail(ADA, Fault(path=WEIGHTS, pace=SLOW))
    store = Store(tmp_path / "data", embedded={})
    with fetching(8, tmp_path / "data", server.endpoint, ADA, is_locking=False) as (_, found):
        results: list[str] = []
        until = time.monotonic() + 60
        while len(results) < 8 and time.monotonic() < until:
            while not found.empty():
                results.append(found.get())
            try:
                folder = store.resolve(ADA).path
            except ModelNotFound:
                continue
            assert {path.name for path in folder.iterdir()} == {path.name for path in repo.iterdir()} | {"rookery.json"}
            assert (folder / WEIGHTS).read_bytes() == (repo / WEIGHTS).read_bytes()
    assert results == [sha] * 8
    assert max(gets(server).values()) > 1, "they did not compete"
    assert [one.revision for one in store.list_revisions(ADA)] == [sha]
    assert nothing_is_under_way(tmp_path)


def test_threads_of_one_process_wait_for_each_other_too(server: FakeHub, tmp_path: Path) -> None:
    sha = server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    server.fail(ADA, Fault(path=WEIGHTS, pace=SLOW))
    hub, found, phases = open_hub(tmp_path, server), [], set()

    def fetch() -> None:
        found.append(hub.fetch(f"{ADA}@{sha}", on_progress=lambda progress: phases.add(progress.phase)))

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {one.revision for one in found} == {sha} and len(found) == 4
    assert set(gets(server).values()) == {1}
    assert phases == {"waiting", "resolving", "downloading", "converting", "publishing"}


def test_who_waits_longer_than_may_be_is_told(tmp_path: Path) -> None:
    claims, waits = Claims(tmp_path / "fetching"), []

    def time_is_up() -> None:
        raise DeadlineExceeded("enough")

    with claims.turn(ADA, time_is_up, lambda _: waits.append("first")):
        with (
            pytest.raises(DeadlineExceeded),
            claims.turn("HuggingTweets/Ada", time_is_up, lambda _: waits.append("2nd")),
        ):
            pass
        with claims.turn("huggingtweets/bob", time_is_up, lambda _: waits.append("other")):
            pass
    assert waits == ["2nd"]
    assert list((tmp_path / "fetching").iterdir()) == [], "a lock that nobody holds is left"


def test_who_waits_hears_what_the_one_before_tells_each_time_it_is_new(tmp_path: Path) -> None:
    claims, heard = Claims(tmp_path / "fetching"), list[str]()
    with claims.turn(ADA, lambda: None, heard.append) as tell:
        left = iter(["half", "half", "all of it", "", None])

        def others_turn() -> None:
            if (text := next(left)) is None:
                raise DeadlineExceeded("enough")
            tell(text)

        with pytest.raises(DeadlineExceeded), claims.turn(ADA, others_turn, heard.append):
            pass
    assert heard == ["", "half", "all of it"]


def test_who_waits_for_a_fetch_sees_how_far_it_is(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.hub.fetch._TELL_EVERY_S", 0.1)
    repo = write_tiny_gpt2(tmp_path / "repo")
    server.add(ADA, repo)
    server.fail(ADA, Fault(path=WEIGHTS, pace=SLOW))
    first, second = open_hub(tmp_path, server), open_hub(tmp_path, server)
    is_begun, heard = threading.Event(), list[PullProgress]()

    def begun(progress: PullProgress) -> None:
        if progress.phase == "downloading":
            is_begun.set()

    thread = threading.Thread(target=lambda: first.fetch(ADA, on_progress=begun))
    thread.start()
    assert is_begun.wait(10)
    second.fetch(ADA, on_progress=heard.append)
    thread.join(10)
    assert any(one.file == WEIGHTS and 0 < one.num_bytes < one.total_bytes for one in heard)
    assert max(gets(server)[path] for path in gets(server) if path.endswith(WEIGHTS)) == 1, "it came twice"


@pytest.mark.parametrize("told", ["", "{", "[]", '{"phase": "downloading", "of": "another release"}'])
def test_what_is_not_to_be_read_is_said_to_be_waiting(told: str) -> None:
    assert _read(told) == PullProgress("waiting")


# --- Going on where another one ended ------------------------------------------------------------------------


def test_failed_download_is_gone_on_with_by_the_next_try(server: FakeHub, tmp_path: Path) -> None:
    repo = write_tiny_gpt2(tmp_path / "repo")
    sha, size = server.add(ADA, repo), (repo / WEIGHTS).stat().st_size
    server.fail(ADA, Fault(path=WEIGHTS, truncate=True, times=1), Fault(503, path=WEIGHTS, prefix="/storage/"))
    with pytest.raises(StoreUnavailable):
        open_hub(tmp_path, server).locate(ADA)
    (kept,) = left(tmp_path)
    assert kept.name == sha and (kept / WEIGHTS).stat().st_size == size // 2
    assert Store(tmp_path / "data", embedded={}).list_models(limit=9).items == ()
    server.recover()
    server.bytes_sent.clear()
    num_requests = server.num_requests()

    assert (open_hub(tmp_path, server).locate(ADA).path / WEIGHTS).read_bytes() == (repo / WEIGHTS).read_bytes()

    asked = [seen for seen in server.requests[num_requests:] if "/resolve/" in seen.path]
    assert {seen.path.rsplit("/", 1)[1] for seen in asked} == {WEIGHTS}, "what was whole was fetched again"
    assert asked[-1].range == f"bytes={size // 2}-"
    assert sum(server.bytes_sent[path] for path in server.bytes_sent if path.endswith(WEIGHTS)) == size - size // 2
    assert nothing_is_under_way(tmp_path)


def test_f15_download_whose_process_is_killed_is_gone_on_with_by_another(server: FakeHub, tmp_path: Path) -> None:
    repo = write_tiny_gpt2(tmp_path / "repo", n_embd=64)
    server.add(ADA, repo)
    server.fail(ADA, Fault(path=WEIGHTS, prefix="/storage/", pace=SLOW))
    with fetching(1, tmp_path / "data", server.endpoint, ADA) as ((process,), _):
        until = time.monotonic() + 30
        while _size_of_weights(tmp_path) < 100_000 and time.monotonic() < until:
            time.sleep(0.005)
        process.kill()
        process.join()
    had = _size_of_weights(tmp_path)
    assert 100_000 <= had < (repo / WEIGHTS).stat().st_size
    server.recover()
    num_requests = server.num_requests()

    assert (open_hub(tmp_path, server).locate(ADA).path / WEIGHTS).read_bytes() == (repo / WEIGHTS).read_bytes()

    (part,) = [seen for seen in server.requests[num_requests:] if seen.path.startswith("/storage/")]
    assert part.range == f"bytes={had}-"
    assert nothing_is_under_way(tmp_path)


def _size_of_weights(tmp_path: Path) -> int:
    sizes = [path.stat().st_size for path in (tmp_path / "data/models").glob(f".fetching/*/*/{WEIGHTS}")]
    return max(sizes, default=0)


def test_what_is_left_of_a_commit_goes_when_another_is_wanted(server: FakeHub, tmp_path: Path) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "old"))
    server.fail(ADA, Fault(503, path=WEIGHTS))
    with pytest.raises(StoreUnavailable):
        open_hub(tmp_path, server).locate(ADA)
    assert len(left(tmp_path)) == 1
    server.recover()
    new = server.add(ADA, write_tiny_gpt2(tmp_path / "new", seed=1))
    assert open_hub(tmp_path, server).locate(ADA).revision == new
    assert nothing_is_under_way(tmp_path)


def test_what_nobody_has_gone_on_with_for_a_day_goes(server: FakeHub, tmp_path: Path) -> None:
    for name, age_s in (("huggingtweets/ada", 90_000), ("huggingtweets/bob", 1000)):
        server.add(name, write_tiny_gpt2(tmp_path / name))
        server.fail(name, Fault(503, path=WEIGHTS))
        with pytest.raises(StoreUnavailable):
            open_hub(tmp_path, server).locate(name)
        newest = max(left(tmp_path), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (time.time() - age_s,) * 2)
    (young,) = [path for path in left(tmp_path) if path.stat().st_mtime > time.time() - 2000]
    with pytest.raises(ModelNotFound):
        open_hub(tmp_path, server).locate("huggingtweets/nobody")
    assert left(tmp_path) == [young]


def leave(claims: Claims, model_id: str, num_bytes: int = 1, age_s: float = 0.0, commit: str = "c" * 40) -> Path:
    """Something of a fetch that failed, so long ago."""
    mine = claims.begin(model_id, commit)
    (mine / WEIGHTS).write_bytes(bytes(num_bytes))
    claims.keep(mine)
    kept = mine.with_name(commit)
    os.utime(kept, (time.time() - age_s,) * 2)
    return kept


def leave_on_another_machine(claims: Claims, model_id: str, age_s: float) -> Path:
    """As a pod leaves it that is killed, and whose name nobody has any more."""
    mine = claims.begin(model_id, "c" * 40)
    (mine / WEIGHTS).write_bytes(b"theirs")
    theirs = mine.with_name(mine.name.replace(socket.gethostname(), "another-pod-7f9c"))
    os.rename(mine, theirs)
    os.utime(theirs, (time.time() - age_s,) * 2)
    return theirs


def test_what_a_killed_pod_was_fetching_goes_after_a_day_and_not_before(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "fetching")
    old = leave_on_another_machine(claims, ADA, 30 * 86_400)
    young = leave_on_another_machine(claims, "huggingtweets/bob", 80_000)
    assert claims.num_bytes() == len("theirs")
    claims.sweep()
    assert not old.parent.exists() and young.exists()
    claims.sweep(0)
    assert young.exists(), "somebody may be working on it"


def test_what_a_killed_pod_was_fetching_is_gone_on_with_after_a_day(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "fetching")
    old = leave_on_another_machine(claims, ADA, 90_000)
    mine = claims.begin(ADA, "c" * 40)
    assert (mine / WEIGHTS).read_bytes() == b"theirs" and not old.exists()


def test_leftovers_are_looked_through_once_a_minute_but_room_is_made_at_once(tmp_path: Path) -> None:
    now = [time.time()]
    claims = Claims(tmp_path / "fetching", clock=lambda: now[0])
    claims.sweep()
    old = leave(claims, ADA, age_s=90_000)
    claims.sweep()
    assert old.exists()
    now[0] += 60
    claims.sweep()
    assert not old.exists()
    young, mine = leave(claims, ADA), claims.begin("huggingtweets/bob", "c" * 40)
    claims.sweep(0)
    assert not young.exists() and mine.exists()


def test_bytes_that_room_can_be_made_of_are_those_nobody_works_on(tmp_path: Path) -> None:
    now = [time.time()]
    claims, others = (Claims(tmp_path / "fetching", clock=lambda: now[0]) for _ in range(2))
    assert claims.num_bytes() == 0
    leave(claims, ADA, 1000)
    (claims.begin("huggingtweets/bob", "c" * 40) / WEIGHTS).write_bytes(bytes(100))
    assert claims.num_bytes() == 1000
    leave(others, "huggingtweets/eve", 10)
    assert claims.num_bytes() == 1000, "it was counted twice within a minute"
    now[0] += 60
    assert claims.num_bytes() == 1010
    claims.sweep(0)
    assert claims.num_bytes() == 0


def test_of_too_many_leftovers_the_oldest_go(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "fetching")
    kept = [leave(claims, f"huggingtweets/m{i}", age_s=10 * (MAX_LEFT + 5 - i)) for i in range(MAX_LEFT + 5)]
    claims.sweep()
    assert [path.exists() for path in kept] == [False] * 5 + [True] * MAX_LEFT
    assert len(os.listdir(tmp_path / "fetching")) == MAX_LEFT
