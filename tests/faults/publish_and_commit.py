"""Publishes, uploads and creates jobs, and tells of each that it is done: what a power cut must then spare.

    python -m tests.faults.publish_and_commit DATA MODELS HUB NUMBER

`begin WHAT` is told before a thing that exists is changed, `done KIND WHAT VALUE` when it can be relied on.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from serve.database.connection import Database
from serve.hub.fetch import Hub
from serve.store.revisions import Store
from serve.training.jobs.store import JobStore
from serve.types import Hyperparameters, JobRequest, TrainingFile
from tests.training.making import made_up_texts

NUM_MODELS = 6  # folders to publish from, and repositories of the Hub


def tell(*words: str) -> None:
    os.write(1, f"{' '.join(words)}\n".encode())


def main(data: Path, models: Path, endpoint: str, number: int) -> None:
    store = Store(data, embedded={})
    hub = Hub(store, endpoint=endpoint)
    database = Database(f"sqlite:///{data / 'rookery.db'}")
    jobs = JobStore(database, data / "uploads")
    for round_ in range(number):
        folder = models / f"m{round_ % NUM_MODELS}"
        tell("done", "model", f"test/m{round_}", store.import_folder(folder, f"test/m{round_}").revision)
        found = hub.locate(f"hub/m{round_ % NUM_MODELS}")
        tell("done", "model", found.model_id, found.revision)
        # One whose `main` moves again and again, and one that is deleted.
        tell("begin", "test/main")
        tell("done", "model", "test/main", store.import_folder(folder, "test/main").revision)
        if round_:
            tell("begin", f"test/m{round_ - 1}")
            store.delete_model(f"test/m{round_ - 1}")
            tell("done", "deletion", f"test/m{round_ - 1}", "")
        text = "\n".join(made_up_texts(150, round_)).encode()
        upload = data / "uploads" / f"upload-{round_}"
        upload.write_bytes(text)
        file = jobs.create_file(upload, "tweets.txt", "fine-tune")
        tell("done", "file", file.id, hashlib.sha256(text).hexdigest())
        wanted = JobRequest("fledgling", (TrainingFile(file.id, f"bot{round_}"),), Hyperparameters(n_epochs=1), seed=1)
        tell("done", "job", jobs.create_job(wanted).id, "")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
