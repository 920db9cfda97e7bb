"""`bench serve`: requests to a gateway beside requests to an empty gRPC service and to Milvus.

The difference to the empty service is the cost of orbithash's part of a request. The services take turns in rounds, and
ratios are computed within a round, because a machine that is slow for a while slows all of them.
"""

import asyncio
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from orbithash.cluster.bench.codes import CodeSource
from orbithash.cluster.bench.engines import distances_to, nearest_rows, words_of
from orbithash.cluster.bench.report import environment
from orbithash.cluster.bench.serving.services import ServedArchive, start_empty_service, start_gateway
from orbithash.cluster.bench.serving.targets import ServiceTarget, Target, check_peer_python, started_milvus
from orbithash.cluster.output import say
from orbithash.encoders.codes import Codes, check_bits
from orbithash.encoders.errors import InputError
from orbithash.search.client.async_client import AsyncClient

__all__ = ["Peer", "ServeBench", "bench_serve"]

Peer = Literal["none", "milvus"]

_K = 10
_NUM_ROUNDS, _NUM_WARM_UP = 8, 300
_LONE_SHARE = 1 / 4
_NUM_CHECKED = 20
_NUM_FAISS_QUERIES = 128
# Targets of one process and of two Ray shards: at least these ratios of rates, at most this ratio of medians.
_FLOOR_RATE_RATIOS = {True: 0.6, False: 0.5}
_PEER_RATE_RATIOS = {True: 2.0, False: 1.5}
_PEER_P50_RATIOS = {True: 1 / 3, False: 1 / 2}


@dataclass(frozen=True)
class ServeBench:
    """Settings of `bench serve`.

    Attributes:
        rows, bits: number and length of generated codes.
        source: where the codes come from.
        shards: number of shards of the gateway.
        in_flight: maximum number of concurrent requests.
        requests: number of requests to each service.
        local: all shards in the gateway's process instead of Ray actors.
        peer: another server to measure in the same rounds.
        peer_python: interpreter of an environment with the peer's packages.
    """

    rows: int = 100_000
    bits: int = 64
    source: CodeSource = field(default_factory=CodeSource)
    shards: int = 2
    in_flight: int = 16
    requests: int = 4000
    local: bool = False
    peer: Peer = "none"
    peer_python: Path | None = None

    def check(self) -> None:
        """Raise `InputError` for an invalid setting."""
        check_bits(self.bits)
        self.source.check()
        if self.source.archive is None and self.rows < _K:
            raise InputError(f"--rows is {self.rows}; at least {_K} are needed")
        if not 1 <= self.in_flight <= 512:
            raise InputError(f"--in-flight is {self.in_flight}; from 1 to 512 are allowed")
        least = _NUM_ROUNDS * self.in_flight
        if self.requests < least:
            raise InputError(
                f"--requests is {self.requests}; at least {least} are needed for {self.in_flight} in flight"
            )
        if self.peer not in ("none", "milvus"):
            raise InputError(f"--peer is {self.peer!r}; allowed: none, milvus")
        if (self.peer == "none") != (self.peer_python is None):
            raise InputError("--peer and --peer-python belong together; give both, or neither")
        if self.peer_python is not None:
            if self.bits % 8:
                raise InputError(f"--bits is {self.bits}; Milvus needs a multiple of 8")
            check_peer_python(self.peer_python)


def bench_serve(settings: ServeBench) -> dict[str, Any]:
    """Measure requests per second and latencies of `orbithash serve`, of the empty service, and of the peer."""
    settings.check()
    rng = np.random.default_rng(0)
    drawn = settings.source.draw(settings.rows, settings.bits, settings.requests, rng)
    with TemporaryDirectory() as temporary, ExitStack() as stack:
        root = Path(temporary)
        archive = ServedArchive.write(root, drawn.codes, drawn.bits)
        say("starting the gateway and the empty service")
        gateway = stack.enter_context(start_gateway(archive, settings.shards, settings.local)).address
        response = root / "response.pb"
        response.write_bytes(asyncio.run(_response_of(gateway, drawn.queries[0])))
        addresses = {"gateway": gateway, "floor": stack.enter_context(start_empty_service(response)).address}
        peers: dict[str, Target] = {}
        version = ""
        if settings.peer_python is not None:
            folder = root / "peer"
            folder.mkdir()
            milvus = stack.enter_context(started_milvus(settings.peer_python, folder, archive.codes, drawn.queries, _K))
            peers["milvus"], version = milvus, milvus.version
        measured = asyncio.run(_measure(addresses, peers, drawn.queries, settings.in_flight, archive))
        faiss_rate = _faiss_rate(archive.codes, drawn.queries)
    result = {
        **environment("serve", "orbithash", "grpcio", "ray"),
        "rows": len(archive.codes),
        "bits": drawn.bits,
        "codes": drawn.kind,
        "k": _K,
        "shards": f"{settings.shards} {'in one process' if settings.local else 'Ray actors'}",
        "in_flight": settings.in_flight,
        "requests": settings.requests,
        **measured,
        **_ratios(measured, "floor", settings.local),
        "raw_faiss_queries_per_s": faiss_rate,
    }
    if peers:
        result |= {"milvus": version, **_ratios(measured, "milvus", settings.local)}
    return result


