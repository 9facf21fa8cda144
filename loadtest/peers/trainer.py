"""transformers' Trainer with huggingtweets' settings, in a process of its own.

    python -m loadtest.peers.trainer work.json

work.json names a base model, blocks of tokens (.npy), a seed, a learning rate, threads, whether to multiply in bf16,
and the folder to write. Prints one line of JSON: when each step ended, in seconds since the training began.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging


class _Stopwatch(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.started = 0.0
        self.ends: list[float] = []

    def on_train_begin(self, *_arguments: Any, **_others: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_arguments: Any, **_others: Any) -> None:
        self.ends.append(time.perf_counter() - self.started)


def train(work: Mapping[str, Any]) -> list[float]:
    """When each step ended."""
    torch.set_num_threads(work["num_threads"])
    model = GPT2LMHeadModel.from_pretrained(work["base"], dtype=torch.float32)
    stopwatch = _Stopwatch()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=work["out"],
            num_train_epochs=1,  # the blocks hold all epochs
            per_device_train_batch_size=1,
            learning_rate=work["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=0,
            seed=work["seed"],
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=work["bf16"],
        ),
        train_dataset=[{"input_ids": torch.from_numpy(block)} for block in np.load(work["blocks"])],
        data_collator=_collate,
        callbacks=[stopwatch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(work["out"])
    return stopwatch.ends


def _collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}  # the model shifts them itself


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(train(json.loads(Path(sys.argv[1]).read_bytes()))))  # noqa: T201
