from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serve.database.connection import Database
from serve.errors import (
    BadUpload,
    Conflict,
    Erased,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    QuotaExceeded,
    StoreUnavailable,
    TooFewTweets,
)
from serve.training.jobs import store as store_module
from serve.training.jobs.queue import MAX_ATTEMPTS, Publication
from serve.training.jobs.store import JobStore
from serve.training.preprocess import Preprocessed, preprocess
from serve.types import BOT_PURPOSE, FileRecord, Hyperparameters, JobRequest, JobStatus, TrainingFile
from tests.training.making import BASE, Training, made_up_texts

ENDED = -1.0  # a lease that has ended when it begins


@pytest.fixture
def training(training_on_both: Training) -> Training:
    return training_on_both


def write(path: Path, *texts: str) -> Path:
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


# --- Files ------------------------------------------------------------------------------------------------


def test_uploaded_file_is_moved_found_listed_and_deleted(training: Training, tmp_path: Path) -> None:
    first, second = training.upload(10), training.upload(20)
    assert not (tmp_path / "upload.txt").exists()
    assert training.jobs.get_file(first.id) == first
    assert first.path.stat().st_size == first.num_bytes > 0
    page = training.jobs.list_files(limit=1)
    assert page.items == (second,) and page.has_more
    assert training.jobs.list_files(limit=5, after=second.id).items == (first,)
    assert training.jobs.list_files(limit=5, newest_first=False).items == (first, second)
    assert training.jobs.list_files(limit=5, purpose="other").items == ()
    training.jobs.delete_file(first.id)
    assert not first.path.exists()
    with pytest.raises(NotFound, match="no file of that id"):
        training.jobs.get_file(first.id)


def test_files_that_come_at_once_are_kept_as_far_as_there_is_room(training: Training, tmp_path: Path) -> None:
    training.upload(owner="bob")

    def check_room(used: int, fresh: int) -> None:
        if used + fresh > 250:
            raise QuotaExceeded(f"{used} and {fresh}")

    def create(number: int) -> bool:
        source = tmp_path / f"upload-{number}"
        source.write_bytes(bytes(100))
        try:
            training.jobs.create_file(source, "a.zip", "fine-tune", "ada", check_room=check_room)
        except QuotaExceeded as exc:
            assert exc.message == "200 and 100"
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(create, range(8))) == 2
    assert training.jobs.bytes_of("ada") == 200
    assert len(list(training.options.uploads.iterdir())) == 3


def test_file_that_a_waiting_job_needs_is_not_deleted(training: Training) -> None:
    job = training.create_job()
    file_id = job.request.files[0].file_id
    with pytest.raises(Conflict, match=job.id):
        training.jobs.delete_file(file_id)
    training.jobs.cancel_job(job.id)
    training.jobs.delete_file(file_id)


def test_archives_of_a_bot_go_with_its_job_and_other_files_stay(training: Training) -> None:
    alone, shared, kept = training.upload(purpose=BOT_PURPOSE), training.upload(purpose=BOT_PURPOSE), training.upload()
    first, second = (
        training.jobs.create_job(JobRequest(BASE, tuple(TrainingFile(file.id, "ada") for file in files)))
        for files in ((alone, shared, kept), (shared,))
    )
    training.jobs.cancel_job(first.id)
    assert [file.path.exists() for file in (alone, shared, kept)] == [False, True, True]
    with pytest.raises(NotFound):
        training.jobs.get_file(alone.id)
    training.jobs.cancel_job(second.id)
    assert not shared.path.exists()


