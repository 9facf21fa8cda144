"""Every metric, declared once: name, unit, help, labels and buckets.

Label values come from bounded sets (route template, status, tier, outcome, reason, state), never from a model, a caller
or anything else that users choose. A leaf: it does not know who counts, or how the text is scraped.

Each process makes one `Metrics`. Where several processes of a node count together (`PROMETHEUS_MULTIPROC_DIR`, see
`serve.exposition`) counters and histograms add up, and each gauge says here how its processes' values become one.

Values of labels: `route` a template, or "other"; `tier` device, host, disk, hub (of bytes: device); `state` of models
resident, leased, pinned, of jobs a JobStatus; `outcome` of the Hub's requests ok, not_found, denied, rate_limited,
refused, server_error, timeout, connection, offline, error, of its fetches and of pulls "ok" or why not, of loads ok or
failed (with tier "none"), of generations ok, left (whoever asked did not wait) or an error's code, of jobs a JobStatus
(queued: to be tried again) or lost to another worker; `reason` of evictions budget, forgotten, closed, late, memory,
refused, of those from the disk budget, space, copy, damaged, of bodies too_large, too_slow, media_type, bad_form,
invalid, of who is refused missing, wrong, scope, cross_site, unknown_host. Gauges of a generator are set once a second,
of jobs every five.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar, Literal, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from serve.version import VERSION

# From a resident model's answer on a GPU (milliseconds) to a cold start from the Hub on a slow line (minutes).
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG_SECONDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)
_POWERS_OF_TWO = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)

# How the values of a node's processes become one; each ends with its process.
_Across = Literal["livesum", "livemax", "livemostrecent"]


class _Uncounted:
    """Any metric that nobody wants to know."""

    def labels(self, *values: str) -> _Uncounted:
        return self

    def inc(self, amount: float = 1) -> None:
        pass

    def dec(self, amount: float = 1) -> None:
        pass

    def set(self, value: float) -> None:
        pass

    def observe(self, amount: float) -> None:
        pass


_UNCOUNTED = _Uncounted()


class Metrics:
    """The metrics of one process. `registry` is what a scrape shows."""

    _is_made: ClassVar[bool] = False

    def __init__(self, *, enabled: bool = True) -> None:
        """Without `enabled` nothing is declared or counted, at next to no cost."""
        self.is_enabled = enabled
        self.is_shared = enabled and "PROMETHEUS_MULTIPROC_DIR" in os.environ
        if self.is_shared:
            assert not Metrics._is_made, "the values of a second one would overwrite the first one's"
            Metrics._is_made = True
        self.registry = CollectorRegistry()
        self._declare_api()
        self._declare_engine()
        self._declare_models()
        self._declare_training()
        self._begin_at_zero()

    def _counter(self, name: str, says: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, says, labels, registry=self.registry) if self.is_enabled else cast(Counter, _UNCOUNTED)

    def _gauge(self, name: str, says: str, labels: Sequence[str] = (), *, across: _Across = "livesum") -> Gauge:
        if not self.is_enabled:
            return cast(Gauge, _UNCOUNTED)
        return Gauge(name, says, labels, registry=self.registry, multiprocess_mode=across)

    def _histogram(self, name: str, says: str, labels: Sequence[str] = (), *, buckets: Sequence[float]) -> Histogram:
        if not self.is_enabled:
            return cast(Histogram, _UNCOUNTED)
        return Histogram(name, says, labels, registry=self.registry, buckets=buckets)

    def _declare_api(self) -> None:
        self.build = self._gauge("rookery_build_info", "1, for the version that runs.", ["version"], across="livemax")
        self.build.labels(VERSION).set(1)
        self.requests = self._counter(
            "rookery_requests",
            "HTTP requests answered; a stream that broke counts under the status of its error.",
            ["route", "status"],
        )
        self.requests_in_progress = self._gauge(
            "rookery_requests_in_progress", "HTTP requests that are being answered."
        )
        self.request_duration = self._histogram(
            "rookery_request_duration_seconds",
            "From the arrival of a request to the last byte of its answer.",
            ["route"],
            buckets=_SECONDS,
        )
        self.time_to_first_token = self._histogram(
            "rookery_time_to_first_token_seconds",
            "From the arrival of a request to its first token, by where the weights were.",
            ["tier"],
            buckets=_SECONDS,
        )
        self.inter_token = self._histogram(
            "rookery_inter_token_seconds",
            "Mean time a token, of each flush after the first, by where the weights were.",
            ["tier"],
            buckets=_STEP_SECONDS,
        )
        self.tokens_generated = self._counter("rookery_tokens_generated", "Tokens sent to callers.")
        self.prompt_tokens = self._counter("rookery_prompt_tokens", "Tokens of the prompts answered.")
        self.generations = self._counter("rookery_generations", "Texts asked for, by how that ended.", ["outcome"])
        self.generations_resumed = self._counter(
            "rookery_generations_resumed",
            "Times that a generator was lost and another one went on, by what there was of the text: `nothing`, the "
            "beginning of a `stream`, or of a `whole` answer, which its caller had not seen.",
            ["had"],
        )
        self.body_rejections = self._counter(
            "rookery_body_rejections", "Request bodies refused before they were used.", ["reason"]
        )
        self.auth_failures = self._counter(
            "rookery_auth_failures", "Requests refused for who sent them, or from where.", ["reason"]
        )
        self.rate_limited = self._counter(
            "rookery_rate_limited", "Requests refused because their caller had had its share of what.", ["limit"]
        )
        self.pull_duration = self._histogram(
            "rookery_pull_duration_seconds",
            "Models pulled by hand, from the question to the Hub to the published model, or to why there is none.",
            ["outcome"],
            buckets=_SECONDS,
        )

    def _declare_engine(self) -> None:
        self.batch_rows = self._histogram("rookery_batch_rows", "Rows (tokens) of a step.", buckets=_POWERS_OF_TWO)
        self.batch_models = self._histogram(
            "rookery_batch_models", "Distinct models of a step.", buckets=_POWERS_OF_TWO
        )
        self.step_duration = self._histogram(
            "rookery_step_duration_seconds", "One step of the engine.", buckets=_STEP_SECONDS
        )
        self.queue_depth = self._gauge("rookery_queue_depth", "Sequences waiting for a place in a batch.")
        self.queue_wait = self._histogram(
            "rookery_queue_wait_seconds",
            "From the arrival of a text at the engine to its first step, without the wait for its model.",
            buckets=_SECONDS,
        )

    def _declare_models(self) -> None:
        self.pool_models = self._gauge(
            "rookery_pool_models", "Models in memory; `leased` and `pinned` ones are among the `resident`.", ["state"]
        )
        self.pool_bytes = self._gauge("rookery_pool_bytes", "Bytes of models, by where they are.", ["tier"])
        self.pool_budget_bytes = self._gauge(
            "rookery_pool_budget_bytes", "Bytes that models may take, by where they are.", ["tier"]
        )
        self.pool_waiting = self._gauge("rookery_pool_waiting", "Requests waiting for their model.")
        self.model_loads = self._counter("rookery_model_loads", "Models brought into memory.", ["tier", "outcome"])
        self.model_reloads = self._counter(
            "rookery_model_reloads", "Loads of models that had been evicted a short while before."
        )
        self.model_load_duration = self._histogram(
            "rookery_model_load_duration_seconds",
            "Time to bring a model into memory, by where it came from.",
            ["tier"],
            buckets=_SECONDS,
        )
        self.model_evictions = self._counter("rookery_model_evictions", "Models dropped from memory.", ["reason"])
        self.quarantines = self._counter(
            "rookery_model_quarantines", "Models refused for a while because their texts held NaN or Inf."
        )
        self.age_at_eviction = self._histogram(
            "rookery_model_age_at_eviction_seconds",
            "How long a model had been in memory when it made room for another.",
            buckets=_LONG_SECONDS,
        )
        self.hub_requests = self._counter("rookery_hub_requests", "HTTP requests to the Hub.", ["outcome"])
        self.hub_fetch_duration = self._histogram(
            "rookery_hub_fetch_duration_seconds",
            "From the question to the Hub to the published model, or to why there is none.",
            ["outcome"],
            buckets=_SECONDS,
        )
        self.disk_evictions = self._counter(
            "rookery_disk_evictions",
            "Models from the Hub dropped from the disk; `copy`: not those, but this machine's own copies of weights; "
            "`damaged`: revisions of any model, whose bytes the disk has changed.",
            ["reason"],
        )

    def _declare_training(self) -> None:
        self.jobs = self._gauge(
            "rookery_jobs",
            "Training jobs of the whole service by state, as its database says: take the maximum over "
            "nodes, not the sum.",
            ["state"],
            across="livemostrecent",
        )
        self.job_duration = self._histogram(
            "rookery_job_duration_seconds",
            "From the start of a job's attempt to its end.",
            ["outcome"],
            buckets=_LONG_SECONDS,
        )
        self.training_tokens = self._counter("rookery_training_tokens", "Tokens that models were trained on.")

    def _begin_at_zero(self) -> None:
        """What is rare and watched: a counter that Prometheus first sees at 1 has, to it, not risen."""
        for outcome in ("succeeded", "failed", "cancelled", "paused", "queued", "lost"):
            self.job_duration.labels(outcome)
        for had in ("nothing", "stream", "whole"):
            self.generations_resumed.labels(had)
        for reason in ("budget", "space", "copy", "damaged"):
            self.disk_evictions.labels(reason)
