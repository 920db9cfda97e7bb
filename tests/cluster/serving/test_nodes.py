"""A cluster of three nodes on this machine, one of which dies."""

import json
import subprocess
import sys
from collections import defaultdict

import pytest
from cluster_parts import joining, kill_a_node, wait_for
from serving_parts import queries_in_background, ready_at

from orbithash.search.client.client import Client

pytestmark = pytest.mark.slow


def test_no_query_fails_when_a_node_dies(start, nodes, archive, model):
    options = ("--shards", "2", "--replicas", "2", "--address", "127.0.0.1:0")
    process = start("serve", archive, "--model", model, *options, before=joining(nodes))
    address = ready_at(process)
    code = bytes(4)
    with Client(address, timeout_s=30) as client:
        expected = client.search(code=code, k=10).hits
        assert {shard.replicas for shard in client.describe().shards} == {2}

    def is_right(answer):
        return answer.hits == expected and answer.coverage.fraction == 1

    with queries_in_background(address, code, is_right) as queries:
        wait_for(lambda: queries.num_answers > 50, process)
        kill_a_node(nodes)
        with Client(address, timeout_s=30) as client:

            def healthy():
                return [shard.healthy_replicas for shard in client.describe().shards]

            wait_for(lambda: min(healthy()) < 2, process)
            assert min(healthy()) >= 1, "both replicas of a shard were on the node that died"
            wait_for(lambda: min(healthy()) == 2, process)
        before = queries.num_answers
        wait_for(lambda: queries.num_answers > before + 50, process)
    assert queries.failures == []


# Prints the node of each living actor with a name.
NODES = """
import json, ray
ray.init(logging_level="ERROR", log_to_driver=False)
from ray._private.state import actors
print(json.dumps({each["Name"]: each["Address"]["NodeID"] for each in actors().values() if each["State"] == "ALIVE"}))
"""


def test_replicas_of_a_shard_are_on_different_nodes(start, nodes, archive, model):
    options = ("--shards", "4", "--replicas", "2", "--address", "127.0.0.1:0")
    process = start("serve", archive, "--model", model, *options, before=joining(nodes))
    ready_at(process)
    program = f"{joining(nodes)}\n{NODES}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    where = defaultdict(list)
    for name, node in json.loads(done.stdout.splitlines()[-1]).items():
        _, is_shard, replica = name.partition("-shard-")
        if is_shard:
            where[replica.partition("-")[0]].append(node)
    assert sorted(where) == ["0", "1", "2", "3"]
    assert all(len(set(of_shard)) == len(of_shard) == 2 for of_shard in where.values()), dict(where)
