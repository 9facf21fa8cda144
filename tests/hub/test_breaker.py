"""The circuit breaker against a plain model of itself, and by hand where the words of the promise are plain."""

from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.errors import HubUnreachable, StoreUnavailable
from serve.hub.breaker import PROBE_S, Breaker, Breakers

DOWN = StoreUnavailable("The Hub answers 503.")


class Clock:
    """A clock and a thread number that stand still until they are told."""

    def __init__(self) -> None:
        self.now, self.thread = 100.0, 1

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(clock: Clock, jitter: float = 0.0) -> Breaker:
    return Breaker("hub", failures=3, clock=clock, jitter=lambda: jitter, caller=lambda: clock.thread)


def fail(breaker: Breaker, times: int = 1, exc: StoreUnavailable = DOWN, about: str | None = None) -> None:
    for _ in range(times):
        breaker.check()
        breaker.failed(exc, about=about)


def left_s(breaker: Breaker) -> float:
    with pytest.raises(StoreUnavailable) as caught:
        breaker.check()
    assert caught.value.retry_after_s is not None
    return caught.value.retry_after_s


def test_it_opens_after_failures_in_a_row_and_tells_how_long(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 2)
    breaker.succeeded()
    fail(breaker, 2)
    assert breaker.state == "closed"
    fail(breaker, 1)
    assert breaker.state == "open" and left_s(breaker) == 5
    clock.now += 3
    assert left_s(breaker) == 2


def test_one_caller_at_a_time_probes_and_its_success_closes(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 3)
    clock.now += 5
    breaker.check()
    clock.thread = 2
    assert 0 < left_s(breaker) <= 5
    clock.thread = 1
    breaker.succeeded()
    assert breaker.state == "closed"
    fail(breaker, 2)
    breaker.check()


def test_each_failed_probe_doubles_the_pause_up_to_a_minute(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 3)
    pauses = []
    for _ in range(6):
        pauses.append(left_s(breaker))
        clock.now += pauses[-1]
        fail(breaker, 1)
    assert pauses == [5, 10, 20, 40, 60, 60]


def test_pauses_are_jittered_by_at_most_a_quarter_and_never_shorter(clock: Clock) -> None:
    breaker = make(clock, jitter=1.0)
    fail(breaker, 3)
    assert left_s(breaker) == 6.25


def test_pause_that_the_host_asks_for_begins_at_once_and_a_later_word_prolongs_it(clock: Clock) -> None:
    breaker = make(clock)
    breaker.check()
    breaker.failed(DOWN, asked_s=20)
    assert left_s(breaker) == 20
    breaker.failed(DOWN, asked_s=30)  # of a request that was sent before
    assert left_s(breaker) == 30
    clock.now += 30
    breaker.check()
    breaker.succeeded()
    assert breaker.state == "closed"


def test_pause_that_the_host_asks_for_is_a_minute_at_most_whoever_was_told(clock: Clock) -> None:
    breaker = make(clock)
    breaker.check()
    breaker.failed(DOWN, asked_s=3600)
    assert left_s(breaker) == 60
    clock.now += 59
    clock.thread = 2
    breaker.failed(DOWN, asked_s=3600)
    assert left_s(breaker) == 60


def test_short_pause_and_one_asked_for_a_single_thing_bind_only_whom_they_were_told(clock: Clock) -> None:
    breaker = make(clock)
    breaker.check()
    breaker.failed(DOWN, asked_s=4)
    breaker.failed(DOWN, about="a", asked_s=40)
    assert breaker.state == "closed"


def test_failures_about_one_thing_count_once_and_of_several_they_are_the_hosts(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 50, about="a")
    fail(breaker, about="b")
    breaker.succeeded()
    fail(breaker, 2)
    assert breaker.state == "closed"
    fail(breaker, about="a")
    assert breaker.state == "open"


def test_probe_for_what_has_failed_before_tells_nothing_and_the_next_caller_probes(clock: Clock) -> None:
    breaker = make(clock)
    for name in "abc":
        fail(breaker, about=name)
    clock.now += 5
    fail(breaker, about="c")
    fail(breaker, about="c")
    assert breaker.state == "half-open"
    fail(breaker, about="d")
    assert breaker.state == "open" and left_s(breaker) == 10
    clock.now += 10
    breaker.check()
    breaker.succeeded()
    assert breaker.state == "closed"


def test_probe_that_is_answered_lets_others_in_before_it_ends(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 3)
    clock.now += 5
    breaker.check()
    breaker.answered()
    for clock.thread in range(2, 62):  # while the first one downloads for a minute
        clock.now += 1
        breaker.check()
        breaker.released()
    clock.thread = 1
    breaker.failed(DOWN, about="a")
    assert breaker.state == "closed"
    fail(breaker, 2)
    assert breaker.state == "open", "what came after the head was not a new failure"


def test_beginning_of_an_answer_does_not_end_a_row_of_failures_nor_another_ones_probe(clock: Clock) -> None:
    breaker = make(clock)
    for name in "abc":
        breaker.check()
        breaker.answered()
        breaker.failed(DOWN, about=name)
    assert breaker.state == "open"
    breaker.answered()
    clock.now += 5
    breaker.check()
    clock.thread = 2
    breaker.answered()
    assert breaker.state == "half-open"


