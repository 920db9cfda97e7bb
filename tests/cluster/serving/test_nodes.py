"""A cluster of three nodes on this machine, one of which dies."""

import threading

import pytest
from cluster_parts import joining, kill_a_node, wait_for

from orbithash.search.client.client import Client

pytestmark = pytest.mark.slow


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
