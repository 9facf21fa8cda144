"""The rules: what an alert must say, and that each was seen to fire and to be silent."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from tests.monitoring.queries import RULE_TESTS, RULES, Json, Rule, read_rules

ALERTS = [rule for rule in read_rules() if rule.is_alert]
RECORDED = [rule for rule in read_rules() if not rule.is_alert]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not here; Debian and Ubuntu have it in the package prometheus"
)
each = pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule.name)


def expectations_of(alert: Rule) -> list[Json]:
    """The expectations of promtool's tests about the alert."""
    tests: list[Json] = yaml.safe_load(RULE_TESTS.read_text(encoding="utf-8"))["tests"]
    return [one for test in tests for one in test["alert_rule_test"] if one["alertname"] == alert.name]


@each
def test_an_alert_says_how_bad_it_is_and_what_has_happened(alert: Rule) -> None:
    assert alert.name.startswith("Rookery")
    assert alert.labels["severity"] in ("critical", "warning")
    assert alert.annotations["summary"].endswith((".", ").")) and alert.annotations["description"].endswith(".")
    assert set(alert.annotations) == {"summary", "description", "runbook"}


@each
def test_an_alert_was_tested_to_fire_and_to_be_silent(alert: Rule) -> None:
    fires = [bool(test["exp_alerts"]) for test in expectations_of(alert)]
    assert set(fires) == {True, False}


def test_names_of_rules_are_used_once() -> None:
    names = [rule.name for rule in read_rules()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: rule.name)
def test_a_recorded_series_is_named_by_its_level(rule: Rule) -> None:
    assert re.fullmatch(r"job:rookery_[a-z_]+:[a-z0-9_]+", rule.name)


@needs_promtool
def test_promtool_finds_the_rules_in_order() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"SUCCESS: {len(read_rules())} rules found" in done.stdout, done.stderr


@needs_promtool
@pytest.mark.slow
def test_promtool_finds_that_alerts_fire_when_they_should(tmp_path: Path) -> None:
    command = ["promtool", "test", "rules", str(RULE_TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
