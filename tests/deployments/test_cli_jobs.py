"""The command line's jobs against the real API: train, jobs, runs; and preview, which needs no server."""

from __future__ import annotations

import json
import re
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from deployments import client, demo
from serve.training import archives, dataset
from serve.training.archives import read_archive
from serve.types import ALL_SEEING, Job, JobEvent, JobStatus, Page, Viewer
from tests.deployments.cli_world import Rookery, ScriptedJobs, World, another_program
from tests.fakes.memory import MemoryFiles, page

# --- Jobs -------------------------------------------------------------------------------------------------


def test_train_sends_the_archives_in_order_and_says_how_to_follow(
    rookery: Rookery, world: World, archive: Path
) -> None:
    other = archive.with_name("bob.zip")
    other.write_bytes(b"another")
    options = ["--seed", 5, "--epochs", 2, "--base", "huggingtweets/bob", "--suffix", "pair"]
    done = rookery("train", archive, other, "--handle", "Ada", "--handle", "@bob", *options)
    assert done.code == 0
    assert done.out == "ftjob-0\n" and "rookery jobs wait ftjob-0" in done.err
    (request,) = world.jobs.requests
    assert [file.handle for file in request.files] == ["Ada", "bob"]
    assert [world.files.get_file(file.file_id).filename for file in request.files] == ["ada.zip", "bob.zip"]
    assert (request.seed, request.hyperparameters.n_epochs, request.base_model) == (5, 2, "huggingtweets/bob")
    assert request.suffix == "pair"


def test_train_sends_a_priority_a_validation_file_and_a_key(rookery: Rookery, world: World, archive: Path) -> None:
    held_out = archive.with_name("held_out.txt")
    held_out.write_bytes(b"posts to judge by")
    assert rookery("train", archive, "--seed", 2**31).code == 2
    options = ["--priority", "high", "--validation", held_out, "--idempotency-key", "key-1", "--json"]
    first, second = (json.loads(rookery("train", archive, *options).out) for _ in range(2))
    assert first["id"] == second["id"] and len(world.jobs.jobs) == 1
    assert first["priority"] == "high" and first["validation_file"] is not None
    assert world.files.get_file(first["validation_file"]).filename == "held_out.txt"
    for _ in range(2):
        assert rookery("train", archive).code == 0
    assert len(world.jobs.jobs) == 3, "without a key, each command is a request of its own"
    assert rookery("train", archive, "--priority", "urgent").code == 2
    for key in ("", "é", "a\nb", " a", "x" * 256):
        done = rookery("train", archive, "--idempotency-key", key)
        assert (done.code, done.out) == (1, "") and "printable ASCII" in done.err


def test_an_upload_whose_answer_is_lost_is_sent_again_under_the_same_key(
    rookery: Rookery, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_UPLOAD_PAUSE_S", 0.0)
    seen: list[tuple[str, bytes]] = []

    class LosesFirstAnswer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.headers["idempotency-key"], body))
            if len(seen) > 1:
                self.send_response(201)
                self.end_headers()
                self.wfile.write(b'{"id": "ftjob-0", "status": "queued"}')

    with another_program(LosesFirstAnswer) as url:
        done = rookery("train", archive, "--json", "--url", url)
    assert (done.code, json.loads(done.out)) == (0, {"id": "ftjob-0", "status": "queued"})
    (key, body), (same_key, same_body) = seen
    assert key == same_key and all(archive.read_bytes() in sent for sent in (body, same_body))


def test_train_wait_json_prints_the_finished_job_and_nothing_else(
    rookery: Rookery, world: World, archive: Path
) -> None:
    done = rookery("train", archive, "--handle", "ada", "--wait", "--json")
    assert done.code == 0
    job = json.loads(done.out)
    assert (job["status"], job["fine_tuned_model"]) == ("succeeded", "huggingtweets/ada")
    assert "training 30/40  loss 4.25  held-out 4.50  1:05 left" in done.err


