"""The application and its YAML, without a cluster."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

import deployments
from deployments.app import AppArgs, app, build, gateway_deployment, generator_deployment, trainer_deployment

FOLDER = Path(next(iter(deployments.__path__)))
CONFIGS = sorted(FOLDER.glob("*.yaml"))
DEPLOYMENTS = {gateway_deployment.name, generator_deployment.name, trainer_deployment.name}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.name)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(request.param.read_text())
    return loaded


def test_both_configurations_are_here() -> None:
    assert [path.name for path in CONFIGS] == ["gpu.yaml", "local.yaml"]


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
        ({"num_trainers": 0}, "num_trainers"),
        ({"device": "gpu", "num_trainers": 3}, "num_trainers times trainer_gpus"),
        ({"settings": {"flush_interval": 1}}, "flush_interval"),
        ({"settings": {"max_sequences": "many"}}, "ROOKERY_MAX_SEQUENCES"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(args: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        AppArgs.model_validate(args)


def bound(args: AppArgs, index: int) -> Any:
    """1: the generator, 2: the trainer."""
    return build(args)._bound_deployment.init_args[index]._bound_deployment


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
