"""Every metric, declared once: names, labels and buckets.

Label values come from bounded sets (route template, status, tier, outcome, reason), never from a model id or a
user. A leaf: it does not know who counts or how the text is scraped.
"""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

Part = Literal["all", "api", "engine"]

# From a resident model's answer on a GPU (milliseconds) to a cold start from the Hub on a slow line (minutes).
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_POWERS_OF_TWO = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


class Metrics:
    """The metrics of one process, over one registry.

    Where API and engine are processes of their own, each passes its `part`: the others' metrics can
    still be called but are not exposed, so that joined expositions never hold the same series twice.
    What both count is `shared`: in the API's process it is not in `registry`, to be joined with the engines' own.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, part: Part = "all") -> None:
        self.registry = registry or CollectorRegistry()

        def owned_by(owner: Part) -> CollectorRegistry | None:
            return self.registry if part in ("all", owner) else None

        self.shared = CollectorRegistry() if part == "api" else self.registry
        api = owned_by("api")
        self.requests = Counter("rookery_requests", "HTTP requests answered.", ["route", "status"], registry=api)
        self.request_duration = Histogram(
            "rookery_request_duration_seconds",
            "From the arrival of a request to the last byte of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=api,
        )
        self.time_to_first_token = Histogram(
            "rookery_time_to_first_token_seconds",
            "From the arrival of a request to its first token, by where the weights were.",
            ["tier"],
            buckets=_SECONDS,
            registry=api,
        )
        self.tokens_generated = Counter("rookery_tokens_generated", "Tokens sent to callers.", registry=api)
        self.prompt_tokens = Counter("rookery_prompt_tokens", "Tokens of the prompts answered.", registry=api)

        self.pull_duration = Histogram(
            "rookery_pull_duration_seconds",
            "Models pulled by hand, from the question to the Hub to the published model, or to why there is none.",
            ["outcome"],
            buckets=_SECONDS,
            registry=api,
        )

        engine = owned_by("engine")
        self.model_loads = Counter(
            "rookery_model_loads", "Models brought into memory.", ["tier", "outcome"], registry=engine
        )
        self.model_load_duration = Histogram(
            "rookery_model_load_duration_seconds",
            "Time to bring a model into memory, by where it came from.",
            ["tier"],
            buckets=_SECONDS,
            registry=engine,
        )
        self.model_evictions = Counter(
            "rookery_model_evictions", "Models dropped from memory.", ["reason"], registry=engine
        )
        self.hub_fetch_duration = Histogram(
            "rookery_hub_fetch_duration_seconds",
            "From the question to the Hub to the published model, or to why there is none.",
            ["outcome"],
            buckets=_SECONDS,
            registry=engine,
        )
        self.disk_evictions = Counter(
            "rookery_disk_evictions", "Models from the Hub dropped from the disk.", ["reason"], registry=self.shared
        )
        self.pool_resident_bytes = Gauge("rookery_pool_resident_bytes", "Bytes of models in memory.", registry=engine)
        self.pool_budget_bytes = Gauge("rookery_pool_budget_bytes", "Bytes models may take.", registry=engine)
        self.pool_resident_models = Gauge("rookery_pool_resident_models", "Models in memory.", registry=engine)
        self.batch_rows = Histogram(
            "rookery_batch_rows", "Rows (tokens) of a step.", buckets=_POWERS_OF_TWO, registry=engine
        )
        self.batch_models = Histogram(
            "rookery_batch_models", "Distinct models of a step.", buckets=_POWERS_OF_TWO, registry=engine
        )
        self.step_duration = Histogram(
            "rookery_step_duration_seconds", "One step of the engine.", buckets=_STEP_SECONDS, registry=engine
        )
        self.queue_depth = Gauge("rookery_queue_depth", "Sequences waiting for a place.", registry=engine)

    def render(self) -> str:
        """The Prometheus text exposition of what this process owns."""
        return generate_latest(self.registry).decode()

    def render_shared(self) -> str:
        """The same of what engines count as well."""
        return generate_latest(self.shared).decode()
