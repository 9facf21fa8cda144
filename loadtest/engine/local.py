"""Rookery's engine in this process as a contender: no HTTP, no Ray, no store."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence as Seq
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from safetensors.torch import load_file
from torch import Tensor

from loadtest.engine.work import CASES, Case, PeerUnavailableError, Work
from serve.engine.backend import weight_bytes
from serve.engine.device import engine_config
from serve.engine.engine import Engine, Layout, StepStats
from serve.engine.sequence import Output, Sequence
from serve.engine.text import Vocabularies
from serve.settings import BadSetting, Settings
from serve.shape import GPT2Shape, canonical_name
from serve.types import SamplingParams

# Half of it may be KV cache: enough for 64 sequences of GPT-2 small. A slot takes memory only once it is filled.
BUDGET_BYTES = 6 << 30


class Local:
    """All models resident in one engine that has the settings of the service."""

    cases = frozenset(case.name for case in CASES)

    def __init__(self, folders: Seq[Path], weights: str) -> None:
        """`weights`: a weight format of the engine. Raises: PeerUnavailableError where this machine lacks it."""
        self.name = f"rookery {weights}"
        try:
            config = engine_config(Settings(dtype=weights, memory_bytes=BUDGET_BYTES))
        except BadSetting as exc:
            raise PeerUnavailableError(str(exc)) from exc
        shape = GPT2Shape.from_config(json.loads((folders[0] / "config.json").read_text()))
        self.streamed_bytes = _streamed_bytes(shape, weights)
        self._vocabulary = Vocabularies().load(folders[0])
        self._done = threading.Event()
        self._num_open = 0
        self._num_tokens = 0
        self._error: Exception | None = None
        self._steps: list[StepStats] = []
        self._engine = Engine(config, on_outputs=self._take, on_step=self._steps.append)
        try:
            self._slots = [self._engine.load(Layout(shape), read_tensors(folder)) for folder in folders]
        except BaseException:
            self._engine.close()
            raise

    def run(self, case: Case, work: Work, seed: int) -> int:
        params = SamplingParams(
            top_p=work.top_p, temperature=work.temperature, max_new_tokens=work.num_tokens, ignore_eos=True
        )
        sequences = [
            (slot, Sequence(slot=slot.index, prompt_ids=work.prompt_ids, params=params,
                            vocabulary=self._vocabulary, seed=seed, choice=choice))
            for choice in range(case.streams) for slot in self._slots[: case.models]
        ]  # fmt: skip
        self._num_open, self._num_tokens = len(sequences), 0
        self._steps.clear()
        self._done.clear()
        for slot, sequence in sequences:
            self._engine.submit(slot, [sequence])
        self._done.wait()
        if self._error:
            raise RuntimeError(self._error)
        return self._num_tokens

    def step_s(self, num_models: int) -> float:
        """Median time of the last run's steps with one row for each of `num_models` models, sampling included."""
        return statistics.median(
            step.duration_s
            for step in self._steps
            if step.num_rows == step.num_models == step.num_sampled == num_models
        )

    def close(self) -> None:
        self._engine.close()

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._num_tokens += output.token is not None
            self._num_open -= output.is_last
            self._error = self._error or output.error
        if not self._num_open:
            self._done.set()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {known: tensor for name, tensor in tensors.items() if (known := canonical_name(name))}


def memory_of_own_process(folders: Seq[Path], weights: str) -> int:
    """Bytes (PSS) of a process that does nothing but serve these models, after 4 texts of each at once."""
    command = [sys.executable, "-m", "loadtest.engine.local", weights, *map(str, folders)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _streamed_bytes(shape: GPT2Shape, weights: str) -> int:
    """What a step must read of a model: all of it but the table of positions."""
    positions = shape.n_positions * shape.n_embd * {"bfloat16": 2}.get(weights, 4)
    return weight_bytes(shape, weights, tied=True) - positions


def main() -> None:
    weights, *folders = sys.argv[1:]
    local = Local([Path(folder) for folder in folders], weights)
    local.run(CASES[-1], Work(), seed=0)
    print(psutil.Process(os.getpid()).memory_full_info().pss)  # noqa: T201
    local.close()


if __name__ == "__main__":
    main()
