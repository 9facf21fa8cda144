"""The command line against the real API over a loopback socket; what needs no server runs without one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deployments import cli, client, demo, show
from serve.api.access import Access
from serve.api.app import build_api
from serve.hub.opening import open_hub
from serve.settings import Settings
from serve.store.opening import open_store
from serve.store.revisions import Store
from serve.training import archives, dataset
from serve.training.archives import read_archive
from serve.types import Job, JobEvent, JobRequest, JobStatus, Page, Resident
from tests.api.conftest import Server
from tests.fakes.generator import EchoGenerator
from tests.fakes.hub import FakeHub, Fault, fake_hub
from tests.fakes.hub_uploads import Uploads, accept_uploads
from tests.fakes.memory import MemoryCatalogue, MemoryFiles, MemoryJobs
from tests.fakes.models import write_tiny_gpt2

COUNTS = {"ada": {"downloaded": 12, "retweets": 2, "short": 1, "kept": 9}}
NUMBERS = {"valid_loss": 4.5, "step": 30, "total_steps": 40, "train_loss": 4.25, "seconds_left": 65.0}


class ScriptedJobs(MemoryJobs):
    """Each look at a job finds it one status further."""

    def __init__(self, files: MemoryFiles, end: JobStatus = JobStatus.SUCCEEDED) -> None:
        super().__init__(files)
        self.script = [JobStatus.QUEUED, JobStatus.RUNNING, end]
        self.requests: list[JobRequest] = []

    def create_job(self, request: JobRequest, *, idempotency_key: str | None = None) -> Job:
        self.requests.append(request)
        return super().create_job(request, idempotency_key=idempotency_key)

    def get_job(self, job_id: str) -> Job:
        if not self.script:
            return super().get_job(job_id)
        job = replace(super().get_job(job_id), status=self.script[0])
        if job.status is JobStatus.SUCCEEDED:
            result = {"counts": COUNTS, "samples": ["My dream is tea."]}
            job = replace(job, fine_tuned_model="huggingtweets/ada", result=result)
        if job.status is JobStatus.FAILED:
            job = replace(job, error_code="training_failed", error_message="The loss is no number.")
        self.script = self.script[1:] or self.script
        return job

    def list_events(self, job_id: str, *, limit: int, after: str | None = None) -> Page[JobEvent]:
        steps = JobEvent("ftevent-1", job_id, 1, "info", "Step 30 of 40: loss 4.250.", "metrics", NUMBERS)
        return Page((steps, JobEvent("ftevent-0", job_id, 0, "info", "The job has started.")), has_more=False)


class BusyGenerator(EchoGenerator):
    async def residents(self) -> list[Resident]:
        return [Resident("huggingtweets/ada", "abc123", "device", 249_000_000, 2, 0.5, "r1")]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


Rookery = Callable[..., Outcome]


@pytest.fixture
def rookery(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Rookery:
    """The command's own `main`, in this process: an exit code, stdout and stderr."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["rookery", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), printed.out, printed.err)

    return run


@dataclass
class World:
    """The parts behind the server that ROOKERY_URL names."""

    generator: BusyGenerator
    catalogue: MemoryCatalogue
    files: MemoryFiles
    jobs: ScriptedJobs


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    files = MemoryFiles(tmp_path / "files")
    catalogue = MemoryCatalogue("fledgling", "huggingtweets/ada", "huggingtweets/bob")
    catalogue.models["huggingtweets/ada"] = replace(catalogue.models["huggingtweets/ada"], counts=COUNTS)
    world = World(BusyGenerator(), catalogue, files, ScriptedJobs(files))
    server = Server(build_api(**vars(world), upload_dir=tmp_path / "uploads"))
    monkeypatch.setenv("ROOKERY_URL", server.url)
    thread = threading.Thread(target=server.serve_for_ever)
    thread.start()
    assert server.is_up.wait(10)
    yield world
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "ada.zip"
    path.write_bytes(b"the fake does not look inside")
    return path


# --- Texts ------------------------------------------------------------------------------------------------


