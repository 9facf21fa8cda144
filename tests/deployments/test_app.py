"""The application and its YAML, without a cluster."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

import deployments
from deployments.app import AppArgs, app, build, gateway_deployment, generator_deployment, trainer_deployment

FOLDER = Path(next(iter(deployments.__path__)))
CONFIGS = sorted(FOLDER.glob("*.yaml"))
POLICY = "deployments.scaling:Scaling"
DEPLOYMENTS = {gateway_deployment.name, generator_deployment.name, trainer_deployment.name}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.name)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(request.param.read_text())
    return loaded


def test_all_configurations_are_here() -> None:
    assert [path.name for path in CONFIGS] == ["gpu.yaml", "ha.yaml", "kind.yaml", "local.yaml"]


def test_a_configuration_is_valid_and_has_no_key_that_ray_would_ignore(config: dict[str, Any]) -> None:
    ServeDeploySchema.model_validate(config)
    assert list(unknown_keys(config, ServeDeploySchema)) == []


def test_a_misspelt_key_is_found() -> None:
    config = {"applications": [{"import_path": "a:b", "deployments": [{"name": "x", "max_ongoing_request": 1}]}]}
    assert list(unknown_keys(config, ServeDeploySchema)) == ["applications.deployments.max_ongoing_request"]


def test_the_arguments_of_a_configuration_build_the_application(config: dict[str, Any]) -> None:
    (application,) = config["applications"]
    assert application["import_path"] == "deployments.app:build"
    build(AppArgs.model_validate(application["args"]))
    assert {override["name"] for override in application.get("deployments", [])} <= DEPLOYMENTS


def test_ray_sees_that_the_builder_takes_app_args() -> None:
    assert inspect.signature(build).parameters["args"].annotation is AppArgs
    assert app is not None


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"num_generator": 2}, "num_generator"),
        ({"num_generators": 0}, "num_generators"),
        ({"device": "tpu"}, "device"),
        ({"num_trainers": 0}, "set max_trainers"),
        ({"num_trainers": -1, "max_trainers": 1}, "num_trainers"),
        ({"num_generators": 3, "max_generators": 2}, "max_generators is 2, below num_generators, which is 3"),
        ({"num_gateways": 2, "max_gateways": 1}, "max_gateways"),
        ({"max_trainers": 0, "num_trainers": 0}, "max_trainers"),
        ({"device": "gpu", "max_trainers": 3}, "max_trainers times trainer_gpus"),
        ({"device": "gpu", "num_trainers": 3}, "num_trainers times trainer_gpus"),
        ({"settings": {"flush_interval": 1}}, "flush_interval"),
        ({"settings": {"max_sequences": "many"}}, "ROOKERY_MAX_SEQUENCES"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(args: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        AppArgs.model_validate(args)


def bound(args: AppArgs, index: int) -> Any:
    """0: the gateway, 1: the generator, 2: the trainer."""
    gateway = build(args)._bound_deployment
    return gateway.init_args[index]._bound_deployment if index else gateway


def scaling(args: AppArgs) -> list[AutoscalingConfig | None]:
    return [bound(args, index)._deployment_config.autoscaling_config for index in range(3)]


def test_what_runs_on_a_laptop_is_never_scaled_and_books_no_place() -> None:
    assert scaling(AppArgs()) == [None, None, None]
    for index in range(3):
        deployment = bound(AppArgs(num_gateways=2, num_generators=2, num_trainers=2), index)
        assert deployment.num_replicas == 2
        assert "resources" not in deployment.ray_actor_options
    trainer = bound(AppArgs(), 2)
    assert trainer.init_args[2] == 0  # Ctrl-C does not wait for a job
    assert trainer._deployment_config.graceful_shutdown_timeout_s == 30


def test_with_a_most_there_are_between_the_fewest_and_the_most() -> None:
    args = AppArgs(num_gateways=2, max_gateways=4, max_generators=3, num_trainers=0, max_trainers=5)
    configs = scaling(args)
    assert [(c.min_replicas, c.max_replicas) for c in configs if c] == [(2, 4), (1, 3), (0, 5)]
    for config in configs:
        assert config is not None
        assert config.upscale_delay_s <= 15 < config.look_back_period_s < config.downscale_delay_s


def test_generators_go_later_than_the_models_asked_for_are_counted() -> None:
    _, generator, _ = scaling(AppArgs(max_generators=2))
    assert generator is not None
    assert generator.downscale_delay_s > AppArgs().working_set_s


def test_gateways_of_a_fixed_number_tell_how_many_jobs_there_are_nonetheless() -> None:
    gateway, generator, _ = scaling(AppArgs(num_gateways=2, max_trainers=1))
    assert gateway is not None and generator is None  # Ray asks only those that it could scale
    assert (gateway.min_replicas, gateway.max_replicas) == (2, 2)


def test_a_trainer_that_may_be_one_too_many_has_time_for_its_job() -> None:
    trainer = bound(AppArgs(max_trainers=2), 2)
    assert trainer.init_args[2] > 0
    assert trainer._deployment_config.graceful_shutdown_timeout_s > trainer.init_args[2]


def test_a_trainer_whose_gpu_is_wanted_is_gone_before_its_pod_is_killed() -> None:
    assert bound(AppArgs(max_trainers=2), 2)._deployment_config.graceful_shutdown_timeout_s <= 90


def test_gateways_are_told_whether_they_need_keys() -> None:
    assert [bound(AppArgs(needs_keys=needs), 0).init_args[3] for needs in (False, True)] == [False, True]
    assert bound(AppArgs(), 0).init_args[3] is True  # who opens it to everybody has to say so


def test_a_placed_replica_books_one_of_the_resource_of_its_name() -> None:
    args = AppArgs(placed=True, device="gpu", trainer_gpus=1)
    booked = [bound(args, index).ray_actor_options for index in range(3)]
    assert [one["resources"] for one in booked] == [{"gateway": 1}, {"generator": 1}, {"trainer": 1}]
    assert [one.get("num_gpus", 0) for one in booked] == [0, 1, 1]


def test_where_an_application_is_scaled_its_configuration_names_the_policy(config: dict[str, Any]) -> None:
    (application,) = config["applications"]
    scales = any(name.startswith("max_") for name in application["args"])
    assert application.get("autoscaling_policy", {}) == ({"policy_function": POLICY} if scales else {})


def test_what_is_to_go_in_a_cluster_has_as_long_as_a_generation_may_take(config: dict[str, Any]) -> None:
    (application,) = config["applications"]
    limit_s = 600
    if application["args"].get("placed"):
        stops = {one["name"]: one["graceful_shutdown_timeout_s"] for one in application["deployments"]}
        assert limit_s < stops["generator"] < stops["gateway"] < config["http_options"]["request_timeout_s"]


def test_a_gpu_generator_asks_for_what_trainers_leave_of_a_gpu_and_torch_for_cuda() -> None:
    generator = bound(AppArgs(device="gpu", num_generators=3, num_trainers=2, trainer_gpus=0.2), 1)
    assert generator.ray_actor_options["num_gpus"] == 0.6
    assert generator.num_replicas == 3
    assert generator.init_args[0] == {"ROOKERY_DEVICE": "cuda"}


@pytest.mark.parametrize(
    ("device", "trainer_gpus", "booked"),
    [("cpu", 0.2, (0, 0)), ("gpu", 0, (1, 0)), ("gpu", 0.1, (0.7, 0.1)), ("gpu", 1, (1, 1))],
)
def test_several_trainers_share_a_gpu_or_have_their_own(
    device: Any, trainer_gpus: float, booked: tuple[float, float]
) -> None:
    args = AppArgs(device=device, num_trainers=3, trainer_gpus=trainer_gpus)
    generator, trainer = bound(args, 1), bound(args, 2)
    assert trainer.num_replicas == 3
    assert (generator.ray_actor_options["num_gpus"], trainer.ray_actor_options["num_gpus"]) == booked


def unknown_keys(value: Any, kind: Any, path: str = "") -> typing.Iterator[str]:
    """Keys of a nested configuration that the pydantic model `kind` has no field for: Ray ignores them."""
    models = [model for model in (kind, *typing.get_args(kind)) if inspect.isclass(model)]
    model = next((model for model in models if issubclass(model, BaseModel)), None)
    if isinstance(value, list):
        for item in value:
            yield from unknown_keys(item, typing.get_args(kind)[0] if typing.get_args(kind) else None, path)
    elif isinstance(value, dict) and model is not None:
        for key, item in value.items():
            field = model.model_fields.get(key)
            if field is None:
                yield f"{path}{key}"
            else:
                yield from unknown_keys(item, field.annotation, f"{path}{key}.")
