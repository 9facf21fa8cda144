"""The application as Ray Serve runs it: gateway -> generator, and trainers beside them.

    serve build deployments.app:app
    serve run deployments.app:build num_generators=2

Deployments carry their options here; YAML may override them by name.
NOTE: no `from __future__ import annotations`: Ray looks at the annotation of `build` and takes a string for no type.
"""

from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
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
_GENERATOR_CPUS = {"cpu": 1, "gpu": 2}
_TORCH_DEVICE = {"cpu": "cpu", "gpu": "cuda"}
_SMALL: dict[str, float] = {"num_cpus": 0.1}
_MAX_SHARED = 0.5  # of a GPU, by all trainers; with more, two generators would fit on one


class AppArgs(BaseModel):
    """Arguments of the application in YAML; `settings` are those of `serve.settings.Settings`, by field name.

    `num_trainers`: jobs that train at once; on one machine, give each its share of the cores by `trainer_threads`.
    `trainer_gpus`: of a GPU that each books; 0: it trains on the CPU, 1: it has one to itself. With less, all of them
    fit beside any one generator, which books the rest and leaves them the memory that it does not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_generators: int = Field(1, ge=1)
    num_gateways: int = Field(1, ge=1)
    num_trainers: int = Field(1, ge=1)
    device: Literal["cpu", "gpu"] = "cpu"
    trainer_gpus: float = Field(0.2, ge=0, le=1)
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

    @model_validator(mode="after")
    def _fits(self) -> "AppArgs":
        if self.device == "gpu" and self.trainer_gpus < 1 and self.num_trainers * self.trainer_gpus >= _MAX_SHARED:
            raise ValueError(
                f"{self.num_trainers} trainers with {self.trainer_gpus:g} of a GPU each leave a generator too little: "
                f"keep num_trainers times trainer_gpus below {_MAX_SHARED:g}, or set trainer_gpus to 1"
            )
        return self


def as_env(settings: dict[str, str | int | float]) -> dict[str, str]:
    """Settings by field name as `ROOKERY_*` variables."""
    return {PREFIX + name.upper(): str(value) for name, value in settings.items()}


def build(args: AppArgs) -> Application:
    """The application graph; Ray Serve calls it with the `args` of its configuration."""
    env = as_env({"device": _TORCH_DEVICE[args.device], **args.settings})
    generator = generator_deployment.options(
        num_replicas=args.num_generators,
        ray_actor_options=_generator_resources(args),
        request_router_config=RequestRouterConfig(
            request_router_class=ModelAffinityRouter, request_router_kwargs={"bound": args.spill_bound}
        ),
    )
    gateway = gateway_deployment.options(num_replicas=args.num_gateways)
    trainer = trainer_deployment.options(num_replicas=args.num_trainers, ray_actor_options=_trainer_resources(args))
    memory_share = args.trainer_gpus if args.device == "gpu" and 0 < args.trainer_gpus < 1 else None
    application: Application = gateway.bind(env, generator.bind(env), trainer.bind(env, memory_share))
    return application


def _generator_resources(args: AppArgs) -> dict[str, float]:
    shared = args.num_trainers * args.trainer_gpus if args.trainer_gpus < 1 else 0.0
    gpus = round(1 - shared, 4) if args.device == "gpu" else 0
    return {"num_cpus": _GENERATOR_CPUS[args.device], "num_gpus": gpus}


def _trainer_resources(args: AppArgs) -> dict[str, float]:
    return {**_SMALL, "num_gpus": args.trainer_gpus if args.device == "gpu" else 0}


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
trainer_deployment = _deployment(Trainer, ray_actor_options=_SMALL, graceful_shutdown_timeout_s=30)

app = build(AppArgs())
