"""The dashboards, as Grafana 12 exports them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from tests.monitoring.queries import DASHBOARDS, Json, load_dashboard, panels_of, read_panels

UNITS = {"s", "short", "bytes", "percentunit", "reqps", "ops"}  # of those that Grafana knows
WIDTH = 24
SCHEMA = 41  # Grafana 12.0's; 11 reads it too

each = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def overlap(one: Json, other: Json) -> bool:
    a, b = one["gridPos"], other["gridPos"]
    apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"]
    return not (apart or b["y"] + b["h"] <= a["y"])


@each
def test_a_dashboard_has_what_grafana_wants_of_one(path: Path) -> None:
    dashboard = load_dashboard(path)
    assert dashboard["schemaVersion"] == SCHEMA
    assert dashboard["uid"] == f"rookery-{path.stem}" and dashboard["id"] is None
    assert dashboard["title"].startswith("Rookery: ") and dashboard["description"].endswith(".")
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "job", "instance"]


@each
def test_panels_have_numbers_and_places_of_their_own(path: Path) -> None:
    panels = list(panels_of(load_dashboard(path)))
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= WIDTH for panel in panels)
    overlapping = [(one["title"], other["title"]) for one, other in combinations(panels, 2) if overlap(one, other)]
    assert not overlapping


@each
def test_a_panel_says_what_it_shows_and_in_which_unit(path: Path) -> None:
    panels = [panel for panel in panels_of(load_dashboard(path)) if panel["type"] != "row"]
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        values = [step["value"] for step in steps[1:]]
        assert steps[0]["value"] is None and values == sorted(values), panel["title"]


@each
def test_a_panel_asks_the_data_source_that_is_chosen(path: Path) -> None:
    for panel in panels_of(load_dashboard(path)):
        for target in panel.get("targets", ()):
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert 'job=~"$job"' in target["expr"], panel["title"]
        letters = [target["refId"] for target in panel.get("targets", ())]
        assert letters == [*"ABCDEF"[: len(letters)]]


def test_an_alert_that_a_panel_draws_a_line_for_has_that_threshold() -> None:
    lines = {panel.title: panel.thresholds for panel in read_panels()}
    assert lines["Share refused"] == (0.05,)
    assert lines["Step time"] == (1,)
    assert lines["Share of loads that are reloads"] == (0.25,)
    assert lines["Speed at which error budgets burn"] == (6, 14.4)
