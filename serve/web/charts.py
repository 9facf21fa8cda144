"""Curves as SVG, drawn from numbers alone: colours and lines are the style sheet's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

Point = tuple[float, float]

_BEYOND = 1e100  # no loss, and it would overflow the scale
MAX_POINTS = 300  # more than there are pixels to see them on a phone
_WIDTH, _HEIGHT = 400, 260  # so that text can be read on a phone, where this is shrunk
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 28, 42


@dataclass(frozen=True, slots=True)
class _Scale:
    """From a range of values to a range of pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def loss_chart(train: Sequence[Point], valid: Sequence[Point], num_steps: int = 0) -> Markup:
    """(step, loss) of either kind, in order of steps, of `num_steps` to come; "" where there is nothing to draw yet."""
    train, valid = _finite(train), _finite(valid)
    points = [*train, *valid]
    if not points:
        return Markup("")
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    y_ticks = nice_ticks(min(losses), max(losses))
    last_step = max(*steps, num_steps, 1)
    x_ticks = [tick for tick in nice_ticks(0, last_step, whole=True) if tick <= last_step]
    x = _Scale(0, last_step, _LEFT, _WIDTH - _RIGHT)
    y = _Scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        *(_row(y(tick), _number(tick, y_ticks)) for tick in y_ticks),
        *(_column(x(tick), f"{tick:,.0f}") for tick in x_ticks),
        f'<text class="axis" x="{_LEFT}" y="14">Loss, nats a token</text>',
        f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">Steps</text>',
        _line("train", thin(train), x, y),
        _line("valid", thin(valid), x, y),
        *(_dot("valid", x(step), y(loss)) for step, loss in thin(valid, 40)),
    ]
    if len(train) == 1:  # a line of one point is not seen
        parts.append(_dot("train", x(train[0][0]), y(train[0][1])))
    label = describe(train, valid)
    return Markup(
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def describe(train: Sequence[Point], valid: Sequence[Point]) -> str:
    """The curves in words, for whoever does not see them."""
    told = [
        f"{name} from {curve[0][1]:.2f} at step {curve[0][0]:,.0f} to {curve[-1][1]:.2f} at step {curve[-1][0]:,.0f}"
        for name, curve in (("training loss", train), ("held-out loss", valid))
        if curve
    ]
    return f"Loss curve: {'; '.join(told)}."


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> Sequence[Point]:
    """At most that many, evenly, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(number * (len(points) - 1) / (most - 1))] for number in range(most)]


def nice_ticks(low: float, high: float, *, whole: bool = False, about: int = 5) -> list[float]:
    """Round numbers, evenly apart, from at most `low` to at least `high`; two or more."""
    span = max(high - low, abs(high) * 1e-3, 1e-6)
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice * about >= span)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _finite(points: Sequence[Point]) -> Sequence[Point]:
    return [point for point in points if all(abs(value) < _BEYOND for value in point)]  # NaN is not, either


def _number(tick: float, ticks: Sequence[float]) -> str:
    apart = ticks[1] - ticks[0]
    return f"{tick:.{max(0, -math.floor(math.log10(apart) + 1e-9))}f}"


def _row(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="axis" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _column(x: float, text: str) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{text}</text>'


def _line(name: str, points: Sequence[Point], x: _Scale, y: _Scale) -> str:
    if len(points) < 2:
        return ""
    path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    return f'<polyline class="line {name}" points="{path}"/>'


def _dot(name: str, x: float, y: float) -> str:
    return f'<circle class="dot {name}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
