"""What Ray's workers are started with."""

import sys
from pathlib import Path

import pytest

from orbithash.cluster.runtime import keeping_memory

pytestmark = pytest.mark.ray


@pytest.mark.skipif(sys.platform != "linux", reason="Ray ships the allocator for Linux only")
def test_a_worker_that_keeps_memory_has_another_allocator(ray_cluster, monkeypatch):
    import ray

    @ray.remote(num_cpus=0)
    def allocators():
        maps = Path("/proc/self/maps").read_text().splitlines()
        return {line.rpartition("/")[2] for line in maps if "malloc" in line}

    usual, other = allocators.remote(), allocators.options(runtime_env={"env_vars": keeping_memory()}).remote()
    assert ray.get([usual, other]) == [set(), {"libjemalloc.so"}]

    # What the user preloads stays, and comes first.
    monkeypatch.setenv("LD_PRELOAD", "libfirst.so")
    assert keeping_memory()["LD_PRELOAD"].split(":")[0] == "libfirst.so"
