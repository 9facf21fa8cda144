"""Writes k8s/requirements/{cpu,cuda}.txt: every package of the image, its version and the hash of its one file.

    python -m tests.k8s.write_locks

Run it where pyproject.toml has changed, in the environment that passed the tests: what is not named there keeps the
version that is installed here. Asks PyPI, and for torch without CUDA PyTorch's own index. The locks are for Python 3.11
on Linux for x86-64, what the image has; knows nothing of the image else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "k8s" / "requirements"
EXTRAS = ("postgres", "tracing")
VARIANTS = ("cpu", "cuda")
PYPI = "https://pypi.org/simple"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# As in Debian 12, or older: a wheel for a newer libc would not start there.
_PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in range(36, 16, -1)) + (
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
)
_HEAD = """\
# Python 3.11 on Linux, x86-64. Written by `python -m tests.k8s.write_locks`: change pyproject.toml, not this.
"""


def direct_requirements(variant: str) -> list[str]:
    """What pyproject.toml names for the image, and what its wheel is built with."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [
        *pyproject["build-system"]["requires"],
        *pyproject["project"]["dependencies"],
        *(one for extra in EXTRAS for one in pyproject["project"]["optional-dependencies"][extra]),
    ]
    local = "+cpu" if variant == "cpu" else ""
    return [re.sub(r"^(torch==[\d.]+)$", rf"\g<1>{local}", one) for one in named]


def write_lock(variant: str, torch_cpu_index: str) -> None:
    """Raises: SystemExit where pip finds no set of versions."""
    direct = direct_requirements(variant)
    indexes = ["--index-url", PYPI, *(["--extra-index-url", torch_cpu_index] if variant == "cpu" else [])]
    found = {_name(one): one for one in _resolve(direct, _constraints(direct), indexes)}
    (REQUIREMENTS / f"{variant}.txt").write_text(_HEAD + "".join(_locked(found[name]) for name in sorted(found)))


def _constraints(direct: list[str]) -> list[str]:
    ours = {canonicalize_name(Requirement(one).name) for one in direct}
    installed = {canonicalize_name(one.metadata["Name"]): one.version for one in distributions()}
    return [f"{name}=={version}" for name, version in sorted(installed.items()) if name not in {*ours, "rookery"}]


def _resolve(direct: list[str], constraints: list[str], indexes: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        wanted, kept, report = (Path(folder) / name for name in ("wanted.txt", "kept.txt", "report.json"))
        wanted.write_text("\n".join(direct))
        kept.write_text("\n".join(constraints))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", *indexes]
        command += ["--only-binary", ":all:", "--target", folder, "--python-version", "3.11", "--implementation", "cp"]
        command += [word for one in _PLATFORMS for word in ("--platform", one)]
        command += ["--report", str(report), "--constraint", str(kept), "--requirement", str(wanted)]
        # No other index or folder that this machine's pip may know: its files would have other hashes.
        plain = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
        if subprocess.run(command, env={**os.environ, **plain}).returncode:
            raise SystemExit("pip found no versions that fit together, or did not reach an index; it says why above.")
        found: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return found


def _name(found: dict[str, Any]) -> str:
    return canonicalize_name(found["metadata"]["name"])


def _locked(found: dict[str, Any]) -> str:
    digest = found["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{_name(found)}=={found['metadata']['version']} \\\n    --hash=sha256:{digest}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-cpu-index", default=TORCH_CPU_INDEX, metavar="URL")
    args = parser.parse_args()
    if (sys.version_info[:2], sys.platform, platform.machine()) != ((3, 11), "linux", "x86_64"):
        raise SystemExit("The locks are for Python 3.11 on Linux, x86-64; they can be written only there.")
    for variant in VARIANTS:
        write_lock(variant, args.torch_cpu_index)


if __name__ == "__main__":
    main()
