"""Small real inputs for training tests: made-up tweets, a database, a base model, a supervisor's options."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from serve.database.connection import Database
from serve.store.revisions import Store
from serve.training.jobs.options import RunOptions
from serve.training.jobs.queue import JobQueue
from serve.training.jobs.store import JobStore
from serve.types import FileRecord, Hyperparameters, Job, JobRequest, TrainingFile
from tests.fakes.models import write_tiny_gpt2

BASE = "tiny/base"
_WORDS = [
    "the",
    "a",
    "house",
    "sea",
    "weather",
    "morning",
    "write",
    "think",
    "talk",
    "coffee",
    "friends",
    "game",
    "news",
    "read",
    "team",
    "saturday",
    "always",
    "never",
]


def made_up_texts(number: int, seed: int = 0) -> list[str]:
    """Sentences of twelve words with an order to learn: each word is followed by one of three."""
    generator = random.Random(seed)
    texts = []
    for _ in range(number):
        at, words = generator.randrange(len(_WORDS)), []
        for _ in range(12):
            words.append(_WORDS[at])
            at = (at * 5 + generator.randrange(3)) % len(_WORDS)
        texts.append(" ".join(words))
    return texts


class Training:
    """A data folder with a database, uploads and a tiny base model."""

    def __init__(self, root: Path, database_url: str | None = None, **options: object) -> None:
        self.options = RunOptions(
            database_url=database_url or f"sqlite:///{root / 'rookery.db'}",
            data_dir=root,
            embedded={BASE: write_tiny_gpt2(root / "base")},
            num_threads=1,
            **{"retry_delay_s": 0.0, **options},  # type: ignore[arg-type]
        )
        self.database = Database(self.options.database_url)
        self.store = Store(root, embedded=self.options.embedded)
        self.jobs = JobStore(self.database, self.options.uploads, check_base=self.store.resolve)
        self.queue = JobQueue(self.database)
        self.to_close: list[Callable[[], None]] = [self.database.close]
        self._root = root

    def upload(self, number: int = 150, seed: int = 0, purpose: str = "fine-tune", owner: str = "") -> FileRecord:
        source = self._root / "upload.txt"
        source.write_text("\n".join(made_up_texts(number, seed)) + "\n", encoding="utf-8")
        return self.jobs.create_file(source, "tweets.txt", purpose, owner)

    def create_job(
        self,
        handle: str = "ada",
        number: int = 150,
        seed: int = 7,
        purpose: str = "fine-tune",
        **hyperparameters: float,
    ) -> Job:
        wanted = Hyperparameters(**{"n_epochs": 1, **hyperparameters})  # type: ignore[arg-type]
        files = (TrainingFile(self.upload(number, purpose=purpose).id, handle),)
        return self.jobs.create_job(JobRequest(base_model=BASE, files=files, hyperparameters=wanted, seed=seed))

    def close(self) -> None:
        for close in self.to_close:
            close()

    def messages(self, job_id: str) -> list[str]:
        return [event.message for event in self.jobs.list_events(job_id, limit=1000).items][::-1]
