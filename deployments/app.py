"""The application as Ray Serve runs it: gateway -> generator, and trainers beside them.

    serve build deployments.app:app
    serve run deployments.app:build num_generators=2

Deployments carry their options here; YAML may override them by name. How many replicas of each there are is fixed, or,
where the arguments name a most, follows what is asked for: `deployments.scaling`, which YAML names as the application's
policy.
NOTE: no `from __future__ import annotations`: Ray looks at the annotation of `build` and takes a string for no type.
"""

from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from deployments.gateway import Gateway
from deployments.generator import Generator
from deployments.router import BOUND, ModelAffinityRouter
from deployments.trainer import Trainer
from serve.pool.working_set import WINDOW_S
from serve.settings import PREFIX, Settings

APP_NAME = "rookery"

# What Ray books for a replica, not what it can use: on a laptop all three share the cores.
_GENERATOR_CPUS = {"cpu": 1, "gpu": 2}
_TORCH_DEVICE = {"cpu": "cpu", "gpu": "cuda"}
_SMALL: dict[str, float] = {"num_cpus": 0.1}
_MAX_SHARED = 0.5  # of a GPU, by all trainers; with more, two generators would fit on one
# How long a number must be wanted before it is had. More comes fast, for somebody waits, and the figures are means of
# half a minute anyway; a pod with a GPU takes minutes to come. Less comes late: a generator that goes takes its models
# with it, so longer than the models asked for are counted (`working_set_s`), and a trainer's owner often has more bots.
_GROW_S = {"gateway": 15.0, "generator": 15.0, "trainer": 0.0}
_SHRINK_S = {"gateway": 300.0, "generator": 600.0, "trainer": 300.0}
# One process on one core relays some 5,000 tokens a second: as many streams of 40 tokens a second.
_STREAMS_A_GATEWAY = 128
_TRAINER_STOPS_S = 30.0  # longer than a training process has to end
_WITHOUT_POLICY = AutoscalingPolicy(policy_function="deployments.scaling:every_one")  # of the application, in YAML
# That a trainer which is to go has for the job at hand: to end, where little is left of it. Else it goes on elsewhere
# from its checkpoint. It cannot tell whether there are too many trainers or its GPU is wanted by generators, whose
# users wait, so that is soon.
_FINISH_S = 60.0


