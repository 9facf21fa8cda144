"""Ray Serve's own way: `@serve.multiplexed` for models that come and go, `@serve.batch` for requests that meet.

    python -m deployments.multiplexed --models FOLDER --keep 8 --port 8000

As Ray's guides on model multiplexing, dynamic batching and streamed batches have it. Ray splits a batch by model, runs
the parts at the same time, and takes the next batch when all of them are done. It is no part of the service: load tests
start it to compare the two, and it is here because nothing else knows Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer

from loadtest.peers.completions import Wanted, ending, event, whole
from loadtest.peers.peer import cores

BATCH = 8  # requests; the wait for more of them is Ray's default
MAX_REQUESTS = 256  # at once; Ray's default of 5 would leave batches unfilled


class Rows:
    """What `generate` writes, token by token for all rows of a batch; made for its `streamer`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[list[int] | None] = asyncio.Queue()

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 1:  # the prompts, which come first, have two dimensions
            self._loop.call_soon_threadsafe(self._steps.put_nowait, value.tolist())

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._steps.put_nowait, None)

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        while (step := await self._steps.get()) is not None:
            yield step


def load(folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


@torch.inference_mode()
def generate(model: Any, inputs: Any, batch: list[Wanted], rows: Rows) -> None:
    """The longest of the batch decides; a row's sampling is that of the first, as `generate` has one for all."""
    try:
        if batch[0].seed is not None:
            torch.manual_seed(batch[0].seed)
        model.generate(
            **inputs, **batch[0].sampling, streamer=rows, pad_token_id=model.config.eos_token_id,
            max_new_tokens=max(wanted.max_tokens for wanted in batch),
            min_new_tokens=max(wanted.min_tokens for wanted in batch),
        )  # fmt: skip
    finally:
        rows.end()


async def pieces(model: Any, tokenizer: Any, batch: list[Wanted]) -> AsyncIterator[list[Any]]:
    """The length of each row's prompt; then, step by step, a piece of text for each row that goes on."""
    inputs = tokenizer([wanted.prompt for wanted in batch], padding=True, return_tensors="pt")
    yield inputs["attention_mask"].sum(1).tolist()
    rows = Rows()
    done = asyncio.get_running_loop().run_in_executor(None, generate, model, inputs, batch, rows)
    left = [wanted.max_tokens for wanted in batch]
    async for tokens in rows:
        texts = tokenizer.batch_decode([[token] for token in tokens], skip_special_tokens=True)
        yield [text if count > 0 else StopIteration for text, count in zip(texts, left, strict=True)]
        stops = [token == tokenizer.eos_token_id for token in tokens]
        left = [0 if stop else count - 1 for count, stop in zip(left, stops, strict=True)]
    await done


async def events(wanted: Wanted, row: AsyncIterator[Any]) -> AsyncIterator[str]:
    """A stream of what comes for one row."""
    num_prompt = num_tokens = 0
    async for piece in row:
        if isinstance(piece, int):
            num_prompt = piece
        else:
            num_tokens += 1
            yield event(wanted, piece)
    yield ending(wanted, num_prompt, num_tokens)


class Ingress:
    """Reads which model is wanted, which Ray wants to know before it hands a request on."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse(await self._writer.num_loads.remote())
        wanted = Wanted.of(await request.json())
        row = self._writer.options(stream=True, multiplexed_model_id=wanted.model).stream.remote(wanted)
        if wanted.is_streaming:
            return StreamingResponse(events(wanted, row), media_type="text/event-stream")
        num_prompt, *texts = [piece async for piece in row]
        return JSONResponse(whole(wanted, "".join(texts), num_prompt, len(texts)))


def application(models: Path, keep: int) -> Any:
    """The application for `serve.run`."""

    @serve.deployment(max_ongoing_requests=MAX_REQUESTS, ray_actor_options={"num_cpus": cores()})
    class Writer:
        def __init__(self) -> None:
            self._num_loads = 0

        @serve.multiplexed(max_num_models_per_replica=keep)  # type: ignore[untyped-decorator]
        async def load(self, model_id: str) -> tuple[Any, Any]:
            self._num_loads += 1
            return await asyncio.to_thread(load, models / model_id)

        @serve.batch(max_batch_size=BATCH)  # type: ignore[untyped-decorator]
        async def write(self, batch: list[Wanted]) -> AsyncIterator[list[Any]]:
            model, tokenizer = await self.load(serve.get_multiplexed_model_id())
            async for step in pieces(model, tokenizer, batch):
                yield step

        async def stream(self, wanted: Wanted) -> AsyncIterator[Any]:
            async for piece in self.write(wanted):
                yield piece

        def num_loads(self) -> int:
            return self._num_loads

    ingress = serve.deployment(Ingress, max_ongoing_requests=MAX_REQUESTS)
    return ingress.bind(Writer.bind())  # type: ignore[attr-defined]


def main() -> None:
    """A cluster of its own, in a folder of its own, until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="a model's id is its path in this folder")
    parser.add_argument("--keep", type=int, default=8, help="models in memory")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    ended = threading.Event()
    with tempfile.TemporaryDirectory(prefix="ray-peer-", ignore_cleanup_errors=True) as scratch:
        ray.init(
            "local", num_cpus=cores() + 2, include_dashboard=False, log_to_driver=False,
            _temp_dir=scratch, configure_logging=False,
        )  # fmt: skip
        for number in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which puts its own in their place
            signal.signal(number, lambda *_: ended.set())
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": args.port})
            serve.run(application(args.models.absolute(), args.keep), name="peer")
            while not ended.wait(1.0):
                pass
        finally:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    main()
