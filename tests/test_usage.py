"""The sketch of who uses the service most: exact for few, bounded for many."""

from __future__ import annotations

import random
from collections import Counter

from serve.types import TopView, Use
from serve.usage import HOUR_S, Usage, top_of


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def top(*usages: Usage, limit: int = 10) -> TopView:
    return top_of([usage.sketch() for usage in usages], limit)


def test_few_names_are_counted_exactly_in_both_orders() -> None:
    usage = Usage()
    for name, caller, num_tokens in (("ada", "k1", 5), ("ada", "k1", 5), ("bob", "", 100)):
        usage.add(name, caller, num_tokens)
    seen = top(usage)
    assert (seen.num_requests, seen.num_tokens) == (3, 110)
    assert seen.models.by_requests == (Use("ada", 2, 10), Use("bob", 1, 100))
    assert seen.models.by_tokens == (Use("bob", 1, 100), Use("ada", 2, 10))
    assert seen.callers.by_requests == (Use("k1", 2, 10), Use("", 1, 100))


def test_nobody_yet_is_an_empty_answer() -> None:
    assert top(Usage()).models.by_requests == top().callers.by_tokens == ()


def test_replicas_are_added_up() -> None:
    one, other = Usage(), Usage()
    for usage, times in ((one, 2), (other, 3)):
        for _ in range(times):
            usage.add("ada", "k1", 7)
    assert top(one, other).models.by_tokens == (Use("ada", 5, 35),)


def test_the_answer_is_of_the_last_one_to_two_hours() -> None:
    clock = Clock()
    usage = Usage(clock)
    usage.add("ada", "", 1)
    clock.now = 1.5 * HOUR_S
    usage.add("bob", "", 1)
    assert {use.name for use in top(usage).models.by_requests} == {"ada", "bob"}
    assert top(usage).window_s == 1.5 * HOUR_S
    clock.now = 2.6 * HOUR_S
    assert {use.name for use in top(usage).models.by_requests} == {"bob"}
    clock.now = 9 * HOUR_S
    assert top(usage).models.by_requests == ()
    assert top(usage).window_s == 0


def test_a_hundred_thousand_names_cost_bounded_memory_and_a_bounded_error() -> None:
    generator = random.Random(7)
    names = [f"huggingtweets/user{number}" for number in range(100_000)]
    weights = [1 / (rank + 1) for rank in range(len(names))]  # Zipf, s = 1
    asked = generator.choices(names, weights, k=200_000) + names  # each at least once
    truth, usage = Counter(asked), Usage()
    for name in asked:
        usage.add(name, "", 10)
    sketch, seen = usage.sketch(), top(usage)
    assert sum(len(part) for part in (sketch.model_requests, sketch.model_tokens)) < 2 * 768 * 64
    most = 0.0035 * len(asked)
    for use in seen.models.by_requests:
        assert truth[use.name] <= use.requests <= truth[use.name] + use.requests_error
        assert use.requests_error <= most and use.tokens_error <= 10 * most
        assert truth[use.name] * 10 <= use.tokens
    assert [use.name for use in seen.models.by_requests[:3]] == names[:3]


def test_hostile_names_are_counted_too() -> None:
    usage = Usage()
    usage.add("\ud800<script>\n", "", 1)
    assert top(usage).models.by_requests[0].name == "?<script>\n"
