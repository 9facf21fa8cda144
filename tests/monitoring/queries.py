"""What the dashboards and rules ask, and of which series; no Prometheus is needed to read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from prometheus_client import Counter, Gauge, Histogram

from serve.metrics import Metrics

FOLDER = Path(__file__).parents[2] / "k8s" / "monitoring"
DASHBOARDS = sorted((FOLDER / "dashboards").glob("*.json"))
RULES = FOLDER / "rules" / "rookery.yaml"
RULE_TESTS = FOLDER / "rules" / "rookery_test.yaml"
RUNBOOK = FOLDER / "RUNBOOK.md"

ADDED_BY_PROMETHEUS = frozenset({"job", "instance"})
_SUFFIXES: Mapping[type, tuple[str, ...]] = {
    Counter: ("_total",),
    Gauge: ("",),
    Histogram: ("_bucket", "_count", "_sum"),
}
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r"(?<![\w:$])((?:job:)?rookery_[\w:]+|up|ALERTS)\s*(\{[^}]*\})?")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel that asks something. `queries` are in the language of Prometheus, with Grafana's variables."""

    dashboard: str
    title: str
    unit: str
    queries: tuple[str, ...]
    legends: tuple[str, ...]
    thresholds: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.dashboard} / {self.title}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One that records a series, or an alert, which has annotations."""

    name: str
    query: str
    is_alert: bool
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Selector:
    """A part of a query that names series: `text` is it as a query of its own."""

    metric: str
    labels: frozenset[str]
    text: str


def load_dashboard(path: Path) -> Json:
    """A dashboard as it is written."""
    found: Json = json.loads(path.read_text(encoding="utf-8"))
    return found


def panels_of(dashboard: Json) -> Iterator[Json]:
    """All panels, rows too, and those inside rows that are folded."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", ())


def read_panels() -> list[Panel]:
    """Every panel of every dashboard but the rows."""
    return [
        Panel(
            dashboard=path.stem,
            title=panel["title"],
            unit=panel["fieldConfig"]["defaults"]["unit"],
            queries=tuple(target["expr"] for target in panel["targets"]),
            legends=tuple(target["legendFormat"] for target in panel["targets"]),
            thresholds=tuple(
                step["value"]
                for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
                if step["value"] is not None
            ),
        )
        for path in DASHBOARDS
        for panel in panels_of(load_dashboard(path))
        if panel["type"] != "row"
    ]


def read_rules() -> list[Rule]:
    """Every rule, in order."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [
        Rule(
            name=rule.get("alert") or rule["record"],
            query=rule["expr"],
            is_alert="alert" in rule,
            labels=rule.get("labels", {}),
            annotations=rule.get("annotations", {}),
        )
        for group in groups
        for rule in group["rules"]
    ]


def all_queries() -> dict[str, str]:
    """By who asks: rules, panels, and what fills the variables and annotations of dashboards."""
    found = {rule.name: rule.query for rule in read_rules()}
    for panel in read_panels():
        found |= {f"{panel.name} {letter}": query for letter, query in zip("ABCDEF", panel.queries, strict=False)}
    for path in DASHBOARDS:
        dashboard = load_dashboard(path)
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                found[f"{path.stem} ${variable['name']}"] = variable["definition"]
        for annotation in dashboard["annotations"]["list"]:
            if "expr" in annotation:
                found[f"{path.stem} {annotation['name']}"] = annotation["expr"]
    return found


def selectors(query: str) -> list[Selector]:
    """The series that a query names."""
    return [
        Selector(match[1], frozenset(_MATCHER.findall(match[2] or "")), match[1] + (match[2] or ""))
        for match in _SELECTOR.finditer(query)
    ]


def groupings(query: str) -> set[str]:
    """The labels by which a query adds up or joins."""
    names = (name.strip() for match in _GROUPING.finditer(_TEXT.sub('""', query)) for name in match[1].split(","))
    return {name for name in names if name}


@cache
def declared() -> Mapping[str, frozenset[str]]:
    """Every series that the service can show, with its own labels: those of `serve.metrics`."""
    found: dict[str, frozenset[str]] = {}
    for metric in vars(Metrics()).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            (family,), labels = metric.describe(), frozenset(metric._labelnames)
            suffixes = _SUFFIXES[type(metric)]
            found |= {family.name + suffix: labels | ({"le"} if suffix == "_bucket" else set()) for suffix in suffixes}
    return found


@cache
def recorded() -> Mapping[str, frozenset[str]]:
    """Every series that a rule records, with the labels by which it adds up."""
    return {rule.name: frozenset(_labels_of(rule.query)) for rule in read_rules() if not rule.is_alert}


def _labels_of(query: str) -> set[str]:
    """Those of the outermost `by`, which each of our rules begins with; a quantile has used up `le`."""
    return (groupings(query) or set().union(*(recorded_labels(one.metric) for one in selectors(query)))) - {"le"}


def recorded_labels(name: str) -> frozenset[str]:
    """Of a series by its name, whoever makes it; none of one that nobody makes."""
    if name in ("up", "ALERTS"):
        return frozenset({"alertname", "alertstate", "severity"} if name == "ALERTS" else ())
    return declared().get(name) or recorded().get(name) or frozenset()


def fill(query: str, *, interval_s: int, range_s: int, job: str = ".*", instance: str = ".*") -> str:
    """A panel's query as Grafana sends it."""
    values = {
        "$__rate_interval": f"{interval_s}s",
        "$__range": f"{range_s}s",
        "$job": job,
        "$instance": instance,
    }
    for name, value in values.items():
        query = query.replace(name, value)
    assert "$" not in query, f"a variable that is not known: {query}"
    return query
