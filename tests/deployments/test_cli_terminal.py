"""The command in a terminal: a real pseudo-terminal, real keys and signals, a process of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from deployments.stopping import interrupts_held
from serve.types import JobStatus
from tests.deployments.cli_world import World

ADA = "huggingtweets/ada"
CTRL_C, CTRL_D = "\x03", "\x04"
TIMEOUT_S = 30.0  # of what takes a second on a machine that is not busy
_STYLES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[=>])|\r")


class Terminal:
    """A command that somebody runs."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deployments.cli", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that its keys are signals
            cwd=Path(__file__).parents[2],
        )
        os.close(slave)
        self.shown = ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str) -> str:
        """What it shows up to `text`, which is then seen."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.shown:
            assert select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0], self.shown
            assert self._read(), self.shown
        before, _, self.shown = self.shown.partition(text)
        return before

    def wait_for_question(self, text: str) -> None:
        """Up to `text`, and until it listens: Python's `input` misses an interrupt that comes between the two."""
        self.wait_for(text)
        process, num_idle = psutil.Process(self.process.pid), 0
        while num_idle < 10:
            num_idle = num_idle + 1 if process.status() == psutil.STATUS_SLEEPING else 0
            time.sleep(0.01)

    def ends_with(self) -> int:
        """Its exit code; what it showed last is in `shown`."""
        while self._read():
            pass
        return self.process.wait(TIMEOUT_S)

    def _read(self) -> bool:
        try:
            block = os.read(self._master, 65_536)
        except OSError:  # nobody has the other end open
            return False
        self.shown += _STYLES.sub("", block.decode(errors="replace"))
        return True


