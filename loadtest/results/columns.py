"""Records as numpy columns, and what can be counted of them over time. It knows neither files nor what is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from loadtest.results.record import STOPPED, Record

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Labels:
    """A column of text: `names[codes[i]]`, names in the order in which they first came."""

    names: tuple[str, ...]
    codes: Ints

    @classmethod
    def of(cls, values: Iterable[str]) -> Labels:
        seen: dict[str, int] = {}
        codes = np.array([seen.setdefault(value, len(seen)) for value in values], dtype=np.int64)
        return cls(tuple(seen), codes)

    def where(self, name: str) -> Bools:
        return np.equal(self.codes, self.names.index(name) if name in self.names else -1)

    def __getitem__(self, mask: Bools) -> Labels:
        return Labels(self.names, self.codes[mask])


@dataclass(frozen=True, eq=False)
class Columns:
    """Row i is record i. NaN where a record says None. Times in seconds from the start of the run."""

    at: Floats
    sent: Floats
    first: Floats
    ended: Floats
    load: Floats
    tokens: Floats
    prompt_tokens: Floats
    choices: Floats
    is_streaming: Bools
    outcome: Labels
    tier: Labels
    flow: Labels
    error: Labels
    gaps: Floats  # of all rows, one after the other
    gap_counts: Ints

    @classmethod
    def of(cls, records: Sequence[Record]) -> Columns:
        def floats(values: Iterable[float | None]) -> Floats:
            return np.array(list(values), dtype=np.float64)  # None becomes NaN

        counts = np.array([len(r.gaps_s) for r in records], dtype=np.int64)
        return cls(
            at=floats(r.at_s for r in records),
            sent=floats(r.sent_s for r in records),
            first=floats(r.first_s for r in records),
            ended=floats(r.ended_s for r in records),
            load=floats(r.load_s for r in records),
            tokens=floats(r.output_tokens for r in records),
            prompt_tokens=floats(r.prompt_tokens for r in records),
            choices=floats(r.num_choices for r in records),
            is_streaming=np.array([r.is_streaming for r in records], dtype=np.bool_),
            outcome=Labels.of(r.outcome for r in records),
            tier=Labels.of(r.tier for r in records),
            flow=Labels.of(r.flow for r in records),
            error=Labels.of(_kind_of_error(r) for r in records),
            gaps=np.fromiter(chain.from_iterable(r.gaps_s for r in records), np.float64, int(counts.sum())),
            gap_counts=counts,
        )

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, mask: Bools) -> Columns:
        rows = {name: value[mask] for name, value in vars(self).items() if name != "gaps"}
        return Columns(**rows, gaps=self.gaps[np.repeat(mask, self.gap_counts)])

    @property
    def ok(self) -> Bools:
        return self.outcome.where("ok")

    @property
    def is_error(self) -> Bools:
        return self.outcome.where("failed") | self.is_timeout

    @property
    def is_timeout(self) -> Bools:
        return self.outcome.where("timeout") & ~self.is_stopped

    @property
    def is_stopped(self) -> Bools:
        """Had no answer when the run was stopped, which is nobody's fault."""
        return self.outcome.where("timeout") & self.error.where(STOPPED)

    @property
    def ttft(self) -> Floats:
        """Seconds to the first token of each; NaN where none came. That of an answer that came whole is its end."""
        return np.where(self.is_streaming, self.first, self.ended) - self.at

    @property
    def took(self) -> Floats:
        return self.ended - self.at

    @property
    def lag(self) -> Floats:
        return self.sent - self.at

    @property
    def time_per_token(self) -> Floats:
        """Seconds between two tokens of one choice, from the first token to the end; NaN where that says nothing.

        The choices of an answer are written side by side, so each has its share of the tokens.
        """
        each = self.tokens / np.maximum(self.choices, 1)
        says = self.is_streaming & (each >= 2) & ~np.isnan(self.first)
        return np.where(says, (self.ended - self.first) / np.where(says, each - 1, 1), np.nan)


def first_tokens(columns: Columns) -> Bools:
    """Whose TTFT is taken: streams; only where nobody streamed, all, at the end of their answer."""
    streaming = columns.ok & columns.is_streaming & ~np.isnan(columns.first)
    return streaming if streaming.any() else columns.ok


def arrived(columns: Columns, edges: Floats) -> Floats:
    """How many tokens had come by each moment of `edges`.

    The first token of a stream comes at its `first`, the others evenly from then to its end; an answer that is not
    streamed comes at its end.
    """
    streams = columns.is_streaming & (columns.tokens >= 2) & (columns.ended > columns.first)
    whole = columns[~streams]
    total = _sum_until(whole.ended, whole.tokens, edges)
    flowing = columns[streams]
    slope = (flowing.tokens - 1) / (flowing.ended - flowing.first)
    total += _sum_until(flowing.first, np.ones(len(flowing)), edges)
    # Each adds slope * (t - first) from its first token on, and is held at its end by the same ramp taken away.
    for start, sign in ((flowing.first, 1.0), (flowing.ended, -1.0)):
        total += sign * (edges * _sum_until(start, slope, edges) - _sum_until(start, slope * start, edges))
    return total


def count_until(moments: Floats, edges: Floats) -> Floats:
    """How many moments are before each edge."""
    return np.searchsorted(np.sort(moments), edges, side="left").astype(np.float64)


def in_flight(columns: Columns, moments: Floats) -> Floats:
    """How many requests were sent and not yet ended, at each moment."""
    return count_until(columns.sent, moments) - count_until(columns.ended, moments)


def nearest_rank(ordered: Floats, share: float) -> float:
    """The least value that at least `share` of all values do not exceed: one that was measured, nothing between two."""
    rank = int(np.ceil(share * len(ordered) - 1e-9))
    return float(ordered[max(rank, 1) - 1])


def _sum_until(moments: Floats, amounts: Floats, edges: Floats) -> Floats:
    order = np.argsort(moments)
    sums = np.concatenate([[0.0], np.cumsum(amounts[order])])
    return np.asarray(sums[np.searchsorted(moments[order], edges, side="left")], dtype=np.float64)


def _kind_of_error(record: Record) -> str:
    if record.outcome in ("ok", "cancelled"):
        return ""
    return record.error or (f"status {record.status}" if record.status else record.outcome)
