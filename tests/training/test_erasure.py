"""A person is erased from a data folder and a database that a training has filled: their texts are nowhere left."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import inspect, select, text

from serve.database.tables import DeliveryRow, JobRow
from serve.errors import Erased, InvalidRequest, ModelNotFound, NotFound
from serve.store.disk import write_json
from serve.store.model_files import PROVENANCE
from serve.store.tombstones import Tombstones
from serve.training.belongings import Finder
from serve.training.erasure import SILENT_S, PersonEraser
from serve.training.jobs.erasing import ERASED
from serve.training.jobs.store import JobStore
from serve.training.tracking import forgetting
from serve.training.tracking.deliver import alone
from serve.types import (
    ALL_SEEING,
    Erasure,
    Hyperparameters,
    JobRequest,
    JobStatus,
    Removed,
    Share,
    TrainingFile,
    Viewer,
)
from tests.fakes.models import write_tiny_gpt2
from tests.training.archive_files import write_lines
from tests.training.making import BASE, Training, made_up_texts
from tests.training.supervising import claim_of, run_of

CANARY = "xylophone-quetzal-4711"
ADA, BOB, BOTH = "huggingtweets/ada", "huggingtweets/bob", "huggingtweets/ada-bob"


def eraser_of(training: Training) -> PersonEraser:
    return PersonEraser(training.store, training.database, training.options)


def write_texts(training: Training, *texts: str, seed: int = 0) -> Path:
    source = training.options.data_dir / "upload.txt"
    source.write_text("\n".join([*made_up_texts(150, seed), *texts]) + "\n", encoding="utf-8")
    return source


def upload(training: Training, *texts: str, filename: str = "tweets.txt", seed: int = 0) -> str:
    return training.jobs.create_file(write_texts(training, *texts, seed=seed), filename, "fine-tune").id


def train(training: Training, *files: tuple[str, str | None], metadata: str = "") -> str:
    """The job's id."""
    entries = tuple(TrainingFile(*one) for one in files)
    request = JobRequest(BASE, entries, Hyperparameters(n_epochs=1), seed=7, metadata={"name": metadata})
    job = training.jobs.create_job(request)
    run_of(training, claim_of(training, 30)).run()
    assert training.jobs.get_job(job.id).status is JobStatus.SUCCEEDED
    return job.id


def erase(training: Training, handle: str, viewer: Viewer = ALL_SEEING) -> Removed:
    eraser = eraser_of(training)
    return eraser.finish(handle, eraser.begin(handle, "key-1", viewer), "key-1", viewer)


def upload_of(training: Training, handle: str, seed: int = 5) -> str:
    """An archive that says itself whose it is."""
    rows = [
        {"id": number, "text": text, "user": {"screen_name": handle}}
        for number, text in enumerate(made_up_texts(150, seed))
    ]
    source = write_lines(training.options.data_dir / "archive.jsonl", rows)
    return training.jobs.create_file(source, "tweets.jsonl", "fine-tune").id


def publish(training: Training, model_id: str, alias: str | None = "main", owner: str = "", **said: object) -> None:
    """A revision with these words in its provenance."""
    staged = write_tiny_gpt2(training.store.stage(), seed=sum(map(ord, f"{model_id}{said}")))
    write_json(staged / PROVENANCE, said)
    training.store.publish(model_id, staged, alias=alias, viewer=Viewer(owner) if owner else ALL_SEEING)


def models_of(training: Training) -> set[str]:
    """Of which any revision is here."""
    return {model_id for model_id in training.store.model_ids() if training.store.published(model_id)}


def told(training: Training, job_id: str, status: str, tries: int, outcome: str | None = None) -> None:
    with training.database.write() as session:
        row = DeliveryRow(job_id=job_id, tracker="trackio", status=status, tries=tries, options={}, outcome=outcome)
        session.add(row)


def tellings(training: Training) -> dict[str, tuple[str, int]]:
    with training.database.read() as session:
        return {row.job_id: (row.status, row.tries) for row in session.scalars(select(DeliveryRow))}


