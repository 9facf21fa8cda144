"""The frame of the command, and the verbs of the service itself: `up`, `down`, `status`, `completion`."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil  # type: ignore[import-untyped]
import pytest

from deployments import running
from deployments.cli.app import Exit, exit_of
from deployments.cli.words import complete_jobs, complete_models
from deployments.client import Refused, ServerUnreachable
from serve.errors import Conflict, HubUnreachable, ModelGated, ModelNotFound, RookeryError
from tests.deployments.cli_world import Rookery, World

COMMAND = (sys.executable, "-m", "deployments.cli")
ROOT = Path(__file__).parents[2]

# Asks every verb for its help, in one process; prints what it is about as JSON.
_ALL_HELP = """
import contextlib, io, json, sys
from typer.main import get_command
from deployments import cli

def verbs(command, words):
    yield words
    for name, verb in getattr(command, "commands", {}).items():
        yield from verbs(verb, [*words, name])

told = {}
for words in verbs(get_command(cli.app), []):
    sys.argv = ["rookery", *words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code, words
    told[" ".join(words)] = said.getvalue()
heavy = {"torch", "transformers", "ray", "fastapi", "sqlalchemy", "huggingface_hub"} & sys.modules.keys()
print(json.dumps({"told": told, "heavy": sorted(heavy)}))
"""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **variables}
    return subprocess.run(
        [*COMMAND, *arguments], env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


# --- The frame --------------------------------------------------------------------------------------------


def test_every_help_has_examples_and_needs_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", _ALL_HELP], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    assert {"", "up", "down", "status", "doctor", "completion", "train", "generate", "push"} <= found["told"].keys()
    for verb, told in found["told"].items():
        examples = told.partition("Examples:")[2].split("\n $ ")[1:]
        assert len(examples) > 1 and all("rookery" in line for line in examples), verb


def test_the_exit_codes_are_in_the_help() -> None:
    told = run("--help").stdout
    for code in Exit:
        assert f" {code:d}  " in told


def test_how_it_ends_tells_what_was_wrong() -> None:
    by_status = {400: 1, 401: 4, 403: 4, 404: 3, 409: 1, 429: 5, 500: 1, 502: 5, 503: 5, 504: 5, 507: 5, 0: 1}
    assert {status: int(exit_of(Refused("no", status=status))) for status in by_status} == by_status
    errors = (ServerUnreachable, HubUnreachable, ModelNotFound, ModelGated, Conflict, RookeryError)
    assert [int(exit_of(error("no"))) for error in errors] == [5, 5, 3, 4, 1, 1]


@pytest.mark.parametrize("place", ["before the verb", "behind it"])
def test_quiet_leaves_data_and_errors(rookery: Rookery, world: World, place: str) -> None:
    def quiet(*arguments: object) -> tuple[object, ...]:
        return ("--quiet", *arguments) if place == "before the verb" else (*arguments, "-q")

    assert "more than 1" in rookery("ls", "--limit", 1).err
    listed = rookery(*quiet("ls", "--limit", 1))
    assert (listed.code, len(listed.out.splitlines()), listed.err) == (0, 2, "")
    assert rookery(*quiet("show", "huggingtweets/missing")).err == "rookery: There is no such model.\n"


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1", "TERM": "xterm-256color"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_no_colours_gets_none(variables: dict[str, str]) -> None:
    said = _in_terminal("status", "--url", "http://127.0.0.1:9", **variables)
    assert b"No answer" in said and b"\x1b[3" not in said
    coloured = _in_terminal("--help", TERM="xterm-256color")
    assert b"\x1b[" in coloured


def test_a_pipe_gets_no_escape_sequences() -> None:
    assert "\x1b" not in run("--help", TERM="xterm-256color").stdout


@pytest.mark.parametrize("arguments", [["completion", "bash"], ["--help"]])
def test_a_reader_that_has_enough_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert process.communicate(timeout=60)[1] == ""


def test_the_version_is_told() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "rookery")


def _in_terminal(*arguments: str, **variables: str) -> bytes:
    """What the command writes to a terminal."""
    environ = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    master, slave = pty.openpty()
    process = subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, env=environ | variables, stdout=slave, stderr=slave)
    os.close(slave)
    said = b""
    try:
        while piece := os.read(master, 65_536):
            said += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(master)
    process.wait(60)
    return said


# --- Which service runs -----------------------------------------------------------------------------------


def test_a_service_is_found_while_it_runs(tmp_path: Path) -> None:
    with running.announced(tmp_path / "data", "http://127.0.0.1:1"):
        found = running.find(tmp_path / "data")
        assert found is not None and (found.pid, found.url) == (os.getpid(), "http://127.0.0.1:1")
    assert running.find(tmp_path / "data") is None
    assert list((tmp_path / "data").iterdir()) == []


def test_what_a_killed_service_has_left_is_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / running.FILE
    created = psutil.Process().create_time()
    left = {"pid": os.getpid(), "created": created - 60, "url": "http://127.0.0.1:1", "started_at": created}
    path.write_text(json.dumps(left))
    assert running.find(tmp_path) is None  # another process under the same number
    path.write_text(json.dumps({**left, "pid": 2**22 + 1, "created": created}))
    assert running.find(tmp_path) is None
    for damaged in ("", "[]", "{}", "\0"):
        path.write_text(damaged)
        assert running.find(tmp_path) is None


@contextmanager
def pretended_service(data: Path, *, is_deaf: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that says it is the service over `data`, with a child; `is_deaf`: SIGTERM does not end it."""
    code = f"""
import pathlib, signal, subprocess, sys
from deployments import running
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
def end(*_):
    raise SystemExit
signal.signal(signal.SIGTERM, signal.SIG_IGN if {is_deaf} else end)
try:
    with running.announced(pathlib.Path({str(data)!r}), "http://127.0.0.1:9"):
        print("up", flush=True)
        while True:
            signal.pause()
finally:
    child.kill()
    child.wait()
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    try:
        yield process
    finally:
        for one in family:
            if one.is_running():
                one.kill()
        process.wait(10)
        process.stdout.close()


def test_down_ends_the_service_and_all_that_belongs_to_it(rookery: Rookery, tmp_path: Path) -> None:
    with pretended_service(tmp_path) as process:
        (child,) = psutil.Process(process.pid).children()
        done = rookery("down", "--data", tmp_path)
        assert (done.code, done.out) == (0, "The service at http://127.0.0.1:9 has ended.\n")
        assert process.wait(10) == 0 and not child.is_running()
    again = rookery("down", "--data", tmp_path)
    assert (again.code, again.out) == (0, f"Nothing runs over {tmp_path}.\n")
    assert json.loads(rookery("down", "--data", tmp_path, "--json").out) == {"stopped": False, "left": []}


def test_down_tells_what_is_left_when_its_time_is_up(rookery: Rookery, tmp_path: Path) -> None:
    with pretended_service(tmp_path, is_deaf=True) as process:
        done = rookery("down", "--data", tmp_path, "--timeout", 1, "--json")
        assert (done.code, json.loads(done.out)["stopped"]) == (1, False)
        assert f"{process.pid} python" in done.err and "kill -9" in done.err


# --- How it is --------------------------------------------------------------------------------------------


def test_status_tells_how_the_service_is(rookery: Rookery, world: World) -> None:
    told = rookery("status")
    assert told.code == 0
    facts = dict(line.split(maxsplit=1) for line in told.out.splitlines())
    assert facts["address"].strip() == os.environ["ROOKERY_URL"]
    as_json = json.loads(rookery("status", "--json").out)
    assert (as_json["up"], as_json["pid"], as_json["url"]) == (True, None, os.environ["ROOKERY_URL"])
    assert {"version", "ready", "resident_models", "jobs", "queued"} <= as_json.keys()


def test_status_finds_the_service_over_the_data_folder(
    rookery: Rookery, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = os.environ["ROOKERY_URL"]
    monkeypatch.delenv("ROOKERY_URL")
    with running.announced(tmp_path, url):
        told = json.loads(rookery("status", "--data", tmp_path, "--json").out)
        assert (told["url"], told["pid"], told["up"]) == (url, os.getpid(), True) and told["uptime_s"] >= 0
        assert "up for" in rookery("status", "--data", tmp_path).out


def test_status_ends_with_5_where_nothing_answers(rookery: Rookery, tmp_path: Path) -> None:
    done = rookery("status", "--url", "http://127.0.0.1:9", "--json")
    assert (done.code, json.loads(done.out)["up"], json.loads(done.out)["ready"]) == (5, False, False)
    with running.announced(tmp_path, "http://127.0.0.1:9"):
        starting = rookery("status", "--data", tmp_path)
    assert (starting.code, "starting" in starting.out, "starting" in starting.err) == (5, True, True)


# --- A second `up` ----------------------------------------------------------------------------------------


def test_a_second_up_over_the_same_folder_says_where_the_first_is(
    rookery: Rookery, world: World, tmp_path: Path
) -> None:
    url = os.environ["ROOKERY_URL"]
    with running.announced(tmp_path, url):
        for more in ([], ["--detach"]):
            done = rookery("up", "--data", tmp_path, "--no-browser", *more)
            assert (done.code, done.out) == (0, f"ready {url}\n")
            assert f"running already at {url} (process {os.getpid()}" in done.err


def test_a_second_up_at_the_same_port_says_so(rookery: Rookery, world: World, tmp_path: Path) -> None:
    url = os.environ["ROOKERY_URL"].replace("localhost", "127.0.0.1")
    done = rookery("up", "--data", tmp_path, "--port", url.rpartition(":")[2], "--no-browser")
    assert (done.code, done.out) == (0, f"ready {url}\n")
    assert "over another folder" in done.err and not (tmp_path / running.FILE).exists()


def test_a_second_up_during_the_first_ones_start_does_not_say_ready(rookery: Rookery, tmp_path: Path) -> None:
    with running.announced(tmp_path, "http://127.0.0.1:9"):
        done = rookery("up", "--data", tmp_path, "--no-browser")
    assert (done.code, done.out, "starting already" in done.err) == (0, "", True)


def test_a_start_in_the_background_that_fails_shows_the_end_of_its_log(rookery: Rookery, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = rookery("up", "--detach", "--data", tmp_path, "--port", port, "--no-browser")
    assert (done.code, done.out) == (1, "")
    assert "did not start" in done.err and f"Port {port}" in done.err
    assert f"Port {port}" in (tmp_path / "rookery.log").read_text()


# --- The Tab key ------------------------------------------------------------------------------------------

_COMPLETE = """
source <("$1" completion bash)
while IFS= read -r line; do
    IFS=' ' read -r -a COMP_WORDS <<< "$line"
    [[ "$line" == *' ' ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _rookery_completion "$1"
    echo "${COMPREPLY[*]}"
done
"""

Tab = Callable[..., list[set[str]]]


@pytest.fixture
def tab(tmp_path: Path) -> Tab:
    """Bash itself, with the script that the command prints: what the Tab key proposes at the end of each line."""
    program = tmp_path / "rookery"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m deployments.cli "$@"\n')
    program.chmod(0o700)

    def press(*lines: str) -> list[set[str]]:
        command = ["bash", "-c", _COMPLETE, "bash", str(program)]
        typed = "".join(f"{line}\n" for line in lines)
        done = subprocess.run(command, input=typed, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        assert done.stderr == ""
        return [set(line.split()) for line in done.stdout.splitlines()]

    return press


def test_bash_completes_verbs_options_and_models(tab: Tab, world: World) -> None:
    options, models = tab("rookery up --", "rookery show huggingtweets/")
    assert {"--detach", "--data", "--quiet"} <= options
    assert models == {"huggingtweets/ada", "huggingtweets/bob"}


def test_jobs_are_completed_as_well(rookery: Rookery, world: World, archive: Path) -> None:
    world.jobs.script = []
    rookery("train", archive)
    context = SimpleNamespace(params={"url": os.environ["ROOKERY_URL"]})
    assert complete_jobs(context, "ftj") == ["ftjob-0"]  # type: ignore[arg-type]
    assert complete_jobs(context, "ftjob-1") == []  # type: ignore[arg-type]


def test_a_server_that_is_silent_or_not_there_proposes_nothing(rookery: Rookery) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for url in ("http://127.0.0.1:9", f"http://127.0.0.1:{silent.getsockname()[1]}", "no address"):
            context = SimpleNamespace(params={"url": url})
            began = time.monotonic()
            assert complete_models(context, "") == complete_jobs(context, "") == []  # type: ignore[arg-type]
            assert time.monotonic() - began < 30  # HTTP's own time-out is 660 s


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_as_well(rookery: Rookery, shell: str) -> None:
    assert "_ROOKERY_COMPLETE" in rookery("completion", shell).out
    assert rookery("completion", "csh").code == 2


# --- All of it --------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_up_detached_status_and_down(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"ROOKERY_HUB_ENABLED": "false", "ROOKERY_DATA": str(tmp_path), "ROOKERY_THREADS": "1"}
    started = run("up", "--detach", "--port", str(port), **variables)
    try:
        assert (started.returncode, started.stdout) == (0, f"ready http://127.0.0.1:{port}\n"), started.stderr
        steps = [line.split()[1] for line in started.stderr.splitlines() if line.startswith("ok ")]
        assert steps == ["versions", "data", "database", "Ray", "deployments", "first"]
        told = json.loads(run("status", "--json", **variables).stdout)
        assert (told["ready"], told["replicas"]) == (True, 1)
        family = psutil.Process(told["pid"]).children(recursive=True)
    finally:
        ended = run("down", **variables)
    assert (ended.returncode, "has ended" in ended.stdout) == (0, True)
    assert not any(one.is_running() for one in family)
    assert run("status", **variables).returncode == 5
    assert "ready" in (tmp_path / "rookery.log").read_text()
