"""The metrics: names, and one owner for each where processes are separate."""

from __future__ import annotations

from serve.metrics import Metrics


def names(metrics: Metrics) -> set[str]:
    return {family.name for family in metrics.registry.collect()}


def test_parts_own_disjoint_metrics_that_add_up_to_all() -> None:
    api, engine = names(Metrics(part="api")), names(Metrics(part="engine"))
    assert api | engine == names(Metrics())
    assert not api & engine
    assert all(name.startswith("rookery_") for name in names(Metrics()))


def test_a_metric_of_another_part_can_be_called_and_is_not_shown() -> None:
    metrics = Metrics(part="api")
    metrics.queue_depth.set(3)
    assert "queue_depth" not in metrics.render()


def test_what_api_and_engine_both_count_is_apart_in_the_api_and_among_the_others_elsewhere() -> None:
    api, engine, whole = Metrics(part="api"), Metrics(part="engine"), Metrics()
    for metrics in (api, engine, whole):
        metrics.disk_evictions.labels("budget").inc()
    line = 'rookery_disk_evictions_total{reason="budget"} 1.0'
    assert line not in api.render() and line in api.render_shared()
    assert engine.render().count(line) == whole.render().count(line) == 1
