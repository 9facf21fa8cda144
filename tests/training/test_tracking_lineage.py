from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve.database.tables import ArtifactRow, RunArtifactRow, RunRow
from serve.training.tracking.lineage import read_runs, record_runs
from serve.training.tracking.provenance import (
    code_sha256,
    deciding_files,
    read_provenance,
    read_runs_of,
    write_records,
)
from serve.types import Artifact, Run
from tests.test_layers import ROOT, imports
from tests.training.making import BASE, Training
from tests.training.tracked import PREVIEWS, REVISION, create_job, making_of, runs_of


@pytest.fixture
def training(training_on_both: Training) -> Training:
    return training_on_both


def names(artifacts: tuple[Artifact, ...]) -> list[tuple[str, str]]:
    return [(artifact.type, artifact.name) for artifact in artifacts]


def record(training: Training, *runs: Run) -> tuple[Run, ...]:
    with training.database.write() as session:
        record_runs(session, runs[0].job_id, runs)
    with training.database.read() as session:
        return read_runs(session, runs[0].job_id)


# --- What a folder tells ------------------------------------------------------------------------------------


def test_a_training_is_told_as_huggingtweets_two_runs(training: Training, tmp_path: Path) -> None:
    job = create_job(training, "Ada")
    raw = training.jobs.get_file(job.request.files[0].file_id).path.read_bytes()
    preprocess, train = runs_of(training, job, tmp_path / "model")
    assert (preprocess.name, preprocess.job_type) == ("@ada-preprocess", "preprocess")
    assert (train.name, train.job_type, train.job_id) == ("@ada-train", "train", job.id)
    assert names(preprocess.inputs) == [("raw-dataset", "tweets-ada")]
    assert preprocess.inputs[0].digest == hashlib.sha256(raw).hexdigest()
    assert names(preprocess.outputs) == [("train-dataset", "dataset-ada")]
    assert names(train.inputs) == [("train-dataset", "dataset-ada"), ("pretrained-model", BASE)]
    assert train.inputs[0] == preprocess.outputs[0]
    assert train.inputs[1].digest == training.store.resolve(BASE).revision
    assert names(train.outputs) == [("finetuned-model", "ada")] and train.outputs[0].digest == REVISION
    assert (preprocess.started_at, preprocess.finished_at) == (1_700_000_035, 1_700_000_040)
    assert (train.started_at, train.finished_at) == (1_700_000_040, 1_700_000_100)


def test_runs_hold_every_hyperparameter_version_and_seed(training: Training, tmp_path: Path) -> None:
    preprocess, train = runs_of(training, create_job(training, "ada"), tmp_path / "model")
    assert preprocess.config["rules"]["min_own_words"] == 3 and preprocess.config["rules"]["min_chars"] == 6000
    assert (preprocess.config["seed"], preprocess.config["held_out_share"]) == (7, 0.1)
    assert preprocess.summary["people"][0]["kept"] == 150
    wanted = {"seed", "n_epochs", "batch_size", "learning_rate", "lr_scheduler", "optimizer", "block_size", "device"}
    assert wanted <= train.config.keys()
    assert {"rookery", "torch", "tokenizers", "python"} <= train.config["versions"].keys()
    assert train.config["code_sha256"] == preprocess.config["code_sha256"] == code_sha256()
    assert train.summary["valid_loss"] == 3.25 and train.summary["trained_tokens"] == 128
    assert train.history["step"] == [0, 1, 2]
    assert train.history["valid_loss"] == [4.0, None, 3.25] and train.history["train_loss"] == [None, 3.5, 3.0]
    table = train.tables["examples"]
    assert table["columns"] == ["Input", "Prediction"]
    assert table["data"] == [["My dream is", text] for text in PREVIEWS]


def test_cyborg_uses_an_archive_a_person_and_goes_by_its_joined_name(training: Training, tmp_path: Path) -> None:
    job = create_job(training, "Bob", "ada", "bob")
    preprocess, train = runs_of(training, job, tmp_path / "model")
    assert (preprocess.name, train.outputs[0].name) == ("@ada-bob-preprocess", "ada-bob")
    ada, bob = preprocess.inputs
    assert (ada.name, bob.name) == ("tweets-ada", "tweets-bob")
    assert len(bob.data["file_sha256"]) == 2 and bob.digest not in bob.data["file_sha256"]
    assert ada.data["file_sha256"] == [ada.digest]


def test_no_archives_text_is_in_the_records(training: Training, tmp_path: Path) -> None:
    job = create_job(training, "ada")
    texts = training.jobs.get_file(job.request.files[0].file_id).path.read_text().splitlines()
    runs_of(training, job, tmp_path / "model")
    records = "".join(path.read_text() for path in (tmp_path / "model").rglob("*.json"))
    assert not any(text in records for text in texts)


def test_provenance_says_what_makes_the_same_bytes_again(training: Training, tmp_path: Path) -> None:
    making = making_of(training, create_job(training, "ada"))
    write_records(tmp_path, making)
    provenance = read_provenance(tmp_path)
    wanted = {
        "code_sha256",
        "versions",
        "seed",
        "base_model",
        "base_revision",
        "dataset_sha256",
        "file_sha256",
        "machine",
    }
    assert wanted <= provenance.keys()
    assert read_runs_of(tmp_path, REVISION)[0].outputs[0].digest == provenance["dataset_sha256"]


