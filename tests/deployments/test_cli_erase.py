"""`rookery erase` and `rookery keys` against the real API over fakes; keys on a server that asks for one."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from serve.types import RESULTS_PURPOSE, TRAINING_PURPOSE, Job, JobRequest, JobStatus, ModelInfo, TrainingFile
from tests.deployments.cli_world import HubWorld, Rookery, World
from tests.fakes.models import write_tiny_gpt2

ADA, BOB, CYBORG = "huggingtweets/ada", "huggingtweets/bob", "huggingtweets/ada-bob"


@pytest.fixture
def populated(world: World, tmp_path: Path) -> World:
    """Ada, Bob and a cyborg of both; each has a job. Ada's is about to run again."""
    for model_id, handles in ((ADA, ("Ada",)), (BOB, ("bob",)), (CYBORG, ("Ada", "bob"))):
        world.catalogue.models[model_id] = ModelInfo(
            model_id, "abc123", 1_700_000_000, 10, "huggingtweets", None, handles
        )
    world.catalogue.models["huggingtweets/adage"] = ModelInfo("huggingtweets/adage", "abc123", 1, 10, "huggingtweets")
    files = {name: _upload(world, tmp_path, name) for name in ("ada.zip", "bob.zip", "both.txt", "result.csv")}
    world.jobs.script = []
    made: list[tuple[str | None, dict[str, str | None], JobStatus]]
    made = [
        (ADA, {"ada.zip": "Ada"}, JobStatus.SUCCEEDED),
        (BOB, {"bob.zip": "bob"}, JobStatus.SUCCEEDED),
        (CYBORG, {"ada.zip": "Ada", "bob.zip": "bob", "both.txt": None}, JobStatus.SUCCEEDED),
        (None, {"ada.zip": "ADA"}, JobStatus.QUEUED),
    ]
    for number, (made_id, read, status) in enumerate(made):
        request = JobRequest("fledgling", tuple(TrainingFile(files[name], whose) for name, whose in read.items()))
        result = {"result_files": [files["result.csv"]]} if made_id == ADA else {}
        job = Job(f"ftjob-{number}", request, status, 1, 0, fine_tuned_model=made_id, result=result)
        world.jobs.jobs[job.id] = job
    return world


def _upload(world: World, tmp_path: Path, name: str) -> str:
    (tmp_path / name).write_text(name)
    purpose = RESULTS_PURPOSE if name.endswith(".csv") else TRAINING_PURPOSE
    return world.files.create_file(tmp_path / name, name, purpose).id


def left(world: World) -> tuple[set[str], set[str]]:
    """Ids of models, names of files."""
    return set(world.catalogue.models), {record.filename for record in world.files.records.values()}


def test_erase_of_a_person_takes_their_bots_cyborgs_uploads_and_open_jobs(rookery: Rookery, populated: World) -> None:
    done = rookery("erase", "@ada", "--yes", "--json")
    receipt = json.loads(done.out)
    assert (done.code, receipt["object"], receipt["of"]) == (0, "erasure", ["@ada"])
    assert set(receipt["models"]) == {ADA, CYBORG} and receipt["jobs_cancelled"] == ["ftjob-3"]
    assert len(receipt["files"]) == 3
    assert left(populated) == ({"fledgling", BOB, "huggingtweets/adage"}, {"bob.zip"})
    assert populated.jobs.jobs["ftjob-3"].status is JobStatus.CANCELLED
    assert set(populated.jobs.forgotten) == {ADA, CYBORG} == set(populated.generator.forgotten)
    again = rookery("erase", "@Ada", "--yes")
    assert (again.code, again.out) == (3, "") and "nothing of @Ada" in again.err


def test_erase_of_a_model_keeps_what_other_models_were_made_of(rookery: Rookery, populated: World) -> None:
    done = rookery("erase", CYBORG, "--yes")
    assert (done.code, done.out) == (0, f"{CYBORG} is deleted.\n")
    assert "1 model, 0 open jobs, 1 file" in done.err and "on a Hub, stay" in done.err
    assert left(populated)[1] == {"ada.zip", "bob.zip", "result.csv"}
    assert rookery("erase", ADA, BOB, "@ada", "--yes", "--quiet").err == ""
    assert left(populated) == ({"fledgling", "huggingtweets/adage"}, set())


