"""A job's runs as a training would leave them, without training: the two trackers' tests tell of these."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from serve.training.dataset import build_dataset, epoch_texts
from serve.training.finetune import FineTuneResult, FineTuneSpec, Progress
from serve.training.jobs.store import JobStore
from serve.training.preprocess import preprocess
from serve.training.tracking.provenance import Making, read_runs_of, write_records
from serve.types import Integration, Job, JobRequest, Run, TrainingFile
from tests.training.making import BASE, Training

REVISION = "c0ffee" * 10 + "beef"
PREVIEWS = ("My dream is to read.", "My dream is 海.")


def create_job(
    training: Training,
    *handles: str,
    texts: int = 150,
    seed: int = 0,
    integrations: tuple[Integration, ...] = (),
    validation_file: str | None = None,
) -> Job:
    """Of one person, or of a cyborg."""
    files = tuple(
        TrainingFile(training.upload(texts, seed=seed + number).id, handle) for number, handle in enumerate(handles)
    )
    request = JobRequest(BASE, files, seed=7, integrations=integrations, validation_file=validation_file)
    return training.jobs.create_job(request)


def making_of(training: Training, job: Job) -> Making:
    """Reads and cleans the job's archives for real; the training is made up: two steps."""
    files = JobStore(training.database, training.options.uploads)
    judge_by = job.request.validation_file
    data = preprocess(
        [(files.get_file(entry.file_id), entry.handle) for entry in job.request.files],
        validation=None if judge_by is None else files.get_file(judge_by),
    )
    texts = None if data.validation is None else data.validation.kept
    dataset = build_dataset(data.kept_by_handle, seed=job.seed, validation=texts)
    base = training.store.resolve(BASE)
    spec = FineTuneSpec(
        base=base.path,
        epochs=[epoch_texts(dataset, job.seed, 0)],
        held_out=dataset.held_out,
        out=training.options.data_dir / "out",
        seed=job.seed,
    )
    step = Progress(
        step=1, total_steps=2, train_loss=3.5, learning_rate=1e-4, tokens=64, tokens_per_s=9.5, seconds_left=1.0
    )
    result = FineTuneResult(
        num_steps=2,
        trained_tokens=128,
        num_parameters=1000,
        train_loss=3.0,
        loss_before=4.0,
        loss_after=3.25,
        previews=PREVIEWS,
        duration_s=60.2,
        dtype="float32",
        block_size=64,
        device="cpu",
        bf16=False,
        num_threads=1,
        history=(step, replace(step, step=2, train_loss=3.0, tokens=128)),
    )
    return Making(job, 1, 1_700_000_100, BASE, base.revision, data, dataset, spec, result, preprocess_s=5.0)


def runs_of(training: Training, job: Job, folder: Path, revision: str = REVISION) -> tuple[Run, Run]:
    """Written into a model's folder and read again, as when a published job is told of."""
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder, making_of(training, job))
    preprocess, train = read_runs_of(folder, revision)
    return preprocess, train
