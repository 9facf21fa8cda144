"""Texts: what is asked for, what comes back, and the protocol of whatever writes them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypedDict

from serve.types.keys import ALL_SEEING, Viewer
from serve.types.usage import TopView

MAX_CHOICES = 16  # of one prompt
PREVIEW_PROMPT = "My dream is"  # how the first texts of a bot begin: huggingtweets' own

FinishReason = Literal["stop", "length", "stop_sequence"]
"""`stop`: the model ended the text itself; `length`: max_new_tokens; `stop_sequence`: a stop string."""

Tier = Literal["device", "host", "disk", "hub"]
"""Where a model's weights were when the request came. `device`: already in a slot."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; every field applies to one sequence, whatever else is in its batch.

    Order of effect: logit_bias, repetition / presence / frequency penalty, min_new_tokens, temperature,
    top_k, top_p, min_p, typical_p: transformers' own order. A neutral value switches a step off.
    """

    temperature: float = 1.0  # 0: greedy, and every filter below is without effect
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens seen, prompt included
    presence_penalty: float = 0.0  # subtracted once from tokens generated so far
    frequency_penalty: float = 0.0  # subtracted per occurrence from tokens generated so far
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    max_new_tokens: int = 160  # huggingtweets' own; the most where nobody says how many: limits reckon with it
    min_new_tokens: int = 0  # the end-of-text token is not sampled before
    stop: tuple[str, ...] = ()  # generation ends before the first of these; it is not part of the text
    ignore_eos: bool = False


class SamplingOverrides(TypedDict, total=False):
    """What a request said itself; all else comes from the model's own generation_config.json."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    max_new_tokens: int
    min_new_tokens: int
    stop: tuple[str, ...]
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Written:
    """What there is of a sequence already: whoever wrote it did not finish."""

    token_ids: tuple[int, ...] = ()  # its own; all that its deltas told of
    is_over: bool = False  # it has ended: nothing is to be added


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`num_choices` continuations of each prompt by one model. Sequence index = prompt * num_choices + choice.

    With `written`, one for each sequence, only what follows is generated: the deltas that would have come next.
    """

    model_id: str
    prompts: tuple[str | tuple[int, ...], ...]  # text, or token ids; "" means <|endoftext|> alone
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    num_choices: int = 1
    seed: int = 0  # 64 bits; the same (seed, prompt, choice) gives the same text
    top_logprobs: int = 0  # how many alternatives to report at each position
    prompt_logprobs: bool = False  # also report the prompt's own tokens (`echo` with `logprobs`, HF `prefill`)
    truncate: int | None = None  # keep only this many last prompt tokens (HF `truncate`)
    add_bos: bool = False  # put <|endoftext|> before text prompts: the start of a tweet
    is_whole: bool = False  # nobody reads along: what follows the first delta may wait for the end
    written: tuple[Written, ...] = ()  # (): nothing, of any sequence
    request_id: str = ""
    viewer: Viewer = ALL_SEEING  # what they may not see, there is no model of that name
    caller: str = ""  # who shares the engine fairly with others: a hash of the API key, never the key


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token with its natural-log probability under the model (before temperature and filters)."""

    id: int
    text: str  # may hold U+FFFD where the token is a part of a character
    logprob: float | None  # None for the first prompt token, which nothing precedes
    special: bool = False
    top: tuple[tuple[int, str, float], ...] = ()  # (id, text, logprob), best first


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """Sent with the first delta of a sequence."""

    text: str  # the prompt as the model saw it, decoded
    num_tokens: int
    tier: Tier
    queue_s: float  # from arrival to the first step, loading included
    load_s: float  # waiting for the weights; 0 when resident
    tokens: tuple[TokenInfo, ...] = ()  # only with prompt_logprobs
    revision: str = ""  # of the model that answers; "" where it is not known


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in one sequence since its last delta.

    `text` never ends inside a character and never holds the beginning of a stop string, so it may be
    empty or lag behind `tokens`. The last delta has a `finish_reason`, or an `error` for this sequence alone.
    """

    index: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None
    prompt: PromptInfo | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Resident:
    """One model in memory, as `rookery ps` shows it."""

    model_id: str
    revision: str
    tier: Tier
    num_bytes: int
    leases: int
    idle_s: float
    replica: str = ""


@dataclass(frozen=True, slots=True)
class Eviction:
    """A model that was dropped from memory."""

    model_id: str
    revision: str
    reason: str  # the pool's word: budget, forgotten, closed
    num_bytes: int
    ago_s: float


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One generator as an operator sees it."""

    name: str  # "" where there is only one, in this process
    device: str
    dtype: str
    used_bytes: int  # of models resident, on their way in and on their way out
    budget_bytes: int
    residents: tuple[Resident, ...]
    evictions: tuple[Eviction, ...]  # the last 50, newest first
    num_waiting: int  # requests that wait for their model
    num_queued: int  # sequences that wait for a place in the batch
    num_running: int  # sequences that are being written
    up_s: float


class Generator(Protocol):
    """Whatever turns requests into text: the engine in this process, or a Ray Serve handle to it."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        """Coalesced deltas of all sequences. Closing the iterator cancels what is left.

        Raises: ModelNotFound, ModelUnusable, InvalidRequest, Overloaded, ... before the first delta.
        """
        ...

    async def replicas(self) -> list[ReplicaView]: ...

    async def top(self, limit: int) -> TopView:
        """Who has used the service most in the last one to two hours: the `limit` greatest of each list."""
        ...

    async def forget(self, model_id: str, *, at_once: bool = False) -> None:
        """Drop a model that was deleted or disabled from memory; sequences under way finish, or end `at_once`."""
        ...

    async def check_ready(self) -> None:
        """Really generates a token with the base model. Raises: RookeryError when it cannot."""
        ...
