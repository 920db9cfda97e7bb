"""Archives that the tests of exports share."""

import pytest
from export_archives import make_archive, unusual_archive


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """An archive of 300 rows, all with a place and a time."""
    return make_archive(tmp_path_factory.mktemp("export") / "world", 300)


@pytest.fixture(scope="session")
def unusual(tmp_path_factory):
    """An archive of six rows at unusual places."""
    return unusual_archive(tmp_path_factory.mktemp("export") / "unusual")
