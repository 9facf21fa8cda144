"""The application as Ray Serve runs it: gateway -> generator, and a trainer beside them.

    serve build deployments.app:app
    serve run deployments.app:build num_generators=2

Deployments carry their options here; YAML may override them by name.
NOTE: no `from __future__ import annotations`: Ray looks at the annotation of `build` and takes a string for no type.
"""

from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from deployments.gateway import Gateway
from deployments.generator import Generator
from deployments.router import BOUND, ModelAffinityRouter
from deployments.trainer import Trainer
from serve.settings import PREFIX, Settings

APP_NAME = "rookery"

# What Ray books for a replica, not what it can use: on a laptop all three share the cores.
_GENERATOR_RESOURCES = {"cpu": {"num_cpus": 1, "num_gpus": 0}, "gpu": {"num_cpus": 2, "num_gpus": 1}}
_TORCH_DEVICE = {"cpu": "cpu", "gpu": "cuda"}
_SMALL: dict[str, float] = {"num_cpus": 0.1}


class AppArgs(BaseModel):
    """Arguments of the application in YAML; `settings` are those of `serve.settings.Settings`, by field name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_generators: int = Field(1, ge=1)
    num_gateways: int = Field(1, ge=1)
    device: Literal["cpu", "gpu"] = "cpu"
    spill_bound: float = Field(BOUND, ge=1.0)
    settings: dict[str, str | int | float] = Field(default_factory=dict)

    @field_validator("settings")
    @classmethod
    def _known(cls, settings: dict[str, str | int | float]) -> dict[str, str | int | float]:
        unknown = settings.keys() - {field.name for field in fields(Settings)}
        if unknown:
            raise ValueError(f"there are no settings named {', '.join(sorted(unknown))}")
        Settings.from_env(as_env(settings))
        return settings


def as_env(settings: dict[str, str | int | float]) -> dict[str, str]:
    """Settings by field name as `ROOKERY_*` variables."""
    return {PREFIX + name.upper(): str(value) for name, value in settings.items()}


def build(args: AppArgs) -> Application:
    """The application graph; Ray Serve calls it with the `args` of its configuration."""
    env = as_env({"device": _TORCH_DEVICE[args.device], **args.settings})
    generator = generator_deployment.options(
        num_replicas=args.num_generators,
        ray_actor_options=_GENERATOR_RESOURCES[args.device],
        request_router_config=RequestRouterConfig(
            request_router_class=ModelAffinityRouter, request_router_kwargs={"bound": args.spill_bound}
        ),
    )
    gateway = gateway_deployment.options(num_replicas=args.num_gateways)
    application: Application = gateway.bind(env, generator.bind(env), trainer_deployment.bind(env))
    return application


def _deployment(target: type, **options: Any) -> Deployment:
    deployment: Deployment = serve.deployment(
        name=target.__name__.lower(),
        health_check_period_s=2,  # a dead replica is replaced after 2-4 s; Ray's own 10 would make it 10-14
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        **options,
    )(target)
    return deployment


# The generator's own queue is fair and knows deadlines, so Ray's stays short and refuses early: 4 times its batch run
# or wait inside, then 64 for each gateway outside.
generator_deployment = _deployment(
    Generator,
    max_ongoing_requests=256,
    max_queued_requests=64,
    graceful_shutdown_timeout_s=20,
)
gateway_deployment = _deployment(
    serve.ingress()(Gateway),
    ray_actor_options=_SMALL,
    max_ongoing_requests=512,
    max_queued_requests=256,
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    graceful_shutdown_timeout_s=20,
)
# Longer than a training process has to end.
trainer_deployment = _deployment(Trainer, num_replicas=1, ray_actor_options=_SMALL, graceful_shutdown_timeout_s=30)

app = build(AppArgs())