def test_late_verdicts_do_not_count_while_another_probes(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 3)
    breaker.succeeded()
    assert breaker.state == "open"
    clock.now += 5
    breaker.check()
    clock.thread = 2
    breaker.succeeded()
    breaker.failed(DOWN)
    breaker.released()
    assert breaker.state == "half-open" and left_s(breaker) > 0


def test_released_probe_is_taken_over_at_once_and_a_lost_one_after_a_while(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 3)
    clock.now += 5
    breaker.check()
    breaker.released()
    clock.thread = 2
    breaker.check()
    clock.thread = 3
    assert left_s(breaker) > 0
    clock.now += PROBE_S
    breaker.check()


def test_no_way_there_is_told_from_trouble_there(clock: Clock) -> None:
    breaker = make(clock)
    fail(breaker, 3, HubUnreachable("There is no way to the Hub."))
    with pytest.raises(HubUnreachable):
        breaker.check()


def test_every_host_has_its_own() -> None:
    breakers = Breakers()
    assert breakers.of("https://hub.co/a") is breakers.of("https://HUB.co:443/b?c")
    others = {breakers.of(url) for url in ("http://hub.co", "https://hub.co", "https://hub.co:444", "https://x.hub.co")}
    assert len(others) == 4


def test_only_one_of_many_threads_probes() -> None:
    breaker = Breaker("hub", failures=1, pause_s=0.0)
    fail(breaker, 1)
    passed: list[int] = []
    gate = threading.Barrier(8)

    def ask() -> None:
        gate.wait()
        try:
            breaker.check()
        except StoreUnavailable:
            return
        passed.append(threading.get_ident())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 1


class BreakerMachine(RuleBasedStateMachine):
    """Threads come and go; the breaker must let through and refuse exactly as the few words of its promise say."""

    @initialize(limit=st.integers(1, 4))
    def begin(self, limit: int) -> None:
        self.clock = Clock()
        self.limit = limit
        self.breaker = Breaker(
            "hub", failures=limit, clock=self.clock, jitter=lambda: 0.0, caller=lambda: self.clock.thread
        )
        self.inside: set[int] = set()  # threads that were let through and have not reported
        self.in_a_row = 0
        self.suspects: set[str] = set()
        self.pause_s, self.until = 5.0, 0.0
        self.is_open = False
        self.prober: int | None = None
        self.lost_at = 0.0

    @rule(seconds=st.sampled_from([0.5, 4.9, 5.0, 20.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(thread=st.integers(1, 4))
    def check(self, thread: int) -> None:
        self.clock.thread = thread
        if thread in self.inside:
            return
        may = not self.is_open or self.clock.now >= (self.lost_at if self.prober else self.until)
        try:
            self.breaker.check()
        except StoreUnavailable as exc:
            assert not may
            assert exc.retry_after_s is not None and 0 < exc.retry_after_s <= 60
            return
        assert may
        self.inside.add(thread)
        if self.is_open:
            self.prober, self.lost_at = thread, self.clock.now + PROBE_S

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def answered(self, data: st.DataObject) -> None:
        thread = self.clock.thread = data.draw(st.sampled_from(sorted(self.inside)))
        self.breaker.answered()
        if self.is_open and self.prober == thread:
            self.close()

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), verdict=st.sampled_from(["succeeded", "released"]))
    def report(self, data: st.DataObject, verdict: str) -> None:
        thread = self.leave(data)
        getattr(self.breaker, verdict)()
        if self.is_open and self.prober != thread:
            return
        if verdict == "succeeded":
            self.close()
        self.prober = None

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), about=st.sampled_from([None, "a", "b", "c"]), asked=st.sampled_from([0, 4, 20, 90]))
    def fail(self, data: st.DataObject, about: str | None, asked: int) -> None:
        thread = self.leave(data)
        self.breaker.failed(DOWN, about=about, asked_s=asked)
        asked = 0 if about or asked < 5 else min(asked, 60)
        if self.is_open and self.prober != thread:
            self.until = max(self.until, self.clock.now + asked)
            return
        was_probe, self.prober = self.is_open, None
        if about in self.suspects:
            return
        self.in_a_row += 1
        if about:
            self.suspects.add(about)
        if was_probe:
            self.pause_s = min(60.0, 2 * self.pause_s)
        is_due = was_probe or self.in_a_row >= self.limit
        if is_due or asked:
            self.is_open, self.until = True, self.clock.now + max(self.pause_s if is_due else 0, asked)

    def leave(self, data: st.DataObject) -> int:
        thread: int = data.draw(st.sampled_from(sorted(self.inside)))
        self.clock.thread = thread
        self.inside.discard(thread)
        return thread

    def close(self) -> None:
        self.is_open, self.prober, self.in_a_row, self.pause_s = False, None, 0, 5.0
        self.suspects = set()

    @invariant()
    def state_is_as_modelled(self) -> None:
        if hasattr(self, "breaker"):
            is_half = self.is_open and (self.prober is not None or self.clock.now >= self.until)
            expected = "half-open" if is_half else "open" if self.is_open else "closed"
            assert self.breaker.state == expected, repr(self.breaker)


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=150, stateful_step_count=40)
