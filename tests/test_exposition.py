"""What the processes of a node have counted, as one text: real processes that write into one folder, and end."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus

from serve import exposition
from serve.exposition import Node, open_metrics, render
from serve.metrics import Metrics
from serve.metrics_port import listen

_parse_openmetrics: Any = parse_openmetrics  # without types
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
_PROCESSES = get_context("forkserver")  # quick, and clean: nothing is counted in what they are forked from
_PROCESSES.set_forkserver_preload(["tests.test_exposition"])


class Process:
    """One that counts in `folder`. It does what it is told, a line of Python at a time."""

    def __init__(self, folder: Path, max_file_bytes: int | None = None) -> None:
        self._pipe, its_own = _PROCESSES.Pipe()
        self._child = _PROCESSES.Process(target=_count, args=(folder, its_own, max_file_bytes), daemon=True)
        self._child.start()
        its_own.close()
        assert self._pipe.recv() == "ready"

    def do(self, line: str) -> None:
        self._pipe.send(line)
        assert self._pipe.recv() == "done"

    def kill(self) -> None:
        self._child.kill()
        self.end()

    def end(self) -> None:
        self._pipe.close()
        self._child.join(10)
        assert self._child.exitcode is not None


def _count(folder: Path, pipe: Connection, max_file_bytes: int | None) -> None:
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    known = {"metrics": open_metrics(folder), "listen": listen, "render": render}
    with suppress(EOFError):
        pipe.send("ready")
        while True:
            exec(pipe.recv(), known)
            pipe.send("done")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Process]]:
    """Starts a process that counts in `tmp_path`."""
    started: list[Process] = []

    def begin() -> Process:
        started.append(Process(tmp_path))
        return started[-1]

    yield begin
    for process in started:
        process.end()


def read(folder: Path) -> dict[str, float]:
    """Name and labels -> value, of all processes in the folder."""
    families = Node(folder).collect()
    return {_named(sample.name, sample.labels): sample.value for family in families for sample in family.samples}


def _named(name: str, labels: dict[str, str]) -> str:
    return name + "".join(f" {value}" for _, value in sorted(labels.items()))


def files(folder: Path, kind: str) -> list[str]:
    return sorted(path.name for path in folder.glob(f"{kind}_*"))


def test_counts_of_a_killed_process_stay_and_its_gauges_go(tmp_path: Path, start: Callable[[], Process]) -> None:
    one, other = start(), start()
    for process in (one, other):
        process.do("metrics.requests.labels('/v1/models', '200').inc(3)")
        process.do("metrics.step_duration.observe(0.02)")
        process.do("metrics.queue_depth.set(4); metrics.jobs.labels('queued').set(2)")
    before = read(tmp_path)
    assert before["rookery_requests_total /v1/models 200"] == 6
    assert (before["rookery_queue_depth"], before["rookery_jobs queued"]) == (8, 2)
    one.kill()
    for _ in range(2):  # the one who finds it dead adds it up; the next finds it added up
        after = read(tmp_path)
        assert after["rookery_requests_total /v1/models 200"] == 6
        assert after["rookery_step_duration_seconds_count"] == after["rookery_step_duration_seconds_bucket +Inf"] == 2
        assert after["rookery_step_duration_seconds_bucket 0.01"] == 0
        assert after["rookery_step_duration_seconds_sum"] == pytest.approx(0.04)
        assert (after["rookery_queue_depth"], after["rookery_jobs queued"]) == (4, 2)
    other.do("metrics.requests.labels('/v1/models', '200').inc()")
    assert read(tmp_path)["rookery_requests_total /v1/models 200"] == 7


def test_the_folder_does_not_grow_with_processes_that_come_and_go(tmp_path: Path, start: Callable[[], Process]) -> None:
    for number in range(1, 4):
        process = start()
        process.do("metrics.training_tokens.inc(10); metrics.job_duration.labels('succeeded').observe(70)")
        process.kill()
        told = read(tmp_path)
        assert told["rookery_training_tokens_total"] == 10 * number
        assert told["rookery_job_duration_seconds_count succeeded"] == number
        assert files(tmp_path, "counter") == ["counter_ended.db"] and files(tmp_path, "gauge") == []
    sizes = {path.stat().st_size for path in tmp_path.glob("*_ended.db")}
    assert max(sizes) < 200_000


def test_who_adds_up_the_ended_may_die_between_any_two_steps(
    tmp_path: Path, start: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        process = start()
        process.do("metrics.tokens_generated.inc(5); metrics.batch_rows.observe(3)")
        process.kill()
    steps, killed_at, real = 0, 0, {name: getattr(Path, name) for name in ("replace", "unlink")}

    def dying(name: str) -> Callable[..., object]:
        def step(path: Path, *args: object, **options: object) -> object:
            nonlocal steps
            steps += 1
            if steps == killed_at:
                raise KeyboardInterrupt
            return real[name](path, *args, **options)

        return step

    for name in real:
        monkeypatch.setattr(Path, name, dying(name))
    is_over = False
    while not is_over:
        steps, killed_at = 0, killed_at + 1
        try:
            told = read(tmp_path)
            is_over = steps == 0
        except KeyboardInterrupt:
            steps, killed_at = -1000, killed_at
            told = read_only(tmp_path)
            steps = 0
        assert (told["rookery_tokens_generated_total"], told["rookery_batch_rows_count"]) == (10, 2)
    assert killed_at > 5


def read_only(folder: Path) -> dict[str, float]:
    """As another process would at this moment, which finds the lock taken."""
    node = Node(folder)
    node._absorb = lambda: None  # type: ignore[method-assign]
    return {_named(sample.name, sample.labels): sample.value for family in node.collect() for sample in family.samples}


def test_both_forms_are_valid_with_and_without_other_processes(tmp_path: Path, start: Callable[[], Process]) -> None:
    process = start()
    process.do("metrics.requests.labels('/v1/models', '200').inc(); metrics.request_duration.labels('/x').observe(1)")
    process.do("metrics.pool_bytes.labels('device').set(7)")
    alone = open_metrics(None)
    alone.requests.labels("/v1/models", "200").inc()
    alone.request_duration.labels("/x").observe(1)
    shared = Metrics()
    shared.registry = CollectorRegistry()
    shared.registry.register(Node(tmp_path))
    for metrics in (alone, shared):
        text, kind = render(metrics, OPENMETRICS)
        assert kind.startswith("application/openmetrics-text") and text.endswith(b"# EOF\n")
        open_families = {family.name: family for family in _parse_openmetrics(text.decode())}
        text, kind = render(metrics)
        assert kind.startswith("text/plain")
        assert {family.name for family in parse_prometheus(text.decode())} == set(open_families)
        assert [sample.value for sample in open_families["rookery_requests"].samples] == [1]
        assert not any("pid" in sample.labels for family in open_families.values() for sample in family.samples)


def test_files_that_cannot_be_read_hide_nothing_else(tmp_path: Path, start: Callable[[], Process]) -> None:
    start().do("metrics.tokens_generated.inc(5)")
    pid = os.getpid()
    (tmp_path / f"counter_{pid}.db").touch()  # just made: nothing is in it yet
    (tmp_path / f"histogram_{pid}.db").write_bytes(b"\xff\x7f\x00\x00" + b"\x11" * 5000)  # a disk has damaged it
    assert read(tmp_path)["rookery_tokens_generated_total"] == 5


def test_a_reused_process_id_is_another_process() -> None:
    own = exposition._identity()
    assert exposition._is_alive(own) and exposition._is_alive(own.partition("-")[0])
    assert not exposition._is_alive(f"{os.getpid()}-1") and not exposition._is_alive("0-1")


def test_where_there_is_no_room_a_process_counts_for_itself(tmp_path: Path) -> None:
    full = Process(tmp_path, max_file_bytes=500_000)
    full.do("metrics.requests.labels('/x', '200').inc()")
    full.do('assert b\'rookery_requests_total{route="/x",status="200"} 1.0\' in render(metrics)[0]')
    assert read(tmp_path) == {}
    full.end()


def test_the_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    Process(folder).end()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.db")} == {0o600}


def test_a_child_counts_where_its_parent_does(tmp_path: Path, start: Callable[[], Process]) -> None:
    process = start()
    child = "from serve.exposition import join_parent; join_parent().training_tokens.inc(11)"
    process.do(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)")
    assert read(tmp_path)["rookery_training_tokens_total"] == 11


def test_a_child_that_finds_the_disk_full_counts_for_itself(tmp_path: Path) -> None:
    """It has the variable from its parent, and with it values that would write into files that nobody has laid out."""
    child = (
        "import os, resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000));"
        "from serve.exposition import join_parent, render;"
        "metrics = join_parent(); metrics.training_tokens.inc(11);"
        "assert b'rookery_training_tokens_total 11.0' in render(metrics)[0] and not metrics.is_shared"
    )
    given = {**os.environ, exposition.FOLDER_VARIABLE: str(tmp_path)}
    subprocess.run([sys.executable, "-c", child], env=given, check=True)
    assert list(tmp_path.iterdir()) == []


def test_without_proc_nobody_could_tell_who_lives_so_a_process_counts_for_itself(
    tmp_path: Path, start: Callable[[], Process]
) -> None:
    child = (
        "from serve import exposition; exposition._started = lambda pid: None; from pathlib import Path;"
        f"metrics = exposition.open_metrics(Path({str(tmp_path)!r}));"
        "metrics.tokens_generated.inc(3); assert not metrics.is_shared;"
        "assert b'rookery_tokens_generated_total 3.0' in exposition.render(metrics)[0]"
    )
    subprocess.run([sys.executable, "-c", child], check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["counter_ended", "histogram_ended", "counter_0-1", "histogram_0-1", "gauge_livesum_0-1"]
)
@pytest.mark.parametrize("content", [b"", b"\xff\x7f\x00\x00" + b"\x11" * 5000])
def test_a_damaged_file_of_those_that_are_gone_costs_its_own_counts_alone(
    tmp_path: Path, start: Callable[[], Process], name: str, content: bytes
) -> None:
    living, gone = start(), start()
    living.do("metrics.tokens_generated.inc(5)")
    (tmp_path / f"{name}.db").write_bytes(content)
    assert read(tmp_path)["rookery_tokens_generated_total"] == 5
    gone.do("metrics.tokens_generated.inc(2); metrics.step_duration.observe(1)")
    gone.kill()
    for _ in range(2):
        told = read(tmp_path)
        assert (told["rookery_tokens_generated_total"], told["rookery_step_duration_seconds_count"]) == (7, 1)


def test_a_file_that_cannot_be_read_now_is_neither_skipped_nor_removed(
    tmp_path: Path, start: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start()
    process.do("metrics.tokens_generated.inc(5)")
    process.kill()

    def too_many(path: str) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(exposition._MmapedDict, "read_all_values_from_file", too_many)
        with pytest.raises(OSError, match="Too many"):
            read(tmp_path)
    assert read(tmp_path)["rookery_tokens_generated_total"] == 5


def test_however_many_ask_files_are_read_once_a_second(
    tmp_path: Path, start: Callable[[], Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, node, asked = start(), Node(tmp_path), list[float]()
    for now in (100.0, 100.9, 101.0, 101.9):
        monkeypatch.setattr("serve.exposition.time.monotonic", lambda now=now: now)
        process.do("metrics.tokens_generated.inc()")
        families = {family.name: family for family in node.collect()}
        asked.append(families["rookery_tokens_generated"].samples[0].value)
    assert asked == [1, 1, 3, 3]


def test_scrapes_of_many_threads_lose_nothing(tmp_path: Path, start: Callable[[], Process]) -> None:
    for _ in range(2):
        process = start()
        process.do("metrics.tokens_generated.inc(5)")
        process.kill()
    told: list[float] = []
    threads = [
        threading.Thread(target=lambda: told.append(read(tmp_path)["rookery_tokens_generated_total"])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [10] * 8
