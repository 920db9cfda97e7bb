"""The memory that shards ask Ray for: the plan's, on a real cluster, and refused where no node has it."""

import asyncio
import types
from functools import partial

import numpy as np
import pytest
import ray
from cluster_parts import wait_for
from ray.util import placement_group_table

from orbithash.cluster.planning.costs import MEASURED
from orbithash.cluster.planning.latency import Fan, Latency
from orbithash.cluster.planning.requirements import Requirements
from orbithash.cluster.planning.sizing import size
from orbithash.cluster.runtime import check_resources
from orbithash.cluster.serving.memory import asked_bytes, node_shortage
from orbithash.cluster.serving.shards import SHARD_CPUS, RayBackend
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.search.observer import Observer

BITS = 16


@pytest.mark.parametrize(("rows", "bits", "shards"), [(10**9, 64, 16), (5 * 10**7, 128, 1), (10**6, 16, 4)])
def test_a_shard_asks_for_what_a_plan_counts(rows, bits, shards):
    plan = size(Requirements(rows, bits), MEASURED, shards, 1, Fan(shards, 0), Latency(1.0, {"all": 0.001}))
    asked = asked_bytes(rows, bits, shards)
    # A plan for random rows expects a few codes of a short length to be missing in a shard.
    assert asked == pytest.approx(1e9 * plan.replica_gb, rel=1e-3)
    assert asked_bytes(0, bits, shards) == pytest.approx(MEASURED.replica_bytes, rel=1e-6)


@pytest.mark.ray
def test_actors_reserve_their_memory_on_the_cluster(ray_cluster, tmp_path):
    codes = np.zeros((1000, BITS // 8), np.uint8)
    keys = [f"row {number}" for number in range(len(codes))]
    archive = Archive.create(tmp_path / "rows", BITS, "model")
    archive.commit(Archive.write_fragments(archive.path, Archive.table(codes, BITS, key=keys, uri=keys)))
    archive.refresh()
    expected = asked_bytes(1000, BITS, 2)

    def reserved():
        groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
        return [bundle["memory"] for group in groups for bundle in group["bundles"].values() if "memory" in bundle]

    async def scenario():
        backend = await RayBackend.start(archive, None, lambda: None, 2, 1, "exact", Observer())
        try:
            assert reserved() == [expected, expected]
            # The actors use what their bundles have reserved: nothing is left of it.
            # Nodes report what is free a moment later.
            wait_for(lambda: not any(name.startswith("memory_group_0_") for name in ray.available_resources()))
        finally:
            await backend.close()

    asyncio.run(scenario())
    wait_for(lambda: reserved() == [])


@pytest.mark.ray
def test_shards_that_no_node_can_hold_are_refused(ray_cluster):
    huge = types.SimpleNamespace(path="none", bits=64, num_rows=10**12)
    with pytest.raises(
        InputError, match=r"^serving 2 shards needs [\d,.]+ GB of memory, the cluster has [\d.]+ GB; use"
    ):
        asyncio.run(RayBackend.start(huge, None, lambda: None, 2, 1, "exact", Observer()))


TWO_NODES = [
    {"Alive": True, "Resources": {"CPU": 2.0, "memory": 4e9}},
    {"Alive": True, "Resources": {"CPU": 2.0, "memory": 4e9}},
    {"Alive": True, "Resources": {"memory": 64e9}},
    {"Alive": False, "Resources": {"CPU": 2.0, "memory": 64e9}},
]


@pytest.mark.parametrize(
    ("num_replicas", "each_gb", "found"),
    [
        (1, 5, "a shard needs 5.00 GB of memory, the largest node of the cluster has 4.00 GB for it"),
        (4, 3, "4 replicas of shards need 3.00 GB of memory each, the nodes of the cluster have room for 2"),
        (3, 2.5, "3 replicas of shards need 2.50 GB of memory each, the nodes of the cluster have room for 2"),
        (2, 3, None),
        (5, 2, "5 replicas of shards need 2.00 GB of memory each, the nodes of the cluster have room for 4"),
    ],
)
def test_memory_is_counted_by_node(monkeypatch, num_replicas, each_gb, found):
    """Two nodes of 4 GB, beside that of a gateway and a dead one; three shards of 2.5 GB would fit into 8 GB."""
    monkeypatch.setattr("ray.nodes", lambda: TWO_NODES)
    shortage = node_shortage(num_replicas, int(each_gb * 1e9))
    assert (shortage and shortage.found) == found


def small_until(monkeypatch, has_grown):
    """Make the nodes of the cluster look too small for a shard until `has_grown()`."""
    real = ray.nodes

    def seen():
        nodes = real()
        if not has_grown():
            nodes = [{**node, "Resources": {**node["Resources"], "memory": 1e6}} for node in nodes]
        return nodes

    monkeypatch.setattr("ray.nodes", seen)


def bundles_asked_for():
    """Return the memory of the bundles of all placement groups since the cluster started, bytes."""
    groups = placement_group_table().values()
    return [bundle["memory"] for group in groups for bundle in group["bundles"].values() if "memory" in bundle]


def small_archive(rows):
    return types.SimpleNamespace(path="none", bits=64, num_rows=rows)


@pytest.mark.ray
def test_nodes_that_are_too_small_are_refused_at_once(ray_cluster, monkeypatch):
    # A number of rows that no other test uses, so that no other test has bundles of this size.
    rows = 1001
    monkeypatch.delenv("ORBITHASH_WAIT_FOR_NODES_S", raising=False)
    small_until(monkeypatch, lambda: False)
    with pytest.raises(
        InputError,
        match=r"^a shard needs 0\.3\d GB of memory, the largest node of the cluster has 0\.00 GB for it; give more "
        r"--shards, add larger nodes, or set ORBITHASH_WAIT_FOR_NODES_S if the cluster adds nodes by itself$",
    ):
        asyncio.run(RayBackend.start(small_archive(rows), None, lambda: None, 2, 1, "exact", Observer()))
    assert asked_bytes(rows, 64, 2) not in bundles_asked_for()


@pytest.mark.ray
@pytest.mark.parametrize(("seconds", "grows"), [(300, True), (1, False)])
def test_the_cluster_is_asked_for_nodes_that_hold_a_shard(ray_cluster, monkeypatch, seconds, grows):
    """An autoscaler adds nodes for a pending placement group; here a node becomes large when it is asked for."""
    # A number of rows that no other test uses, so that no other test has bundles of this size.
    rows = 2002 + grows
    shard = asked_bytes(rows, 64, 2)
    monkeypatch.setenv("ORBITHASH_WAIT_FOR_NODES_S", str(seconds))
    small_until(monkeypatch, lambda: grows and bundles_asked_for().count(shard) == 2)
    bundles = [{"CPU": SHARD_CPUS, "memory": shard}] * 2

    def check():
        check_resources("serving 2 shards", bundles, partial(node_shortage, 2, shard))

    if grows:
        check()
    else:
        with pytest.raises(InputError, match=r"has 0\.00 GB for it after 1 s; give more --shards"):
            check()
    assert bundles_asked_for().count(shard) == 2
    # Nothing stays reserved.
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}
