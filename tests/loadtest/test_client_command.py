from __future__ import annotations

import asyncio
import io
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loadtest.__main__ import app
from loadtest.client import noop
from loadtest.client.facts import Server
from loadtest.client.progress import Progress
from loadtest.client.target import Target
from loadtest.results.files import read
from loadtest.results.record import Header, Record
from loadtest.traffic.plan import Call
from loadtest.traffic.reading import plan_names

PLAN = """
about = "Short."
duration_s = 0.4
warmup_s = 0.1
[arrivals]
process = "constant"
rate = 50
[requests]
output_tokens = 4
"""
NEEDED = {
    "requests", "errors", "refused", "p50_ttft_ms", "p99_ttft_ms", "p50_ms", "p99_ms", "tokens_s", "cold_share",
    "hit_rate",
}  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A no-op server in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server, address = asyncio.run_coroutine_threadsafe(noop.start(), loop).result()
    yield address

    async def close() -> None:
        server.close()
        await server.wait_closed()

    asyncio.run_coroutine_threadsafe(close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def plan(tmp_path: Path) -> str:
    path = tmp_path / "short.toml"
    path.write_text(PLAN)
    return str(path)


def call(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def test_a_run_ends_with_one_line_of_json_and_leaves_its_records(url: str, plan: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    status, stdout, _ = call("run", plan, "--url", url, "--json", "--out", str(out), "--seed", "5")
    assert status == 0
    line = json.loads(stdout.strip().splitlines()[-1])
    assert line.keys() >= NEEDED
    assert (line["requests"], line["errors"], line["refused"], line["hit_rate"]) == (20, 0, 0, 1.0)
    run = read(out)
    assert len(run.records) == 25 and len(run.counted) == 20
    assert run.stopped_s is None
    assert run.header.plan["seed"] == 5


def test_without_json_there_is_a_table(url: str, plan: str) -> None:
    status, stdout, _ = call("run", plan, "--url", url, "--rate", "100", "--duration", "0.2")
    assert status == 0
    assert "0 failed" in stdout and "tweets/s" in stdout


@pytest.mark.slow  # matplotlib takes its time
def test_a_page_with_charts_is_written(url: str, plan: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert call("run", plan, "--url", url, "--html", str(page), "--json")[0] == 0
    assert "</html>" in page.read_text()


def test_the_highest_rate_is_looked_for_and_every_probe_is_shown(url: str, plan: str) -> None:
    words = ["--slo", "p50=0.001ms", "--probe-s", "0.1", "--warmup", "0", "--json"]  # no server is so fast
    status, stdout, stderr = call("run", plan, "--url", url, *words)
    assert status == 0
    line = json.loads(stdout.strip().splitlines()[-1])
    assert line.keys() >= NEEDED
    assert (line["slo"], line["goodput_rps"]) == (["p50=0.001ms", "errors=1%"], 0.0)
    assert [probe["rate"] for probe in line["probes"]] == [50.0, 25.0, 12.5]
    assert stderr.count("fails") == 3


def test_each_probe_says_how_late_the_tester_was_and_whether_the_server_kept_up(url: str, plan: str) -> None:
    words = ["--slo", "p50=1ms", "--probe-s", "0.01", "--rate", "1", "--warmup", "0", "--duration", "0.1", "--json"]
    line = json_of(*("run", plan, "--url", url, *words))
    assert line["probe_s"] == 0.02  # 20 times the limit
    assert all(probe["p99_lag_ms"] is None or probe["p99_lag_ms"] >= 0 for probe in line["probes"])
    assert all(isinstance(probe["kept_up"], bool) for probe in line["probes"])


def json_of(*words: str, status: int | None = None) -> dict[str, Any]:
    found, stdout, _ = call(*words)
    assert status is None or found == status
    (line,) = stdout.splitlines()
    values: dict[str, Any] = json.loads(line)
    assert values.keys() >= NEEDED | {"reason"}
    return values


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["smoke", "--url", "http://127.0.0.1:9"], 1, "nobody answers at http://127.0.0.1:9"),
        (["smoke", "--url", "nonsense"], 1, "nobody answers at nonsense"),
        (["nosuchplan"], 2, "there is no plan"),
        (["smoke", "--slo", "p99=soon"], 2, "is no goal"),
        (["smoke", "--models", "none/*"], 1, "lists no model like none/*"),
        (["smoke", "--rate", "inf"], 2, "rate = inf"),
        (["smoke", "--out", "/"], 2, "--out /: "),
        (["smoke", "--html", "/proc/x.html"], 2, "--html /proc/x.html: "),
        (["smoke", "--key", "a\nb"], 2, "--key: a key has no line breaks"),
        (["smoke", "--price-per-hour", "0"], 2, "--price-per-hour 0"),
        (["smoke", "--price-per-hour", "inf"], 2, "--price-per-hour inf"),
        (["smoke", "--price-per-hour", "nan"], 2, "--price-per-hour nan"),
    ],
)
def test_with_json_there_is_a_line_that_says_why_nothing_was_measured(
    url: str, words: list[str], status: int, said: str
) -> None:
    line = json_of("run", "--url", url, *words, "--json", status=status)
    assert said in line["reason"]
    assert (line["requests"], line["errors"], line["p99_ms"]) == (0, 0, None)


def test_a_file_that_is_there_is_kept_until_the_run_begins(plan: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text("kept")
    for out in (old, new):
        assert call("run", plan, "--url", "http://127.0.0.1:9", "--out", str(out))[0] == 1
    assert old.read_text() == "kept"
    assert not new.exists()


def test_figures_are_shown_before_a_page_that_cannot_be_made(
    url: str, plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "loadtest.results.html", None)  # as where matplotlib is not installed
    status, stdout, stderr = call("run", plan, "--url", url, "--json", "--html", str(tmp_path / "a.html"))
    assert status == 1
    assert json.loads(stdout)["requests"] == 20
    assert "--html" in stderr and "Traceback" not in stderr


def test_fewer_models_than_the_plan_asks_for_are_said_in_the_file(url: str, tmp_path: Path) -> None:
    many, out = tmp_path / "many.toml", tmp_path / "out.jsonl"
    many.write_text(PLAN + "[models]\ncount = 5\n")
    assert call("run", str(many), "--url", url, "--out", str(out), "--json")[0] == 0
    run = read(out)
    (note,) = run.header.notes
    assert "asks for 5 models, and there are 1" in note


@pytest.mark.parametrize(("counts", "is_needed"), [("count = 1", False), ("times_fit = 2", True)])
def test_a_model_is_loaded_before_the_run_only_where_the_plan_is_about_memory(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: str, is_needed: bool
) -> None:
    asked: list[bool] = []

    async def look(target: Target, *, patterns: Sequence[str], is_fit_needed: bool) -> Server:
        asked.append(is_fit_needed)
        return Server(())

    monkeypatch.setattr("loadtest.client.command.look_at", look)
    path = tmp_path / "some.toml"
    path.write_text(PLAN + f"[models]\n{counts}\n")
    call("run", str(path), "--url", url)
    assert asked == [is_needed]


@pytest.mark.parametrize(
    ("kind", "slo"), [(signal.SIGINT, []), (signal.SIGTERM, ["--slo", "p50=0.001ms", "--probe-s", "0.2"])]
)
def test_a_run_that_is_stopped_says_so_and_tells_what_there_was(
    url: str, plan: str, tmp_path: Path, kind: signal.Signals, slo: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = 0

    class Stopping(Progress):
        def ended(self, record: Record) -> None:
            nonlocal ended
            ended += 1
            if ended == 12:
                signal.raise_signal(kind)

    monkeypatch.setattr("loadtest.client.command.Progress", Stopping)
    out, before = tmp_path / "out.jsonl", signal.getsignal(kind)
    line = json_of("run", plan, "--url", url, "--out", str(out), "--warmup", "0", *slo, "--json", status=130)
    assert line["reason"].startswith("stopped after")
    assert line["requests"] > 0
    assert line.get("goodput_rps") is None
    if slo:
        assert [probe["held"] for probe in line["probes"]] == [False]  # that of 10 requests
    else:
        assert read(out).stopped_s is not None
    assert signal.getsignal(kind) == before


def test_stopped_before_anything_was_sent_there_is_still_a_line(
    url: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        await asyncio.Event().wait()

    monkeypatch.setattr("loadtest.client.command.look_at", look)
    assert "before anything" in json_of("run", plan, "--url", url, "--json", status=130)["reason"]


def test_nobody_at_the_address_is_status_1_with_a_sentence(plan: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        status, stdout, stderr = call("run", plan, "--url", address)
    assert (status, stdout) == (1, "")
    assert f"nobody answers at {address}" in stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nosuchplan"], "there is no plan"),
        (["smoke", "--slo", "p99=soon"], "is no goal"),
        (["smoke", "--duration", "-1"], ""),
        (["smoke", "--nonsense"], ""),
    ],
)
def test_wrong_usage_is_status_2(url: str, words: list[str], said: str) -> None:
    status, stdout, stderr = call("run", *words, "--url", url)
    assert (status, stdout) == (2, "")
    assert said in stderr


def test_plans_are_listed_with_what_they_are_for() -> None:
    status, stdout, _ = call("plans")
    assert status == 0
    assert {line for line in stdout.splitlines() if not line.startswith(" ")} == set(plan_names())
    assert "good answer" in stdout


@pytest.mark.parametrize("command", ["report", "compare"])
def test_commands_that_are_elsewhere_have_their_own_options(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0 and "--json" in done.stdout
    assert CliRunner().invoke(app, [command]).exit_code == 2


def test_help_names_all_commands_and_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv[1:] = ['--help']\nfrom loadtest.__main__ import main\ntry: main()\n"
    code += (
        "except SystemExit: pass\nprint('heavy:', sorted({'numpy', 'torch', 'ray', 'aiohttp'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    for command in ("run", "plans", "models", "report", "compare", "plan-capacity", "peers"):
        assert f" {command} " in done.stdout


def record_of(number: int, **values: object) -> Record:
    return Record(number, "f", "m", 0.0, 0.0, 0.01, "ok", **{"first_s": 0.005, "tier": "device", **values})  # type: ignore[arg-type]


async def test_progress_tells_of_the_last_seconds_and_of_a_late_tester() -> None:
    header = Header({}, "", "", "", "", {}, "", 1.0, 29.0)
    with Progress(Console(file=io.StringIO()), "probe 1  ") as progress:
        progress.begin(header, lambda: 4.0)
        for number in range(8):
            progress.sent(Call(number, "f", 0.5, "m", "", 1))
        for number in range(4):
            progress.ended(record_of(number, tier="disk" if number else "device"))
        progress.ended(Record(4, "f", "m", 0.0, 0.0, 0.01, "refused", status=429))
        line = progress.line().plain
        assert line == (
            "probe 1  4/30 s  offered 2.0/s  answered 1.0/s  in flight 3  TTFT p50 5 p99 5 ms  hits 25 %  refused 1"
        )
        progress.ended(Record(5, "f", "m", 0.0, 0.5, 0.6, "ok"))
        assert "THE TESTER IS LATE: p99 500 ms" in progress.line().plain