def test_train_wait_shows_progress_then_counts_and_samples(rookery: Rookery, world: World, archive: Path) -> None:
    done = rookery("train", archive, "--handle", "ada", "--wait")
    lines = done.out.splitlines()
    told = [line.split()[0] for line in done.err.splitlines()]
    assert told == ["uploading", "Job", "After", "·", "queued", "training", "succeeded", "huggingtweets/ada"]
    assert "After 30 of 40 steps" in done.err and "My dream is to learn." in done.err
    assert lines[1].split() == ["@ada", "12", "2", "1", "9"]
    assert [line.strip() for line in lines[2:]] == ["· My dream is tea."]
    assert "rookery generate huggingtweets/ada" in done.err.splitlines()[-1]
    assert rookery("jobs", "wait", "ftjob-0", "--quiet").err == ""


@pytest.mark.parametrize("end", [JobStatus.FAILED, JobStatus.CANCELLED])
def test_a_job_that_ends_without_a_model_is_an_error(
    rookery: Rookery, world: World, archive: Path, end: JobStatus
) -> None:
    world.jobs.script[-1] = end
    done = rookery("train", archive, "--handle", "ada", "--wait", "--json")
    assert done.code == 1
    assert json.loads(done.out)["status"] == end
    assert f"the job {end.value}" in done.err.splitlines()[-1]


def test_an_archive_that_the_server_refuses_is_an_error_in_its_words(
    rookery: Rookery, world: World, archive: Path
) -> None:
    done = rookery("train", archive, "--handle", "short", "--wait")
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-1] == "rookery: @short has 3 tweets; at least 20 are needed."


def test_jobs_pauses_resumes_cancels_and_tells_the_history(rookery: Rookery, world: World, archive: Path) -> None:
    world.jobs.script = []
    rookery("train", archive, "--handle", "ada", "--priority", "low")
    assert rookery("jobs").out.splitlines()[1].split()[:5] == ["ftjob-0", "queued", "@ada", "-", "low"]
    for action, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        assert json.loads(rookery("jobs", action, "ftjob-0", "--json").out)["status"] == status
    assert rookery("jobs", "pause", "ftjob-0").err == "rookery: Job ftjob-0 has already ended.\n"
    told = rookery("jobs", "logs", "ftjob-0").out.splitlines()
    said = [line.partition("info")[2].strip() for line in told]
    assert said == ["The job has started.", "Step 30 of 40: loss 4.250."]
    events = [json.loads(line) for line in rookery("jobs", "logs", "ftjob-0", "--json").out.splitlines()]
    assert [event["message"] for event in events] == said
    assert rookery("jobs", "logs", "ftjob-0", "--limit", 1).out.splitlines() == told[1:]
    for wrong in (["pause"], ["logs"], ["stop", "ftjob-0"], ["pause", "ftjob-0", "now"]):
        assert rookery("jobs", *wrong).code == 2


class GrowingJobs(ScriptedJobs):
    """Each look at the events finds some more, sometimes none; `running` for as long as there are more to come."""

    growth = [1, 0, 3, 2500, 0, 7]

    def __init__(self, files: MemoryFiles) -> None:
        super().__init__(files)
        self.script = []
        self.ids: list[str] = []
        self.left = [*self.growth]

    def get_job(self, job_id: str, viewer: Viewer = ALL_SEEING) -> Job:
        status = JobStatus.RUNNING if self.left else JobStatus.FAILED
        job = super().get_job(job_id, viewer)
        return replace(job, status=status, error_message="It was not to be.", error_code="no")

    def list_events(self, job_id: str, *, limit: int, after: str | None = None) -> Page[JobEvent]:
        if after is None and self.left:
            self.ids += [f"ftevent-{len(self.ids) + number}" for number in range(self.left.pop(0))]
        newest_first = self.ids[::-1]
        events = [JobEvent(id, job_id, 1, "info", f"This is {id}.") for id in newest_first]
        return page(events, newest_first, limit, after)


@pytest.fixture
def growing(world: World, archive: Path, rookery: Rookery, monkeypatch: pytest.MonkeyPatch) -> GrowingJobs:
    """The jobs of `world`, with the job `ftjob-0`, looked at without a pause."""
    monkeypatch.setattr(client, "_POLL_S", 0.0)
    jobs = GrowingJobs(world.files)
    rookery("train", archive)
    jobs.jobs = world.jobs.jobs
    for name in ("get_job", "list_events"):
        monkeypatch.setattr(world.jobs, name, getattr(jobs, name))
    return jobs


