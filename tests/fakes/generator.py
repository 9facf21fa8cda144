"""A Generator without a model: words drawn by (seed, prompt, choice), in tokens, deltas and all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

from serve.errors import GenerationFailed, ModelNotFound, Overloaded, RookeryError, StoreUnavailable
from serve.types import (
    Delta,
    Eviction,
    FinishReason,
    GenerationRequest,
    PromptInfo,
    ReplicaView,
    Resident,
    SamplingParams,
    TokenInfo,
    TopView,
)
from serve.usage import Usage, top_of

WORDS = (" the", " my", " dream", " is", " tea", " \u2028", " «day»", "\u0085", "!", " 👋")
END = TokenInfo(50256, "<|endoftext|>", -0.5, special=True)


def tokens_of(word: str) -> list[TokenInfo]:
    """One token; two for the emoji, each a part of its bytes."""
    index = WORDS.index(word)
    logprob = -0.25 * (index + 1)
    top = ((index, word, logprob), (index + 1, "?", -9.0), (index + 2, "?", float("-inf")))
    if "👋" in word:
        return [TokenInfo(index, " \ufffd", logprob, top=top), TokenInfo(index + 1, "\ufffd", logprob, top=top)]
    return [TokenInfo(index, word, logprob, top=top)]


class EchoGenerator:
    """Behaves by the model's name: `missing`, `busy`, `away`, `nan`, `halfway`, `crash`, `stuck`, else writes."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.forgotten: list[str] = []
        self.num_closed = 0
        self.closed = asyncio.Event()
        self.is_ready = True
        self.num_checks = 0
        self.views = [replica_view("")]
        self.usage = Usage()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        self.requests.append(request)
        try:
            name = request.model_id.partition("@")[0].rpartition("/")[2]
            refuse(name)
            sequences = [
                write(request, prompt, choice)
                for prompt in range(len(request.prompts))
                for choice in range(request.num_choices)
            ]
            for step in range(max(map(len, sequences))):
                await asyncio.sleep(0)
                yield [deltas[step] for deltas in sequences if step < len(deltas)]
                await misbehave(name, step)
        finally:
            self.num_closed += 1
            self.closed.set()

    async def replicas(self) -> list[ReplicaView]:
        return list(self.views)

    async def top(self, limit: int) -> TopView:
        return top_of([self.usage.sketch()], limit)

    async def forget(self, model_id: str, *, at_once: bool = False) -> None:
        self.forgotten.append(model_id)

    async def check_ready(self) -> None:
        self.num_checks += 1
        if not self.is_ready:
            raise GenerationFailed("no numbers")


def replica_view(name: str, *residents: Resident, evictions: Sequence[Eviction] = ()) -> ReplicaView:
    """A generator with a GiB for models, which has these in memory."""
    used_bytes = sum(resident.num_bytes for resident in residents)
    return ReplicaView(name, "cpu", "float32", used_bytes, 1 << 30, residents, tuple(evictions), 0, 0, 0, 60.0)


def refuse(name: str) -> None:
    errors: dict[str, RookeryError] = {
        "missing": ModelNotFound("There is no such model.", param="model"),
        "busy": Overloaded("Too many requests; come back.", retry_after_s=2.2),
        "away": StoreUnavailable("The disk is away.", retry_after_s=7),
    }
    if name in errors:
        raise errors[name]


async def misbehave(name: str, step: int) -> None:
    if name == "stuck":
        await asyncio.Event().wait()
    if step == 1 and name == "halfway":
        raise GenerationFailed("The model gave no usable numbers.")
    if step == 1 and name == "crash":
        raise RuntimeError("secret detail")


def write(request: GenerationRequest, prompt: int, choice: int) -> list[Delta]:
    """All deltas of one sequence, a token each; the text ends before the first stop string."""
    index = prompt * request.num_choices + choice
    sampling = request.sampling
    max_new_tokens = sampling.get("max_new_tokens", SamplingParams().max_new_tokens)
    draw = random.Random(f"{request.seed}/{request.prompts[prompt]}/{choice}")
    tokens: list[TokenInfo] = []
    pieces: list[str] = []
    finish: FinishReason = "length"
    while len(tokens) < max_new_tokens:
        word = WORDS[0] if sampling.get("temperature") == 0 else draw.choice(WORDS)
        parts = tokens_of(word)
        tokens += parts
        pieces += [""] * (len(parts) - 1) + [word]
        if len(tokens) > 40:
            tokens, pieces, finish = [*tokens, END], [*pieces, ""], "stop"
            break
        text = "".join(pieces)
        found = [text.find(stop) for stop in sampling.get("stop", ()) if stop in text]
        if found:
            pieces = [""] * (len(tokens) - 1) + [text[: min(found)]]
            finish = "stop_sequence"
            break
    tokens, pieces = tokens[:max_new_tokens], pieces[:max_new_tokens]
    deltas = []
    for i, (token, piece) in enumerate(zip(tokens, pieces, strict=True)):
        last = i == len(tokens) - 1
        error = "no usable numbers" if request.model_id == "nan" and last else None
        info = prompt_info(request, prompt) if i == 0 else None
        top = token.top[: request.top_logprobs]
        shown = TokenInfo(token.id, token.text, token.logprob, token.special, top)
        deltas.append(Delta(index, piece, (shown,), finish if last and not error else None, info, error))
    return deltas


def prompt_info(request: GenerationRequest, prompt: int) -> PromptInfo:
    given = request.prompts[prompt]
    text = given if isinstance(given, str) else "".join(WORDS[token % len(WORDS)] for token in given)
    words = [f"{' ' if i else ''}{word}" for i, word in enumerate(text.split(" "))]
    tokens = tuple(TokenInfo(i, word, None if i == 0 else -1.0) for i, word in enumerate(words))
    shown = tokens if request.prompt_logprobs else ()
    return PromptInfo(text, len(tokens), "disk", queue_s=0.25, load_s=0.125, tokens=shown, revision="abc123")
