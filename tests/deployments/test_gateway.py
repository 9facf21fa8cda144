"""What the gateway makes of Ray's errors and of the replicas' metrics, without a cluster."""

from __future__ import annotations

import pickle

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from deployments.gateway import join_expositions, translate
from serve.errors import ContextLengthExceeded, ModelNotFound, Overloaded, RookeryError, StoreUnavailable
from serve.metrics import Metrics


@pytest.mark.parametrize("error", [ModelNotFound("gone", param="model"), ContextLengthExceeded("long", param="prompt")])
def test_an_error_raised_in_a_replica_is_the_same_error_in_the_gateway(error: RookeryError) -> None:
    from_ray = pickle.loads(pickle.dumps(RayTaskError("generate", "Traceback ...", error))).as_instanceof_cause()
    translated = translate(from_ray)
    assert type(translated) is type(error)
    assert (str(translated), translated.param) == (error.message, error.param)


def test_full_queues_are_an_overload() -> None:
    error = translate(BackPressureError(64, 64))
    assert isinstance(error, Overloaded)
    assert error.retry_after_s


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("gone", b"0" * 16)])
def test_a_dead_replica_is_a_matter_of_seconds(error: Exception) -> None:
    translated = translate(error)
    assert isinstance(translated, StoreUnavailable)
    assert translated.retry_after_s


def test_an_error_nobody_foresaw_is_left_as_it_is() -> None:
    error = KeyError("oops")
    assert translate(error) is error


def test_metrics_of_two_replicas_are_one_exposition_without_double_series() -> None:
    texts = {}
    for replica, num_models in (("one", 3), ("two", 5)):
        metrics = Metrics(part="engine")
        metrics.pool_resident_models.set(num_models)
        metrics.model_loads.labels("disk", "ok").inc(num_models)
        metrics.batch_rows.observe(4)
        texts[replica] = metrics.render()
    joined = list(text_string_to_metric_families(join_expositions(texts)))
    assert len({family.name for family in joined}) == len(joined)
    values = {
        (s.name, s.labels["replica"]): s.value for family in joined for s in family.samples if "le" not in s.labels
    }
    assert values["rookery_pool_resident_models", "one"] == 3
    assert values["rookery_pool_resident_models", "two"] == 5
    assert values["rookery_model_loads_total", "two"] == 5
    assert values["rookery_batch_rows_count", "one"] == 1


def test_what_the_gateway_counts_as_the_generators_do_is_a_series_of_its_own() -> None:
    own, engine = Metrics(part="api"), Metrics(part="engine")
    own.disk_evictions.labels("budget").inc()
    engine.disk_evictions.labels("budget").inc(2)
    text = own.render() + join_expositions({"one": engine.render(), "gateway": own.render_shared()})
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    counted = [s for family in families for s in family.samples if s.name == "rookery_disk_evictions_total"]
    assert {s.labels["replica"]: s.value for s in counted} == {"one": 2, "gateway": 1}
