"""The image, built and used without a container engine.

    python -m tests.k8s.image_check [--variant cpu|cuda] [--folder FOLDER] [--wheels FOLDER] [--ca FILE]

Builds k8s/Dockerfile as it stands with buildah, on a Debian that mmdebstrap puts together in the place of the image
that the Dockerfile names, which has to come from a registry. Then starts what is in it as a node would: as the image's
user, with its environment, nothing writable but the volumes, its own network. `rookery up`, as plain docker starts it;
then Ray, as KubeRay starts it, with k8s/base's environment and deployments/kind.yaml. Both write a text.

Six minutes and 8 GB of disk (cuda: fifteen and 40 GB), root, Debian's packages and PyPI. --wheels: where torch without
CUDA is, if PyTorch's index is not to be reached. --ca: the authority to trust, where a proxy has one of its own.
--folder: keeps what was built. What is done goes to stderr. Ends with one JSON line, and status 0 if all is well; 2
where it cannot be tried.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from serve.version import VERSION
from tests.k8s.container import Container, Image, is_root, running

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "k8s" / "Dockerfile"
STAND_IN = "debian:stand-in"
VOLUMES = ("/var/lib/rookery", "/var/cache/rookery")
URL = "http://127.0.0.1:8000"
PROMPT = "My dream is"
READY_S = 300
_NEEDED = ("buildah", "mmdebstrap", "nsenter", "unshare", "ip")
_COMPILERS = ("gcc", "cc", "g++", "c++", "clang", "make", "ld", "as", "pip", "pip3")
# What KubeRay calls of Ray's: its autoscaler beside the head, and the job that empties Redis of a cluster that is gone.
_KUBERAY_IMPORTS = """\
import ray._private.gcs_utils, ray.autoscaler._private.kuberay.run_autoscaler, ray.autoscaler.v2.monitor
import ray.dashboard.optional_deps, ray.dashboard.modules.serve.serve_head
assert ray._private.gcs_utils.cleanup_redis_storage
"""
_APP_IMPORTS = """\
import deployments.app, serve.settings, psycopg, opentelemetry.exporter.otlp.proto.http
assert deployments.app.__file__ == "/opt/rookery/deployments/app.py", deployments.app.__file__
"""

Figures = dict[str, Any]


class Builder:
    """buildah with a storage of its own."""

    def __init__(self, folder: Path, wheels: Path | None, authority: Path) -> None:
        self._folder, self._wheels, self._authority = folder, wheels, authority

    def buildah(self, *arguments: str, log: Path | None = None) -> str:
        """Raises: SystemExit with the end of its output."""
        command = ["buildah", "--root", str(self._folder / "storage"), "--runroot", str(self._folder / "run")]
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        if log:
            log.write_text(done.stdout + done.stderr)
        if done.returncode:
            raise SystemExit(f"buildah {arguments[0]} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
        return done.stdout.strip()

    def debian(self) -> None:
        """Debian 12 as a base image; kept from one run to the next."""
        if STAND_IN.partition(":")[2] in self.buildah("images", "--format", "{{.Tag}}").split():
            return
        tar = self._folder / "debian.tar"
        subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", "bookworm", str(tar)], check=True)
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, str(tar), "/")
        self.buildah("commit", "--quiet", "--rm", container, STAND_IN)
        tar.unlink()

    def build(self, variant: str) -> str:
        """The name of the image."""
        name = f"rookery:{VERSION}" + ("-cuda" if variant == "cuda" else "")
        inputs = self._folder / "inputs"
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir()
        shutil.copy(self._authority, inputs / "ca.crt")
        (inputs / "pip.conf").write_text("[global]\ncert = /run/inputs/ca.crt\n")
        arguments = [f"--build-arg=VARIANT={variant}", f"--build-arg=DEBIAN={STAND_IN.partition(':')[2]}"]
        if self._wheels:
            _write_index(self._wheels, inputs)
            arguments.append("--build-arg=TORCH_CPU_INDEX=file:///run/inputs")
        mounts = [f"--volume={inputs}:/run/inputs:ro", f"--volume={inputs}/pip.conf:/etc/pip.conf:ro"]
        self.buildah(
            *("build", "--isolation=chroot", "--network=host", "--pull-never", "--layers", "--format=docker"),
            *(*arguments, *mounts, "--file", str(DOCKERFILE), "--tag", name, "."),
            log=self._folder / f"build-{variant}.log",
        )
        return name

    def layers(self, name: str) -> list[tuple[str, int]]:
        """What made each layer that is not empty, and its bytes as they lie on a disk."""
        config = json.loads(self.buildah("inspect", "--type", "image", name))["OCIv1"]
        made = [one.get("created_by", "") for one in config["history"] if not one.get("empty_layer")]
        stored = json.loads((self._folder / "storage" / "overlay-layers" / "layers.json").read_text())
        sizes = {one.get("diff-digest"): one.get("diff-size", 0) for one in stored}
        return [
            (_said(by), sizes.get(digest, 0)) for by, digest in zip(made, config["rootfs"]["diff_ids"], strict=True)
        ]

    @contextlib.contextmanager
    def mounted(self, name: str) -> Iterator[Image]:
        container = self.buildah("from", "--pull-never", name)
        try:
            config = json.loads(self.buildah("inspect", "--type", "image", name))["Docker"]["config"]
            yield Image(
                root=Path(self.buildah("mount", container)),
                user=config["User"],
                environment=dict(one.split("=", 1) for one in config["Env"]),
                entrypoint=config["Entrypoint"],
                command=config["Cmd"],
                folder=config["WorkingDir"],
            )
        finally:
            self.buildah("umount", container)
            self.buildah("rm", container)


def _said(created_by: str) -> str:
    return created_by.removeprefix("/bin/sh -c ").removeprefix("#(nop) ")[:60].strip()


def _write_index(wheels: Path, inputs: Path) -> None:
    """As PyTorch's index, with what `wheels` has of torch."""
    (inputs / "torch").mkdir()
    names = [shutil.copy(wheel, inputs / "torch") for wheel in wheels.glob("torch-*.whl")]
    links = [Path(name).name for name in names]
    page = "".join(f'<a href="{link.replace("+", "%2B")}">{link}</a>\n' for link in links)
    (inputs / "torch" / "index.html").write_text(page)


