"""What the command line shows: tables in narrow terminals, texts of strangers, bars."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from deployments import show
from deployments.client import JobView
from deployments.progress import JobProgress, TransferProgress

JOB_ID, MODEL = "ftjob-0123456789abcdef01234567", "huggingtweets/capt_barnacle"
JOB: dict[str, Any] = {
    **{"id": JOB_ID, "status": "running", "fine_tuned_model": MODEL, "priority": "normal", "estimated_finish": None},
    **{"training_files": [{"handle": "capt_barnacle"}, {"handle": "grandma_ines"}], "created_at": 1_700_000_000},
}
VERSION = {
    **{"revision": "1f0c2ab9" * 5, "created": 1, "bytes": 17_000_000, "losses": {}, "job_id": JOB_ID},
    **{"is_main": True, "step": None},
}


def shown(show_on: Callable[[Console], object], width: int = 80, *, is_terminal: bool = False) -> str:
    out = io.StringIO()
    show_on(Console(file=out, width=width, force_terminal=is_terminal, color_system=None, highlight=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 240])
def test_ids_are_whole_on_their_line_in_every_terminal(width: int) -> None:
    jobs = shown(lambda console: show.show_table(console, show.jobs_table([JOB])), width)
    assert {JOB_ID, "running", MODEL, "@capt_barnacle", "2023-11-14"} <= set(jobs.splitlines()[1].split())
    versions = shown(lambda console: show.show_table(console, show.versions_table([VERSION])), width)
    assert {VERSION["revision"], JOB_ID} <= set(versions.splitlines()[1].split())


def test_jobs_have_columns_only_for_what_is_not_as_usual() -> None:
    def header(**changes: object) -> list[str]:
        table = show.jobs_table([JOB, {**JOB, **changes}])
        return shown(lambda console: show.show_table(console, table), 240).splitlines()[0].split()

    assert header() == ["job", "status", "handles", "model", "created"]
    assert header(priority="low") == ["job", "status", "handles", "model", "priority", "created"]
    assert header(estimated_finish=1) == ["job", "status", "handles", "model", "ready", "in", "created"]


def test_a_terminal_gets_nothing_of_strangers_that_it_would_obey() -> None:
    assert show.plain("\x1b]0;owned\x07a\tb\nc\x9b2J \x7f👩\u200d🚀") == "]0;owneda\tb\nc2J 👩\u200d🚀"
    assert show.plain("\u202eeb\u202c \ud800\u2067אב\u2069") == "eb \u2067אב\u2069"
    event = show.event_line({"created_at": 1, "level": "\x1b[2J", "message": "\x1b[2J"})
    table = shown(lambda console: console.print(show.table("\x1b[2J", rows=[["\x1b[2J"]])))
    assert "\x1b" not in event.plain + table and "[2J" in table


def test_json_is_one_line_of_letters_that_no_terminal_obeys() -> None:
    value = {"text": "a\x1b\x7f\x85\x9b\u2028\u2029\u202e\ud800 👋 ü"}
    line = show.json_text(value)
    assert json.loads(line) == value and len(line.splitlines()) == 1
    assert show.plain(line) == line and line.endswith(' 👋 ü"}')
    assert json.loads(show.json_text(value, indent=2)) == value


@pytest.mark.parametrize(("width", "told"), [(40, "120/1200  12:21"), (80, "loss 4.20  held-out 4.40  12:21 left")])
def test_a_bar_is_one_line(width: int, told: str) -> None:
    numbers = {"step": 120, "total_steps": 1200, "train_loss": 4.2, "valid_loss": 4.4, "seconds_left": 741.0}

    def follow(console: Console) -> None:
        with JobProgress(console) as progress:
            progress.update(JobView({"id": "ftjob-0", "status": "running"}, "", numbers), "")
        with TransferProgress(console) as transfer:
            transfer.update("downloading", "model.safetensors", 10_000_000, 548_000_000)

    lines = [line.rstrip() for line in shown(follow, width, is_terminal=True).replace("\r", "\n").splitlines()]
    transferred = "2 %" if width == 40 else "10.0 MB of 548.0 MB model.safetensors"
    assert any(line.endswith(told) for line in lines) and any(line.endswith(transferred) for line in lines)