def test_what_uploads_that_broke_off_have_left_is_swept_after_a_day(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = training.options.uploads
    waiting = training.create_job(purpose=BOT_PURPOSE).request.files[0].file_id
    strays = [uploads / "upload-0", uploads / "file-0.part", uploads / "file-1"]
    for path in strays:
        path.touch()
    forgotten, kept, other = training.upload(purpose=BOT_PURPOSE).path, training.upload().path, uploads / "notes"
    other.touch()
    JobStore(training.database, uploads)
    assert all(path.exists() for path in (*strays, forgotten))  # they are of today
    monkeypatch.setattr(store_module, "ROWLESS_AFTER_S", -2)
    training.jobs.sweep()
    assert forgotten.exists() and not any(path.exists() for path in strays)
    monkeypatch.setattr(store_module, "ABANDONED_AFTER_S", -2)
    training.jobs.sweep()
    assert sorted(uploads.iterdir()) == sorted([uploads / waiting, kept, other])


def test_files_that_cannot_all_be_kept_are_none(training: Training, tmp_path: Path) -> None:
    staged = [training.jobs.stage_file(write(tmp_path / name), name, BOT_PURPOSE, "ada") for name in ("a", "b")]
    staged[1].path.unlink()
    with pytest.raises(StoreUnavailable, match="keep an upload"):
        training.jobs.keep_files(staged)
    assert not any(training.options.uploads.iterdir())
    assert training.jobs.bytes_of("ada") == 0


# --- Creating ---------------------------------------------------------------------------------------------


def bot_of(file: FileRecord) -> JobRequest:
    return JobRequest(base_model=BASE, files=(TrainingFile(file.id, "ada"),))


def test_a_job_takes_over_the_files_that_came_with_it(training: Training, tmp_path: Path) -> None:
    staged = training.jobs.stage_file(write(tmp_path / "a", *made_up_texts(150)), "a.txt", BOT_PURPOSE, "ada")
    job = training.jobs.create_job(bot_of(staged), staged=[staged])
    kept = training.jobs.get_file(job.request.files[0].file_id)
    assert (kept.filename, kept.num_bytes, kept.purpose, kept.owner) == ("a.txt", staged.num_bytes, BOT_PURPOSE, "ada")
    assert kept.path.stat().st_size == staged.num_bytes and not staged.path.exists()


def test_files_of_a_job_that_is_refused_are_not_touched(training: Training, tmp_path: Path) -> None:
    def refuse(used: int, fresh: int) -> None:
        raise QuotaExceeded(f"{used} and {fresh}")

    unread = training.jobs.stage_file(write(tmp_path / "a", "too", "few"), "a.txt", BOT_PURPOSE)
    with pytest.raises(TooFewTweets):
        training.jobs.create_job(bot_of(unread), staged=[unread], check_room=refuse)
    assert unread.path.exists()  # it was read where it lay
    whole = training.jobs.stage_file(write(tmp_path / "b", *made_up_texts(150)), "b.txt", BOT_PURPOSE)
    with pytest.raises(QuotaExceeded, match=f"0 and {whole.num_bytes}"):
        training.jobs.create_job(bot_of(whole), staged=[whole], check_room=refuse)
    assert training.jobs.list_files(limit=5).items == ()
    assert not any(training.options.uploads.iterdir())


def test_whoever_is_erased_while_their_posts_are_read_leaves_nothing(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    erased: set[str] = set()

    def check_person(handle: str) -> None:
        if handle in erased:
            raise Erased("gone")

    def read(*args: Any, **options: Any) -> Preprocessed:
        found = preprocess(*args, **options)
        erased.add("ada")
        return found

    monkeypatch.setattr(store_module, "preprocess", read)
    jobs = JobStore(training.database, training.options.uploads, check_person=check_person)
    staged = jobs.stage_file(write(tmp_path / "a", *made_up_texts(150)), "a.txt", BOT_PURPOSE)
    with pytest.raises(Erased):
        jobs.create_job(bot_of(staged), staged=[staged])
    assert jobs.list_files(limit=5).items == () and jobs.list_jobs(limit=5).items == ()
    assert not any(training.options.uploads.iterdir())


def test_of_twins_that_come_at_once_one_keeps_its_files(training: Training, tmp_path: Path) -> None:
    def create(number: int) -> str:
        source = write(tmp_path / f"a-{number}", *made_up_texts(150))
        staged = training.jobs.stage_file(source, "a.txt", BOT_PURPOSE)
        return training.jobs.create_job(bot_of(staged), idempotency_key="once", staged=[staged]).id

    with ThreadPoolExecutor(4) as threads:
        (job_id,) = set(threads.map(create, range(4)))
    (needed,) = training.jobs.get_job(job_id).request.files
    assert [path.name for path in training.options.uploads.iterdir()] == [needed.file_id]
    assert [file.id for file in training.jobs.list_files(limit=5).items] == [needed.file_id]


def test_created_job_is_queued_with_its_counts_and_survives_a_restart(training: Training) -> None:
    job = training.create_job(number=150)
    assert job.status is JobStatus.QUEUED
    assert job.result["counts"] == {"ada": {"downloaded": 150, "retweets": 0, "short": 0, "kept": 150}}
    training.database.close()
    reopened = Database(training.options.database_url)
    assert JobStore(reopened, training.options.uploads).get_job(job.id) == job
    reopened.close()


def test_job_with_too_few_tweets_is_refused_at_once_and_nothing_is_stored(training: Training) -> None:
    file = training.upload(20)
    with pytest.raises(TooFewTweets, match="6,000") as caught:
        training.jobs.create_job(JobRequest(BASE, (TrainingFile(file.id, "ada"),)))
    assert caught.value.param == "training_file"
    assert training.jobs.list_jobs(limit=5).items == ()


def test_job_of_a_file_that_is_no_archive_is_refused_at_once(training: Training, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 40)
    file = training.jobs.create_file(tmp_path / "noise", "noise.zip", "fine-tune")
    with pytest.raises(BadUpload) as caught:
        training.jobs.create_job(JobRequest(BASE, (TrainingFile(file.id, "ada"),)))
    assert caught.value.param == "training_file"
    assert training.jobs.list_jobs(limit=5).items == ()


def test_large_archives_are_left_for_the_worker_to_read(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_BYTES_READ_AT_ONCE", 100)
    assert training.create_job().status is JobStatus.VALIDATING
    assert training.queue.claim("worker", 30) is not None


def test_bad_request_is_refused_by_the_name_of_its_field(training: Training) -> None:
    rows: list[tuple[dict[str, object], str]] = [
        ({"files": ()}, "training_file"),
        ({"files": (TrainingFile("file-a"), TrainingFile("file-a"))}, "training_file"),
        ({"files": tuple(TrainingFile(f"file-{i}") for i in range(9))}, "training_file"),
        ({"base_model": "../etc"}, "model"),
        ({"suffix": "a/b"}, "suffix"),
        ({"suffix": ""}, "suffix length"),
        ({"seed": -1}, "seed"),
        ({"hyperparameters": Hyperparameters(n_epochs=0)}, "n_epochs"),
        ({"hyperparameters": Hyperparameters(batch_size=1000)}, "batch_size"),
        ({"hyperparameters": Hyperparameters(learning_rate_multiplier=float("nan"))}, "learning_rate_multiplier"),
    ]
    for changes, param in rows:
        wanted = {"base_model": BASE, "files": (TrainingFile("file-a"),), **changes}
        with pytest.raises(InvalidRequest) as caught:
            training.jobs.create_job(JobRequest(**wanted))  # type: ignore[arg-type]
        assert caught.value.param == param


def test_job_of_an_unknown_file_is_refused(training: Training) -> None:
    with pytest.raises(NotFound, match="no file of that id") as caught:
        training.jobs.create_job(JobRequest(BASE, (TrainingFile("file-none"),)))
    assert caught.value.param == "training_file"


def test_job_of_a_base_that_no_job_could_find_is_refused(training: Training) -> None:
    entry = (TrainingFile(training.upload().id, "ada"),)
    with pytest.raises(ModelNotFound, match="nobody/nothing") as caught:
        training.jobs.create_job(JobRequest("nobody/nothing", entry))
    assert caught.value.param == "model" and training.jobs.list_jobs(limit=5).items == ()


@pytest.mark.parametrize("handle", ["a\u202eda", "a\x07da", "Ünï", "a b"])
def test_handle_is_checked_also_where_a_suffix_names_the_model(training: Training, handle: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        training.jobs.create_job(JobRequest(BASE, (TrainingFile(training.upload().id, handle),), suffix="somebody"))
    assert caught.value.param == "handle"


def test_archive_that_does_not_say_whose_it_is_needs_a_handle_or_a_name(training: Training) -> None:
    file = training.upload()
    with pytest.raises(InvalidRequest, match="handle"):
        training.jobs.create_job(JobRequest(BASE, (TrainingFile(file.id),)))
    assert training.jobs.create_job(JobRequest(BASE, (TrainingFile(file.id),), suffix="somebody"))


def test_jobs_are_listed_newest_first_by_page_and_by_metadata(training: Training) -> None:
    file = training.upload()
    entry = (TrainingFile(file.id, "ada"),)
    made = [
        training.jobs.create_job(JobRequest(BASE, entry, metadata={"run": str(i % 2), 'k"': "x"})) for i in range(4)
    ]
    ids = [job.id for job in made]
    page = training.jobs.list_jobs(limit=3)
    assert [job.id for job in page.items] == ids[:0:-1] and page.has_more
    rest = training.jobs.list_jobs(limit=3, after=page.items[-1].id)
    assert [job.id for job in rest.items] == ids[:1] and not rest.has_more
    odd = training.jobs.list_jobs(limit=9, metadata={"run": "1", 'k"': "x"})
    assert [job.id for job in odd.items] == [ids[3], ids[1]]
    with pytest.raises(NotFound):
        training.jobs.list_jobs(limit=3, after="ftjob-none")


def test_jobs_are_counted_by_status(training: Training) -> None:
    assert training.jobs.count_jobs() == {}
    jobs = [training.create_job() for _ in range(3)]
    training.jobs.pause_job(jobs[0].id)
    training.queue.claim("worker", 30)
    assert training.jobs.count_jobs() == {JobStatus.PAUSED: 1, JobStatus.RUNNING: 1, JobStatus.QUEUED: 1}


# --- Leases -----------------------------------------------------------------------------------------------


def test_jobs_are_claimed_oldest_first_and_each_once(training: Training) -> None:
    jobs = [training.create_job(), training.create_job()]
    claims = [training.queue.claim("worker", 30) for _ in range(3)]
    assert [claim and claim.job.id for claim in claims] == [jobs[0].id, jobs[1].id, None]
    assert training.jobs.get_job(jobs[0].id).status is JobStatus.RUNNING


def test_f4_worker_that_was_replaced_can_change_nothing_any_more(training: Training, tmp_path: Path) -> None:
    job = training.create_job()
    zombie = training.queue.claim("zombie", ENDED)
    heir = training.queue.claim("heir", 30)
    assert zombie and heir and heir.fence > zombie.fence and heir.attempt == 2
    queue = training.queue
    for action in (
        lambda: queue.heartbeat(zombie, 30),
        lambda: queue.add_event(zombie, "still here"),
        lambda: queue.set_publication(zombie, Publication(tmp_path, "huggingtweets/ada", "1")),
        lambda: queue.finish(zombie, model_id="huggingtweets/ada", trained_tokens=1, result={}),
        lambda: queue.fail(zombie, code="x", message="x"),
        lambda: queue.release(zombie),
        lambda: queue.abandon(zombie, "x"),
        lambda: queue.check(zombie),
    ):
        with pytest.raises(Conflict, match=job.id):
            action()
    queue.finish(heir, model_id="huggingtweets/ada", trained_tokens=5, result={"revision": "abc"})
    done = training.jobs.get_job(job.id)
    assert done.status is JobStatus.SUCCEEDED and done.fine_tuned_model == "huggingtweets/ada"
    assert done.result["revision"] == "abc" and done.result["counts"]
    with pytest.raises(Conflict):
        queue.finish(heir, model_id="huggingtweets/ada", trained_tokens=5, result={})


def test_heartbeat_keeps_a_lease_from_ending(training: Training) -> None:
    training.create_job()
    claim = training.queue.claim("worker", ENDED)
    assert claim and training.queue.heartbeat(claim, 30) is None
    assert training.queue.claim("other", 30) is None


def test_f5_job_whose_worker_always_falls_silent_fails_after_three_attempts(training: Training) -> None:
    poison, healthy = training.create_job(), training.create_job()
    attempts = [training.queue.claim("worker", ENDED) for _ in range(MAX_ATTEMPTS)]
    assert [claim and (claim.job.id, claim.attempt) for claim in attempts] == [(poison.id, n) for n in (1, 2, 3)]
    following = training.queue.claim("worker", 30)
    assert following and following.job.id == healthy.id
    failed = training.jobs.get_job(poison.id)
    assert failed.status is JobStatus.FAILED and failed.error_code == "poison_job" and failed.finished_at


def test_released_job_waits_again_and_the_attempt_does_not_count(training: Training) -> None:
    training.create_job()
    for _ in range(MAX_ATTEMPTS + 2):
        claim = training.queue.claim("worker", 30)
        assert claim and claim.attempt == 1
        assert training.queue.release(claim) is JobStatus.QUEUED


def test_abandoned_job_is_not_tried_again_before_its_delay(training: Training) -> None:
    training.create_job()
    claim = training.queue.claim("worker", 30)
    assert claim and training.queue.abandon(claim, "the Hub is away", delay_s=60) is JobStatus.QUEUED
    assert training.queue.claim("worker", 30) is None


def test_attempt_that_may_have_published_is_followed_by_one_that_finds_out(training: Training, tmp_path: Path) -> None:
    training.create_job()
    publication = Publication(tmp_path / "stage", "huggingtweets/ada", "0123")
    claims = [training.queue.claim("worker", ENDED) for _ in range(MAX_ATTEMPTS)]
    assert claims[-1]
    training.queue.set_publication(claims[-1], publication)
    heir = training.queue.claim("worker", 30)
    assert heir and heir.pending == publication and heir.attempt == MAX_ATTEMPTS + 1
    assert training.queue.resume(heir.job.id, heir.fence) == heir


# --- Cancelling -------------------------------------------------------------------------------------------


def test_waiting_job_is_cancelled_at_once_and_only_once(training: Training) -> None:
    job = training.create_job()
    assert training.jobs.cancel_job(job.id).status is JobStatus.CANCELLED
    assert training.queue.claim("worker", 30) is None
    with pytest.raises(Conflict, match="cancelled"):
        training.jobs.cancel_job(job.id)


def test_running_job_hears_of_its_cancelling_at_the_next_heartbeat(training: Training) -> None:
    job = training.create_job()
    claim = training.queue.claim("worker", 30)
    assert claim and training.jobs.cancel_job(job.id).status is JobStatus.RUNNING
    assert training.queue.heartbeat(claim, 30) == "cancel"
    assert training.queue.release(claim) is JobStatus.CANCELLED


def test_cancelled_job_whose_worker_fell_silent_is_not_taken_over(training: Training) -> None:
    job = training.create_job()
    training.queue.claim("worker", ENDED)
    training.jobs.cancel_job(job.id)
    assert training.queue.claim("other", 30) is None
    assert training.jobs.get_job(job.id).status is JobStatus.CANCELLED


# --- Events -----------------------------------------------------------------------------------------------


def test_events_are_listed_newest_first_with_their_numbers(training: Training) -> None:
    job = training.create_job()
    claim = training.queue.claim("worker", 30)
    assert claim
    training.queue.add_event(claim, "Step 1.", metrics={"step": 1, "train_loss": 2.5}, seconds_left=600)
    page = training.jobs.list_events(job.id, limit=2)
    assert page.items[0].type == "metrics" and page.items[0].data == {"step": 1, "train_loss": 2.5} and page.has_more
    assert [event.message for event in training.jobs.list_events(job.id, limit=9, after=page.items[0].id).items] == [
        "The job has started.",
        "The job was created.",
    ]
    estimated = training.jobs.get_job(job.id).estimated_finish
    assert estimated and job.created_at + 590 < estimated < job.created_at + 700
    with pytest.raises(NotFound):
        training.jobs.list_events("ftjob-none", limit=1)


def test_many_workers_at_once_claim_each_job_once(training: Training) -> None:
    ids = {training.create_job().id for _ in range(10)}
    with ThreadPoolExecutor(4) as workers:
        claims = list(workers.map(lambda _: training.queue.claim("worker", 30), range(14)))
    assert sorted(claim.job.id for claim in claims if claim) == sorted(ids)
