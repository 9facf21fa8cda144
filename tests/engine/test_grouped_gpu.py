"""The path of devices on a CUDA device: the same answers, graphs captured once, copies beside running steps."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve.engine.backend import Span
from serve.engine.engine import EngineConfig
from serve.engine.grouped.backend import GroupedBackend
from serve.shape import GPT2Shape
from serve.types import SamplingParams
from tests.engine.harness import Harness, read_tensors
from tests.fakes.models import VOCAB_SIZE, tiny_config, write_tiny_gpt2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = torch.device("cuda")
NUM_MODELS = 4


class Rig:
    """Four tiny models in a backend on the device; transformers' twins there, in the same precision."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        shape = GPT2Shape.from_config(tiny_config(n_embd=64, n_positions=256))
        self.backend = GroupedBackend(shape, NUM_MODELS + 1, 32, dtype, CUDA)
        self.folders = [write_tiny_gpt2(folder / str(i), seed=i, n_embd=64, n_positions=256) for i in range(NUM_MODELS)]
        self.models: list[Any] = [
            AutoModelForCausalLM.from_pretrained(f, dtype=dtype).to(CUDA).eval() for f in self.folders
        ]
        for path in self.folders:
            self.backend.write(self.backend.acquire(), read_tensors(path))

    def check_step(self, texts: list[list[int]], token: int, atol: float) -> None:
        """Append `token` to every text (two a model); logits must be transformers'."""
        spans = [Span(i // 2, i, len(text), [token]) for i, text in enumerate(texts)]
        logits = self.backend.forward(spans).clone()
        for i, text in enumerate(texts):
            text.append(token)
            with torch.inference_mode():
                expected = self.models[i // 2](torch.tensor([text], device=CUDA)).logits[0, -1].float()
            torch.testing.assert_close(logits[i], expected, atol=atol, rtol=0)

    def prefill(self, texts: list[list[int]]) -> None:
        self.backend.forward([Span(i // 2, i, 0, text) for i, text in enumerate(texts)])


def random_texts(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (3 + 7 * i,), generator=generator).tolist() for i in range(2 * NUM_MODELS)]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
def test_prefill_and_decode_match_transformers(tmp_path: Path, dtype: torch.dtype, atol: float) -> None:
    rig = Rig(tmp_path, dtype)
    texts = random_texts(seed=1)
    rig.prefill(texts)
    for token in range(12):  # over the border from 64 to 128 positions for the longest
        rig.check_step(texts, token, atol)


def test_a_size_of_step_is_captured_once_whatever_is_swapped(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("graphs need Hopper's grouped_mm")
    rig = Rig(tmp_path, torch.bfloat16)
    texts = [text[:4] for text in random_texts(seed=2)]
    rig.prefill(texts)
    rig.check_step(texts, 1, atol=0.5)
    assert rig.backend.num_graphs == 1
    for model in range(NUM_MODELS):
        other = (model + 1) % NUM_MODELS
        rig.backend.clear(model)
        assert rig.backend.acquire() == model
        rig.backend.write(model, read_tensors(rig.folders[other]))
    rig.models = rig.models[1:] + rig.models[:1]
    for row, text in enumerate(texts):
        rig.backend.forget(row, len(text))
    rig.prefill(texts)
    rig.check_step(texts, 2, atol=0.5)
    assert rig.backend.num_graphs == 1


def test_copies_beside_running_steps_do_not_change_them(tmp_path: Path) -> None:
    rig = Rig(tmp_path, torch.bfloat16)
    free = rig.backend.acquire()
    stop, started = threading.Event(), threading.Event()

    def copy_all_the_time() -> None:
        while not stop.is_set():
            rig.backend.write(free, read_tensors(rig.folders[0]))
            started.set()

    thread = threading.Thread(target=copy_all_the_time)
    thread.start()
    try:
        assert started.wait(60)
        texts = random_texts(seed=3)
        rig.prefill(texts)
        for token in range(30):
            rig.check_step(texts, token, atol=0.5)
    finally:
        stop.set()
        thread.join()
    # And what was copied is whole.
    rig.backend.forward([Span(free, 30, 0, [1, 2, 3])])
    got = rig.backend.forward([Span(free, 30, 3, [4])])[0]
    rig.backend.forward([Span(0, 31, 0, [1, 2, 3])])
    torch.testing.assert_close(got.clone(), rig.backend.forward([Span(0, 31, 3, [4])])[0], atol=0.1, rtol=0)


def test_64_models_with_4_texts_each_all_end_with_their_tokens(tmp_path: Path) -> None:
    config = EngineConfig(CUDA, "bfloat16", 2 << 30, max_sequences=256, max_step_rows=384)
    harness = Harness(tmp_path, 64, config, n_embd=64)
    params = SamplingParams(top_p=0.95, max_new_tokens=20, ignore_eos=True)
    work = [(model, harness.sequence(model, [1, 2, 3], params, seed=text)) for model in range(64) for text in range(4)]
    results = harness.run(work)
    assert all(len(got.ids) == 20 for got in results)
    harness.engine.close()
