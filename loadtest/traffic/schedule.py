"""A plan -> its calls, one after another as they are needed. It knows no clock and no server.

The same plan and models give the same calls. Each aspect of each flow has random numbers of its own, so that a plan
with one thing changed differs in that thing only: at another rate the same requests come in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from heapq import merge
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loadtest.traffic.arrivals import CHUNK, arrival_chunks
from loadtest.traffic.limits import check
from loadtest.traffic.plan import BadPlan, Call, Flow, Plan, Requests
from loadtest.traffic.popularity import choose_models
from loadtest.traffic.streams import stream
from loadtest.traffic.texts import OPENINGS, POSTS, draw_lengths, draw_places, prompt
from loadtest.traffic.trace import NOT_SAID, Trace, read_trace

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
_Draft: TypeAlias = tuple[Any, ...]  # the fields of a call from `at_s` on, behind the flow's place in the plan


def schedule(plan: Plan, model_ids: Sequence[str]) -> Iterator[Call]:
    """Calls of the open-loop flows in order of time, numbered from 0; `model_ids` with the most popular first.

    Raises: BadPlan, at once, where the plan cannot be played or the models are too few.
    """
    _check(plan, model_ids)
    flows = [(place, flow) for place, flow in enumerate(plan.flows) if flow.arrivals.process != "closed"]
    return _numbered(plan, [_drafts(place, flow, plan, model_ids) for place, flow in flows])


def closed_calls(
    plan: Plan, flow: Flow, model_ids: Sequence[str], numbers: Iterator[int] | None = None
) -> Iterator[Call]:
    """Calls without end for the clients of a closed loop, each of whom takes the next when it has its answer.

    `at_s` is 0, and `leaves_after_s` counts from the sending. `numbers`: shared by several flows. A flow that is not
    closed gives the requests that it would send. Raises: BadPlan
    """
    _check(plan, model_ids)
    chunks = _closed_chunks(plan, flow, model_ids)
    drafts = itertools.chain.from_iterable(chunks)
    numbers = itertools.count() if numbers is None else numbers
    return (Call(number, flow.name, *draft[1:]) for number, draft in zip(numbers, drafts, strict=False))


def _check(plan: Plan, model_ids: Sequence[str]) -> None:
    check(plan)
    if plan.needs_capacity or plan.needs_fit:
        raise BadPlan(f"plan {plan.name!r} speaks of multiples of what the server can do; they were not resolved")
    if plan.num_models > len(model_ids):
        raise BadPlan(
            f"plan {plan.name!r} asks for {plan.num_models:,} models, and there are {len(model_ids):,}. Make more with "
            f"`python -m loadtest models FOLDER --count {plan.num_models}`, or ask for fewer with --models"
        )


def _numbered(plan: Plan, flows: list[Iterator[_Draft]]) -> Iterator[Call]:
    # Two flows never tie beyond their places, which differ.
    drafts = merge(*flows, key=lambda draft: (draft[1], draft[0])) if len(flows) > 1 else itertools.chain(*flows)
    names = [flow.name for flow in plan.flows]
    for number, draft in enumerate(drafts):
        yield Call(number, names[draft[0]], *draft[1:])


def _drafts(place: int, flow: Flow, plan: Plan, model_ids: Sequence[str]) -> Iterator[_Draft]:
    ends_s = plan.ends_s if flow.ends_s is None else min(flow.ends_s, plan.ends_s)
    trace = read_trace(flow.arrivals.trace) if flow.arrivals.process == "trace" and flow.arrivals.trace else None
    drawing = _Drawing(plan.seed, flow, model_ids, trace)
    for times in arrival_chunks(flow.arrivals, flow.begins_s, ends_s, stream(plan.seed, flow.name, "arrivals")):
        yield from drawing.draw(place, times, times)


def _closed_chunks(plan: Plan, flow: Flow, model_ids: Sequence[str]) -> Iterator[Iterator[_Draft]]:
    drawing = _Drawing(plan.seed, flow, model_ids, None)
    for start in itertools.count(0, CHUNK):
        # Favourites churn as they would if the flow's rate were offered: nothing else here tells how time passes.
        yield drawing.draw(0, np.zeros(CHUNK), (start + np.arange(CHUNK)) / flow.arrivals.rate)


class _Drawing:
    """The requests of one flow, chunk by chunk."""

    def __init__(self, seed: int, flow: Flow, model_ids: Sequence[str], trace: Trace | None) -> None:
        self._requests = flow.requests
        self._model_ids = model_ids
        self._trace = trace
        self._first_model = flow.models.first
        self._num_drawn = 0
        aspects = ("models", "prompt lengths", "prompts", "lengths", "choices", "streaming", "leaving", "seeds")
        self._of = {aspect: stream(seed, flow.name, aspect) for aspect in aspects}
        self._choose = choose_models(flow.models, self._of["models"])
        self._numbers_of_choices, self._cumulative = _choices(flow.requests)

    def draw(self, place: int, at_s: Floats, times: Floats) -> Iterator[_Draft]:
        """Drafts that are sent at `at_s`, of models as they are popular at `times`; (n,) both."""
        size, asked, of = len(at_s), self._requests, self._of
        models = self._or_traced(self._choose(times), "model", self._first_model)
        prompt_lengths = draw_lengths(asked.prompt_tokens, OPENINGS, size, of["prompt lengths"])
        prompt_lengths = self._or_traced(prompt_lengths, "prompt_tokens")
        lengths = self._or_traced(draw_lengths(asked.output_tokens, POSTS, size, of["lengths"]), "output_tokens")
        places = draw_places(size, of["prompts"])
        choices = self._numbers_of_choices[np.searchsorted(self._cumulative, of["choices"].random(size), side="right")]
        streaming = of["streaming"].random(size) < asked.streaming
        seeds = of["seeds"].integers(2**31, size=size)
        self._num_drawn += size
        return zip(
            itertools.repeat(place),
            at_s.tolist(),
            map(self._model_ids.__getitem__, models.tolist()),
            map(prompt, prompt_lengths.tolist(), places.tolist()),
            lengths.tolist(),
            choices.tolist(),
            streaming.tolist(),
            seeds.tolist(),
            _leaving(asked, size, of["leaving"]),
            strict=False,
        )

    def _or_traced(self, drawn: Ints, column: str, first: int = 0) -> Ints:
        """What the trace says of these requests, and what was drawn where it says nothing."""
        if self._trace is None:
            return drawn
        said = getattr(self._trace, column)[self._num_drawn : self._num_drawn + len(drawn)]
        return np.where(said == NOT_SAID, drawn, first + said)


def _choices(asked: Requests) -> tuple[Ints, Floats]:
    """Numbers of texts, and the probability of each and all before it."""
    cumulative = np.cumsum(list(asked.choices.values()))
    likely = cumulative / cumulative[-1]
    return np.array(list(asked.choices), dtype=np.int64), likely


def _leaving(asked: Requests, size: int, rng: np.random.Generator) -> list[float | None]:
    leaves, patience_s = rng.random((size, 2)).T
    waits = -asked.patience_s * np.log1p(-patience_s)
    return [
        wait if leaves else None
        for leaves, wait in zip((leaves < asked.cancelled).tolist(), waits.tolist(), strict=True)
    ]