def test_erase_goes_by_huggingtweets_names_where_nobody_recorded_the_handles(rookery: Rookery, world: World) -> None:
    world.catalogue.models[CYBORG] = replace(world.catalogue.models[ADA], model_id=CYBORG)
    assert rookery("erase", "@bob", "--yes").out.split()[::3] == [BOB, CYBORG]


def test_erase_without_a_terminal_deletes_nothing_but_by_yes(rookery: Rookery, populated: World) -> None:
    before = left(populated)
    done = rookery("erase", "@ada")
    assert (done.code, done.out, "--yes" in done.err) == (2, "", True)
    for wrong, code in (("huggingtweets/nobody", 3), ("..", 3), (f"{ADA}@abc123", 2)):
        assert rookery("erase", wrong, "--yes").code == code
    assert left(populated) == before


def test_erase_asks_whether_a_person_was_meant(rookery: Rookery, populated: World) -> None:
    before = left(populated)
    done = rookery("erase", "ada", "nobody", "--yes")
    assert (done.code, done.err) == (3, "rookery: The server has nothing of ada or nobody. Did you mean @ada?\n")
    assert left(populated) == before


def test_erase_tells_what_went_before_something_was_refused(rookery: Rookery, populated: World) -> None:
    done = rookery("erase", "fledgling", ADA, "--yes", "--json")
    assert (done.code, json.loads(done.out)["models"]) == (1, [])
    assert "cannot be deleted" in done.err


# --- keys -------------------------------------------------------------------------------------------------


def test_a_new_key_is_random_and_alone_on_stdout(rookery: Rookery) -> None:
    first, second = rookery("keys", "new"), json.loads(rookery("keys", "new", "--json").out)
    assert re.fullmatch(r"rk-[A-Za-z0-9_-]{43}\n", first.out) and second["key"] != first.out.strip()
    assert "ROOKERY_API_KEYS" in first.err and "ROOKERY_API_KEY=" in first.err


def test_keys_check_asks_the_server(rookery: Rookery, hub_world: HubWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(rookery("keys", "check", "--json").out)["accepted"]
    for wrong in ("rk-wrong", ""):
        monkeypatch.setenv("ROOKERY_API_KEY", wrong)
        refused = rookery("keys", "check")
        assert (refused.code, refused.out) == (4, "") and "ROOKERY_API_KEY" in refused.err
        assert rookery("jobs", "ls").code == 4


def test_keys_check_says_where_no_key_is_needed(rookery: Rookery, world: World) -> None:
    assert "asks for no key" in rookery("keys", "check").out


# --- card, show, ls ---------------------------------------------------------------------------------------


def test_card_is_printed_as_it_is_written(rookery: Rookery, hub_world: HubWorld, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_tiny_gpt2(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Wren\n\nSays **tea**.\n")
    hub_world.store.import_folder(folder, "huggingtweets/wren")
    done = rookery("card", "huggingtweets/wren")
    assert done.code == 0 and "# Wren" in done.out
    assert json.loads(rookery("card", "huggingtweets/wren", "--json").out)["card"] == done.out
    assert rookery("card", "huggingtweets/missing").code == 3


def test_show_tells_names_sample_and_versions_and_ls_the_kept_posts(rookery: Rookery, world: World) -> None:
    world.catalogue.models[ADA] = replace(
        world.catalogue.models[ADA], handles=("ada",), names={"ada": "Ada L."}, sample="My dream is tea."
    )
    told = [" ".join(line.split()) for line in rookery("show", ADA).out.splitlines()]
    for line in ("learnt from Ada L. (@ada)", "sample My dream is tea.", "versions 2"):
        assert line in told
    header, _, row, *_ = rookery("ls").out.splitlines()
    assert header.split() == ["model", "kept", "posts", "created", "size"]
    assert row.split()[:2] == [ADA, "9"]
