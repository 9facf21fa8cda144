"""What a query names: metrics that exist, labels that they have."""

from __future__ import annotations

import re

import pytest

from tests.monitoring.queries import (
    ADDED_BY_PROMETHEUS,
    all_queries,
    declared,
    fill,
    groupings,
    recorded,
    recorded_labels,
    selectors,
)

QUERIES = all_queries()
# Metrics that no dashboard shows and no rule asks for, and why.
NOT_SHOWN: dict[str, str] = {}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES.keys())
def test_a_query_names_metrics_that_exist(query: str) -> None:
    known = declared().keys() | recorded().keys() | {"up", "ALERTS"}
    named = {one.metric for one in selectors(query)}
    assert named and named <= known, named - known


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES.keys())
def test_a_query_names_labels_that_its_metrics_have(query: str) -> None:
    for one in selectors(query):
        unknown = one.labels - recorded_labels(one.metric) - ADDED_BY_PROMETHEUS
        assert not unknown, f"{one.metric} has no label {unknown}"
    its_own = frozenset().union(*(recorded_labels(one.metric) for one in selectors(query)))
    assert groupings(query) <= its_own | ADDED_BY_PROMETHEUS


def test_every_metric_is_shown_or_watched() -> None:
    named = {one.metric for query in QUERIES.values() for one in selectors(query)}
    families = {name.removesuffix("_total").removesuffix("_bucket"): name for name in declared()}
    families = {family: name for family, name in families.items() if not family.endswith(("_count", "_sum"))}
    shown = {family for family in families if any(name.startswith(family) for name in named)}
    assert families.keys() - shown == NOT_SHOWN.keys()


def test_counters_are_asked_for_their_rate() -> None:
    for name, query in QUERIES.items():
        texts = [one.text for one in selectors(query)]
        for text in {one.text for one in selectors(query) if re.search(r"_(total|bucket|count|sum)$", one.metric)}:
            rates = re.findall(r"\b(?:rate|increase)\(" + re.escape(text) + r"\[", query)
            assert len(rates) == texts.count(text), f"{name}: {text}"


def test_the_jobs_of_nodes_are_not_added_up() -> None:
    asked = [query for query in QUERIES.values() if "rookery_jobs{" in query or "(rookery_jobs)" in query]
    assert asked and all(query.startswith("max by") for query in asked)


def test_selectors_and_groupings_are_found() -> None:
    query = 'sum by (job, le) (rate(rookery_x_bucket{route!~"/a|{b}", status="5.."}[5m])) / on (job) job:rookery_y:sum'
    assert [one.metric for one in selectors(query.replace("{b}", "b"))] == ["rookery_x_bucket", "job:rookery_y:sum"]
    assert selectors(query.replace("{b}", "b"))[0].labels == {"route", "status"}
    assert groupings(query) == {"job", "le"}


def test_the_variables_of_grafana_are_filled_in() -> None:
    query = 'sum(rate(rookery_requests_total{job=~"$job"}[$__rate_interval]))'
    assert fill(query, interval_s=8, range_s=60) == 'sum(rate(rookery_requests_total{job=~".*"}[8s]))'
