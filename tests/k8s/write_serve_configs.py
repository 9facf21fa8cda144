"""What the cluster repeats word for word from elsewhere in the project: Serve configurations, and the alerts.

    python -m tests.k8s.write_serve_configs

A RayService carries its Serve configuration as text, and a PrometheusRule its groups, where kustomize can put no file.
So these are written from deployments/NAME.yaml and k8s/monitoring/rules/rookery.yaml, and a test holds them equal.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("kind", "gpu", "ha")

_SERVE = """\
# Written by `python -m tests.k8s.write_serve_configs`: deployments/{name}.yaml for KubeRay.
apiVersion: ray.io/v1
kind: RayService
metadata:
  name: rookery
spec:
  serveConfigV2: |
{text}"""
_RULES = """\
# Written by `python -m tests.k8s.write_serve_configs`: ../rules/rookery.yaml for the Prometheus operator.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: rookery
spec:
{text}"""


def written() -> dict[Path, str]:
    """What each file should hold, by its path under the root."""
    serve = {
        Path(f"k8s/overlays/{name}/serve.yaml"): _SERVE.format(name=name, text=_read(f"deployments/{name}.yaml", 4))
        for name in OVERLAYS
    }
    rules = _RULES.format(text=_read("k8s/monitoring/rules/rookery.yaml", 2))
    return {**serve, Path("k8s/monitoring/operator/rules.yaml"): rules}


def _read(path: str, columns: int) -> str:
    return indent((ROOT / path).read_text(), " " * columns)


if __name__ == "__main__":
    for _path, _text in written().items():
        (ROOT / _path).write_text(_text)