def rows_with(training: Training, needle: str) -> list[str]:
    """Tables that say it anywhere. Say none of hexadecimal digits alone: ids have those by chance."""
    with training.database.read() as session:
        tables = inspect(session.connection()).get_table_names()
        return [table for table in tables if needle in str(session.execute(text(f"SELECT * FROM {table}")).all())]


def files_with(folder: Path, needle: str) -> list[Path]:
    wanted = needle.encode()
    return [path for path in folder.rglob("*") if path.is_file() and wanted in path.read_bytes()]


def test_nothing_of_a_person_is_left_in_files_or_rows(training_on_both: Training) -> None:
    training = training_on_both
    own = upload(training, *[f"{CANARY} said number {number} of it" for number in range(20)], filename=f"{CANARY}.txt")
    other = upload(training, seed=3)
    jobs = [train(training, (own, "Ada"), (other, "bob"), metadata=CANARY)]
    kept = train(training, (other, "bob"))
    eraser, data = eraser_of(training), training.options.data_dir
    assert files_with(data, CANARY) and rows_with(training, CANARY)

    found = eraser.find("@ADA", ALL_SEEING)
    assert (found.models, found.jobs) == ((BOTH,), tuple(jobs))
    assert own in found.files and other not in found.files
    removed = erase(training, "ada")

    assert removed.what.models == (BOTH,) and removed.unreached == ()
    assert removed.tiers["models"].count == 1 and removed.tiers["models"].num_bytes > 10_000
    assert files_with(data, CANARY) == [] and rows_with(training, CANARY) == []
    assert training.store.main_of(BOTH) is None and training.store.main_of(BOB) is not None
    assert [event.message for event in training.jobs.list_events(jobs[0], limit=9).items] == [ERASED]
    job = training.jobs.get_job(jobs[0])
    assert (job.status, job.request.files, job.fine_tuned_model, job.result.get("samples")) == (
        *(JobStatus.SUCCEEDED, (), None, None),
    )
    assert training.jobs.get_job(kept).fine_tuned_model == BOB and training.jobs.list_runs(kept)
    assert not eraser.find("ada", ALL_SEEING)


def test_who_is_erased_is_not_learnt_from_until_it_is_lifted(training: Training) -> None:
    eraser, file = eraser_of(training), upload(training)
    for model_id in (ADA, "you/mybot"):
        publish(training, model_id, handles=["Ada"])
    assert erase(training, "Ada").what.models == (ADA, "you/mybot")
    jobs = JobStore(training.database, training.options.uploads, check_person=training.store.burials.check_person)
    for refused in (TrainingFile(file, "@ADA"), TrainingFile(upload_of(training, "Ada"), "bob")):
        with pytest.raises(Erased):
            jobs.create_job(JobRequest(BASE, (refused,)))
    for suffix in (None, "somebody"):
        job = training.jobs.create_job(JobRequest(BASE, (TrainingFile(file, "aDa"),), suffix=suffix))
        run_of(training, claim_of(training, 30)).run()
        failed = training.jobs.get_job(job.id)
        assert (failed.status, failed.error_code) == (JobStatus.FAILED, "erased")
        assert not [message for message in training.messages(job.id) if " posts, " in message]  # nothing is told of it
    assert eraser.lift("@ada") and not eraser.lift("ada")
    assert models_of(training) == set()
    train(training, (file, "ada"))
    publish(training, "you/mybot", handles=["ada"])
    assert models_of(training) == {ADA, "you/mybot"}


