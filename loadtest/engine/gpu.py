"""Rookery's engine on a GPU: many models at once, against the memory's speed and against `generate`.

Needs a CUDA device, else it says so and exits with status 2; `--device cpu --tiny` runs all of it on a toy, on the
code path of devices. Weights are random, of GPT-2 small, and all models have memory of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loadtest.models import PEAKED, write_random_gpt2
from serve.engine.device import engine_config
from serve.engine.engine import Engine, Layout, Slot
from serve.engine.grouped.backend import GroupedBackend
from serve.engine.sequence import Output, Sequence
from serve.engine.text import Vocabularies
from serve.settings import Settings
from serve.shape import GPT2Shape, canonical_name
from serve.types import SamplingParams

PROMPT_IDS = (50256, 3666, 4320, 318)  # "<|endoftext|>My dream is"
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Work:
    """What is measured: `models` x `streams` texts of `tokens` new tokens, `rounds` times."""

    device: torch.device
    models: int
    streams: int
    tokens: int
    rounds: int
    swaps: int
    probe_bytes: int  # of the tensor that the memory's speed is measured with
    sizes: Mapping[str, int]


class Contender:
    """An engine with all models in slots, and one slot more to swap."""

    def __init__(self, work: Work, folder: Path) -> None:
        num_texts = work.models * work.streams
        settings = Settings(
            device=work.device.type,
            dtype="bfloat16",
            memory_bytes=1 << 28 if work.sizes else 0,  # a toy needs little; else what the service takes
            max_sequences=num_texts,
            max_step_rows=num_texts + 128,
        )
        self._work = work
        self.tensors = {
            known: tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
            if (known := canonical_name(name))
        }
        self.layout = Layout(GPT2Shape.from_config(json.loads((folder / "config.json").read_text())))
        self._vocabulary = Vocabularies().load(folder)
        self._idle = threading.Event()
        self._num_open = self._num_tokens = 0
        self._error: Exception | None = None
        self.engine = Engine(engine_config(settings), on_outputs=self._take, build=self._build)
        self.slots = [self.load() for _ in range(work.models)]

    def load(self) -> Slot:
        return self.engine.load(self.layout, self.tensors)

    def run(self, seed: int) -> float:
        """Tokens per second, first to last step."""
        params = SamplingParams(top_p=0.95, temperature=1.0, max_new_tokens=self._work.tokens, ignore_eos=True)
        texts = [
            (slot, Sequence(slot=slot.index, prompt_ids=PROMPT_IDS, params=params, vocabulary=self._vocabulary,
                            seed=seed, choice=choice))
            for slot in self.slots for choice in range(self._work.streams)
        ]  # fmt: skip
        self._num_open, self._num_tokens = len(texts), 0
        self._idle.clear()
        started = time.perf_counter()
        for slot, sequence in texts:
            self.engine.submit(slot, [sequence])
        self._idle.wait()
        if self._error:
            raise RuntimeError(self._error)
        return self._num_tokens / (time.perf_counter() - started)

    def _build(
        self, shape: GPT2Shape, num_slots: int, kv_rows: int, weights: str, device: torch.device, *, tied: bool
    ) -> GroupedBackend:
        self.backend = GroupedBackend(shape, num_slots, kv_rows, getattr(torch, weights), device, tied=tied)
        return self.backend

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._num_tokens += output.token is not None
            self._num_open -= output.is_last
            self._error = self._error or output.error
        if self._num_open == 0:
            self._idle.set()


def main() -> int:
    work = parse(sys.argv[1:])
    if work.device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("No CUDA device is available; run this where one is, or with --device cpu --tiny.\n")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        result = measure(work, Path(folder))
    print(json.dumps(result))  # noqa: T201
    return 0


def parse(arguments: list[str]) -> Work:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a toy instead of GPT-2 small: is the script sound?")
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--streams", type=int, default=4)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if args.tiny:
        return Work(device, 3, 2, 8, 2, 3, 1 << 24, {"n_embd": 32, "n_layer": 2, "n_head": 2})
    return Work(device, args.models, args.streams, 60, 5, 20, 1 << 32, {})


def measure(work: Work, folder: Path) -> dict[str, float]:
    write_random_gpt2(folder, seed=0, dtype=DTYPE, final_scale=PEAKED, shape=work.sizes)
    contender = Contender(work, folder)
    peer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(work.device).eval()
    # Once each before the clock runs: graphs are captured, libraries set themselves up.
    contender.run(seed=0)
    generate(peer, work)
    # In turns, so that both see the same state of the machine.
    rates: list[float] = []
    peer_rates: list[float] = []
    speeds: list[float] = []
    for seed in range(1, work.rounds + 1):
        rates.append(contender.run(seed))
        peer_rates.append(generate(peer, work))
        speeds.append(bandwidth(work))
    graphs = contender.backend.num_graphs
    idle_s = swap(contender, work.swaps)
    busy_s, busy_rate = swap_while_decoding(contender, work.swaps)
    contender.run(seed=0)
    contender.engine.close()

    rate, peer_rate, speed = map(statistics.median, (rates, peer_rates, speeds))
    model_bytes = sum(tensor.nbytes for name, tensor in contender.tensors.items() if name != "lm_head.weight")
    floor_rate = work.streams * speed / model_bytes  # a token for each text takes reading each model once
    report(work, "rookery", [f"{rate:,.0f} tokens/s", spread(rates)])
    report(work, "rookery, with a model swapped all the time", [f"{busy_rate:,.0f} tokens/s"])
    report(work, "generate, one model after another", [f"{peer_rate:,.0f} tokens/s", spread(peer_rates)])
    report(work, "floor: each model's bytes read once a token", [f"{floor_rate:,.0f} tokens/s"])
    report(work, "memory", [f"{speed / 1e9:,.0f} GB/s", spread([s / 1e9 for s in speeds])])
    report(work, "a model into a slot", [f"idle {idle_s * 1e3:.1f} ms", f"while decoding {busy_s * 1e3:.1f} ms"])
    report(work, "graphs", [f"{graphs} captured", f"{contender.backend.num_graphs} after {2 * work.swaps} swaps"])
    return {
        "tokens_s_64x4": round(rate, 1),
        "hbm_floor_share": round(rate / floor_rate, 3),
        "vs_generate": round(rate / peer_rate, 2),
        "swap_ms": round(busy_s * 1e3, 2),
        "captured_graphs": contender.backend.num_graphs,
    }


@torch.inference_mode()
def generate(model: Any, work: Work) -> float:
    """transformers' tokens per second with one model's texts in a batch; other models would come after it."""
    ids = torch.tensor([PROMPT_IDS] * work.streams, device=work.device)
    seconds = timed(work.device, lambda: model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_p=0.95, top_k=0, temperature=1.0,
        min_new_tokens=work.tokens, max_new_tokens=work.tokens, pad_token_id=50256,
    ))  # fmt: skip
    return work.streams * work.tokens / seconds


def bandwidth(work: Work) -> float:
    """Bytes per second that the device reads at best."""
    source = torch.ones(work.probe_bytes // 4, dtype=torch.float32, device=work.device)
    target = torch.empty_like(source)
    reading = min(timed(work.device, lambda: source.sum()) for _ in range(5))
    copying = min(timed(work.device, lambda: target.copy_(source)) for _ in range(5))
    return max(source.nbytes / reading, 2 * source.nbytes / copying)


def swap(contender: Contender, count: int) -> float:
    """Median seconds of a load into the free slot."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        slot = contender.load()
        seconds.append(time.perf_counter() - started)
        contender.engine.unload(slot)
    return statistics.median(seconds)


def swap_while_decoding(contender: Contender, count: int) -> tuple[float, float]:
    """The same beside a running batch, and that batch's tokens per second."""
    seconds: list[float] = []
    done = threading.Event()

    def loads() -> None:
        while len(seconds) < count or not done.is_set():
            seconds.append(swap(contender, 1))

    thread = threading.Thread(target=loads)
    thread.start()
    rate = contender.run(seed=1)
    done.set()
    thread.join()
    return statistics.median(seconds), rate


def timed(device: torch.device, function: Callable[[], Tensor]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def spread(values: list[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g} in {len(values)} runs"


def report(work: Work, what: str, figures: list[str]) -> None:
    print(f"{work.models} x {work.streams}  {what:45} {'; '.join(figures)}")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
