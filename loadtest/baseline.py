"""Rookery over HTTP against `model.generate` per request, side by side in one run.

    python -m loadtest.baseline

Eight distinct models of GPT-2-small shape (random weights), eight concurrent clients (one a model), 60 new
tokens each, top-p 0.95. The peer has all its models loaded beforehand and answers the same requests one
after another. Rounds alternate between the two, and the figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loadtest.models import write_random_gpt2

PROMPT = "My dream is"
NAMESPACE = "bench"


@contextmanager
def running_server(data: Path, dtype: str) -> Iterator[str]:
    """`rookery up` on a free port; yields its URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = os.environ | {"ROOKERY_DTYPE": dtype, "ROOKERY_HUB_ENABLED": "0"}
    command = [sys.executable, "-m", "deployments.cli", "up", "--port", str(port), "--data", str(data), "--no-browser"]
    with (data / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if line.startswith("ready "):
                    yield line.split()[1]
                    break
            else:
                raise SystemExit("the server did not start: " + (data / "server.log").read_text()[-2000:])
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)


async def serve_round(url: str, num_models: int, streams: int, num_tokens: int) -> float:
    """Tokens a second of `streams` clients for each model, all at once."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(model: int, seed: int) -> int:
            body = {
                "model": f"{NAMESPACE}/m{model}",
                "prompt": PROMPT,
                "max_tokens": num_tokens,
                "min_tokens": num_tokens,
                "seed": seed,
            }
            answer = await client.post("/v1/completions", json=body)
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        started = time.perf_counter()
        counts = await asyncio.gather(*(one(m, s) for s in range(streams) for m in range(num_models)))
        return sum(counts) / (time.perf_counter() - started)


class Peer:
    """The obvious way: every model loaded by transformers, one `generate` for each request."""

    def __init__(self, folders: list[Path], dtype: torch.dtype) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folders[0])
        self._models: list[Any] = [AutoModelForCausalLM.from_pretrained(f, dtype=dtype).eval() for f in folders]

    @torch.inference_mode()
    def round(self, streams: int, num_tokens: int) -> float:
        """Tokens a second."""
        started = time.perf_counter()
        count = 0
        for _ in range(streams):
            for model in self._models:
                inputs = self._tokenizer(PROMPT, return_tensors="pt")
                ids = model.generate(
                    **inputs, do_sample=True, top_p=0.95, max_new_tokens=num_tokens, min_new_tokens=num_tokens,
                    pad_token_id=50256,
                )  # fmt: skip
                count += ids.shape[1] - inputs.input_ids.shape[1]
        return count / (time.perf_counter() - started)


def measure(data: Path, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Alternate rounds at one precision."""
    folders = [data / "models" / NAMESPACE / f"m{i}" for i in range(args.models)]
    peer = Peer(folders, getattr(torch, dtype))
    ours: list[float] = []
    theirs: list[float] = []
    with running_server(data, dtype) as url:
        asyncio.run(serve_round(url, args.models, args.streams, 4))  # loads every model
        peer.round(1, 4)
        for _ in range(args.rounds):
            ours.append(asyncio.run(serve_round(url, args.models, args.streams, args.tokens)))
            theirs.append(peer.round(args.streams, args.tokens))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "rookery_tokens_s": round(statistics.median(ours), 1),
        "generate_tokens_s": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--streams", type=int, default=1, help="concurrent clients for each model")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    args = parser.parse_args()
    data = Path(tempfile.mkdtemp(prefix="rookery-bench-"))
    try:
        for i in range(args.models):
            write_random_gpt2(data / "models" / NAMESPACE / f"m{i}", seed=i)
        result: dict[str, Any] = {
            "models": args.models, "streams": args.streams, "tokens": args.tokens, "rounds": args.rounds,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__,
        }  # fmt: skip
        for dtype in args.dtypes.split(","):
            result[dtype] = measure(data, dtype, args)
        print(json.dumps(result))  # noqa: T201
    finally:
        shutil.rmtree(data, ignore_errors=True)


if __name__ == "__main__":
    main()
