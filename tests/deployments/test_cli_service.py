"""The frame of the command, and the verbs of the service itself: `up`, `down`, `status`, `completion`."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil  # type: ignore[import-untyped]
import pytest

from deployments import running
from deployments.cli.app import Exit, exit_of
from deployments.cli.options import remark, remarks, tell
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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
    assert (listed.code, len(listed.out.splitlines()), listed.err) == (0, 1, "")
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


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_are_no_error(closed: tuple[int, ...], tmp_path: Path) -> None:
    shut = " ".join(f"{number}>&-" for number in closed)
    command = ["sh", "-c", f'exec "$0" -m deployments.cli down --data "$1" {shut}', sys.executable, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if 1 in closed else f"Nothing runs over {tmp_path}.\n")


@pytest.mark.parametrize("arguments", ["completion bash", "--help", "down --data /proc/nowhere"])
def test_a_full_disk_under_stdout_is_one_sentence(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments.split()], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr == "rookery: The output cannot be written: No space left on device.\n"


def test_letters_that_the_terminal_does_not_know_are_replaced(tmp_path: Path) -> None:
    done = run("down", "--data", str(tmp_path / "küken"), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, f"Nothing runs over {tmp_path}/k?ken.\n")


def test_an_argument_that_is_no_text_is_wrong_usage() -> None:
    done = subprocess.run([*COMMAND, "show", b"ada\xff"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "rookery: Argument 2 is not UTF-8 text.\n")


def test_what_is_told_holds_no_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remarks, "quiet", False)
    for say in (tell, remark):
        say("a\x1b]0;title\x07b")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("a]0;titleb\n",) * 2


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


def test_what_a_service_keeps_is_for_its_owner_alone(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running.announced(data, "http://127.0.0.1:1"):
        modes = [path.stat().st_mode & 0o777 for path in (data, data / running.FILE)]
    assert modes == [0o700, 0o600]


def test_of_several_services_that_start_at_once_one_has_the_folder(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys
from deployments import running
sys.stdin.readline()
try:
    with running.announced(pathlib.Path({str(tmp_path)!r}), "http://127.0.0.1:9"):
        print("first", flush=True)
        sys.stdin.readline()
except running.RunsAlready:
    print("late", flush=True)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for _ in range(4)
    ]
    said = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
    for process in processes:
        assert process.stdout is not None
        said.append(process.stdout.readline())
    for process in processes:
        process.communicate("end\n", timeout=60)
    assert sorted(said) == ["first\n", "late\n", "late\n", "late\n"]


def test_the_service_over_the_data_folder_is_the_one_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOKERY_DATA", str(tmp_path))
    assert running.default_url() == "http://127.0.0.1:8000"
    with running.announced(tmp_path, "http://127.0.0.1:9"):
        assert running.default_url() == "http://127.0.0.1:9"
        environ = {name: value for name, value in os.environ.items() if name != "ROOKERY_URL"}
        done = subprocess.run([*COMMAND, "ls"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 5 and "No answer from http://127.0.0.1:9 " in done.stderr


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
            assert "; nothing is started at http://127.0.0.1:8000." in done.err
        port = int(url.rpartition(":")[2])
    with running.announced(tmp_path, f"http://127.0.0.1:{port}"):
        assert "nothing is started" not in rookery("up", "--data", tmp_path, "--port", port, "--no-browser").err


@pytest.mark.parametrize("more", [[], ["--detach"]])
def test_a_second_up_at_the_same_port_over_another_folder_is_refused(
    rookery: Rookery, world: World, tmp_path: Path, more: list[str]
) -> None:
    url = os.environ["ROOKERY_URL"].replace("localhost", "127.0.0.1")
    done = rookery("up", "--data", tmp_path, "--port", url.rpartition(":")[2], "--no-browser", *more)
    assert (done.code, done.out) == (1, "")
    assert f"over another folder than {tmp_path}" in done.err and not (tmp_path / running.FILE).exists()


@pytest.mark.parametrize("more", [[], ["--detach"]])
def test_a_data_folder_that_cannot_be_written_is_named(rookery: Rookery, more: list[str]) -> None:
    done = rookery("up", "--data", "/proc/nowhere", "--port", _free_port(), "--no-browser", *more)
    assert (done.code, done.out) == (1, "")
    assert "/proc/nowhere cannot be written" in done.err and "--data" in done.err


def test_a_base_model_that_cannot_be_had_is_said_at_once(rookery: Rookery, tmp_path: Path) -> None:
    variables = {"ROOKERY_HUB_ENABLED": "0", "ROOKERY_DATA": str(tmp_path)}
    done = run("up", "--base", "nobody/none", "--port", str(_free_port()), "--no-browser", **variables)
    assert (done.returncode, done.stdout) == (3, "")
    assert "problem base model" in done.stderr and "'nobody/none'" in done.stderr
    assert not (tmp_path / running.FILE).exists()


def test_a_second_detached_up_waits_for_the_first(rookery: Rookery, tmp_path: Path) -> None:
    with pretended_service(tmp_path) as process:
        ending = threading.Timer(0.5, process.terminate)
        ending.start()
        done = rookery("up", "--data", tmp_path, "--detach", "--no-browser")
        ending.join()
    assert (done.code, done.out) == (1, "")
    assert "starting already" in done.err and "ended before it was ready" in done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_ray_is_there_ends_the_start(tmp_path: Path, number: signal.Signals) -> None:
    arguments = ["up", "--data", str(tmp_path), "--port", str(_free_port()), "--no-browser"]
    with subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("ok      versions")
        process.send_signal(number)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()
    assert running.find(tmp_path) is None and not (tmp_path / running.FILE).exists()


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
    assert "did not start" in done.err and f"rookery: Port {port}" in done.err and f"process {os.getpid()}" in done.err
    assert f"Port {port}" in (tmp_path / "rookery.log").read_text()
    assert (tmp_path / "rookery.log").stat().st_mode & 0o777 == 0o600


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
    (options,) = tab("rookery up --")
    assert {"--detach", "--data", "--quiet"} <= options
    for _ in range(20):  # what takes a busy machine too long is proposed when the key is pressed again
        (models,) = tab("rookery show huggingtweets/")
        if models:
            break
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
    port = _free_port()
    variables = {"ROOKERY_HUB_ENABLED": "false", "ROOKERY_DATA": str(tmp_path), "ROOKERY_THREADS": "1"}
    started = run("up", "--detach", "--port", str(port), **variables)
    try:
        assert (started.returncode, started.stdout) == (0, f"ready http://127.0.0.1:{port}\n"), started.stderr
        steps = [line.split()[1] for line in started.stderr.splitlines() if line.startswith("ok ")]
        assert steps == ["versions", "data", "database", "base", "Ray", "deployments", "first"]
        told = json.loads(run("status", "--json", **variables).stdout)
        assert (told["ready"], told["replicas"]) == (True, 1)
        family = psutil.Process(told["pid"]).children(recursive=True)
    finally:
        ended = run("down", **variables)
    assert (ended.returncode, "has ended" in ended.stdout) == (0, True)
    assert not any(one.is_running() for one in family)
    assert run("status", **variables).returncode == 5
    assert "ready" in (tmp_path / "rookery.log").read_text()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_of_two_starts_at_once_both_end_with_the_same_service(tmp_path: Path) -> None:
    variables = {"ROOKERY_HUB_ENABLED": "false", "ROOKERY_DATA": str(tmp_path), "ROOKERY_THREADS": "1"}
    command = [*COMMAND, "up", "--detach", "--port", str(_free_port())]
    starts = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        said = [start.communicate(timeout=120)[0] for start in starts]
        assert [start.returncode for start in starts] == [0, 0]
        found = running.find(tmp_path)
        assert found is not None and said == [f"ready {found.url}\n"] * 2
    finally:
        assert run("down", **variables).returncode == 0