Run = Callable[..., Terminal]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    for name, value in {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with ExitStack() as stack:

        def start(*arguments: object) -> Terminal:
            terminal = Terminal(*map(str, arguments))
            stack.callback(terminal.close)
            return terminal

        yield start


@pytest.fixture
def job(world: World, archive: Path) -> str:
    """A job that runs for ever."""
    world.jobs.script = []
    files = {"archive": ("ada.zip", b"posts")}
    made = httpx.post(f"{os.environ['ROOKERY_URL']}/v1/bots", files=files, data={"handle": "ada"}, trust_env=False)
    return str(made.json()["id"])


# --- A job that is followed -------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "status"), [("n", JobStatus.QUEUED), ("y", JobStatus.CANCELLED)])
@pytest.mark.parametrize("verb", [["wait"], ["logs", "-f"]])
def test_a_second_ctrl_c_asks_whether_to_cancel(
    run: Run, world: World, job: str, verb: list[str], answer: str, status: JobStatus
) -> None:
    terminal = run("jobs", *verb, job)
    terminal.wait_for("Job ftjob-0" if verb == ["wait"] else "The job has started.")
    terminal.press(CTRL_C)
    terminal.wait_for(f"The job goes on. Follow it with: rookery jobs {verb[0]} {job}")
    terminal.wait_for("Press Ctrl-C again within 3 s")
    terminal.press(CTRL_C)
    terminal.wait_for("Cancel the job? [y/N]: ")
    terminal.press(f"{answer}\n")
    assert terminal.ends_with() == 130
    assert ("The job is cancelled." in terminal.shown) is (answer == "y")
    assert world.jobs.jobs[job].status is status


def test_a_ctrl_c_while_a_sentence_is_printed_does_not_print_it_twice() -> None:
    printed = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        printed.append("whole")
    assert printed == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_answer_to_the_question_is_no_yes(run: Run, world: World, job: str) -> None:
    terminal = run("jobs", "wait", job)
    terminal.wait_for("Job ftjob-0")
    for said in ("Press Ctrl-C again within 3 s", "Cancel the job? [y/N]: "):
        terminal.press(CTRL_C)
        terminal.wait_for(said)
    terminal.press(CTRL_D)
    assert terminal.ends_with() == 130
    assert world.jobs.jobs[job].status is JobStatus.QUEUED


@pytest.mark.slow
def test_a_single_ctrl_c_leaves_the_job_to_itself(run: Run, world: World, job: str) -> None:
    terminal = run("jobs", "wait", job)
    terminal.wait_for("Job ftjob-0")
    terminal.press(CTRL_C)
    assert terminal.ends_with() == 130
    assert "The job goes on" in terminal.shown and "Cancel the job?" not in terminal.shown
    assert world.jobs.jobs[job].status is JobStatus.QUEUED


def test_an_interrupt_without_a_terminal_leaves_at_once(world: World, job: str) -> None:
    command = [sys.executable, "-m", "deployments.cli", "jobs", "logs", "-f", job, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stderr is not None
        assert b"The job has started." in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 130
        assert process.stderr.read() == b"\nThe job goes on. Follow it with: rookery jobs logs ftjob-0 -f\n"
    assert world.jobs.jobs[job].status is JobStatus.QUEUED


# --- Questions --------------------------------------------------------------------------------------------


def test_train_asks_once_for_the_right_to_use_the_archive(run: Run, world: World, archive: Path) -> None:
    refused = run("train", archive, "--no-wait")
    refused.wait_for("Do you have the right to use this archive")
    refused.press("n\n")
    assert refused.ends_with() == 1 and "nothing was sent" in refused.shown
    assert world.jobs.requests == []
    allowed = run("train", archive, "--no-wait")
    allowed.wait_for("Do you have the right to use this archive")
    allowed.press("y\n")
    assert allowed.ends_with() == 0
    again = run("train", archive, "--no-wait")
    assert again.ends_with() == 0 and "Do you have the right" not in again.shown
    assert len(world.jobs.requests) == 2


def test_erase_shows_what_goes_and_asks(run: Run, world: World) -> None:
    terminal = run("erase", ADA)
    assert ADA in terminal.wait_for("Delete 1 model, 0 jobs, 0 files for good? [y/N]: ")
    terminal.press("\n")
    assert terminal.ends_with() == 1 and "nothing was deleted" in terminal.shown
    assert ADA in world.catalogue.models


def test_ctrl_c_at_a_question_is_an_interrupt(run: Run, world: World) -> None:
    terminal = run("erase", ADA)
    terminal.wait_for_question("[y/N]: ")
    terminal.press(CTRL_C)
    assert terminal.ends_with() == 130
    assert ADA in world.catalogue.models


# --- Texts ------------------------------------------------------------------------------------------------


def test_play_writes_on_stops_at_ctrl_c_and_ends_at_ctrl_d(run: Run, world: World, tmp_path: Path) -> None:
    terminal = run("play", ADA, "--seed", 3, "--max-tokens", 4)
    terminal.wait_for(f"{ADA}> ")
    terminal.press("Today\n")
    terminal.wait_for("Today")
    terminal.wait_for("Today")  # the first was the echo
    terminal.wait_for(f"{ADA}> ")
    terminal.press("/model huggingtweets/stuck\n")
    terminal.wait_for("huggingtweets/stuck> ")
    terminal.press("never ends\n")
    terminal.wait_for("never ends")
    terminal.wait_for("never ends")
    terminal.press(CTRL_C)
    terminal.wait_for("huggingtweets/stuck> ")
    terminal.press(f"/save {tmp_path / 'kept.txt'}\n")
    terminal.wait_for("2 texts are in")
    terminal.wait_for_question("huggingtweets/stuck> ")
    terminal.press("half a line" + CTRL_C)
    terminal.wait_for("huggingtweets/stuck> ")
    terminal.press(CTRL_D)
    assert terminal.ends_with() == 0
    assert "never ends" in (tmp_path / "kept.txt").read_text()
    assert (tmp_path / "state/rookery/play_history").read_text().splitlines()[:2] == [
        "Today",
        "/model huggingtweets/stuck",
    ]
    assert [request.seed for request in world.generator.requests] == [3, 4]


def test_a_single_text_is_streamed_in_a_terminal(run: Run, world: World) -> None:
    terminal = run("generate", "huggingtweets/stuck", "Today")
    terminal.wait_for("Today")  # and no more ever comes
    terminal.press(CTRL_C)
    assert terminal.ends_with() == 130
