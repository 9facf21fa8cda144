"""Loss curves: what is drawn, and what is told to those who do not see it."""

from __future__ import annotations

import math
from xml.etree import ElementTree

from hypothesis import given, strategies

from serve.web.charts import MAX_POINTS, describe, loss_chart, nice_ticks, thin


def test_nothing_is_drawn_of_nothing() -> None:
    assert loss_chart([], []) == ""
    assert loss_chart([(1, math.nan)], [(1, math.inf)]) == ""


def test_a_chart_is_well_formed_and_says_its_numbers() -> None:
    chart = loss_chart([(1, 4.0), (2, 3.5)], [(0, 4.25), (2, 3.75)], num_steps=10)
    root = ElementTree.fromstring(chart)
    assert root.get("role") == "img"
    assert root.get("aria-label") == (
        "Loss curve: training loss from 4.00 at step 1 to 3.50 at step 2; held-out loss from 4.25 at step 0 to 3.75 at "
        "step 2."
    )
    assert [line.get("class") for line in root.iter("polyline")] == ["line train", "line valid"]


def test_the_axis_reaches_to_the_last_step_to_come() -> None:
    line = ElementTree.fromstring(loss_chart([(1, 4.0), (50, 3.5)], [], num_steps=100)).find("polyline")
    assert line is not None
    last_x = float(line.get("points", "").split()[-1].split(",")[0])
    assert 44 < last_x < 230


def test_a_single_point_is_seen() -> None:
    assert "<circle" in loss_chart([(1, 4.0)], [])


def test_no_style_stands_in_a_chart() -> None:
    assert "style" not in loss_chart([(1, 4.0), (2, 3.5)], [(0, 4.25)])


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    kept = thin(points)
    assert len(kept) == MAX_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert len(set(kept)) == MAX_POINTS
    assert thin(points[:5]) == points[:5]


def test_one_curve_alone_is_described() -> None:
    assert describe([], [(0, 4.0)]) == "Loss curve: held-out loss from 4.00 at step 0 to 4.00 at step 0."


@given(strategies.floats(-1e6, 1e6), strategies.floats(0, 1e6), strategies.booleans())
def test_ticks_are_few_evenly_apart_and_hold_the_range(low: float, span: float, whole: bool) -> None:
    ticks = nice_ticks(low, low + span, whole=whole)
    apart = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 12
    assert all(math.isclose(b - a, apart, rel_tol=1e-6) for a, b in zip(ticks, ticks[1:], strict=False))
    slack = apart * 1e-6
    assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack
    assert not whole or all(tick == round(tick) for tick in ticks)


@given(
    strategies.lists(strategies.tuples(strategies.integers(0, 10**6), strategies.floats(-1e3, 1e3)), max_size=20),
    strategies.lists(strategies.tuples(strategies.integers(0, 10**6), strategies.floats(allow_nan=True)), max_size=20),
)
def test_any_numbers_make_a_chart_inside_its_box(
    train: list[tuple[int, float]], valid: list[tuple[int, float]]
) -> None:
    chart = loss_chart(sorted(train), sorted(valid, key=lambda point: point[0]))
    if not chart:
        return
    root = ElementTree.fromstring(chart)
    for line in root.iter("polyline"):
        for pair in line.get("points", "").split():
            x, y = map(float, pair.split(","))
            assert 43 <= x <= 387 and 27 <= y <= 219