class Check:
    """One after another; what failed is told, and the next one is tried."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.failed: list[str] = []

    def __call__(self, name: str, check: Callable[[], str]) -> None:
        started = time.monotonic()
        try:
            said, mark = check(), "ok"
        except (AssertionError, OSError, subprocess.SubprocessError, ValueError) as error:
            said, mark = str(error)[-2000:], "FAILED"
            self.failed.append(name)
        _tell(f"{mark:6} {name}: {said} ({time.monotonic() - started:.1f} s)")

    def files(self, container: Container) -> None:
        self("no compiler, no pip", lambda: _has_none_of(container, _COMPILERS))
        self("no file with the rights of its owner", lambda: _finds_none(container, "-type f -perm /6000"))
        self("nothing of the user's but the volumes", lambda: _owns_nothing(container))
        self("read-only", lambda: _writes_only(container, writable=("/tmp", "/dev/shm", *VOLUMES)))

    def programs(self, container: Container) -> None:
        self("the application imports", lambda: _python(container, _APP_IMPORTS))
        self("what KubeRay calls imports", lambda: _python(container, _KUBERAY_IMPORTS))
        self("ray --version", lambda: _says(container, ["ray", "--version"], version("ray")))
        self("rookery version", lambda: _says(container, ["rookery", "--version"], VERSION))
        self("HAProxy's start", lambda: _says(container, ["cat", "/opt/rookery/haproxy"], "/opt/rookery/deployments/"))
        self("rookery doctor", lambda: _doctor(container))

    def docker(self, container: Container, image: Image) -> None:
        """As the image says: entry point, command, health check."""
        log = self._folder / "docker.log"
        log.write_text("")
        process = container.start([*image.entrypoint, *image.command], log)
        try:
            self(
                "rookery up, as docker runs it", lambda: _wait(lambda: f"ready {URL}" in log.read_text(), process, log)
            )
            self("its health check", lambda: _healthy(container))
            self("a text", lambda: _generate(container))
        finally:
            self("ends when told to", lambda: _ends(process, log))

    def kuberay(self, container: Container) -> None:
        """As KubeRay does: a shell raises the limit of files and starts Ray, then the config goes to its dashboard."""
        log = self._folder / "kuberay.log"
        environment = _cluster_environment()
        offered = json.dumps({"gateway": 1, "generator": 1, "trainer": 1})
        start = (
            "ulimit -n 65536; ray start --head --block --num-cpus=8 --dashboard-host=0.0.0.0 --port=6379 "
            f"--metrics-export-port=8080 --dashboard-agent-listen-port=52365 --resources='{offered}'"
        )
        process = container.start(["/bin/bash", "-c", "--", start], log, environment)
        try:
            self("rookery migrate", lambda: _ran(container, ["rookery", "migrate", "--wait", "30"], environment))
            self("Ray, as KubeRay starts it", lambda: _dashboard(container, process, log))
            deploy = ["serve", "deploy", "deployments/kind.yaml"]
            self("serve deploy", lambda: _ran(container, deploy, environment))
            self("ready", lambda: _ready(container, process, log))
            self("a text through HAProxy", lambda: _generate(container))
            self("Ray's metrics", lambda: _fetches(container, "http://127.0.0.1:8080/metrics", "ray_"))
            self("our metrics", lambda: _fetches(container, "http://127.0.0.1:9464/metrics", "rookery_"))
        finally:
            process.kill()  # all that it started is of its namespace, and ends with it
            process.wait()


def _cluster_environment() -> dict[str, str]:
    """The two files of the base, and what a Secret would bring."""
    lines = [
        line for name in ("ray.env", "rookery.env") for line in (ROOT / "k8s/base" / name).read_text().splitlines()
    ]
    named = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {**named, "RAY_AUTH_TOKEN": "0" * 64}


def _python(container: Container, code: str) -> str:
    return _ran(container, ["python", "-W", "ignore", "-c", code], {})


def _ran(container: Container, command: Sequence[str], environment: dict[str, str]) -> str:
    done = container.run(*command, timeout_s=READY_S, environment=environment)
    assert done.returncode == 0, f"status {done.returncode}: {done.stdout}{done.stderr}"
    lines = re.sub(r"\x1b\[\d+m", "", done.stdout).strip().splitlines()  # without Ray's colours
    return (lines or ["done"])[-1][:100]


def _says(container: Container, command: Sequence[str], word: str) -> str:
    done = container.run(*command)
    assert word in done.stdout, f"{word!r} is not in: {done.stdout}{done.stderr}"
    return done.stdout.strip().splitlines()[-1][:200]


def _doctor(container: Container) -> str:
    done = container.run("rookery", "doctor", timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    _tell(done.stdout)
    return "no problem"


def _has_none_of(container: Container, names: Sequence[str]) -> str:
    found = container.run("/bin/sh", "-c", f"for one in {' '.join(names)}; do command -v $one; done").stdout.split()
    assert not found, f"found {found}"
    return f"none of {len(names)}"


def _finds_none(container: Container, what: str) -> str:
    found = container.run("/bin/sh", "-c", f"find / -xdev {what} 2>/dev/null").stdout.split()
    assert not found, f"found {found[:10]}"
    return "none"


def _owns_nothing(container: Container) -> str:
    keep = " ".join(f"-not -path {one}" for one in VOLUMES)
    return _finds_none(container, f"-user 10001 {keep}")


def _writes_only(container: Container, writable: Sequence[str]) -> str:
    def can_write(folder: str) -> bool:
        return container.run("/bin/sh", "-c", f"touch {folder}/tried && rm {folder}/tried").returncode == 0

    for folder in ("/", "/opt/rookery", "/opt/venv", "/var/tmp", "/etc", "/root"):
        assert not can_write(folder), f"{folder} is writable"
    for folder in writable:
        assert can_write(folder), f"{folder} is not writable"
    return f"but {', '.join(writable)}"


def _fetch(container: Container, url: str) -> subprocess.CompletedProcess[str]:
    return container.run("wget", "--quiet", "--output-document=-", "--timeout=10", "--tries=1", url)


def _fetches(container: Container, url: str, word: str) -> str:
    fetched = _fetch(container, url)
    assert fetched.returncode == 0 and word in fetched.stdout, f"{url}: status {fetched.returncode}"
    return f"{len(fetched.stdout):,} bytes"


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> str:
    started = time.monotonic()
    while not condition():
        assert process.poll() is None, f"it ended with status {process.returncode}: {_end_of(log)}"
        assert time.monotonic() < started + READY_S, f"not after {READY_S} s: {_end_of(log)}"
        time.sleep(0.5)
    return f"after {time.monotonic() - started:.1f} s"


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:]


def _ready(container: Container, process: subprocess.Popen[bytes], log: Path) -> str:
    return _wait(lambda: _fetch(container, f"{URL}/readyz").returncode == 0, process, log)


def _dashboard(container: Container, process: subprocess.Popen[bytes], log: Path) -> str:
    """The probe that KubeRay gives to heads, asked of the agent and of the dashboard."""
    urls = ("http://127.0.0.1:52365/api/local_raylet_healthz", "http://127.0.0.1:8265/api/gcs_healthz")
    return _wait(lambda: all(_fetch(container, url).returncode == 0 for url in urls), process, log)


def _healthy(container: Container) -> str:
    lines = DOCKERFILE.read_text().partition("HEALTHCHECK")[2]
    command = json.loads(lines.partition("CMD")[2].splitlines()[0])
    return _ran(container, command, {})


def _generate(container: Container) -> str:
    done = container.run("rookery", "generate", "fledgling", PROMPT, "--seed", "1", "--max-tokens", "20", "--no-stream")
    assert done.returncode == 0 and done.stdout.startswith(PROMPT), done.stdout + done.stderr
    return f"{len(done.stdout)} characters"


def _ends(process: subprocess.Popen[bytes], log: Path) -> str:
    """As `docker stop` does it: SIGTERM to the first process."""
    started = time.monotonic()
    first = next(one for one in psutil.Process(process.pid).children(recursive=True) if one.name() == "tini")
    first.terminate()
    status = process.wait(60)
    assert status == 0, f"status {status}: {_end_of(log)}"
    return f"status 0 after {time.monotonic() - started:.1f} s"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def check(folder: Path, variant: str, wheels: Path | None, authority: Path) -> Figures:
    builder = Builder(folder, wheels, authority)
    started = time.monotonic()
    builder.debian()
    _tell(f"debian {time.monotonic() - started:.0f} s")
    built = time.monotonic()
    name = builder.build(variant)
    build_s = round(time.monotonic() - built)
    layers = builder.layers(name)
    _tell(f"{name} built in {build_s} s")
    for by, size in layers:
        _tell(f"{size / 1e6:10,.1f} MB  {by}")
    check = Check(folder)
    with builder.mounted(name) as image:
        with running(image, VOLUMES) as container:
            check.files(container)
            check.programs(container)
            check.docker(container, image)
        with running(image, VOLUMES) as container:
            check.kuberay(container)
    megabytes = [round(size / 1e6, 1) for _, size in layers]
    return {
        "image": name,
        "build_s": build_s,
        "layers_mb": megabytes,
        "mb": round(sum(megabytes)),
        "failed": check.failed,
    }


def _missing(args: argparse.Namespace) -> str:
    """What keeps this machine from trying, or nothing."""
    if not is_root():
        return "It needs root: it makes file systems and namespaces."
    if absent := [name for name in _NEEDED if shutil.which(name) is None]:
        packages = "buildah, mmdebstrap, util-linux and iproute2"
        return f"It needs {', '.join(absent)}: Debian's packages {packages}."
    if not args.ca.is_file():
        return f"There is no {args.ca}; name the authorities to trust with --ca."
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--ca", type=Path, default=Path("/etc/ssl/certs/ca-certificates.crt"))
    args = parser.parse_args()
    if missing := _missing(args):
        _tell(missing)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs inside, and its mounts, end too
    with tempfile.TemporaryDirectory(prefix="rookery-image-") as temporary:
        folder = args.folder.absolute() if args.folder else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = check(folder, args.variant, args.wheels, args.ca)
    print(json.dumps(figures))
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
