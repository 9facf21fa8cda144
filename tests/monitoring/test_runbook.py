"""The runbook: a section for each alert, and commands that exist."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import typer

from deployments.cli.app import app
from serve.settings import Settings
from tests.monitoring.queries import FOLDER, RUNBOOK, Rule, read_panels, read_rules

TEXT = RUNBOOK.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
ALERTS = [rule for rule in read_rules() if rule.is_alert]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule.name)
def test_an_alert_has_a_section_that_says_what_to_do(alert: Rule) -> None:
    section = SECTIONS[alert.name]
    assert "**Means**" in section
    assert re.search(r"\*\*(See\*\*.*\*\*Do|See and do)\*\*", section, re.S)
    assert alert.annotations["runbook"] == f"k8s/monitoring/RUNBOOK.md#{alert.name.lower()}"


def test_every_section_is_about_an_alert() -> None:
    assert SECTIONS.keys() == {alert.name for alert in ALERTS}


def test_links_lead_somewhere() -> None:
    anchors = {name.lower() for name in SECTIONS}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.removeprefix("#") in anchors if target.startswith("#") else (FOLDER / target).exists(), target


def test_settings_exist() -> None:
    known = {"ROOKERY_" + field.name.upper() for field in fields(Settings)}
    assert set(re.findall(r"ROOKERY_[A-Z_]+", TEXT)) <= known


def test_verbs_exist() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(re.findall(r"`rookery ([a-z]+)", TEXT)) <= set(known)


def test_panels_that_it_points_to_exist() -> None:
    titles = {panel.title for panel in read_panels()}
    see = "".join(re.findall(r"\*\*See\*\*.*?(?=\*\*Do\*\*|```)", TEXT, re.S))
    quoted = {" ".join(one.split()) for one in re.findall(r'"([^"]+)"', see)}
    assert quoted <= titles


def test_events_that_it_looks_for_are_logged() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (FOLDER.parents[1] / "serve").rglob("*.py"))
    events = re.findall(r"`([a-z]+(?:_[a-z]+)+)`", TEXT)
    assert events and all(f'"{event}"' in code for event in events)
