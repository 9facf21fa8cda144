"""A person is erased from a data folder and a database that a training has filled: their texts are nowhere left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from serve.errors import Erased, InvalidRequest, ModelNotFound, NotFound
from serve.store.tombstones import Tombstones
from serve.training.erasure import PersonEraser
from serve.training.jobs.erasing import ERASED
from serve.types import JobRequest, JobStatus, TrainingFile, Viewer
from tests.fakes.models import write_tiny_gpt2
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
    request = JobRequest(BASE, tuple(TrainingFile(*one) for one in files), seed=7, metadata={"name": metadata})
    job = training.jobs.create_job(request)
    run_of(training, claim_of(training, 30)).run()
    assert training.jobs.get_job(job.id).status is JobStatus.SUCCEEDED
    return job.id


def rows_with(training: Training, needle: str) -> list[str]:
    """Tables that say it anywhere."""
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

    found = eraser.find("@ADA")
    assert (found.models, found.jobs) == ((BOTH,), tuple(jobs))
    assert own in found.files and other not in found.files
    removed = eraser.finish("ada", eraser.begin("ada", "key-1"), "key-1")

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
    assert not eraser.find("ada")


def test_who_is_erased_is_not_learnt_from_until_it_is_lifted(training: Training) -> None:
    eraser = eraser_of(training)
    eraser.begin("Ada", "")
    file = upload(training)
    for suffix in (None, "somebody"):
        job = training.jobs.create_job(JobRequest(BASE, (TrainingFile(file, "aDa"),), suffix=suffix))
        run_of(training, claim_of(training, 30)).run()
        failed = training.jobs.get_job(job.id)
        assert (failed.status, failed.error_code) == (JobStatus.FAILED, "erased")
    assert eraser.lift("@ada") and not eraser.lift("ada")
    assert training.store.main_of(ADA) is None
    train(training, (file, "ada"))
    assert training.store.main_of(ADA)


def test_a_training_that_had_begun_does_not_publish_who_is_erased_meanwhile(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.training.jobs.run import JobRun

    job = training.jobs.create_job(JobRequest(BASE, (TrainingFile(upload(training), "ada"),), seed=7))
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
    begun = eraser.begin("ada", "")
    assert begun.jobs == (running.id, waiting.id)[: len(begun.jobs)] and running.id in begun.jobs
    removed = eraser.finish("ada", begun, "")
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
    assert eraser.find("ada").models == (ADA, BOTH)
    home.rename(backup / "ada")
    eraser.finish("ada", eraser.begin("ada", ""), "")
    (backup / "ada").rename(home)
    training.store.burials.bury(ADA, "erased")
    with pytest.raises(ModelNotFound):
        training.store.resolve(ADA)
    for wanted, refused in ((ADA, True), ("huggingtweets/ADA-zoe", True), ("other/ada", False)):
        if refused:
            with pytest.raises(Erased):
                training.store.burials.check_fetch(wanted, is_asked_for=True)
        else:
            training.store.burials.check_fetch(wanted, is_asked_for=True)


def test_only_an_owner_of_everything_or_who_sees_all_may_erase(training: Training) -> None:
    found = eraser_of(training).find("ada")
    assert found.may_be_erased_by(Viewer(sees_all=True))
    for owner in ("inc", "others"):
        file = training.jobs.create_file(write_texts(training), "tweets.txt", "fine-tune", owner)
        training.jobs.create_job(JobRequest(BASE, (TrainingFile(file.id, "ada"),), viewer=Viewer(owner)))
        found = eraser_of(training).find("ada")
        assert found.may_be_erased_by(Viewer("inc")) == (owner == "inc")
    assert found.owners == {"inc", "others"} and not found.may_be_erased_by(Viewer(""))
    with pytest.raises(InvalidRequest):
        eraser_of(training).find("../ada")


def test_receipts_are_kept_and_found_by_their_id_alone(training: Training) -> None:
    from serve.types import Erasure, Share

    eraser = eraser_of(training)
    receipt = Erasure(f"erasure-{'0a' * 12}", "@ada", "done", 1, 2, (ADA,), tiers={"models": Share(1, 9)})
    eraser.save(receipt)
    assert eraser.load(receipt.id) == receipt
    for unknown in ("erasure-" + "00" * 12, "../rookery", json.dumps(None)):
        with pytest.raises(NotFound):
            eraser.load(unknown)
