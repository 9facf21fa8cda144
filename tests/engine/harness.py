"""An engine driven by hand: tiny models in slots, outputs collected per sequence."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from serve.engine.backend import Backend
from serve.engine.engine import Engine, EngineConfig, Layout, Slot
from serve.engine.grouped.backend import GroupedBackend
from serve.engine.selection import build_backend
from serve.engine.sequence import Output, Sequence
from serve.engine.text import Vocabularies, Vocabulary
from serve.shape import GPT2Shape, canonical_name
from serve.types import SamplingParams, TokenInfo
from tests.fakes.models import tiny_config, write_tiny_gpt2

GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {canonical: t for name, t in tensors.items() if (canonical := canonical_name(name))}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grouped_backend(
    shape: GPT2Shape, num_slots: int, kv_rows: int, weights: str, device: torch.device, *, tied: bool
) -> GroupedBackend:
    """As `build_backend`, but the path of devices, whatever this machine would choose."""
    return GroupedBackend(shape, num_slots, kv_rows, getattr(torch, weights), device, tied=tied)


@dataclass
class Collected:
    ids: list[int] = field(default_factory=list)
    tokens: list[TokenInfo] = field(default_factory=list)
    prompt: list[TokenInfo] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # a step each
    last: Output | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Harness:
    """Tiny models `0 .. n-1` loaded in an engine, and their transformers twins."""

    def __init__(
        self,
        folder: Path,
        num_models: int,
        config: EngineConfig | None = None,
        build: Callable[..., Backend] = build_backend,
        **shape: Any,
    ) -> None:
        self._changed = threading.Condition()
        self.collected: dict[Sequence, Collected] = {}
        self.engine = Engine(config or EngineConfig(), on_outputs=self._take, build=build)
        self.slots: list[Slot] = []
        self.folders = [write_tiny_gpt2(folder / str(i), seed=i, **shape) for i in range(num_models)]
        self.vocabulary: Vocabulary = Vocabularies().load(self.folders[0])
        self.layout = Layout(GPT2Shape.from_config(tiny_config(**shape)), shape.get("tie", True))
        for path in self.folders:
            self.slots.append(self.engine.load(self.layout, read_tensors(path)))

    def reference(self, model: int) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folders[model], dtype=torch.float32).eval()

    def sequence(self, model: int, prompt: list[int], params: SamplingParams = GREEDY, **extra: Any) -> Sequence:
        return Sequence(
            slot=self.slots[model].index, prompt_ids=prompt, params=params, vocabulary=self.vocabulary, **extra
        )

    def submit(self, model: int, sequence: Sequence) -> Collected:
        collected = self.collected[sequence] = Collected()
        self.engine.submit(self.slots[model], [sequence])
        return collected

    def run(self, work: list[tuple[int, Sequence]]) -> list[Collected]:
        """Submit all at once and wait for the last output of each."""
        collected = [self.submit(model, sequence) for model, sequence in work]
        self.wait(collected)
        return collected

    def wait(self, collected: list[Collected]) -> None:
        with self._changed:
            done = self._changed.wait_for(lambda: all(c.last for c in collected), timeout=60)
        assert done, "the engine did not finish in 60 s"

    def wait_tokens(self, collected: Collected, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(collected.ids) >= count or collected.last, timeout=60)

    def _take(self, outputs: list[Output]) -> None:
        with self._changed:
            for output in outputs:
                collected = self.collected[output.sequence]
                collected.texts.append(output.text)
                collected.prompt.extend(output.prompt_tokens)
                if output.token:
                    collected.ids.append(output.token.id)
                    collected.tokens.append(output.token)
                if output.is_last:
                    collected.last = output
            self._changed.notify_all()
