"""The image's recipe and its locks, read. What it builds is tried by `python -m tests.k8s.image_check`."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePath
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deployments import haproxy
from serve.settings import PREFIX, Settings
from serve.version import VERSION
from tests.k8s.dockerfile import Dockerfile, Stage, read_dockerfile
from tests.k8s.write_locks import REQUIREMENTS, ROOT, VARIANTS, direct_requirements

_DOCKERFILE = ROOT / "k8s" / "Dockerfile"
_COMPILERS = re.compile(
    r"^(gcc|g\+\+|clang|cpp|make|cmake|build-essential|binutils|python3?-pip|python3?-dev|.*-dev)\b"
)
_DATED = re.compile(r"bookworm-20\d{6}-slim@sha256:[0-9a-f]{64}")


@pytest.fixture(scope="module")
def recipe() -> Dockerfile:
    return read_dockerfile(_DOCKERFILE)


@pytest.fixture(scope="module")
def final(recipe: Dockerfile) -> Stage:
    return list(recipe.stages.values())[-1]


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# --- The recipe ---------------------------------------------------------------------------------------------


def test_every_stage_stands_on_one_debian_that_is_dated_and_named_by_its_digest(recipe: Dockerfile) -> None:
    assert _DATED.fullmatch(recipe.arguments["DEBIAN"])
    bases = [stage.base for stage in recipe.stages.values()]
    assert bases == ["debian:${DEBIAN}", "python", "python"]
    assert list(recipe.stages) == ["python", "builder", "final"]


def test_nothing_is_latest_and_nothing_is_added_from_a_url(recipe: Dockerfile) -> None:
    for stage in recipe.stages.values():
        assert "latest" not in stage.base
        assert not stage.all("ADD")
        for one in stage.all("RUN"):
            assert not re.search(r"\b(curl|wget|git) +(-\S+ +)*\S*(://|clone)", one.text), one.text


def test_apt_get_leaves_no_lists_and_takes_nothing_that_is_not_named(recipe: Dockerfile) -> None:
    for stage in recipe.stages.values():
        for one in stage.all("RUN"):
            if "apt-get install" in one.text:
                assert one.text.startswith("apt-get update &&")
                assert "-y --no-install-recommends" in one.text
                assert "rm -rf /var/lib/apt/lists/*" in one.text
        assert stage.packages() == sorted(stage.packages())


def test_the_final_image_has_no_compiler_and_what_kuberay_calls(recipe: Dockerfile, final: Stage) -> None:
    packages = recipe.stages["python"].packages() + final.packages()
    assert not [name for name in packages if _COMPILERS.match(name)]
    assert {"ca-certificates", "python3", "wget"} <= set(packages)
    assert "g++" in recipe.stages["builder"].packages()


def test_the_final_image_takes_two_folders_of_the_builder_and_nothing_else(final: Stage) -> None:
    copied = [one.words() for one in final.all("COPY")]
    assert copied == [["--from=builder", folder, folder] for folder in ("/opt/venv", "/opt/rookery")]


def test_it_runs_as_a_user_without_rights(final: Stage) -> None:
    assert final.one("USER").text == "10001:10001"
    after = final.instructions[final.instructions.index(final.one("USER")) :]
    assert not [one for one in after if one.name in ("RUN", "COPY")]
    assert "useradd --uid 10001 --user-group" in final.one("RUN").text
    assert "-perm /6000 -exec chmod a-s {} +" in final.one("RUN").text


def test_its_environment_finds_the_code_and_no_switch_of_rays(final: Stage) -> None:
    named = final.pairs("ENV")
    assert named["PYTHONPATH"] == "/opt/rookery"
    assert named["PATH"].split(":")[:2] == ["/opt/rookery/bin", "/opt/venv/bin"]
    assert named["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert not [name for name in named if name.startswith("RAY_")]
    settings = {name.removeprefix(PREFIX).lower() for name in named if name.startswith(PREFIX)}
    assert settings <= set(Settings.__dataclass_fields__)


def test_no_secret_is_built_in(recipe: Dockerfile) -> None:
    for stage in recipe.stages.values():
        names = [*stage.pairs("ENV"), *stage.pairs("ARG")]
        assert not [name for name in names if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]


def test_it_says_what_it_is(final: Stage) -> None:
    assert final.pairs("ARG")["VERSION"] == VERSION
    labels = {name.removeprefix("org.opencontainers.image.") for name in final.pairs("LABEL")}
    assert {"version", "revision", "source", "licenses", "title", "description"} == labels


def test_health_is_asked_of_the_route_that_says_it(final: Stage) -> None:
    command = json.loads(final.one("HEALTHCHECK").text.partition("CMD ")[2])
    assert command[0] == "wget" and command[0] in final.packages()
    assert command[-1] == "http://127.0.0.1:8000/healthz"


def test_alone_it_is_the_command_up(final: Stage) -> None:
    assert final.one("ENTRYPOINT").words() == ["tini", "--", "rookery"]
    assert final.one("CMD").words() == ["up"]
    assert "tini" in final.packages()


def test_the_ports_are_those_of_the_service(final: Stage) -> None:
    assert set(final.one("EXPOSE").words()) == {"8000", "9464", "8080", "6379", "8265", "10001"}


def test_haproxys_start_is_where_rays_switches_name_it(recipe: Dockerfile) -> None:
    *_, made = recipe.stages["builder"].all("RUN")
    assert f"--write {haproxy.CLUSTER_FOLDER} {haproxy.CLUSTER_PROGRAM}" in made.text
    assert recipe.stages["builder"].all("WORKDIR")[-1].text == "/opt/rookery"


# --- What goes in -------------------------------------------------------------------------------------------


def test_what_is_copied_exists_and_docker_is_shown_it(recipe: Dockerfile) -> None:
    for one in recipe.stages["builder"].all("COPY"):
        *sources, _ = one.words()
        for source in sources:
            assert (ROOT / source).exists()
            assert _is_shown(source)


def test_the_wheel_finds_all_that_it_is_made_of(recipe: Dockerfile, pyproject: dict[str, Any]) -> None:
    copied = {source for one in recipe.stages["builder"].all("COPY") for source in one.words()[:-1]}
    packages = {name.rstrip("*") for name in pyproject["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {pyproject["project"]["readme"], *pyproject["project"]["license-files"], "pyproject.toml"}
    assert packages | files <= copied


@pytest.mark.parametrize(
    "path",
    [".git/config", ".venv/bin/python", ".rookery/rookery.db", ".env", "serve/.env", "tests/test_logs.py", "id_rsa"]
    + ["serve/engine/native/_rookery.so", "serve/__pycache__/version.pyc", "k8s/base/rayservice.yaml"],
)
def test_docker_is_not_shown(path: str) -> None:
    assert not _is_shown(path)


def _is_shown(path: str) -> bool:
    """By .dockerignore: the last rule that fits the path or a folder above it decides."""
    shown = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            rule, shows = line.removeprefix("!"), line.startswith("!")
            paths = [str(one) for one in (PurePath(path), *PurePath(path).parents) if str(one) != "."]
            if any(_fits(one, rule) for one in paths):
                shown = shows
    return shown


def _fits(path: str, rule: str) -> bool:
    if rule.startswith("**/"):
        return fnmatch.fnmatchcase(PurePath(path).name, rule.removeprefix("**/"))
    return len(PurePath(path).parts) == len(PurePath(rule).parts) and fnmatch.fnmatchcase(path, rule)


# --- The locks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _locked(variant: str) -> dict[str, str]:
    lines = (REQUIREMENTS / f"{variant}.txt").read_text().splitlines()
    return dict(line.removesuffix(" \\").split("==") for line in lines if "==" in line)


def test_each_variant_of_the_recipe_has_a_lock(recipe: Dockerfile) -> None:
    (install,) = (one.text for one in recipe.stages["builder"].all("RUN") if "--require-hashes" in one.text)
    assert re.findall(r"(\w+)\) index=", install) == list(VARIANTS)
    assert {f"{name}.txt" for name in VARIANTS} == {path.name for path in REQUIREMENTS.iterdir()}


def test_every_package_has_the_hash_of_one_file_and_none_is_an_exception(variant: str) -> None:
    text = (REQUIREMENTS / f"{variant}.txt").read_text()
    packages = re.findall(r"^([a-z0-9-]+)==[\w.+]+ \\\n    --hash=sha256:[0-9a-f]{64}$", text, flags=re.MULTILINE)
    assert len(packages) * 2 + 1 == len(text.splitlines())
    assert packages == sorted(set(packages))


def test_the_lock_has_the_versions_that_pyproject_names(variant: str) -> None:
    locked = _locked(variant)
    for one in map(Requirement, direct_requirements(variant)):
        assert one.specifier.contains(locked[canonicalize_name(one.name)]), one


def test_the_locks_differ_in_torch_and_what_it_brings_alone() -> None:
    cpu, cuda = _locked("cpu"), _locked("cuda")
    differing = {name for name in cpu.keys() | cuda.keys() if cpu.get(name) != cuda.get(name)}
    brought = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
    assert not [name for name in differing if not brought.fullmatch(name)]
    assert cpu["torch"] == f"{cuda['torch']}+cpu"
    assert "nvidia-cudnn-cu13" in cuda and not [name for name in cpu if name.startswith(("nvidia", "cuda"))]


def test_the_lock_has_all_that_its_packages_require() -> None:
    """What is installed here tells what it requires, where it has the version that is locked."""
    locked = _locked("cpu")
    todo = [(canonicalize_name(one.name), one.extras) for one in map(Requirement, direct_requirements("cpu"))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        name, extras = todo.pop()
        assert name in locked
        if (name, frozenset(extras)) not in seen:
            seen.add((name, frozenset(extras)))
            todo += [(canonicalize_name(one.name), one.extras) for one in _required(name, locked[name], extras)]


def _required(name: str, locked: str, extras: set[str]) -> list[Requirement]:
    try:
        installed = distribution(name)
    except PackageNotFoundError:
        return []
    asked = [extra for extra in extras or {""} if installed.version.partition("+")[0] == locked.partition("+")[0]]
    return [
        one
        for one in map(Requirement, installed.requires or [])
        if any(one.marker is None or one.marker.evaluate({"extra": extra}) for extra in asked)
    ]


def test_the_locks_are_written_for_the_python_of_the_image(variant: str) -> None:
    assert "Python 3.11 on Linux, x86-64" in (REQUIREMENTS / f"{variant}.txt").read_text().splitlines()[0]


# --- The slow check says what it lacks ----------------------------------------------------------------------


def test_the_check_of_a_real_build_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.k8s.image_check", "--ca", str(tmp_path / "none.crt")]
    tried = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert tried.returncode == 2
    assert tried.stderr.startswith("It needs ")
