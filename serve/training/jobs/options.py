"""What a training process must know besides its job. Light: a supervisor reads it without importing torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunOptions:
    """`data_dir` holds models/, uploads/ and training/. `embedded`: model id -> folder of models in the package."""

    database_url: str = field(repr=False)  # may hold a password
    data_dir: Path
    embedded: Mapping[str, Path] = field(default_factory=dict)
    cache: Path | None = None  # this machine's own, for what the store derives
    hub_enabled: bool = False
    hub_endpoint: str | None = None
    hub_token: str | None = field(default=None, repr=False)
    hub_deadline_s: float = 600.0  # for all of a model's files
    hub_bytes: int = 0  # of models fetched from the Hub, at most; 0: while the disk has room
    lease_timeout_s: float = 120.0  # how long generators wait for a place in memory, with a model that is not to go
    num_threads: int | None = None  # of torch; None: its own choice
    memory_share: float | None = None  # of a CUDA device, at most; None: what it needs
    checkpoint_every_s: float = 45.0
    retry_delay_s: float = 5.0  # before the attempt after one that died
    trackers: str = ""  # that are told of every training, with commas between

    @property
    def uploads(self) -> Path:
        return self.data_dir / "uploads"

    def work_of(self, job_id: str) -> Path:
        """Checkpoints of one job, a folder an attempt."""
        return self.data_dir / "training" / job_id

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> RunOptions:
        values = json.loads(text)
        values["data_dir"] = Path(values["data_dir"])
        values["cache"] = Path(values["cache"]) if values["cache"] else None
        values["embedded"] = {model_id: Path(folder) for model_id, folder in values["embedded"].items()}
        return cls(**values)
