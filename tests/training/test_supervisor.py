"""The whole way from an archive to a published model, and the jobs that fail for what was asked of them."""

from __future__ import annotations

import json
import socket
import tomllib
import warnings
from pathlib import Path

import pytest

from serve.store.model_files import content_hash
from serve.store.texts import printable
from serve.training.jobs.queue import MAX_ATTEMPTS
from serve.training.jobs.run import JobRun
from serve.training.jobs.store import JobStore
from serve.types import JobRequest, JobStatus, TrainingFile
from tests.training.archive_files import tweet, x_zip
from tests.training.making import BASE, Training, made_up_texts
from tests.training.supervising import MODEL, claim_of, leftovers, supervisor_of

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


async def test_job_goes_from_archive_to_a_published_model(training_on_both: Training) -> None:
    training = training_on_both
    job = training.create_job()
    texts = training.jobs.get_file(job.request.files[0].file_id).path.read_text().splitlines()
    assert await supervisor_of(training).run_one() is True
    done = training.jobs.get_job(job.id)
    assert done.status is JobStatus.SUCCEEDED and done.fine_tuned_model == MODEL
    assert done.result["losses"]["held_out_after"] < done.result["losses"]["held_out_before"]
    assert done.started_at and done.finished_at and done.trained_tokens
    told = [dict(e.data) for e in training.jobs.list_events(job.id, limit=99).items if e.type == "metrics"][::-1]
    losses = done.result["losses"]
    assert (told[0]["step"], told[0]["valid_loss"]) == (0, losses["held_out_before"])
    assert any(event["samples"] and 0 < event["step"] < event["total_steps"] for event in told)
    assert (told[-1]["valid_loss_before"], told[-1]["valid_loss"]) == tuple(
        losses[f"held_out_{when}"] for when in ("before", "after")
    )
    assert told[-1]["samples"] == done.result["samples"] and told[-1]["seconds_left"] == 0

    info = training.store.get_model(MODEL)
    assert (info.revision, info.base_model, info.handles) == (done.result["revision"], BASE, ("ada",))
    assert info.counts["ada"]["kept"] == 150
    card = training.store.read_card(MODEL)
    assert "@ada" in card and "thumbnail: predictions.png" in card
    folder = training.store.resolve(MODEL).path
    assert (folder / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert training.store.find_avatar(MODEL, 0) == folder / "avatars/0.webp" and info.num_avatars == 1
    assert info.sample.startswith("My dream is") and info.sample in map(printable, done.result["samples"])
    assert content_hash(folder) == folder.name
    assert not any(texts[0] in path.read_text() for path in folder.rglob("*.json"))  # tweets are not published
    assert leftovers(training) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        from transformers import pipeline

        assert pipeline("text-generation", model=str(folder))("My dream is")[0]["generated_text"]
    assert await supervisor_of(training).run_one() is False


async def test_job_that_a_user_can_mend_fails_with_the_same_words_as_at_upload(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.training.jobs.store.MAX_BYTES_READ_AT_ONCE", 0)
    job = training.create_job(number=20)
    assert job.status is JobStatus.VALIDATING
    await supervisor_of(training).run_one()
    failed = training.jobs.get_job(job.id)
    assert (failed.status, failed.error_code, failed.error_param) == ("failed", "too_few_tweets", "training_file")
    assert failed.error_message and "6,000" in failed.error_message


async def test_everything_that_decides_a_models_bytes_is_recorded(training: Training) -> None:
    training.create_job()
    JobRun(training.options, claim_of(training, 30).job.id, 1).run()
    folder = training.store.resolve(MODEL).path
    provenance, run = (json.loads((folder / name).read_text()) for name in ("rookery.json", "runs/train.json"))
    assert {
        name: provenance[name] for name in ("seed", "data_seed", "epoch_seeds", "block_size", "held_out_share")
    } == {
        "seed": 7,
        "data_seed": 7,
        "epoch_seeds": ["7/0"],
        "block_size": 64,
        "held_out_share": 0.1,
    }
    assert provenance.items() >= {name: run["config"][name] for name in ("device", "versions", "code_sha256")}.items()
    assert (provenance["num_threads"], provenance["attempts"]) == (1, 1)
    assert provenance["device"] in ("cpu", "cuda") and isinstance(provenance["bf16"], bool)
    expected = {"rookery", "python", "torch", "tokenizers", "numpy", "safetensors"}
    assert provenance["versions"].keys() == expected
    assert provenance["versions"]["rookery"] == tomllib.loads(PYPROJECT.read_text())["project"]["version"]


def test_owner_by_another_name_is_told_of(training: Training, tmp_path: Path) -> None:
    tweets = [tweet(number, text) for number, text in enumerate(made_up_texts(150))]
    file = training.jobs.create_file(x_zip(tmp_path / "x.zip", tweets), "x.zip", "fine-tune")
    job = training.jobs.create_job(JobRequest(BASE, (TrainingFile(file.id, "@Eve"),), suffix="EVE"))
    run = JobRun(training.options, job.id, claim_of(training, 30).fence)
    data = run._preprocess()
    assert data.model_id == "huggingtweets/eve"
    run._tell_data(data)
    [warning] = [e.message for e in training.jobs.list_events(job.id, limit=9).items if "asked for" in e.message]
    assert "'Ada_L'" in warning and "'Eve'" in warning


async def test_job_with_a_base_that_is_not_here_fails_at_once(training: Training) -> None:
    entry = (TrainingFile(training.upload().id, "ada"),)
    unchecked = JobStore(training.database, training.options.uploads)
    job = unchecked.create_job(JobRequest("nobody/nothing", entry))
    await supervisor_of(training).run_one()
    failed = training.jobs.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", "model_not_found")


def test_job_whose_base_is_on_a_hub_that_does_not_answer_fails_by_that_name(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        training = Training(tmp_path, hub_enabled=True, hub_endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}")
        entry = (TrainingFile(training.upload().id, "ada"),)
        job = JobStore(training.database, training.options.uploads).create_job(JobRequest("some/body", entry))
        for _ in range(MAX_ATTEMPTS):
            JobRun(training.options, job.id, claim_of(training, 30).fence).run()
    failed = training.jobs.get_job(job.id)
    assert failed.status is JobStatus.FAILED and failed.error_code in ("store_unavailable", "hub_unreachable")
    assert failed.error_message and "some/body" in failed.error_message