def test_generate_prints_each_text_on_a_line_that_begins_with_the_prompt(rookery: Rookery, world: World) -> None:
    done = rookery("generate", "huggingtweets/ada", "My dream is", "-n", 5, "--seed", 7, "--max-tokens", 12)
    assert done.code == 0
    lines = done.out.removesuffix("\n").split("\n")
    assert len(lines) == 5 and all(line.startswith("My dream is") for line in lines)
    (request,) = world.generator.requests
    assert (request.num_choices, request.seed, request.add_bos) == (5, 7, True)
    assert request.sampling["max_new_tokens"] == 12


def test_a_single_text_is_streamed_and_the_same_as_the_whole_one(rookery: Rookery, world: World) -> None:
    streamed = rookery("generate", "huggingtweets/ada", "--seed", 3)
    whole = json.loads(rookery("generate", "huggingtweets/ada", "--seed", 3, "--json").out)
    assert streamed.out == "My dream is" + show.plain(whole["choices"][0]["text"]) + "\n"
    assert whole["object"] == "text_completion"


def test_a_model_that_is_missing_is_an_error_on_stderr_alone(rookery: Rookery, world: World) -> None:
    for more in ([], ["-n", 2], ["--json"]):
        done = rookery("generate", "huggingtweets/missing", *more)
        assert (done.code, done.out, done.err) == (1, "", "rookery: There is no such model.\n")


def test_a_stream_that_breaks_off_is_an_error(rookery: Rookery, world: World) -> None:
    done = rookery("generate", "huggingtweets/halfway")
    assert done.code == 1
    assert "no usable numbers" in done.err


def test_a_terminal_gets_no_control_characters_of_others() -> None:
    assert show.plain("\x1b]0;owned\x07a\tb\nc\x9b2J \x7f👩\u200d🚀") == "]0;owneda\tb\nc2J 👩\u200d🚀"


# --- Models -----------------------------------------------------------------------------------------------


def test_ls_lists_the_models_or_those_with_a_word_in_their_id(rookery: Rookery, world: World) -> None:
    listed = rookery("ls")
    assert [line.split()[0] for line in listed.out.splitlines()[1:]] == [*world.catalogue.models]
    assert "huggingtweets/ada" not in rookery("ls", "bob").out
    assert [model["id"] for model in json.loads(rookery("ls", "bob", "--json").out)["data"]] == ["huggingtweets/bob"]
    assert "more than 1" in rookery("ls", "--limit", 1).err


def test_ps_lists_what_is_in_memory(rookery: Rookery, world: World) -> None:
    assert "huggingtweets/ada" in rookery("ps").out
    (resident,) = json.loads(rookery("ps", "--json").out)["data"]
    assert resident == {
        "model": "huggingtweets/ada",
        "revision": "abc123",
        "tier": "device",
        "bytes": 249_000_000,
        "leases": 2,
        "idle_s": 0.5,
        "replica": "r1",
    }


def test_show_tells_the_counts_of_a_bot(rookery: Rookery, world: World) -> None:
    shown = rookery("show", "huggingtweets/ada")
    assert shown.out.splitlines()[-1].split() == ["@ada", "12", "2", "1", "9"]
    assert json.loads(rookery("show", "huggingtweets/ada", "--json").out)["counts"] == COUNTS