def _ratios(measured: Mapping[str, Any], other: str, local: bool) -> dict[str, Any]:
    """Return the gateway's ratios to another service, each with its target."""
    rates = np.divide(measured["gateway_rates"], measured[f"{other}_rates"])
    least = (_FLOOR_RATE_RATIOS if other == "floor" else _PEER_RATE_RATIOS)[local]
    ratios: dict[str, Any] = {
        f"rate_to_{other}": float(np.median(rates)),
        f"rate_to_{other}_target": f"at least {least:g}",
        f"p50_to_{other}": measured["gateway_p50_ms"] / measured[f"{other}_p50_ms"],
    }
    if other != "floor":
        ratios[f"p50_to_{other}_target"] = f"at most {_PEER_P50_RATIOS[local]:.2f}"
    return ratios


async def _response_of(address: str, code: Codes) -> bytes:
    """Return a serialised response of the gateway, which the empty service repeats."""
    import grpc

    from orbithash.v1 import search_pb2, search_pb2_grpc

    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = search_pb2_grpc.SearchServiceStub(channel)
        response = await stub.Search(search_pb2.SearchRequest(code=code.tobytes(), k=_K), timeout=30)
        return bytes(response.SerializeToString())


async def _measure(
    addresses: Mapping[str, str], peers: Mapping[str, Target], queries: Codes, in_flight: int, archive: ServedArchive
) -> dict[str, Any]:
    """Return rates of each round, their median, and percentiles of lone queries by service; wrong answers."""
    rates: dict[str, list[float]] = {name: [] for name in (*addresses, *peers)}
    lone: dict[str, list[float]] = {name: [] for name in rates}
    async with AsyncExitStack() as stack:
        targets: dict[str, Target] = {}
        for name, address in addresses.items():
            client = await stack.enter_async_context(AsyncClient(address))
            targets[name] = ServiceTarget(client, queries, _K)
        targets |= peers
        result = {"wrong_answers": f"{await _num_wrong(targets['gateway'], queries, archive)} of {_NUM_CHECKED}"}
        for name, peer in peers.items():
            wrong = await _num_wrong_distances(peer, queries, archive)
            result[f"{name}_wrong_answers"] = f"{wrong} of {_NUM_CHECKED}, by distance"
        for target in targets.values():
            await target.rate(0, 1, _NUM_WARM_UP, in_flight)
        num_lone = max(1, int(_LONE_SHARE * len(queries) / _NUM_ROUNDS))
        for number in range(_NUM_ROUNDS):
            # The order alternates, so that no service always follows the same one.
            for name in list(targets)[:: -1 if number % 2 else 1]:
                say(f"round {number + 1} of {_NUM_ROUNDS}: {name}")
                rates[name].append(await targets[name].rate(number, _NUM_ROUNDS, len(queries), in_flight))
                lone[name] += await targets[name].latencies(number, _NUM_ROUNDS, num_lone)
    metrics: dict[str, Any] = dict(result)
    for name, of_rounds in rates.items():
        metrics[f"{name}_requests_per_s"] = float(np.median(of_rounds))
        for share in (50, 95, 99):
            metrics[f"{name}_p{share}_ms"] = 1e3 * float(np.percentile(lone[name], share))
    return metrics | {f"{name}_rates": [round(rate, 1) for rate in of_rounds] for name, of_rounds in rates.items()}


async def _num_wrong(target: Target, queries: Codes, archive: ServedArchive) -> int:
    """Return the number of answers that differ from the exact one.

    The rows of the archive are in the order of their ids, so sorting by row is sorting by id.
    """
    answers = await target.rows(0, 1, _NUM_CHECKED)
    exact = archive.ids[nearest_rows(archive.codes, queries[:_NUM_CHECKED], _K)]
    return sum(answer != row.tolist() for answer, row in zip(answers, exact, strict=True))


async def _num_wrong_distances(target: Target, queries: Codes, archive: ServedArchive) -> int:
    """Return the number of answers whose rows are not as near as those of the exact answer."""
    answers = await target.rows(0, 1, _NUM_CHECKED)
    words = words_of(archive.codes)
    asked = queries[:_NUM_CHECKED]
    exact = nearest_rows(archive.codes, asked, _K)
    return sum(
        len(set(answer)) != _K or sorted(distances_to(words[answer], query)) != sorted(distances_to(words[rows], query))
        for answer, rows, query in zip(answers, exact, words_of(asked), strict=True)
    )


def _faiss_rate(codes: Codes, queries: Codes) -> float:
    """Return queries per second of FAISS alone, with one thread per core and separate queries in each thread."""
    import faiss

    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index.add(codes)
    num_threads = len(os.sched_getaffinity(0))
    part = queries[:_NUM_FAISS_QUERIES]

    def search(_: int) -> None:
        # For the calling thread. Threads of OpenMP would wait for one another, which takes long on a busy machine.
        faiss.omp_set_num_threads(1)
        index.search(part, _K)

    rates = []
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(search, range(num_threads)))
        for _ in range(_NUM_ROUNDS):
            begun = time.perf_counter()
            list(pool.map(search, range(num_threads)))
            rates.append(num_threads * len(part) / (time.perf_counter() - begun))
    return float(np.median(rates))