def test_provenance_says_how_the_model_is_to_be_shown(training: Training, tmp_path: Path) -> None:
    making = making_of(training, create_job(training, "ada", "bob"))
    [ada, bob] = making.data.people
    data = replace(making.data, people=(replace(ada, display_name="Ada \u202e Lovelace"), bob))
    write_records(tmp_path, replace(making, data=data, sample=PREVIEWS[1]))
    provenance = read_provenance(tmp_path)
    assert provenance["display_names"] == {"ada": "Ada \u202e Lovelace"}  # whoever shows it cleans it
    assert provenance["sample"] == PREVIEWS[1]


def test_file_that_was_only_judged_by_is_told_apart_from_those_learnt_from(training: Training, tmp_path: Path) -> None:
    judge_by = training.upload(20, seed=5)
    making = making_of(training, create_job(training, "ada", validation_file=judge_by.id))
    write_records(tmp_path, making)
    provenance, (preprocess, _) = read_provenance(tmp_path), read_runs_of(tmp_path, REVISION)
    sha256 = hashlib.sha256(judge_by.path.read_bytes()).hexdigest()
    assert provenance["validation_sha256"] == preprocess.config["validation_sha256"] == sha256
    assert list(provenance["file_sha256"].values()) == [preprocess.inputs[0].digest] != [sha256]


def test_hash_of_the_code_covers_what_turns_archives_into_weights_and_nothing_else() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in deciding_files()}
    assert {"serve/training/clean.py", "serve/training/finetune.py", "serve/training/archives/x.py"} <= files
    assert not any(path.startswith(("serve/api/", "serve/pool/", "serve/database/")) for path in files)
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files}
    used = {module for path in files for module, _ in imports(ROOT / path) if module.startswith("serve.")}
    assert used - modules == {
        *(
            "serve.errors",
            "serve.types",
            "serve.settings",
            "serve.logs",
            "serve.store.disk",
        ),  # nouns, how a byte is written
        *("serve.engine.randomness", "serve.engine.sampling", "serve.engine.native.library"),  # samples, the engine's
        *("serve.engine.engine", "serve.engine.selection"),
    }


# --- What SQL keeps -----------------------------------------------------------------------------------------


def test_recorded_runs_are_read_as_they_were(training: Training, tmp_path: Path) -> None:
    runs = runs_of(training, create_job(training, "bob", "ada"), tmp_path / "model")
    assert record(training, *runs) == runs
    with training.database.read() as session:
        assert read_runs(session, "ftjob-unknown") == ()


def test_recording_twice_changes_nothing(training: Training, tmp_path: Path) -> None:
    runs = runs_of(training, create_job(training, "ada"), tmp_path / "model")
    assert record(training, *runs) == record(training, *runs) == runs
    with training.database.read() as session:
        counts = [session.query(table).count() for table in (RunRow, ArtifactRow, RunArtifactRow)]
    assert counts == [2, 4, 5]


def test_same_content_is_the_same_version_and_new_content_the_next(training: Training, tmp_path: Path) -> None:
    versions: list[tuple[int, ...]] = []
    for seed, revision in ((0, "a" * 64), (0, "b" * 64), (1, "c" * 64)):
        job = create_job(training, "ada", seed=seed)
        [preprocess, train] = record(training, *runs_of(training, job, tmp_path / revision, revision))
        used = (*preprocess.inputs, *train.inputs, *train.outputs)
        versions.append(tuple(artifact.version for artifact in used))
    # tweets-ada, dataset-ada, the base, ada
    assert versions == [(0, 0, 0, 0), (0, 0, 0, 1), (1, 1, 0, 2)]


def test_writers_at_the_same_time_number_an_artifact_without_gaps(training: Training, tmp_path: Path) -> None:
    first, _ = runs_of(training, create_job(training, "ada"), tmp_path / "model")
    job_ids = [create_job(training, "ada").id for _ in range(8)]
    barrier = threading.Barrier(len(job_ids))
    errors: list[Exception] = []

    def write(number: int, job_id: str) -> None:
        # Four contents, each recorded by two jobs, beside one that all have in common.
        output = replace(first.outputs[0], digest=f"{number % 4:064d}")
        barrier.wait()
        try:
            record(training, replace(first, job_id=job_id, outputs=(output,)))
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=write, args=pair) for pair in enumerate(job_ids)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with training.database.read() as session:
        runs = [read_runs(session, job_id)[0] for job_id in job_ids]
    assert {run.inputs[0].version for run in runs} == {0}
    assert sorted(run.outputs[0].version for run in runs) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({(run.outputs[0].digest, run.outputs[0].version) for run in runs}) == 4


def test_runs_are_plain_json(training: Training, tmp_path: Path) -> None:
    runs_of(training, create_job(training, "ada"), tmp_path / "model")
    for path in (tmp_path / "model" / "runs").iterdir():

        def refuse(constant: str) -> Any:
            pytest.fail(f"{constant} is no JSON")

        json.loads(path.read_text(), parse_constant=refuse)