def test_versions_are_listed_and_rollback_goes_one_back(rookery: Rookery, world: World) -> None:
    rows = [line.split() for line in rookery("versions", "huggingtweets/ada").out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["abc123", "abc122", "abc121"]
    assert rows[0][-2:] == ["answers", "now"] and rows[1][-4:] == ["checkpoint", "of", "step", "40"]
    done = rookery("rollback", "huggingtweets/ada")
    assert (done.code, done.out) == (0, "huggingtweets/ada is now revision abc121.\n")
    assert json.loads(rookery("versions", "huggingtweets/ada", "--json").out)["data"][2]["is_main"]
    refused = rookery("rollback", "huggingtweets/ada")
    assert (refused.code, "no version before" in refused.err) == (1, True)
    again = json.loads(rookery("rollback", "huggingtweets/ada", "abc123", "--json").out)
    assert again["is_main"] and world.catalogue.main["huggingtweets/ada"] == "abc123"
    for wrong in ("abc122", "fffffff"):
        assert rookery("rollback", "huggingtweets/ada", wrong).code == 1


def test_rm_deletes_a_model_from_disk_and_memory_but_not_the_base(rookery: Rookery, world: World) -> None:
    assert rookery("rm", "huggingtweets/ada", "huggingtweets/bob").code == 0
    assert list(world.catalogue.models) == ["fledgling"]
    assert world.generator.forgotten == ["huggingtweets/ada", "huggingtweets/bob"]
    refused = rookery("rm", "fledgling")
    assert (refused.code, "cannot be deleted" in refused.err) == (1, True)


def test_rm_of_several_models_prints_one_document_also_when_one_is_refused(rookery: Rookery, world: World) -> None:
    done = rookery("rm", "huggingtweets/ada", "huggingtweets/bob", "fledgling", "--json")
    deleted = json.loads(done.out)["data"]
    assert (done.code, [model["id"] for model in deleted]) == (1, ["huggingtweets/ada", "huggingtweets/bob"])


def test_an_id_that_is_none_asks_for_nothing_else(rookery: Rookery, world: World, archive: Path) -> None:
    rookery("train", archive)
    (file_id,) = world.files.records
    asked = [
        [*command, word] for command in (["rm"], ["show"], ["versions"]) for word in (f"../files/{file_id}", "..", "")
    ]
    asked += [["jobs", ".."], ["jobs", "cancel", f"../../files/{file_id}"], ["runs", "."]]
    for arguments in asked:
        done = rookery(*arguments)
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1) and "of that name" in done.err
    assert list(world.files.records) == [file_id]


# --- Jobs -------------------------------------------------------------------------------------------------


def test_train_sends_the_archives_in_order_and_says_how_to_follow(
    rookery: Rookery, world: World, archive: Path
) -> None:
    other = archive.with_name("bob.zip")
    other.write_bytes(b"another")
    options = ["--seed", 5, "--epochs", 2, "--base", "huggingtweets/bob", "--suffix", "pair"]
    done = rookery("train", archive, other, "--handle", "Ada", "--handle", "@bob", *options)
    assert done.code == 0
    assert "rookery jobs ftjob-0 --wait" in done.out
    (request,) = world.jobs.requests
    assert [file.handle for file in request.files] == ["Ada", "bob"]
    assert [world.files.get_file(file.file_id).filename for file in request.files] == ["ada.zip", "bob.zip"]
    assert (request.seed, request.hyperparameters.n_epochs, request.base_model) == (5, 2, "huggingtweets/bob")
    assert request.suffix == "pair"


def test_train_sends_a_priority_a_validation_file_and_a_key(rookery: Rookery, world: World, archive: Path) -> None:
    held_out = archive.with_name("held_out.txt")
    held_out.write_bytes(b"posts to judge by")
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
                self.wfile.write(b'{"id": "ftjob-0"}')

    with another_program(LosesFirstAnswer) as url:
        done = rookery("train", archive, "--json", "--url", url)
    assert (done.code, json.loads(done.out)) == (0, {"id": "ftjob-0"})
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
    assert [line.split()[0] for line in lines[:4]] == ["Job", "queued", "training", "succeeded"]
    assert lines[5].split() == ["@ada", "12", "2", "1", "9"]
    assert "My dream is tea." in lines[6]
    assert "rookery generate huggingtweets/ada" in lines[7]


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
    assert done.err == "rookery: @short has 3 tweets; at least 20 are needed.\n"


def test_jobs_pauses_resumes_cancels_and_tells_the_history(rookery: Rookery, world: World, archive: Path) -> None:
    world.jobs.script = []
    rookery("train", archive, "--handle", "ada", "--priority", "low")
    assert rookery("jobs").out.splitlines()[1].split()[:5] == ["ftjob-0", "queued", "@ada", "-", "low"]
    for action, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        assert json.loads(rookery("jobs", action, "ftjob-0", "--json").out)["status"] == status
    assert rookery("jobs", "pause", "ftjob-0").err == "rookery: Job ftjob-0 has already ended.\n"
    told = rookery("jobs", "events", "ftjob-0").out.splitlines()
    assert [line.partition("info")[2].strip() for line in told[1:]] == [
        "The job has started.",
        "Step 30 of 40: loss 4.250.",
    ]
    assert len(json.loads(rookery("jobs", "events", "ftjob-0", "--json").out)["data"]) == 2
    for wrong in (["pause"], ["events"], ["stop", "ftjob-0"], ["pause", "ftjob-0", "now"]):
        assert rookery("jobs", *wrong).code == 2


