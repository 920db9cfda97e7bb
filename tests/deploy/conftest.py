"""Fixtures of the manifests."""

import pytest
from deploy_manifests import FOLDERS, KUBERNETES, SERVING, build, by_group, policies_of


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request):
    """Each folder with a kustomization, one after the other."""
    return request.param


@pytest.fixture(params=SERVING)
def serving(request):
    """The pods of a serving cluster by the name of their group."""
    return by_group(build(KUBERNETES / request.param))


@pytest.fixture
def policies():
    """The specs of the network policies of the base by name."""
    return policies_of(build(KUBERNETES / "base"))
