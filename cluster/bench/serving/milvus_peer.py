"""Milvus as the peer of `bench serve`: a program for a Python with `milvus` and `pymilvus`, which imports nothing else.

    python -I milvus_peer.py FOLDER K

FOLDER holds codes.npy uint8 [N, B] and queries.npy uint8 [Q, B]. The program starts a Milvus server with its data in
FOLDER/milvus, inserts the codes, and writes its version when it is ready. Each line of JSON that it then reads from
stdin is a call of a method of `Peer`: its name under "call", and its arguments. It writes each result as one line of
JSON, and stops the server at the end of stdin.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_BYTES_PER_INSERT = 2**23
_TIMEOUT_S = 60.0


class Peer:
    """pymilvus as the client of the server. Queries are `queries[first::step]`, at most `count` of them."""

    def __init__(self, collection: Any, queries: Any, k: int) -> None:
        self._collection = collection
        self._queries = queries
        self._k = k

    def rate(self, first: int, step: int, count: int, in_flight: int) -> float:
        """Return queries per second with `in_flight` at a time."""
        part = self._queries[first::step][:count]
        with ThreadPoolExecutor(in_flight) as pool:
            begun = time.perf_counter()
            for _ in pool.map(self._rows, part):
                pass
            return len(part) / (time.perf_counter() - begun)

    def latencies(self, first: int, step: int, count: int) -> list[float]:
        """Return the seconds of each query, sent one at a time."""
        seconds = []
        for query in self._queries[first::step][:count]:
            begun = time.perf_counter()
            self._rows(query)
            seconds.append(time.perf_counter() - begun)
        return seconds

    def rows(self, first: int, step: int, count: int) -> list[list[int]]:
        """Return the numbers of the nearest rows of each query."""
        return [self._rows(query) for query in self._queries[first::step][:count]]

    def _rows(self, query: Any) -> list[int]:
        # The default consistency. "Strong" waits for the next time tick, 200 ms and more.
        found = self._collection.search(
            [query.tobytes()], "code", {"metric_type": "HAMMING"}, self._k, timeout=_TIMEOUT_S
        )
        return list(found[0].ids)


def load(codes: Any, port: int) -> Any:
    """Return a new collection of the codes, in memory and with an index that compares all of them."""
    import numpy as np
    from pymilvus import Collection, CollectionSchema, DataType, FieldSchema, connections

    connections.connect(host="127.0.0.1", port=str(port))
    fields = [
        FieldSchema("row", DataType.INT64, is_primary=True),
        FieldSchema("code", DataType.BINARY_VECTOR, dim=8 * codes.shape[1]),
    ]
    collection = Collection("codes", CollectionSchema(fields))
    size = _BYTES_PER_INSERT // (codes.shape[1] + 8)
    for start in range(0, len(codes), size):
        part = codes[start : start + size]
        collection.insert([np.arange(start, start + len(part)), [code.tobytes() for code in part]])
    collection.flush()
    collection.create_index("code", {"index_type": "BIN_FLAT", "metric_type": "HAMMING", "params": {}})
    collection.load()
    return collection


def main() -> None:
    """Start the server and answer calls; the server stops in any case."""
    import numpy as np
    from milvus import __version__, default_server

    # Libraries that print must not write into the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder, k = Path(sys.argv[1]), int(sys.argv[2])
    codes, queries = (np.load(folder / f"{name}.npy") for name in ("codes", "queries"))
    default_server.set_base_dir(str(folder / "milvus"))
    try:
        default_server.start()
        peer = Peer(load(codes, default_server.listen_port), queries, k)
        print(json.dumps(__version__), file=replies, flush=True)
        for line in sys.stdin:
            call = json.loads(line)
            print(json.dumps(getattr(peer, call.pop("call"))(**call)), file=replies, flush=True)
    finally:
        default_server.stop()


if __name__ == "__main__":
    main()