def test_to_wait_for_a_job_ends_when_it_is_paused(rookery: Rookery, world: World, archive: Path) -> None:
    world.jobs.script = []
    rookery("train", archive)
    asked = rookery("jobs", "pause", "ftjob-0", "--wait")
    assert (asked.code, "rookery jobs resume ftjob-0 --wait" in asked.err) == (0, True)
    met = rookery("jobs", "ftjob-0", "--wait", "--json")
    assert (met.code, json.loads(met.out)["status"], "jobs resume" in met.err) == (1, "paused", True)
    assert rookery("jobs", "cancel", "ftjob-0", "--wait").code == 0


def test_jobs_tells_when_a_job_will_be_ready(rookery: Rookery, world: World, archive: Path) -> None:
    world.jobs.script = []
    rookery("train", archive)
    job = replace(world.jobs.jobs["ftjob-0"], status=JobStatus.RUNNING, estimated_finish=int(time.time()) + 600)
    world.jobs.jobs["ftjob-0"] = job
    told = rookery("jobs").out.splitlines()[1].split()
    assert told[5] in ("9:58", "9:59", "10:00")


def test_runs_tells_what_a_job_used_and_made(rookery: Rookery, world: World, archive: Path) -> None:
    world.jobs.script = []
    rookery("train", archive)
    assert "Nothing is recorded" in rookery("runs", "ftjob-0").out
    world.jobs.jobs["ftjob-0"] = replace(world.jobs.jobs["ftjob-0"], status=JobStatus.SUCCEEDED)
    lines = [" ".join(line.split()) for line in rookery("runs", "ftjob-0").out.splitlines()]
    for line in (
        *("@ada-preprocess", "used raw-dataset tweets-ada:v0", "made train-dataset dataset-ada:v1"),
        *("@ada-train", "made finetuned-model ada:v2", "n_epochs 4", "train_loss 3.5", "My dream is tea."),
    ):
        assert line in lines
    assert [run["name"] for run in json.loads(rookery("runs", "ftjob-0", "--json").out)["data"]][1] == "@ada-train"
    assert rookery("runs", "ftjob-9").code == 1


def test_jobs_lists_shows_and_cancels(rookery: Rookery, world: World, archive: Path) -> None:
    rookery("train", archive, "--handle", "ada")
    assert rookery("jobs").out.splitlines()[1].split()[:3] == ["ftjob-0", "queued", "@ada"]
    assert "The job has started." in rookery("jobs", "ftjob-0").out
    assert rookery("jobs", "cancel", "ftjob-0").code == 0
    assert world.jobs.jobs["ftjob-0"].status is JobStatus.CANCELLED
    assert rookery("jobs", "ftjob-9").err == "rookery: There is no such job.\n"
    assert rookery("jobs", "--wait").code == 2


# --- Without a server -------------------------------------------------------------------------------------


def test_no_server_at_the_address_is_an_exit_code_of_its_own(rookery: Rookery) -> None:
    for url in ("http://127.0.0.1:9", "no address", "127.0.0.1:9"):
        done = rookery("ls", "--url", url)
        assert (done.code, done.out) == (3, ""), url
        assert url in done.err


def test_another_program_at_the_address_is_not_taken_for_a_server(rookery: Rookery) -> None:
    with another_program() as url:
        done = rookery("ls", "--url", url)
        assert (done.code, "is it another program?" in done.err) == (3, True)