def test_a_training_that_had_begun_does_not_publish_who_is_erased_meanwhile(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.training.jobs.run import JobRun

    job = training.create_job("ada")
    train_for_real = JobRun._train

    def train_and_erase(*arguments: object) -> object:
        result = train_for_real(*arguments)  # type: ignore[arg-type]
        Tombstones(training.store.burials.root).bury("@ada", "erased")
        return result

    monkeypatch.setattr(JobRun, "_train", train_and_erase)
    run_of(training, claim_of(training, 30)).run()
    assert training.jobs.get_job(job.id).error_code == "erased" and training.store.main_of(ADA) is None


def test_open_jobs_end_and_a_worker_that_hangs_is_cut_off(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.training.erasure.JOBS_END_S", 0.0)
    file = upload(training)
    running = training.jobs.create_job(JobRequest(BASE, (TrainingFile(file, "ada"),)))
    claim = claim_of(training, 30)
    waiting = training.jobs.create_job(JobRequest(BASE, (TrainingFile(file, None),), suffix="ada"))
    (training.options.work_of(running.id) / "1").mkdir(parents=True)
    eraser = eraser_of(training)
    begun = eraser.begin("ada", "", ALL_SEEING)
    assert begun.jobs == (running.id, waiting.id)[: len(begun.jobs)] and running.id in begun.jobs
    removed = eraser.finish("ada", begun, "", ALL_SEEING)
    assert training.jobs.get_job(running.id).status is JobStatus.CANCELLED
    assert removed.tiers["checkpoints"].count == 1 and not training.options.work_of(running.id).exists()
    with pytest.raises(Exception, match="no longer"):
        training.queue.check(claim)


def test_what_nobody_recorded_goes_by_its_name_and_comes_back_by_no_backup(training: Training, tmp_path: Path) -> None:
    for name in (ADA, BOTH, "other/ada", "huggingtweets/adage"):
        training.store.publish(name, write_tiny_gpt2(training.store.stage(), seed=len(name)))
    backup = tmp_path / "backup"
    home = training.store.resolve(ADA).path.parent
    backup.mkdir()
    eraser = eraser_of(training)
    assert eraser.find("ada", ALL_SEEING).models == (ADA, BOTH)
    home.rename(backup / "ada")
    erase(training, "ada")
    (backup / "ada").rename(home)
    with pytest.raises(ModelNotFound):
        training.store.resolve(ADA)
    for wanted, refused in ((ADA, True), ("huggingtweets/ADA-zoe", True), ("other/ada", False)):
        if refused:
            with pytest.raises(Erased):
                training.store.burials.check_fetch(wanted, is_asked_for=True)
        else:
            training.store.burials.check_fetch(wanted, is_asked_for=True)


def test_who_has_learnt_is_known_by_every_revision_every_base_and_every_checkpoint(training: Training) -> None:
    paused = training.jobs.create_job(JobRequest(BASE, (TrainingFile(upload(training), None),), suffix="ada"))
    training.jobs.pause_job(paused.id)
    publish(training, ADA, None, handles=["ada"], checkpoint_step=3, job_id=paused.id)
    publish(training, "you/mybot", handles=["ada"])
    publish(training, "you/mybot", handles=["bob"])
    publish(training, "x/carl", handles=["carl"], base_model="You/mybot@main")
    publish(training, "x/dora", None, handles=["dora"], base_model="x/carl", checkpoint_step=1)
    publish(training, BOB, handles=["bob"], base_model=BASE)
    publish(training, "huggingtweets/ada-eve", handles=["eve"], base_model=BOB)  # what is recorded counts
    with training.database.write() as session:  # and jobs that were trained on bots of theirs, also since deleted ones
        base = JobRequest(BASE, (TrainingFile(carls := upload(training, seed=2), None),), suffix="carl")
        on_top = [training.jobs.create_job(base).id for _ in range(2)]
        for job_id, name in zip(on_top, ("x/carl", "huggingtweets/ADA-zoe"), strict=True):
            row = session.scalars(select(JobRow).where(JobRow.id == job_id)).one()
            row.request = {**row.request, "base_model": name}

    removed = erase(training, "ada")
    assert removed.what.models == (ADA, "x/carl", "x/dora", "you/mybot")
    assert set(removed.what.jobs) == {paused.id, *on_top} and carls not in removed.what.files
    assert models_of(training) == {BOB, "huggingtweets/ada-eve"}
    assert training.jobs.get_job(on_top[1]).request.base_model == ""
    assert not eraser_of(training).find("ada", ALL_SEEING)


def test_a_job_that_names_nobody_is_whose_its_archive_says(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.training.jobs.store.MAX_BYTES_READ_AT_ONCE", 0)
    own, others = upload_of(training, "Ada"), upload_of(training, "bob")
    jobs = [training.jobs.create_job(JobRequest(BASE, (TrainingFile(file),))) for file in (own, others)]
    assert {job.status for job in jobs} == {JobStatus.VALIDATING}
    found = eraser_of(training).find("ada", ALL_SEEING)
    assert (found.jobs, found.files) == ((jobs[0].id,), (own,))
    erase(training, "ada")
    assert training.jobs.get_job(jobs[0].id).status is JobStatus.CANCELLED
    assert [file.id for file in training.jobs.list_files(limit=9).items] == [others]


def test_another_handle_hides_nobodys_archive(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    own, unused = upload_of(training, "Ada"), upload_of(training, "ada", seed=6)
    job = training.jobs.create_job(JobRequest(BASE, (TrainingFile(own, "bob"),)))
    assert job.result["handles"] == {own: "Ada"}
    publish(training, BOB, handles=["bob"], job_id=job.id)
    eraser, read = eraser_of(training), list[str]()
    really_read = Finder._read_handle

    def read_and_tell(finder: Finder, file_id: str, filename: str) -> str | None:
        read.append(file_id)
        return really_read(finder, file_id, filename)

    monkeypatch.setattr(Finder, "_read_handle", read_and_tell)
    for _ in range(2):
        found = eraser.find("ada", ALL_SEEING)
    assert (found.models, found.jobs, set(found.files)) == ((BOB,), (job.id,), {own, unused})
    assert read == [unused]  # what a job has recorded, and what was read once, is not read again
    assert eraser.find("bob", ALL_SEEING).models == (BOB,)
    erase(training, "ada")
    assert not models_of(training)
    monkeypatch.setattr("serve.training.jobs.store.MAX_BYTES_READ_AT_ONCE", 0)
    again = training.jobs.create_job(JobRequest(BASE, (TrainingFile(file := upload_of(training, "ADA"), "carl"),)))
    run_of(training, claim_of(training, 30)).run()
    ended = training.jobs.get_job(again.id)
    assert (ended.error_code, ended.result) == ("erased", {"handles": {file: "ADA"}})


def test_a_tenant_erases_its_own_and_learns_nothing_of_others(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    inc, others, eraser = Viewer("inc"), Viewer("others"), eraser_of(training)
    assert not eraser.find("ada", inc)

    def make(viewer: Viewer) -> tuple[str, str]:
        file = training.jobs.create_file(write_texts(training), "tweets.txt", "fine-tune", viewer.tenant)
        job = training.jobs.create_job(JobRequest(BASE, (TrainingFile(file.id, "ada"),), viewer=viewer))
        publish(training, f"{viewer.tenant}/ada", owner=viewer.tenant, handles=["ada"])
        return job.id, file.id

    theirs = make(others)
    publish(training, ADA, handles=["ada"])  # nobody's, as from a Hub
    assert not eraser.find("ada", inc) and len(eraser.find("ada", ALL_SEEING).models) == 2
    own = make(inc)
    begun = eraser.begin("ada", "key-1", inc)
    assert (begun.models, begun.jobs, begun.files) == (("inc/ada",), own[:1], own[1:])
    more = make(Viewer("third"))  # what others add meanwhile
    removed = eraser.finish("ada", begun, "key-1", inc)
    assert removed.what == begun and removed.message == ""
    assert models_of(training) == {ADA, "others/ada", "third/ada"}
    assert {job.id for job in training.jobs.list_jobs(limit=9).items if job.request.files} == {theirs[0], more[0]}
    training.store.burials.check_person("ada")  # nobody is closed to others, nor is a name
    publish(training, "inc/ada", owner="inc", handles=["ada"])
    training.store.burials.check_fetch(ADA, is_asked_for=True)
    with pytest.raises(InvalidRequest):
        eraser.find("../ada", inc)


def test_what_is_begun_while_it_is_erased_goes_too(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    eraser = eraser_of(training)
    begun = eraser.begin("ada", "", ALL_SEEING)
    late = training.jobs.create_job(JobRequest(BASE, (TrainingFile(upload(training), "ada"),)))
    claim = claim_of(training, 30)
    monkeypatch.setattr("serve.training.erasure.JOBS_END_S", 0.0)
    assert eraser.finish("ada", begun, "", ALL_SEEING).what.jobs == (late.id,)
    assert training.jobs.get_job(late.id).status is JobStatus.CANCELLED
    with pytest.raises(Exception, match="no longer"):
        training.queue.check(claim)


# --- Trackers -----------------------------------------------------------------------------------------------


def test_while_a_tracker_is_told_nothing_is_lost_by_which_the_rest_is_found(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "PATIENCE_S", 0.0)
    publish(training, "huggingtweets/rosa", handles=["rosa"])
    job = training.jobs.create_job(JobRequest(BASE, (TrainingFile(upload(training), "rosa"),)))
    told(training, job.id, "waiting", 1)  # the first telling: nothing is in the folder yet
    folder = training.options.data_dir / "trackers" / "trackio"
    with alone(training.options.data_dir):
        removed = erase(training, "rosa")
        assert "is being told" in removed.message and set(removed.tiers) == {"models", "uploads"}
        folder.mkdir()
        (folder / "run").write_text(CANARY)
    assert eraser_of(training).find("rosa", ALL_SEEING).jobs == (job.id,) and tellings(training) == {
        job.id: ("waiting", 1)
    }
    removed = erase(training, "rosa")
    assert removed.message == "" and removed.tiers["trackers"].count == 1
    assert removed.unreached == (f"trackio may have been told a part of job {job.id}.",)
    assert tellings(training) == {} and not folder.exists() and not rows_with(training, "rosa")


def test_only_others_are_told_again_and_who_was_never_told_is_not_waited_for(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "PATIENCE_S", 0.0)
    handles = ("ada", "bob", "carl", "ada")
    jobs = [training.create_job(handle).id for handle in handles]
    (training.options.data_dir / "trackers" / "trackio").mkdir(parents=True)
    for job_id, outcome in zip(jobs, ("project a", "project b", "https://elsewhere/c"), strict=False):
        told(training, job_id, "done", 1, outcome)
    told(training, jobs[3], "waiting", 0)
    assert erase(training, "ada").unreached == ()
    assert tellings(training) == {jobs[1]: ("waiting", 0), jobs[2]: ("done", 1)}
    told(training, (dora := training.create_job("dora").id), "waiting", 0)
    with alone(training.options.data_dir):
        assert erase(training, "dora").message == "" and dora not in tellings(training)


# --- Receipts -----------------------------------------------------------------------------------------------


def test_receipts_are_kept_for_a_day_and_found_by_their_id_alone(training: Training) -> None:
    eraser, now = eraser_of(training), int(time.time())
    receipt = Erasure(
        f"erasure-{'0a' * 12}", "@ada", "done", 1, now, (ADA,), tiers={"models": Share(1, 9)}, viewer=Viewer("inc")
    )
    eraser.save(receipt)
    assert eraser.load(receipt.id) == receipt and eraser.take_up() == []
    for unknown in ("erasure-" + "00" * 12, "../rookery", json.dumps(None)):
        with pytest.raises(NotFound):
            eraser.load(unknown)
    eraser.save(replace(receipt, finished_at=now - 24 * 3600 - 1))
    with pytest.raises(NotFound):
        eraser.load(receipt.id)
    half = training.options.data_dir / "erasures" / f"{receipt.id}.json.0123abcd.part"  # of a writer that was killed
    half.touch()
    eraser.take_up()
    assert half.exists(), "somebody may be writing it"
    os.utime(half, (0, time.time() - SILENT_S - 1))
    eraser.take_up()
    assert [path.name for path in half.parent.iterdir()] == [".lock"]


def test_an_erasure_whose_gateway_is_silent_is_taken_up_once(training: Training) -> None:
    eraser = eraser_of(training)
    assert eraser.take_up() == []
    begun = [Erasure(f"erasure-{number * 12}", "@ada", "running", 1) for number in ("0a", "0b")]
    for one in begun:
        eraser.save(one)
        path = training.options.data_dir / "erasures" / f"{one.id}.json"
        os.utime(path, (0, time.time() - SILENT_S - 1))
    eraser.beat(begun[1].id)
    assert (eraser_of(training).take_up(), eraser.take_up()) == (begun[:1], [])
