"""What Ray Serve is told: known to it, the same as in `deployments/`, and with room for it in the pods."""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, get_args

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError
from ray.serve._private.build_app import build_app
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import ServeDeploySchema

from deployments.app import AppArgs, build
from serve.api.service import Limits
from tests.k8s.quantities import parse
from tests.k8s.rendered import ROOT, Json, Rendering

_APPLICATION = "rookery"
_IMPORT_PATH = "deployments.app:build"
_GPU = "nvidia.com/gpu"
# Where the schema takes anything, though Ray makes one of these of it.
_OPAQUE: Mapping[str, type[BaseModel]] = {
    "autoscaling_config": AutoscalingConfig,
    "autoscaling_policy": AutoscalingPolicy,
    "request_router_config": RequestRouterConfig,
}


@dataclass(frozen=True, slots=True)
class Replicas:
    """Of one deployment: how many there are, what each books of its node, how long it may take to end.

    `most` has those in it that there are besides while they are replaced.
    """

    fewest: int
    most: int
    booked: Mapping[str, float]
    grace_s: float


def replicas_of(rendering: Rendering) -> dict[str, Replicas]:
    """By deployment; none where the application cannot be built, which `the_application_can_be_built` says."""
    application = _application(rendering)
    try:
        return _replicas(json.dumps(application))
    except (ValidationError, ValueError, KeyError):
        return {}


@cache
def _replicas(application: str) -> dict[str, Replicas]:
    described = json.loads(application)
    built = build_app(build(AppArgs(**described["args"])), name=_APPLICATION)
    overrides = {one["name"]: one for one in described.get("deployments", ())}
    return {one.name: _with(one, overrides.get(one.name, {})) for one in built.deployments}


def _with(deployment: Any, override: Json) -> Replicas:
    """Options of the YAML take the place of the code's, `ray_actor_options` as a whole."""
    config = deployment._deployment_config
    options = override.get("ray_actor_options", deployment.ray_actor_options)
    scaling = config.autoscaling_config
    scaling = override.get("autoscaling_config", scaling and scaling.model_dump())
    number = override.get("num_replicas", config.num_replicas)
    fewest, most = (scaling["min_replicas"], scaling["max_replicas"]) if scaling else (number, number)
    booked = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
    grace_s = override.get("graceful_shutdown_timeout_s", config.graceful_shutdown_timeout_s)
    most = ceil(most * (1 + override.get("max_surge_percent", config.max_surge_percent) / 100))
    return Replicas(fewest, most, {name: amount for name, amount in booked.items() if amount}, grace_s)


def _application(rendering: Rendering) -> Json:
    found = rendering.serve_config.get("applications") or [{}]
    application: Json = found[0]
    return application


def the_application_is_ours(rendering: Rendering) -> Iterator[str]:
    applications = rendering.serve_config.get("applications", [])
    if [one.get("name") for one in applications] != [_APPLICATION]:
        yield f"Served is {', '.join(str(one.get('name')) for one in applications)}, not {_APPLICATION} alone."
    for one in applications:
        if one.get("import_path") != _IMPORT_PATH or one.get("route_prefix", "/") != "/":
            yield f"{one.get('import_path')} at {one.get('route_prefix')} is not our application at /."
        if "runtime_env" in one:
            yield f"{one.get('name')} brings code with it that is not the image's."


def the_configuration_is_the_one_in_deployments(rendering: Rendering) -> Iterator[str]:
    source = ROOT / "deployments" / f"{rendering.overlay}.yaml"
    if not source.is_file():
        yield f"There is no deployments/{source.name}."
    elif yaml.safe_load(source.read_text(encoding="utf-8")) != rendering.serve_config:
        yield f"serveConfigV2 is not what deployments/{source.name} says."


def every_option_is_known_to_ray(rendering: Rendering) -> Iterator[str]:
    """Ray would ignore a name that it does not know."""
    yield from _unknown(ServeDeploySchema, rendering.serve_config, "serveConfigV2")
    try:
        ServeDeploySchema.model_validate(rendering.serve_config)
    except ValidationError as exc:
        yield from (f"serveConfigV2: {'.'.join(map(str, one['loc']))}: {one['msg']}." for one in exc.errors())


