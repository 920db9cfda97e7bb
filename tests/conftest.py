"""What every test shares: the environment Ray needs to see before its first import, and where the real data lie."""

import os

# Before anything imports ray, torch or faiss.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_USAGE_STATS_ENABLED="0",
    OMP_NUM_THREADS="1",
)

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> None:
    """Caches of tests are kept nowhere else; compiled kernels are kept for the next run."""
    os.environ["ORBITHASH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    if pytestconfig.cache is not None:
        os.environ.setdefault("NUMBA_CACHE_DIR", str(pytestconfig.cache.mkdir("numba")))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real imagery and weights, or a skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED.name}/ beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The settings `backbone` and `weights` of a tiny locally saved model of each library of backbones."""
    from backbone_models import write_all

    return write_all(tmp_path_factory.mktemp("backbones"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in of the Hugging Face hub without models, an empty cache of downloads, and a token."""
    from hub_server import Hub, redirect

    server = Hub()
    redirect(server, tmp_path, monkeypatch)
    yield server
    server.close()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster for all tests that need one: starting it takes seconds."""
    import ray

    for attempt in range(3):
        try:
            # Four logical CPUs: with two, an actor pool and the tasks that feed it can starve each other.
            ray.init(
                # Whatever another test, or a killed one, has left on this machine.
                "local",
                num_cpus=4,
                include_dashboard=False,
                object_store_memory=300 * 2**20,
                log_to_driver=False,
                namespace="test",
            )
            break
        except Exception as err:
            # Ray waits 30 s for its own servers, which a busy machine may need longer for.
            if attempt == 2 or "timed out during startup" not in str(err):
                raise
    yield
    ray.shutdown()
