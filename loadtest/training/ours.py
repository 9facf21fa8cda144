"""Our fine-tuning, in a process of its own: what `loadtest.peers.trainer` is to the peer.

python -m loadtest.training.ours work.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.training.finetune import FineTuneSpec, Progress, finetune


def train(work: Mapping[str, Any]) -> list[float]:
    """When each step ended, in seconds since the training began."""
    ends: list[float] = []

    def on_progress(progress: Progress) -> None:
        if len(ends) == progress.step:  # 0 is the beginning; the last step is told twice
            ends.append(time.perf_counter())

    finetune(
        FineTuneSpec(
            base=Path(work["base"]),
            epochs=work["epochs"],
            held_out=[],
            out=Path(work["out"]),
            seed=work["seed"],
            batch_size=work["batch_size"],
            learning_rate=work["learning_rate"],
            num_previews=0,
            num_threads=work["num_threads"],
        ),
        on_progress=on_progress,
    )
    return [end - ends[0] for end in ends[1:]]


if __name__ == "__main__":
    print(json.dumps(train(json.loads(Path(sys.argv[1]).read_bytes()))))  # noqa: T201