@contextmanager
def another_program(handler: type[BaseHTTPRequestHandler] = BaseHTTPRequestHandler) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), handler)  # the default answers 501 in HTML
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["ls", "--frobnicate"],
        ["generate"],
        ["generate", "gpt2", "-n", "0"],
        ["generate", "gpt2", "-n", "17"],
        ["train", "no-such-file.zip"],
        ["train", __file__, "--handle", "ada", "--handle", "bob"],
        ["import", "no-such-folder", "--as", "a/b"],
    ],
)
def test_wrong_usage_exits_with_2(rookery: Rookery, arguments: list[str]) -> None:
    done = rookery(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage:" in done.err


def test_a_setting_that_does_not_exist_is_named(rookery: Rookery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOKERY_PROT", "8000")
    done = rookery("up", "--no-browser")
    assert (done.code, "ROOKERY_PROT is not a setting" in done.err) == (1, True)


def test_the_command_runs_as_a_program_of_its_own() -> None:
    command = [sys.executable, "-m", "deployments.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    for name in (
        "up",
        "train",
        "generate",
        "ls",
        "ps",
        "show",
        "rm",
        "jobs",
        "preview",
        "import",
        "versions",
        "rollback",
        "runs",
    ):
        assert f" {name} " in done.stdout


def test_import_makes_a_plain_folder_servable(rookery: Rookery, tmp_path: Path) -> None:
    folder, data = write_tiny_gpt2(tmp_path / "plain"), tmp_path / "data"
    done = rookery("import", folder, "--as", "Org/Tiny", "--data", data, "--json")
    assert done.code == 0
    found = open_store(Settings(data=data)).resolve("org/tiny")
    assert json.loads(done.out) == {"id": "Org/Tiny", "revision": found.revision, "path": str(found.path)}
    assert (found.path / "model.safetensors").is_file()


def test_import_under_an_id_with_a_revision_is_refused(rookery: Rookery, tmp_path: Path) -> None:
    done = rookery("import", write_tiny_gpt2(tmp_path / "plain"), "--as", "org/tiny@v1", "--data", tmp_path / "data")
    assert (done.code, "leave out '@v1'" in done.err) == (1, True)


def test_import_of_a_folder_without_a_model_is_refused(rookery: Rookery, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = rookery("import", tmp_path / "empty", "--as", "org/tiny", "--data", tmp_path / "data")
    assert (done.code, "no weights" in done.err) == (1, True)


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


def test_preview_for_people_says_what_was_left_out_and_why_then_five_posts(rookery: Rookery) -> None:
    lines = rookery("preview", demo.ARCHIVES / "unit_seven.zip").out.splitlines()
    told = [" ".join(line.split()) for line in lines]
    assert "status enough to learn from" in told
    assert "25 others' posts, passed on" in told and "12 fewer than 3 words of their own" in told
    samples = json.loads(rookery("preview", demo.ARCHIVES / "unit_seven.zip", "--json").out)["samples"]
    assert len(samples) == 5 and lines[-5:] == samples


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


# --- The Hub ----------------------------------------------------------------------------------------------


@dataclass
class HubWorld:
    """A server over a real store, and the Hub that it pulls from and is pushed to."""

    store: Store
    hub: FakeHub
    uploads: Uploads

    def weights(self, model_id: str) -> bytes:
        return (self.store.resolve(model_id).path / "model.safetensors").read_bytes()


@pytest.fixture
def hub_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubWorld]:
    with fake_hub() as hub, accept_uploads(hub, tmp_path / "uploads") as uploads:
        settings = Settings(data=tmp_path / "data", hub_endpoint=hub.endpoint, hub_token="hf_lina")
        store, files = open_store(settings), MemoryFiles(tmp_path / "files")
        app = build_api(
            generator=EchoGenerator(),
            catalogue=store,
            files=files,
            jobs=MemoryJobs(files),
            upload_dir=tmp_path / "uploaded",
            puller=open_hub(settings, store),
            access=Access(["sk-key"]),
        )
        server = Server(app)
        variables = {"ROOKERY_URL": server.url, "ROOKERY_API_KEY": "sk-key", "HF_ENDPOINT": hub.endpoint}
        variables |= {"HF_TOKEN": "hf_lina", "XDG_CACHE_HOME": str(tmp_path / "cache"), "NO_PROXY": "", "no_proxy": ""}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        thread = threading.Thread(target=server.serve_for_ever)
        thread.start()
        assert server.is_up.wait(10)
        yield HubWorld(store, hub, uploads)
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


_sends_files = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own way


@_sends_files
def test_a_model_goes_to_the_hub_and_comes_back_the_same(rookery: Rookery, hub_world: HubWorld, tmp_path: Path) -> None:
    revision = hub_world.store.import_folder(write_tiny_gpt2(tmp_path / "tiny", seed=4), "huggingtweets/wren")
    before = hub_world.weights("huggingtweets/wren")
    pushed = rookery("push", "huggingtweets/wren", "--json")
    assert pushed.code == 0, pushed.err
    told = json.loads(pushed.out)
    assert set(told) == {"repo", "url", "commit", "tag", "uploaded_bytes", "skipped"}
    assert (told["repo"], told["tag"]) == ("lina/wren", f"rookery-{revision.revision[:12]}")
    assert told["uploaded_bytes"] > len(before) and not told["skipped"]
    assert rookery("rm", "huggingtweets/wren").code == 0
    pulled = rookery("pull", "lina/wren", "--json")
    assert pulled.code == 0, pulled.err
    assert (json.loads(pulled.out)["id"], json.loads(pulled.out)["revision"]) == ("lina/wren", told["commit"])
    assert hub_world.weights("lina/wren") == before
    assert rookery("pull", f"lina/wren@{told['tag']}").code == 0
    assert hub_world.weights(f"lina/wren@{told['tag']}") == before


@_sends_files
def test_push_and_pull_say_in_a_line_what_they_did_and_on_stderr_how_far_they_are(
    rookery: Rookery, hub_world: HubWorld, tmp_path: Path
) -> None:
    hub_world.store.import_folder(write_tiny_gpt2(tmp_path / "tiny"), "lina/wren")
    first, second = (rookery("push", "lina/wren") for _ in range(2))
    assert re.fullmatch(r"lina/wren is now at http://\S+/lina/wren as rookery-[0-9a-f]{12}\.\n", first.out)
    assert second.out == first.out.replace("is now at", "was already at")
    assert [line.split()[0] for line in first.err.splitlines()][:2] == ["looking", "fetching"]
    assert "uploading" in first.err and "committing" in first.err
    assert second.err == "looking\n"
    newer = write_tiny_gpt2(tmp_path / "newer", seed=1)
    commit = hub_world.hub.add("lina/wren", newer)
    pulled = rookery("pull", "lina/wren")
    assert (pulled.code, pulled.out) == (0, f"lina/wren is here as revision {commit}.\n")
    assert "downloading" in pulled.err
    assert hub_world.weights("lina/wren") == (newer / "model.safetensors").read_bytes()


@_sends_files
def test_a_private_model_needs_the_servers_key_and_stays_private(
    rookery: Rookery, hub_world: HubWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_world.store.import_folder(write_tiny_gpt2(tmp_path / "tiny"), "lina/wren")
    hub_world.store.set_private("lina/wren", True)
    assert rookery("push", "lina/wren").code == 0
    assert hub_world.hub.repos["lina/wren"].head.info == {"private": True}
    assert rookery("push", "lina/wren", "--public", "--to", "lina/shown").code == 0
    assert hub_world.hub.repos["lina/shown"].head.info == {}
    monkeypatch.delenv("ROOKERY_API_KEY")
    for arguments in (["push", "lina/wren"], ["pull", "lina/wren"], ["show", "lina/wren"]):
        refused = rookery(*arguments)
        assert (refused.code, refused.out) == (1, "")


def test_what_cannot_be_pushed_or_pulled_is_a_sentence_and_exit_code_1(
    rookery: Rookery, hub_world: HubWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_world.store.import_folder(write_tiny_gpt2(tmp_path / "tiny"), "lina/wren")
    hub_world.hub.fail("lina/down", Fault(503, headers={"Retry-After": "3600"}))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for arguments, said in (
        (["push", "lina/nobody"], "lina/nobody"),
        (["push", "lina/wren"], "hf auth login"),
        (["push", "lina/wren", "--endpoint", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
        (["push", "lina/wren", "--to", "a/b/c"], "a/b/c"),
        (["pull", "lina/nobody"], "lina/nobody"),
        (["pull", "a/b/c"], "no model of that name"),
        (["pull", "lina/down"], "lina/down"),
    ):
        refused = rookery(*arguments)
        assert (refused.code, refused.out) == (1, ""), arguments
        last = refused.err.splitlines()[-1]
        assert last.startswith("rookery: ") and said in last
    monkeypatch.setenv("ROOKERY_URL", "http://127.0.0.1:9")
    assert [rookery(word, "lina/wren").code for word in ("push", "pull")] == [3, 3]
