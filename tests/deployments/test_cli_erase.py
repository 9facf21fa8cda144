"""`rookery erase` and `rookery keys` against the real API over fakes; keys on a server that asks for one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from serve.api.app import build_api
from serve.database.tables import JobRow
from serve.training.erasure import PersonEraser
from serve.types import RESULTS_PURPOSE, TRAINING_PURPOSE, JobRequest, JobStatus, TrainingFile
from tests.api.conftest import Server
from tests.deployments.cli_world import BusyGenerator, HubWorld, Rookery, World
from tests.fakes.models import write_tiny_gpt2
from tests.training.making import BASE, Training, made_up_texts

ADA, BOB, CYBORG = "huggingtweets/ada", "huggingtweets/bob", "huggingtweets/ada-bob"


@pytest.fixture
def populated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    """Ada, Bob and a cyborg of both; each has a job. Ada's is about to run again."""
    training = Training(tmp_path / "data")
    for number, model_id in enumerate((ADA, BOB, CYBORG, "huggingtweets/adage")):
        training.store.publish(model_id, write_tiny_gpt2(training.store.stage(), seed=number))
    files = {name: _upload(training, tmp_path, name) for name in ("ada.txt", "bob.txt", "both.txt", "result.csv")}
    for made, read in (
        (ADA, {"ada.txt": "Ada"}),
        (BOB, {"bob.txt": "bob"}),
        (CYBORG, {"ada.txt": "Ada", "bob.txt": "bob", "both.txt": "ada"}),
        (None, {"ada.txt": "ADA"}),
    ):
        entries = tuple(TrainingFile(files[name], whose) for name, whose in read.items())
        job = training.jobs.create_job(JobRequest(BASE, entries))
        if made is not None:
            result = {"result_files": [files["result.csv"]]} if made == ADA else {}
            with training.database.write() as session:
                row = session.scalars(select(JobRow).where(JobRow.id == job.id)).one()
                row.status, row.fine_tuned_model, row.result = JobStatus.SUCCEEDED, made, {**row.result, **result}
    server = Server(
        build_api(
            generator=BusyGenerator(),
            catalogue=training.store,
            files=training.jobs,
            jobs=training.jobs,
            upload_dir=training.options.uploads,
            eraser=PersonEraser(training.store, training.database, training.options),
        )
    )
    monkeypatch.setenv("ROOKERY_URL", server.url)
    thread = threading.Thread(target=server.serve_for_ever)
    thread.start()
    assert server.is_up.wait(10)
    yield training
    server.should_exit = True
    thread.join(10)
    training.close()


def _upload(training: Training, folder: Path, name: str) -> str:
    (folder / name).write_text("\n".join(made_up_texts(150)))
    purpose = RESULTS_PURPOSE if name.endswith(".csv") else TRAINING_PURPOSE
    return training.jobs.create_file(folder / name, name, purpose).id


def left(training: Training) -> tuple[set[str], set[str]]:
    """Ids of models, names of files."""
    models = {info.model_id for info in training.store.list_models(limit=99).items if not info.is_embedded}
    return models, {record.filename for record in training.jobs.list_files(limit=99).items}


def test_erase_of_a_person_takes_their_bots_cyborgs_uploads_and_open_jobs(
    rookery: Rookery, populated: Training
) -> None:
    jobs = [job.id for job in populated.jobs.list_jobs(limit=9).items]
    done = rookery("erase", "@ada", "--yes", "--json")
    receipt = json.loads(done.out)
    assert (done.code, receipt["object"], receipt["of"]) == (0, "erasure", ["@ada"])
    assert set(receipt["models"]) == {ADA, CYBORG} and len(receipt["jobs"]) == 3 and len(receipt["files"]) == 3
    [person] = receipt["people"]
    assert (person["handle"], person["status"]) == ("@ada", "done")
    assert person["unreached"] == ["r1 still has a model of it in memory."]  # this one never lets go
    assert person["tiers"]["models"]["count"] == 2 and person["generators"] == {"r1": 249_000_000}
    assert left(populated) == ({BOB, "huggingtweets/adage"}, {"bob.txt"})
    assert populated.jobs.get_job(jobs[0]).status is JobStatus.CANCELLED
    again = rookery("erase", "@Ada", "--yes")
    assert (again.code, again.out) == (3, "") and "nothing of @Ada" in again.err
    assert rookery("erase", "@ada", "--lift").out == "@ada may be learnt from again.\n"
    assert (rookery("erase", "@ada", "--lift").code, rookery("erase", ADA, "--lift").code) == (3, 2)


def test_erase_of_a_model_keeps_what_other_models_were_made_of(rookery: Rookery, populated: Training) -> None:
    done = rookery("erase", CYBORG, "--yes")
    assert (done.code, done.out) == (0, f"{CYBORG} is deleted.\n")
    assert "1 model, 0 jobs, 1 file" in done.err and "on a Hub, stay" in done.err
    assert left(populated)[1] == {"ada.txt", "bob.txt", "result.csv"}


def test_erase_without_a_terminal_deletes_nothing_but_by_yes(rookery: Rookery, populated: Training) -> None:
    before = left(populated)
    done = rookery("erase", "@ada")
    assert (done.code, done.out, "--yes" in done.err) == (2, "", True)
    for wrong, code in (("huggingtweets/nobody", 3), ("..", 3), (f"{ADA}@abc123", 2)):
        assert rookery("erase", wrong, "--yes").code == code
    assert left(populated) == before


def test_erase_asks_whether_a_person_was_meant(rookery: Rookery, populated: Training) -> None:
    before = left(populated)
    done = rookery("erase", "ada", "nobody", "--yes")
    assert (done.code, done.err) == (3, "rookery: The server has nothing of ada or nobody. Did you mean @ada?\n")
    assert left(populated) == before


def test_erase_tells_what_went_before_something_was_refused(rookery: Rookery, populated: Training) -> None:
    done = rookery("erase", BASE, ADA, "--yes", "--json")
    assert done.code == 1 and "comes with the program" in done.err
    assert BASE not in json.loads(done.out)["models"]


def test_disable_takes_a_model_out_of_use_until_it_is_enabled(rookery: Rookery, populated: Training) -> None:
    assert rookery("disable", ADA, "--reason", "a complaint").out == f"{ADA} is disabled.\n"
    refused = rookery("show", ADA)
    assert refused.code and "has been disabled" in refused.err and "complaint" not in refused.err
    assert json.loads(rookery("enable", ADA, "--json").out) == {"id": ADA, "object": "model", "disabled": False}
    assert rookery("show", ADA).code == 0 and rookery("enable", ADA).code == 1


# --- keys -------------------------------------------------------------------------------------------------


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
