"""Steps for which there is no memory: done again in halves, once; whoever still finds none is told, and nobody else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serve.engine.backend import Span
from serve.engine.grouped.backend import GroupedBackend
from serve.engine.memory import is_out_of_memory
from serve.errors import OutOfMemory
from serve.types import SamplingParams
from tests.engine.harness import Harness, grouped_backend

_NUM_MODELS = 4
# What torch says on a CPU, see `test_what_torch_says_is_understood`.
_SAID = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"


class Short(GroupedBackend):
    """Has no memory for steps of more than `max_spans` sequences, of which it computes all but the end."""

    max_spans = 100

    def forward(self, spans: Seq[Span]) -> Tensor:
        logits = super().forward(spans)
        if len(spans) > self.max_spans:
            raise RuntimeError(_SAID)
        return logits


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    monkeypatch.setattr("tests.engine.harness.GroupedBackend", Short)
    return Harness(tmp_path, _NUM_MODELS, build=grouped_backend)


def work(harness: Harness) -> list[tuple[int, Any]]:
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    made = [(number, [number + 1, 2, 3]) for number in range(_NUM_MODELS)]
    return [(model, harness.sequence(model, prompt, params, seed=5, prompt_logprobs=True)) for model, prompt in made]


def test_halves_of_a_step_write_what_the_whole_would_have(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    relieved: list[int] = []
    monkeypatch.setattr(harness.engine, "_on_low_memory", lambda: relieved.append(1))
    whole = harness.run(work(harness))
    assert relieved == []
    monkeypatch.setattr(Short, "max_spans", _NUM_MODELS // 2)
    halves = harness.run(work(harness))
    harness.engine.close()
    assert [one.ids for one in halves] == [one.ids for one in whole]
    assert [[token.id for token in one.prompt] for one in halves] == [[n + 1, 2, 3] for n in range(_NUM_MODELS)]
    assert relieved


def test_who_finds_no_memory_in_half_a_step_either_is_told_and_the_engine_goes_on(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Short, "max_spans", 0)
    refused = harness.run(work(harness))
    assert {type(one.last.error) for one in refused if one.last} == {OutOfMemory}
    monkeypatch.setattr(Short, "max_spans", 100)
    assert all(one.last and one.last.error is None for one in harness.run(work(harness)))
    harness.engine.close()


def test_what_torch_says_is_understood() -> None:
    """By a process whose address space is at its limit; the error is torch's own."""
    code = """
import resource, torch
from serve.engine.memory import is_out_of_memory
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
try:
    torch.empty(1 << 28)
except Exception as exc:
    print(is_out_of_memory(exc), "DefaultCPUAllocator" in str(exc))
"""
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert said.stdout.split() == ["True", "True"]


@pytest.mark.parametrize(
    ("error", "is_it"),
    [(MemoryError(), True), (OSError(12, "Cannot allocate memory"), True), (torch.OutOfMemoryError(), True),
     (OSError(5, "Input/output error"), False), (RuntimeError("shape '[2]' is invalid"), False)],
)  # fmt: skip
def test_other_errors_are_no_lack_of_memory(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) is is_it


def test_a_probe_is_answered_by_the_thread_and_not_after_its_end(harness: Harness) -> None:
    harness.engine.probe().result(30)
    harness.engine.close()
    assert not harness.engine.probe().done()