def test_logs_f_tells_each_event_once_in_order_until_the_job_ends(rookery: Rookery, growing: GrowingJobs) -> None:
    done = rookery("jobs", "logs", "ftjob-0", "-f", "--json")
    told = [json.loads(line)["id"] for line in done.out.splitlines()]
    assert told == growing.ids and len(told) == sum(GrowingJobs.growth)
    assert (done.code, done.err) == (1, "rookery: the job failed: It was not to be.\n")
    assert rookery("jobs", "logs", "ftjob-0", "-f", "--limit", 2, "--json").out.splitlines() == [
        *done.out.splitlines()[-2:]
    ]


def test_to_wait_for_a_job_ends_when_it_is_paused(rookery: Rookery, world: World, archive: Path) -> None:
    world.jobs.script = []
    rookery("train", archive)
    asked = rookery("jobs", "pause", "ftjob-0", "--wait")
    assert "jobs resume" in rookery("jobs", "logs", "ftjob-0", "-f").err
    assert (asked.code, "rookery jobs resume ftjob-0 --wait" in asked.err) == (0, True)
    met = rookery("jobs", "wait", "ftjob-0", "--json")
    assert (met.code, json.loads(met.out)["status"], "jobs resume" in met.err) == (1, "paused", True)
    assert rookery("jobs", "cancel", "ftjob-0", "--wait").code == 0


def test_jobs_tells_when_a_job_will_be_ready(rookery: Rookery, world: World, archive: Path) -> None:
    world.jobs.script = []
    rookery("train", archive)
    job = replace(world.jobs.jobs["ftjob-0"], status=JobStatus.RUNNING, estimated_finish=int(time.time()) + 600)
    world.jobs.jobs["ftjob-0"] = job
    told = rookery("jobs").out.splitlines()[1].split()
    assert told[4] == "10:00" or told[4].startswith("9:")


def test_runs_tells_what_a_job_used_and_made(rookery: Rookery, world: World, archive: Path) -> None:
    world.jobs.script = []
    rookery("train", archive)
    assert "Nothing is recorded" in rookery("runs", "ftjob-0").err
    world.jobs.jobs["ftjob-0"] = replace(world.jobs.jobs["ftjob-0"], status=JobStatus.SUCCEEDED)
    lines = [" ".join(line.split()) for line in rookery("runs", "ftjob-0").out.splitlines()]
    for line in (
        *("@ada-preprocess", "used raw-dataset tweets-ada:v0", "made train-dataset dataset-ada:v1"),
        *("@ada-train", "made finetuned-model ada:v2", "n_epochs 4", "train_loss 3.5", "My dream is tea."),
    ):
        assert line in lines
    assert [run["name"] for run in json.loads(rookery("runs", "ftjob-0", "--json").out)["data"]][1] == "@ada-train"
    assert rookery("runs", "ftjob-9").code == 3


def test_jobs_lists_shows_and_cancels(rookery: Rookery, world: World, archive: Path) -> None:
    rookery("train", archive, "--handle", "ada")
    assert rookery("jobs").out.splitlines()[1].split()[:3] == ["ftjob-0", "queued", "@ada"]
    assert rookery("jobs", "ls").out == rookery("jobs").out
    assert json.loads(rookery("jobs", "ls", "--json").out)["data"][0]["id"] == "ftjob-0"
    assert "The job has started." in rookery("jobs", "show", "ftjob-0").out
    assert rookery("jobs", "cancel", "ftjob-0").code == 0
    assert world.jobs.jobs["ftjob-0"].status is JobStatus.CANCELLED
    missing = rookery("jobs", "show", "ftjob-9")
    assert (missing.code, missing.err) == (3, "rookery: There is no such job.\n")
    assert rookery("jobs", "--wait").code == 2


def test_jobs_alone_lists_them_as_json_too(rookery: Rookery, world: World, archive: Path) -> None:
    rookery("train", archive)
    assert rookery("jobs", "--json").out == rookery("jobs", "ls", "--json").out
    assert rookery("jobs", "--json", "ls").code == 2


def test_a_job_is_cancelling_until_it_has_stopped(rookery: Rookery, world: World, archive: Path) -> None:
    world.jobs.script = [JobStatus.RUNNING]
    rookery("train", archive)
    done = rookery("jobs", "cancel", "ftjob-0")
    assert done.code == 0 and "Cancelling" in done.err and "rookery jobs wait ftjob-0" in done.err
    world.jobs.script = []
    rookery("train", archive)
    assert rookery("jobs", "cancel", "ftjob-1").err == ""


