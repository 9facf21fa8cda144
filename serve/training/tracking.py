"""What a revision says of its own making: huggingtweets' two runs, and the provenance, as plain JSON.

runs/preprocess.json    archives -> cleaned texts    (artifacts by hash; the texts themselves stay out)
runs/train.json         cleaned texts + base -> model, with every step's loss
rookery.json            the same in short, for the catalogue and the card
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.training.dataset import HELD_OUT_SHARE, Dataset
from serve.training.finetune import FineTuneResult, FineTuneSpec, write_json
from serve.training.preprocess import Preprocessed
from serve.types import Job

PROVENANCE = "rookery.json"
VERSION = "0.1.0"  # as pyproject.toml says, which an image need not hold
_VERSIONED = ("torch", "transformers", "tokenizers", "accelerate", "numpy", "safetensors")


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


def write_records(folder: Path, making: Making) -> None:
    """Writes the three files into a model's folder."""
    write_json(folder / "runs" / "preprocess.json", _preprocess_run(making))
    write_json(folder / "runs" / "train.json", _train_run(making))
    write_json(folder / PROVENANCE, _provenance(making))


def read_provenance(folder: Path) -> dict[str, Any]:
    """`rookery.json` of a model that we trained."""
    provenance: dict[str, Any] = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    return provenance


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


def _preprocess_run(making: Making) -> dict[str, Any]:
    counts = making.data.counts
    raw = [
        {"type": "raw-dataset", "file_id": file_id, "sha256": digest}
        for file_id, digest in making.data.file_sha256.items()
    ]
    people = [
        {
            "handle": person.handle,
            "format": person.format,
            **counts[person.handle],
            "left_out": person.left_out,
            "status": person.cleaned.status,
            "kept_sorted_sha256": person.cleaned.kept_sorted_sha256,
        }
        for person in making.data.people
    ]
    return {
        "name": "preprocess",
        "job_id": making.job.id,
        "inputs": raw,
        "summary": {"people": people},
        "outputs": [_train_dataset(making)],
    }


def _train_dataset(making: Making) -> dict[str, Any]:
    dataset = making.dataset
    return {
        "type": "train-dataset",
        "sha256": dataset_sha256(dataset),
        "num_train": len(dataset.train),
        "num_held_out": len(dataset.held_out),
        "counts": {handle: dict(counts) for handle, counts in dataset.counts.items()},
    }


def _train_run(making: Making) -> dict[str, Any]:
    result = making.result
    columns = ("step", "train_loss", "learning_rate", "tokens", "tokens_per_s")
    return {
        "name": "train",
        "job_id": making.job.id,
        "inputs": [_train_dataset(making), _base(making)],
        "config": _config(making),
        "environment": _environment(making),
        "history": {name: [getattr(progress, name) for progress in result.history] for name in columns},
        "summary": {"losses": _losses(result), "trained_tokens": result.trained_tokens, "steps": result.num_steps},
        "outputs": [{"type": "finetuned-model", "name": making.data.model_id, "dtype": result.dtype}],
    }


def _base(making: Making) -> dict[str, Any]:
    return {"type": "pretrained-model", "name": making.base_model, "revision": making.base_revision}


def _config(making: Making) -> dict[str, Any]:
    spec = making.spec
    return {
        "seed": spec.seed,
        "n_epochs": len(spec.epochs),
        "epoch_seeds": [f"{spec.seed}/{epoch}" for epoch in range(len(spec.epochs))],  # see dataset.epoch_texts
        "data_seed": spec.seed,  # of the order in which the Trainer takes the blocks, a random permutation
        "held_out_share": HELD_OUT_SHARE,
        "block_size": making.result.block_size,
        "batch_size": spec.batch_size,
        "learning_rate": spec.learning_rate,
        "lr_scheduler": "cosine",
        "warmup_steps": 0,
        "optimizer": "adamw",
    }


def _environment(making: Making) -> dict[str, Any]:
    """What, besides `_config` and the texts, may change the bytes of the result."""
    result = making.result
    return {
        "device": result.device,
        "bf16_autocast": result.bf16,
        "num_threads": result.num_threads,
        "attempts": making.attempt,
        "versions": {
            "rookery": VERSION,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _VERSIONED},
        },
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
        "counts": making.data.counts,
        "tags": [],
        "dataset_sha256": dataset_sha256(making.dataset),
        "file_sha256": making.data.file_sha256,
        **_config(making),
        "losses": _losses(result),
        "samples": list(result.previews),
        "trained_tokens": result.trained_tokens,
        "num_parameters": result.num_parameters,
        "duration_s": round(result.duration_s, 2),
        **_environment(making),
    }
