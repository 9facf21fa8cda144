"""What a revision says of its own making: huggingtweets' two runs, and the provenance, as plain JSON.

runs/preprocess.json    archives -> data set            artifacts by hash; the texts themselves stay out
runs/train.json         data set and base -> model      every step's loss, and what the model says now
rookery.json            what `rookery reproduce` needs, and in short what the catalogue and the card show

Knows no database and no tracker. Imports no torch: a job that was published before its process died is told from here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.store.disk import write_json
from serve.store.model_files import PROVENANCE, RUNS
from serve.training.clean import MIN_CHARS, MIN_OWN_WORDS, WARN_CHARS
from serve.training.dataset import HELD_OUT_SHARE, Dataset
from serve.training.preprocess import Person, Preprocessed
from serve.types import PREVIEW_PROMPT, Artifact, Job, ModelId, Run
from serve.version import VERSION

if TYPE_CHECKING:
    from serve.store.revisions import Revision
    from serve.training.finetune import FineTuneResult, FineTuneSpec, Progress

_VERSIONED = ("torch", "tokenizers", "numpy", "safetensors")
_HISTORY = ("step", "train_loss", "valid_loss", "learning_rate", "tokens", "tokens_per_s")
_SOURCES = Path(__file__).resolve().parents[2]  # of the package `serve`
# What turns archives and a base into weights. How a job is kept, run, told and shown does not change a byte of them.
_DECIDING = (
    "shape.py",
    "engine/device.py",
    "store/safetensors_file.py",
    "store/validate.py",
    "training/archives/*.py",
    *(f"training/{name}.py" for name in ("checkpoint", "clean", "dataset", "evaluate")),
    *(f"training/{name}.py" for name in ("finetune", "gpt2", "learner", "preprocess")),
)


@dataclass(frozen=True, slots=True)
class Making:
    """All that is known of how one model was made."""

    job: Job
    attempt: int  # 1 for the first
    created_at: int  # Unix seconds
    base_model: str
    base_revision: str
    data: Preprocessed
    dataset: Dataset
    spec: FineTuneSpec
    result: FineTuneResult
    preprocess_s: float = 0.0  # how long it took to read and clean the archives
    sample: str = ""  # the text that stands for the model


def write_records(folder: Path, making: Making) -> None:
    """Writes the three files into a model's folder."""
    for name, run in zip(RUNS, _runs(making), strict=True):
        write_json(folder / name, asdict(run))
    write_json(folder / PROVENANCE, _provenance(making))


def write_checkpoint_record(folder: Path, job: Job, base: Revision, data: Preprocessed, progress: Progress) -> None:
    """rookery.json of a model from the middle of a training: the same whenever that step is reached."""
    losses = {"train": progress.train_loss, "held_out_after": progress.valid_loss}
    record = {
        "job_id": job.id,
        "checkpoint_step": progress.step,
        "base_model": base.model_id,
        "base_revision": base.revision,
        "handles": list(data.handles),
        "display_names": data.display_names,
        "counts": data.counts,
        "tags": [],
        "losses": losses,
    }
    write_json(folder / PROVENANCE, record)


def read_provenance(folder: Path) -> dict[str, Any]:
    """`rookery.json` of a model that we trained."""
    provenance: dict[str, Any] = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    return provenance


def read_runs_of(folder: Path, revision: str) -> tuple[Run, ...]:
    """The two runs of a published model; none where an earlier release wrote them.

    `revision` is the model's digest, which its own files cannot hold.
    """
    try:
        preprocess, train = (to_run(json.loads((folder / name).read_text(encoding="utf-8"))) for name in RUNS)
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    outputs = (replace(output, digest=revision) if _is_model(output) else output for output in train.outputs)
    return preprocess, replace(train, outputs=tuple(outputs))


def to_run(stored: Mapping[str, Any]) -> Run:
    """What `asdict` made of a run, and JSON of that."""
    artifacts = {side: tuple(Artifact(**artifact) for artifact in stored[side]) for side in ("inputs", "outputs")}
    return Run(**{**stored, **artifacts})


