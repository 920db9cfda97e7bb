"""A cluster of three nodes on this machine, one of which dies."""

import subprocess
import sys
import threading

import pytest
from cluster_parts import family, kill, wait_for

from orbithash.search.client import Client

pytestmark = pytest.mark.slow

# Three nodes, the first with the control service; a line on stdin kills the last one that is left.
CLUSTER = """
import os, sys
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False,
                  "object_store_memory": 200 * 2**20})
nodes = [cluster.add_node(num_cpus=2, object_store_memory=200 * 2**20) for _ in range(2)]
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    print("killed", flush=True)
"""


@pytest.fixture
def nodes():
    """The process that holds the cluster, with its `address`."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    process.address = process.stdout.readline().strip()
    assert process.address, "the cluster did not start"
    yield process
    kill(process, *family(process.pid))


def kill_a_node(nodes):
    nodes.stdin.write("\n")
    nodes.stdin.flush()
    assert nodes.stdout.readline() == "killed\n"


def joining(nodes):
    """What a process runs first, to be of the cluster."""
    return f"import os; os.environ.update(RAY_ADDRESS={nodes.address!r}, RAY_AUTH_MODE='disabled')"


def test_no_query_fails_when_a_node_dies(start, nodes, archive, model):
    options = ("--shards", "2", "--replicas", "2", "--address", "127.0.0.1:0")
    process = start("serve", archive, "--model", model, *options, before=joining(nodes))
    line = wait_for(lambda: [one for one in process.err.read_text().splitlines() if "ready at " in one], process)[0]
    address = line.split("ready at ")[1].split(";")[0]
    code = bytes(4)
    with Client(address, timeout_s=30) as client:
        expected = client.search(code=code, k=10)
        copies = {shard.replicas for shard in client.describe().shards}
    assert copies == {2}
    failures, stop, num_asked = [], threading.Event(), [0]

    def ask():
        with Client(address, timeout_s=30) as client:
            while not stop.is_set():
                try:
                    answer = client.search(code=code, k=10)
                    num_asked[0] += 1
                    if answer.hits != expected.hits or answer.coverage.fraction != 1:
                        failures.append(answer)
                except Exception as error:
                    failures.append(error)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        wait_for(lambda: num_asked[0] > 50, process)
        kill_a_node(nodes)
        with Client(address, timeout_s=30) as client:

            def healthy():
                return [shard.healthy_replicas for shard in client.describe().shards]

            wait_for(lambda: min(healthy()) < 2, process)
            assert min(healthy()) >= 1, "both copies of a shard were on the node that died"
            wait_for(lambda: min(healthy()) == 2, process)
        before = num_asked[0]
        wait_for(lambda: num_asked[0] > before + 50, process)
    finally:
        stop.set()
        for thread in asking:
            thread.join()
    assert failures == []
