"""What the manifests' tests need besides Python."""

import shutil

import pytest

from tests.infra.manifests import K8S, Document, overlay
from tests.infra.schemas import CRDS, has_crds

# An overlay that is copied and changed is checked as ours are.
OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())


@pytest.fixture(scope="session")
def kustomize() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which has kustomize in it, is not installed")


@pytest.fixture(scope="session")
def crds() -> None:
    if not has_crds():
        pytest.skip(f"KubeRay's schemas are not in {CRDS}")


@pytest.fixture(params=OVERLAYS)
def documents(request: pytest.FixtureRequest) -> list[Document]:
    """All objects of an overlay, to be changed at will."""
    return overlay(request.param)


@pytest.fixture
def gpu() -> list[Document]:
    return overlay("gpu")