def job_result(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a finished job tells of its model."""
    return {key: provenance[key] for key in ("counts", "losses", "samples", "num_parameters", "duration_s")}


def hyperparameters(making: Making) -> dict[str, float | int | str]:
    """As a card shows them."""
    config = _config(making)
    del config["epoch_seeds"]
    return config


def card_losses(making: Making) -> dict[str, float]:
    """As a card shows them: without those that were not measured."""
    return {name: loss for name, loss in _losses(making.result).items() if loss is not None}


def dataset_sha256(dataset: Dataset) -> str:
    """Of the texts trained on and held out, in their order."""
    return hashlib.sha256(json.dumps([dataset.train, dataset.held_out]).encode()).hexdigest()


def deciding_files() -> list[Path]:
    """The Python files that decide the bytes of a model."""
    return sorted(path for pattern in _DECIDING for path in _SOURCES.glob(pattern))


@cache
def code_sha256() -> str:
    """Of the files in `_DECIDING`: the same hash is the same code, whatever its version is called."""
    digest = hashlib.sha256()
    for path in deciding_files():
        digest.update(f"{path.relative_to(_SOURCES).as_posix()}\0{_sha256(path.read_bytes())}\n".encode())
    return digest.hexdigest()


# --- The two runs -------------------------------------------------------------------------------------------


def _runs(making: Making) -> tuple[Run, Run]:
    name = ModelId.parse(making.data.model_id).name
    train_started = making.created_at - round(making.result.duration_s)
    preprocess = Run(
        job_id=making.job.id,
        job_type="preprocess",
        name=f"@{name}-preprocess",
        started_at=train_started - round(making.preprocess_s),
        finished_at=train_started,
        config=_preprocess_config(making),
        summary={**_dataset_counts(making), "people": [_count_person(person) for person in making.data.people]},
        inputs=_raw_datasets(making),
        outputs=(_train_dataset(making, name),),
    )
    train = Run(
        job_id=making.job.id,
        job_type="train",
        name=f"@{name}-train",
        started_at=train_started,
        finished_at=making.created_at,
        config={**_config(making), **_environment(making)},
        summary=_train_summary(making),
        history=_history(making.result),
        tables={"examples": _examples(making.result)},
        inputs=(_train_dataset(making, name), _pretrained_model(making)),
        outputs=(_finetuned_model(making, name),),
    )
    return preprocess, train


def _preprocess_config(making: Making) -> dict[str, Any]:
    return {
        "rules": {
            "retweets": "left out",
            "links": "removed",
            "min_own_words": MIN_OWN_WORDS,  # a post with fewer is left out
            "min_chars": MIN_CHARS,  # of all kept texts, else nothing is trained
            "warn_chars": WARN_CHARS,
        },
        "seed": making.spec.seed,
        "held_out_share": HELD_OUT_SHARE,
        "validation_sha256": _files(making)["validation_sha256"],
        "code_sha256": code_sha256(),
        "versions": _versions(),
    }


def _count_person(person: Person) -> dict[str, Any]:
    return {
        "handle": person.handle,
        "format": person.format,
        **person.cleaned.counts,
        "left_out": person.left_out,
        "status": person.cleaned.status,
        "kept_sorted_sha256": person.cleaned.kept_sorted_sha256,
    }


def _dataset_counts(making: Making) -> dict[str, int]:
    return {"num_train": len(making.dataset.train), "num_held_out": len(making.dataset.held_out)}


def _raw_datasets(making: Making) -> tuple[Artifact, ...]:
    found = (_raw_dataset(person, making) for person in making.data.people)
    return tuple(sorted(found, key=lambda artifact: artifact.name))


def _raw_dataset(person: Person, making: Making) -> Artifact:
    """Of one file: its sha256. Of several: that of their sorted hashes, a line each."""
    files = sorted(making.data.file_sha256[file_id] for file_id in person.file_ids)
    digest = files[0] if len(files) == 1 else _sha256("\n".join(files).encode())
    data = {"handle": person.handle, "format": person.format, "file_sha256": files}
    return Artifact("raw-dataset", f"tweets-{person.handle.lower()}", digest, data=data)


def _train_dataset(making: Making, name: str) -> Artifact:
    counts = {handle: dict(counts) for handle, counts in making.dataset.counts.items()}
    data = {**_dataset_counts(making), "counts": counts}
    return Artifact("train-dataset", f"dataset-{name}", dataset_sha256(making.dataset), data=data)


def _pretrained_model(making: Making) -> Artifact:
    return Artifact("pretrained-model", making.base_model, making.base_revision)


def _finetuned_model(making: Making, name: str) -> Artifact:
    """Without its digest: that is the hash of the folder which this record becomes a part of."""
    result = making.result
    data = {
        "model_id": making.data.model_id,
        "base_model": making.base_model,
        "num_parameters": result.num_parameters,
        "dtype": result.dtype,
    }
    return Artifact("finetuned-model", name, digest="", data=data)


def _is_model(artifact: Artifact) -> bool:
    return artifact.type == "finetuned-model"


def _train_summary(making: Making) -> dict[str, Any]:
    result = making.result
    return {
        "train_loss": result.train_loss,
        "valid_loss_before": result.loss_before,
        "valid_loss": result.loss_after,
        "trained_tokens": result.trained_tokens,
        "steps": result.num_steps,
        "num_parameters": result.num_parameters,
        "duration_s": round(result.duration_s, 2),
    }


def _history(result: FineTuneResult) -> dict[str, list[Any]]:
    """Every step; the held-out loss before the first (step 0) and after the last is measured apart from them."""
    first, last = result.history[0], result.history[-1]
    rows = [
        replace(first, step=0, train_loss=None, tokens=0, tokens_per_s=None, valid_loss=result.loss_before),
        *(progress for progress in result.history[:-1] if progress.step),
        replace(last, valid_loss=result.loss_after),
    ]
    return {name: [getattr(row, name) for row in rows] for name in _HISTORY}


def _examples(result: FineTuneResult) -> dict[str, Any]:
    return {"columns": ["Input", "Prediction"], "data": [[PREVIEW_PROMPT, text] for text in result.previews]}


# --- What decides the bytes of a model ----------------------------------------------------------------------


def _config(making: Making) -> dict[str, Any]:
    spec = making.spec
    return {
        "seed": spec.seed,
        "n_epochs": len(spec.epochs),
        "epoch_seeds": [f"{spec.seed}/{epoch}" for epoch in range(len(spec.epochs))],  # see dataset.epoch_texts
        "data_seed": spec.seed,  # of the order in which the blocks are taken, a random permutation
        "held_out_share": HELD_OUT_SHARE,
        "block_size": making.result.block_size,
        "batch_size": spec.batch_size,
        "learning_rate": spec.learning_rate,
        "lr_scheduler": "cosine",
        "warmup_steps": 0,
        "optimizer": "adamw",
    }


def _files(making: Making) -> dict[str, Any]:
    """The archives that were learnt from, by file id, and apart from them the one that was only judged by."""
    sha256 = dict(making.data.file_sha256)
    return {"validation_sha256": sha256.pop(making.job.request.validation_file or "", None), "file_sha256": sha256}


def _environment(making: Making) -> dict[str, Any]:
    """What, besides `_config` and the texts, may change the bytes of the result."""
    result = making.result
    return {
        "device": result.device,
        "bf16": result.bf16,
        "num_threads": result.num_threads,
        "attempts": making.attempt,
        "machine": platform.machine(),
        "code_sha256": code_sha256(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {
        "rookery": VERSION,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _VERSIONED},
    }


def _losses(result: FineTuneResult) -> dict[str, float | None]:
    return {
        "train": result.train_loss,
        "held_out_before": result.loss_before,
        "held_out_after": result.loss_after,
    }


def _provenance(making: Making) -> dict[str, Any]:
    result = making.result
    return {
        "created_at": making.created_at,
        "job_id": making.job.id,
        "base_model": making.base_model,
        "base_revision": making.base_revision,
        "handles": list(making.data.handles),
        "display_names": making.data.display_names,
        "counts": making.data.counts,
        "tags": [],
        "dataset_sha256": dataset_sha256(making.dataset),
        **_files(making),
        **_config(making),
        "losses": _losses(result),
        "samples": list(result.previews),
        "sample": making.sample,
        "trained_tokens": result.trained_tokens,
        "num_parameters": result.num_parameters,
        "duration_s": round(result.duration_s, 2),
        **_environment(making),
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
