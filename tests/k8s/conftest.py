"""What the tests of the manifests share: the renderings, and KubeRay's definitions."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.k8s.rendered import OVERLAYS, NoKubectl, Rendering, find_kubectl, render
from tests.k8s.schemas import DEFINITIONS

with warnings.catch_warnings():  # of pydantic's, about Ray's own models
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401


@pytest.fixture(scope="session")
def definitions() -> Path:
    """The CustomResourceDefinitions that may lie beside the checkout; tests that want them skip without."""
    if not DEFINITIONS.is_dir():
        pytest.skip("KubeRay's CustomResourceDefinitions are not beside this checkout")
    return DEFINITIONS


@pytest.fixture(scope="session")
def kubectl() -> str:
    """Tests that render skip without."""
    try:
        return find_kubectl()
    except NoKubectl as exc:
        pytest.skip(str(exc))


@pytest.fixture(params=OVERLAYS)
def rendering(kubectl: str, request: pytest.FixtureRequest) -> Rendering:
    """Each overlay."""
    return render(request.param)