def _unknown(model: type[BaseModel], value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        return
    for key, one in value.items():
        if key not in model.model_fields:
            yield f"{path}: {key} is no option of Ray's {model.__name__}."
        elif (inner := _OPAQUE.get(key) or _model_in(model.model_fields[key].annotation)) is not None:
            for number, part in enumerate(one) if isinstance(one, list) else [(None, one)]:
                yield from _unknown(inner, part, f"{path}.{key}" + (f".{number}" if number is not None else ""))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field may hold, or a list of which it may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def the_application_can_be_built(rendering: Rendering) -> Iterator[str]:
    application = _application(rendering)
    try:
        known = _replicas(json.dumps(application))
    except (ValidationError, ValueError, KeyError) as exc:
        yield f"The application cannot be built: {str(exc)[:500]}."
        return
    for one in application.get("deployments", ()):
        if one.get("name") not in known:
            yield f"serveConfigV2 speaks of {one.get('name')}, which is no deployment of ours."
    policy = application.get("autoscaling_policy", {}).get("policy_function")
    if policy is not None and not _can_be_imported(policy):
        yield f"serveConfigV2: {policy} is not there to be imported."


def _can_be_imported(path: str) -> bool:
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def replicas_have_room(rendering: Rendering) -> Iterator[str]:
    """In pods of the group that is named like their deployment, as many as there may be of both."""
    for name, replicas in replicas_of(rendering).items():
        group = rendering.groups.get(name)
        if group is None:
            yield f"There are no pods for the deployment {name}."
            continue
        offered = _offered(group)
        in_pod = min((int(offered.get(one, 0) / amount + 1e-9) for one, amount in replicas.booked.items()), default=0)
        if name not in replicas.booked:
            yield f"Replicas of {name} may be put anywhere: set `placed`."
        if not in_pod:
            yield f"A replica of {name} books {_text(replicas.booked)}; a pod of its group offers {_text(offered)}."
            continue
        yield from _too_few(rendering, name, group, replicas, in_pod)
        if name == "generator" and (in_pod > 1 or offered.get("GPU", 0) > replicas.booked.get("GPU", 0)):
            yield f"A pod of the group generator offers {_text(offered)}, more than one generator books."


def _too_few(rendering: Rendering, name: str, group: Json, replicas: Replicas, in_pod: int) -> Iterator[str]:
    scales = bool(rendering.ray_cluster.get("enableInTreeAutoscaling"))
    fewest = group.get("minReplicas", 0) if scales else group.get("replicas", 0)
    most = group.get("maxReplicas", 0) if scales else fewest
    if most * in_pod < replicas.most:
        yield f"There may be {replicas.most} replicas of {name}, but pods for {most * in_pod}."
    if fewest * in_pod > replicas.fewest:
        yield f"There are {fewest} pods of the group {name} at least, but replicas for fewer: {replicas.fewest}."
    if not scales and replicas.most > replicas.fewest:
        yield f"{name} scales, but its pods do not."


def _offered(group: Json) -> dict[str, float]:
    """By a Ray node of the group. Source: KubeRay's common/pod.go."""
    parameters, container = group.get("rayStartParams", {}), group["template"]["spec"]["containers"][0]
    resources = container.get("resources", {})
    limits = {**resources.get("requests", {}), **resources.get("limits", {})}
    offered = {"CPU": float(parameters.get("num-cpus", -(-parse(limits.get("cpu", 0)) // 1)))}
    offered["GPU"] = float(parameters.get("num-gpus", parse(limits.get(_GPU, 0))))
    own = json.loads(*shlex.split(parameters["resources"])) if "resources" in parameters else {}
    return offered | {name: float(amount) for name, amount in own.items()}


def _text(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount) or "nothing"


def clusters_with_gpus_grow_and_shrink(rendering: Rendering) -> Iterator[str]:
    """What is not used is not paid for; trainers are there with jobs alone."""
    if not any(one.booked.get("GPU") for one in replicas_of(rendering).values()):
        return
    if not rendering.ray_cluster.get("enableInTreeAutoscaling"):
        yield "There are GPUs, but enableInTreeAutoscaling is not set: all are paid for at all times."
    elif rendering.ray_cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield "autoscalerOptions.version is not v2."
    if (trainers := rendering.groups.get("trainer", {})).get("minReplicas", 0):
        yield f"{trainers['minReplicas']} pods wait for jobs at all times: minReplicas of the group trainer is not 0."


def the_head_does_no_work(rendering: Rendering) -> Iterator[str]:
    head = rendering.ray_cluster["headGroupSpec"]
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield "The head offers CPUs, so that replicas may be put on it: num-cpus is not 0."
    if offered := set(_offered(head)) - {"CPU", "GPU"}:
        yield f"The head offers {', '.join(sorted(offered))}, so that replicas may be put on it."
    if not rendering.ray_service["spec"].get("excludeHeadPodFromServeSvc"):
        yield "The head is among those that requests go to: excludeHeadPodFromServeSvc is not set."


def no_answer_is_cut_off_by_a_clock(rendering: Rendering) -> Iterator[str]:
    """From the inside out, each has a little more time than what it waits for."""
    generate_s = Limits().generate_s
    if (request_s := rendering.serve_config["http_options"].get("request_timeout_s", 0)) <= generate_s:
        yield f"Ray ends a request after {request_s} s, but a generation may take {generate_s:g} s."
    replicas = replicas_of(rendering)
    for name in ("generator", "gateway"):
        if name in replicas and replicas[name].grace_s <= generate_s:
            yield f"A {name} that is to go has {replicas[name].grace_s:g} s, but may be asked for {generate_s:g} s."


def upgrades_have_both_clusters(rendering: Rendering) -> Iterator[str]:
    spec = rendering.ray_service["spec"]
    if spec.get("upgradeStrategy", {}).get("type") == "None":
        yield "A changed image would change nothing: upgradeStrategy is None."
    if spec.get("rayClusterDeletionDelaySeconds", 60) < 60:
        yield f"The old cluster is gone {spec['rayClusterDeletionDelaySeconds']} s after the new one has come."


POLICIES = (
    the_application_is_ours,
    the_configuration_is_the_one_in_deployments,
    every_option_is_known_to_ray,
    the_application_can_be_built,
    replicas_have_room,
    clusters_with_gpus_grow_and_shrink,
    the_head_does_no_work,
    no_answer_is_cut_off_by_a_clock,
    upgrades_have_both_clusters,
)
