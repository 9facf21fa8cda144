"""The command `rookery` as a program of its own, against the live application."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from deployments.parts import open_jobs
from serve.settings import Settings
from serve.types import JobStatus
from tests.deployments.conftest import (
    BASE,
    ROOKERY,
    LiveService,
    import_tiny_model,
    start_service,
    stop_service,
    wait_until,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ARCHIVES = Path(__file__).parents[2] / "deployments" / "archives"

Command = Callable[..., subprocess.CompletedProcess[str]]


def command_of(url: str) -> Command:
    """The command in a process of its own, told by its environment where the server is."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [*ROOKERY, *map(str, arguments)]
        environment = {**os.environ, "ROOKERY_URL": url}
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
        )

    return run


@pytest.fixture
def rookery(live_url: str) -> Command:
    return command_of(live_url)


@pytest.fixture
def wren(live_service: LiveService, rookery: Command) -> Iterator[str]:
    """A model that is there for one test."""
    import_tiny_model(live_service.data, "huggingtweets/wren-of-the-command", seed=3)
    yield "huggingtweets/wren-of-the-command"
    rookery("rm", "huggingtweets/wren-of-the-command")


def test_models_are_listed_shown_and_removed(rookery: Command, wren: str) -> None:
    assert wren in rookery("ls").stdout
    listed = json.loads(rookery("ls", "wren-of", "--json").stdout)
    assert [model["id"] for model in listed["data"]] == [wren]
    told = json.loads(rookery("show", wren, "--json").stdout)
    assert (told["id"], told["context_length"]) == (wren, 64)
    assert told["revision"] in rookery("show", wren).stdout
    removed = rookery("rm", wren)
    assert (removed.returncode, removed.stdout) == (0, f"{wren} is deleted.\n")
    for arguments in (["show", wren], ["rm", wren], ["generate", wren]):
        refused = rookery(*arguments)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert refused.stderr.startswith("rookery: ") and wren in refused.stderr


def test_a_model_that_has_written_is_in_memory_until_it_is_removed(rookery: Command, wren: str) -> None:
    def residents() -> set[str]:
        return {one["model"] for one in json.loads(rookery("ps", "--json").stdout)["data"]}

    assert wren not in residents()
    assert rookery("generate", wren, "--max-tokens", 4).returncode == 0
    assert wren in residents() and wren in rookery("ps").stdout
    rookery("rm", wren)
    assert wren not in residents()


def test_generate_writes_the_same_texts_for_the_same_seed(rookery: Command) -> None:
    asked = ["generate", BASE, "My dream is", "-n", 5, "--seed", 7, "--max-tokens", 12]
    first, second = (json.loads(rookery(*asked, "--json").stdout) for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert len(texts) == 5 and len(set(texts)) > 1
    assert texts == [choice["text"] for choice in second["choices"]]
    assert rookery(*asked).stdout.count("My dream is") == 5


def test_train_wait_json_prints_the_finished_job_of_a_model_that_answers(rookery: Command) -> None:
    done = rookery("train", ARCHIVES / "capt_barnacle.zip", "--handle", "Barney", "--epochs", 1, "--wait", "--json")
    assert done.returncode == 0, done.stderr
    job: dict[str, Any] = json.loads(done.stdout)
    assert (job["object"], job["status"]) == ("fine_tuning.job", "succeeded")
    assert job["fine_tuned_model"] == "huggingtweets/barney"  # lower case
    (counts,) = job["result"]["counts"].values()
    assert counts["downloaded"] == counts["retweets"] + counts["short"] + counts["kept"]
    assert len(job["result"]["samples"]) == 5
    assert json.loads(rookery("jobs", "show", job["id"], "--json").stdout) == job
    assert job["id"] in rookery("jobs").stdout
    written = rookery("generate", "huggingtweets/barney", "-n", 5, "--max-tokens", 40, "--json")
    assert len(json.loads(written.stdout)["choices"]) == 5
    assert "Barney" in rookery("show", "huggingtweets/barney").stdout


@pytest.mark.slow
def test_two_archives_make_a_cyborg_named_in_sorted_order(rookery: Command) -> None:
    done = rookery(
        *("train", ARCHIVES / "unit_seven.zip", ARCHIVES / "grandma_ines.zip"),
        *("--handle", "@Unit_Two", "--handle", "Ines", "--epochs", 1, "--wait", "--json"),
    )
    assert done.returncode == 0, done.stderr
    job: dict[str, Any] = json.loads(done.stdout)
    assert job["fine_tuned_model"] == "huggingtweets/ines-unit_two"
    assert {handle.lower() for handle in job["result"]["counts"]} == {"ines", "unit_two"}
    told = json.loads(rookery("show", "huggingtweets/ines-unit_two", "--json").stdout)
    assert {handle.lower() for handle in told["handles"]} == {"ines", "unit_two"}


def test_what_cannot_be_learnt_from_is_refused_in_a_sentence(rookery: Command, tmp_path: Path) -> None:
    picture, letter = tmp_path / "cat.png", tmp_path / "letter.txt"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    letter.write_text("Dear diary, nothing happened today.\n" * 20)
    for path, said in ((picture, "Expected: an X archive"), (letter, "at least 6,000 characters are needed")):
        refused = rookery("train", path, "--handle", "nobody", "--wait", "--json", "--quiet")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert said in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_training_that_sigterm_interrupts_goes_on_after_the_next_start(tmp_path: Path) -> None:
    import_tiny_model(tmp_path, BASE)
    service = start_service(tmp_path)
    rookery = command_of(service.url)
    started = rookery(
        "train", ARCHIVES / "unit_seven.zip", "--handle", "unit_seven", "--epochs", 20, "--no-wait", "--json"
    )
    job_id: str = json.loads(started.stdout)["id"]
    wait_until(lambda: _steps(service.url, job_id) > 100, 60)
    (child,) = _training_processes(service)
    began = time.monotonic()
    assert stop_service(service) == []
    assert not child.is_running()
    assert time.monotonic() - began < 30
    assert open_jobs(Settings(data=tmp_path)).get_job(job_id).status is JobStatus.QUEUED
    assert not (tmp_path / "models/huggingtweets/unit_seven/main").exists()  # nothing half-made is to be seen

    service = start_service(tmp_path)
    done = command_of(service.url)("jobs", "wait", job_id, "--json")
    events = httpx.get(f"{service.url}/v1/fine_tuning/jobs/{job_id}/events?limit=100").json()["data"]
    assert stop_service(service) == []
    assert json.loads(done.stdout)["status"] == "succeeded", done.stderr
    assert any(event["message"].startswith("Training goes on from checkpoint") for event in events)


def _steps(url: str, job_id: str) -> int:
    """How many training steps the job has told of so far."""
    events = httpx.get(f"{url}/v1/fine_tuning/jobs/{job_id}/events").json()["data"]
    return max((event["data"]["step"] for event in events if event["type"] == "metrics"), default=0)


def _training_processes(service: LiveService) -> list[psutil.Process]:
    family = psutil.Process(service.process.pid).children(recursive=True)
    return [process for process in family if "serve.training.jobs.run" in process.cmdline()]