# --- The archives that ship with the project --------------------------------------------------------------


@pytest.mark.parametrize(("handle", "kept"), [("capt_barnacle", 451), ("grandma_ines", 465), ("unit_seven", 479)])
def test_preview_of_a_shipped_archive(rookery: Rookery, handle: str, kept: int) -> None:
    done = rookery("preview", demo.ARCHIVES / f"{handle}.zip", "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert {name: report[name] for name in ("handle", "format", "downloaded", "retweets", "short", "kept")} == {
        "handle": handle,
        "format": "x-archive",
        "downloaded": kept + 37,
        "retweets": 25,
        "short": 12,
        "kept": kept,
    }
    assert report["status"] == "ok"
    assert report["left_out"] == {"deleted": 3, "superseded_edit": 2}
    assert len(report["kept_sorted_sha256"]) == 64


def test_preview_sums_over_several_archives_and_says_what_is_too_little(rookery: Rookery, tmp_path: Path) -> None:
    paths = [demo.ARCHIVES / f"{handle}.zip" for handle in demo.HANDLES]
    assert json.loads(rookery("preview", *paths, "--json").out)["kept"] == 451 + 465 + 479
    few = tmp_path / "few.txt"
    few.write_text("My dream is a very short list of tweets.\n")
    assert json.loads(rookery("preview", few, "--handle", "@ada", "--json").out)["status"] == "too_few"


def test_preview_for_people_shows_the_table_of_counts(rookery: Rookery) -> None:
    shown = rookery("preview", demo.ARCHIVES / "unit_seven.zip")
    assert ["@unit_seven", "516", "25", "12", "479"] in [line.split() for line in shown.out.splitlines()]


def test_preview_for_people_warns_sums_up_and_heads_nothing_that_is_empty(rookery: Rookery, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for number, file in enumerate(files):
        file.write_text(f"My dream is the {number}th very short list of tweets.\n")
    shown = rookery("preview", *files, "--handle", "ada", "--handle", "@bob").out
    told = [line.split() for line in shown.splitlines()]
    for row in (["@ada", "1", "0", "0", "1"], ["@bob", "1", "0", "0", "1"], ["together", "2", "0", "0", "2"]):
        assert row in told
    assert "training needs at least" in shown and "@bob: There are" in shown and "because" not in shown
    assert rookery("preview", files[0], "--handle", "ada", "--handle", "bob").code == 2


def test_preview_for_people_says_what_was_left_out_and_why_then_some_posts(rookery: Rookery) -> None:
    lines = rookery("preview", demo.ARCHIVES / "unit_seven.zip").out.splitlines()
    told = [" ".join(line.split()) for line in lines]
    assert "status enough to learn from" in told
    assert "25 others' posts, passed on" in told and "12 fewer than 3 words of their own" in told
    samples = json.loads(rookery("preview", demo.ARCHIVES / "unit_seven.zip", "--json").out)["samples"]
    assert len(samples) == 8 and lines[-8:] == [f"  · {sample}" for sample in samples]


def test_every_reason_to_leave_a_record_out_has_words() -> None:
    files = Path(archives.__file__).parent.glob("*.py")
    reasons = {reason for file in files for reason in re.findall(r'leave_out\("(\w+)"', file.read_text())}
    assert len(reasons) > 5 and reasons <= dataset.REASONS.keys()


def test_preview_of_what_is_no_archive_is_refused(rookery: Rookery, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.zip"
    with zipfile.ZipFile(nothing, "w") as members:
        members.writestr("holiday.jpg", b"not a tweet")
    done = rookery("preview", nothing, "--json")
    assert (done.code, done.out) == (1, "")
    assert "Expected" in done.err


def test_likes_and_private_messages_of_the_shipped_archives_are_not_learnt(rookery: Rookery) -> None:
    for handle in demo.HANDLES:
        with zipfile.ZipFile(demo.ARCHIVES / f"{handle}.zip") as members:
            assert "no bot should learn" in members.read("data/like.js").decode()
            assert "no bot should learn" in members.read("data/direct-messages.js").decode()
        posts = read_archive(demo.ARCHIVES / f"{handle}.zip").posts
        assert posts and not any("no bot should learn" in post.text for post in posts)
