"""One process, FastAPI, and a least-recently-used cache of transformers models: the server that most would write.

    python -m loadtest.peers.lru_server --models FOLDER --keep 8 --port 8000

A request generates in a thread with a streamer, so many at a time as `--at-once` says, never two with one model. A
model in use is not dropped: who needs room waits for one that is idle.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import AsyncTextIteratorStreamer, AutoModelForCausalLM, AutoTokenizer

from loadtest.peers.completions import Wanted, ending, event, whole

MAX_REQUESTS = 256  # threads: as many as anybody asks at once


@dataclass(slots=True)
class Loaded:
    """A model in memory."""

    model: Any
    tokenizer: Any
    users: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


def load(folder: Path) -> Loaded:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return Loaded(model, AutoTokenizer.from_pretrained(folder))


class Cache:
    """At most `keep` models; the one that was asked for longest ago goes first. For one event loop."""

    def __init__(self, models: Path, keep: int) -> None:
        self._models = models
        self._keep = keep
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._loading = asyncio.Lock()
        self._idle = asyncio.Event()
        self.num_loads = 0

    @asynccontextmanager
    async def borrow(self, model_id: str) -> AsyncIterator[Loaded]:
        """The model, which stays in memory meanwhile."""
        if model_id not in self._loaded:
            await self._load(model_id)
        loaded = self._loaded[model_id]
        self._loaded.move_to_end(model_id)
        loaded.users += 1
        try:
            yield loaded
        finally:
            loaded.users -= 1
            self._idle.set()

    async def _load(self, model_id: str) -> None:
        async with self._loading:
            if model_id in self._loaded:
                return
            while len(self._loaded) >= self._keep:
                await self._drop_idle()
            self._loaded[model_id] = await asyncio.to_thread(load, self._models / model_id)
            self.num_loads += 1

    async def _drop_idle(self) -> None:
        self._idle.clear()
        for model_id, loaded in self._loaded.items():
            if not loaded.users:
                del self._loaded[model_id]
                return
        await self._idle.wait()


class Answer:
    """One completion as it is written."""

    def __init__(self, wanted: Wanted, cache: Cache, turns: asyncio.Semaphore, threads: ThreadPoolExecutor) -> None:
        self._wanted = wanted
        self._cache = cache
        self._turns = turns
        self._threads = threads
        self.num_prompt = self.num_tokens = 0

    async def texts(self) -> AsyncIterator[str]:
        """Pieces of text; the counts are right when they are over."""
        async with self._cache.borrow(self._wanted.model) as loaded, loaded.lock, self._turns:
            inputs = loaded.tokenizer(self._wanted.prompt, return_tensors="pt")
            streamer = AsyncTextIteratorStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
            loop = asyncio.get_running_loop()
            done = loop.run_in_executor(self._threads, self._generate, loaded.model, inputs, streamer)
            async for text in streamer:
                yield text
            self.num_prompt = inputs["input_ids"].shape[1]
            self.num_tokens = await done - self.num_prompt

    async def events(self) -> AsyncIterator[str]:
        async for text in self.texts():
            yield event(self._wanted, text)
        yield ending(self._wanted, self.num_prompt, self.num_tokens)

    @torch.inference_mode()
    def _generate(self, model: Any, inputs: Any, streamer: AsyncTextIteratorStreamer) -> int:
        """Tokens of prompt and answer together."""
        wanted = self._wanted
        try:
            if wanted.seed is not None:
                torch.manual_seed(wanted.seed)
            ids = model.generate(
                **inputs, **wanted.sampling, streamer=streamer, pad_token_id=model.config.eos_token_id,
                max_new_tokens=wanted.max_tokens, min_new_tokens=wanted.min_tokens,
            )  # fmt: skip
            return int(ids.shape[1])
        finally:
            streamer.end()  # again is harmless, and never is a request that waits for ever


def application(models: Path, keep: int, at_once: int = 8) -> FastAPI:
    app = FastAPI()
    cache = Cache(models, keep)
    turns = asyncio.Semaphore(at_once)
    threads = ThreadPoolExecutor(MAX_REQUESTS)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        wanted = Wanted.of(await request.json())
        answer = Answer(wanted, cache, turns, threads)
        if wanted.is_streaming:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        text = "".join([piece async for piece in answer.texts()])
        return JSONResponse(whole(wanted, text, answer.num_prompt, answer.num_tokens))

    @app.get("/loads")
    async def loads() -> int:
        return cache.num_loads

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="a model's id is its path in this folder")
    parser.add_argument("--keep", type=int, default=8, help="models in memory")
    parser.add_argument("--at-once", type=int, default=8, help="texts that are written at the same time")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(
        application(args.models, args.keep, args.at_once), host="127.0.0.1", port=args.port, log_level="warning"
    )


if __name__ == "__main__":
    main()