class AppArgs(BaseModel):
    """Arguments of the application in YAML; `settings` are those of `serve.settings.Settings`, by field name.

    `num_trainers`: jobs that train at once; on one machine, give each its share of the cores by `trainer_threads`.
    `trainer_gpus`: of a GPU that each books; 0: it trains on the CPU, 1: it has one to itself. With less, all of them
    fit beside any one generator, which books the rest and leaves them the memory that it does not.
    `max_generators`, `max_gateways`, `max_trainers`: as many as there may be, `num_*` then being the fewest, which of
    trainers may be none; None: their number is fixed.
    `working_set_s`: models asked for within so many seconds are to fit into the generators' memory together.
    `placed`: each replica books 1 of the custom resource `gateway`, `generator` or `trainer` of its node.
    `needs_keys`: gateways refuse to start without API keys; False for what only its own machine can reach.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_generators: int = Field(1, ge=1)
    num_gateways: int = Field(1, ge=1)
    num_trainers: int = Field(1, ge=0)
    max_generators: int | None = Field(None, ge=1)
    max_gateways: int | None = Field(None, ge=1)
    max_trainers: int | None = Field(None, ge=1)
    working_set_s: float = Field(WINDOW_S, gt=0)
    placed: bool = False
    needs_keys: bool = True
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
    def _ranges(self) -> "AppArgs":
        for kind in ("generators", "gateways", "trainers"):
            fewest, most = getattr(self, f"num_{kind}"), getattr(self, f"max_{kind}")
            if most is not None and most < fewest:
                raise ValueError(
                    f"max_{kind} is {most}, below num_{kind}, which is {fewest}: raise it, or leave it out"
                )
        if self.num_trainers == 0 and self.max_trainers is None:
            raise ValueError("num_trainers is 0, so that no job would ever run: set it to 1, or set max_trainers")
        return self

    @model_validator(mode="after")
    def _fits(self) -> "AppArgs":
        most, named = self.most_trainers, "num_trainers" if self.max_trainers is None else "max_trainers"
        if self.device == "gpu" and self.trainer_gpus < 1 and most * self.trainer_gpus >= _MAX_SHARED:
            raise ValueError(
                f"{most} trainers with {self.trainer_gpus:g} of a GPU each leave a generator too little: "
                f"keep {named} times trainer_gpus below {_MAX_SHARED:g}, or set trainer_gpus to 1"
            )
        return self

    @property
    def most_trainers(self) -> int:
        return self.max_trainers or self.num_trainers


def as_env(settings: dict[str, str | int | float]) -> dict[str, str]:
    """Settings by field name as `ROOKERY_*` variables."""
    return {PREFIX + name.upper(): str(value) for name, value in settings.items()}


def build(args: AppArgs) -> Application:
    """The application graph; Ray Serve calls it with the `args` of its configuration."""
    env = as_env({"device": _TORCH_DEVICE[args.device], **args.settings})
    generator = generator_deployment.options(
        **_number("generator", args.num_generators, args.max_generators),
        ray_actor_options=_resources("generator", args, _generator_share(args)),
        request_router_config=RequestRouterConfig(
            request_router_class=ModelAffinityRouter, request_router_kwargs={"bound": args.spill_bound}
        ),
    )
    # Also where their number is fixed: Ray asks the gateways how many jobs there are only where it could scale them.
    max_gateways = args.num_gateways if args.max_gateways is None and args.max_trainers else args.max_gateways
    gateway = gateway_deployment.options(
        **_number("gateway", args.num_gateways, max_gateways, target_ongoing_requests=_STREAMS_A_GATEWAY),
        ray_actor_options=_resources("gateway", args),
    )
    finish_s = _FINISH_S if args.max_trainers else 0.0
    trainer = trainer_deployment.options(
        **_number("trainer", args.num_trainers, args.max_trainers, policy=_WITHOUT_POLICY),
        ray_actor_options=_resources("trainer", args, args.trainer_gpus),
        graceful_shutdown_timeout_s=finish_s + _TRAINER_STOPS_S,
    )
    memory_share = args.trainer_gpus if args.device == "gpu" and 0 < args.trainer_gpus < 1 else None
    application: Application = gateway.bind(
        env, generator.bind(env, args.working_set_s), trainer.bind(env, memory_share, finish_s), args.needs_keys
    )
    return application


def _number(name: str, fewest: int, most: int | None, **autoscaling: Any) -> dict[str, Any]:
    if most is None:
        return {"num_replicas": fewest}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=fewest,
            max_replicas=most,
            upscale_delay_s=_GROW_S[name],
            downscale_delay_s=_SHRINK_S[name],
            **autoscaling,
        )
    }


def _generator_share(args: AppArgs) -> float:
    """Of a GPU, which trainers may leave to it in part."""
    return round(1 - args.most_trainers * args.trainer_gpus, 4) if args.trainer_gpus < 1 else 1.0


def _resources(name: str, args: AppArgs, gpus: float = 0.0) -> dict[str, Any]:
    """What one replica books of its node."""
    booked: dict[str, Any] = {**_SMALL}
    if name == "generator":
        booked["num_cpus"] = _GENERATOR_CPUS[args.device]
    if name != "gateway":
        booked["num_gpus"] = gpus if args.device == "gpu" else 0
    return {**booked, "resources": {name: 1}} if args.placed else booked


def _deployment(target: type, *, health_check_timeout_s: float = 30, **options: Any) -> Deployment:
    deployment: Deployment = serve.deployment(
        name=target.__name__.lower(),
        health_check_period_s=2,  # a dead replica is replaced after 2-4 s; Ray's own 10 would make it 10-14
        health_check_timeout_s=health_check_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        **options,
    )(target)
    return deployment


# The generator's own queue is fair and knows deadlines, so Ray's stays short and refuses early: 4 times its batch run
# or wait inside, then 64 for each gateway outside.
generator_deployment = _deployment(
    Generator,
    health_check_timeout_s=10,  # three in a row and the start of another: one that hangs is replaced within 45 s
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
trainer_deployment = _deployment(Trainer, ray_actor_options=_SMALL, graceful_shutdown_timeout_s=_TRAINER_STOPS_S)

app = build(AppArgs())
