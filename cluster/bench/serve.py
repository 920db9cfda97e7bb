"""`bench serve`: requests to a gateway beside requests to an empty gRPC service.

The difference is the cost of orbithash's part of a request. One client sends requests to both services in turns.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from orbithash.cluster.bench.engines import nearest_rows
from orbithash.cluster.bench.report import environment
from orbithash.cluster.bench.services import RandomArchive, start_empty_service, start_gateway
from orbithash.cluster.output import say
from orbithash.encoders.codes import Codes, check_bits, pack
from orbithash.encoders.errors import InputError
from orbithash.search.client.async_client import AsyncClient

__all__ = ["bench_serve"]

_K = 10
_NUM_ROUNDS, _NUM_WARM_UP = 8, 300
_LONE_SHARE = 1 / 4
_NUM_CHECKED = 20
_NUM_FAISS_QUERIES = 128
_MIN_RATE_RATIO, _MAX_P50_RATIO = 0.6, 5.0


def bench_serve(rows: int, bits: int, shards: int, in_flight: int, requests: int, local: bool) -> dict[str, Any]:
    """Measure requests per second and latencies of `orbithash serve` over random codes, and of the empty service."""
    check_bits(bits)
    if rows < _K:
        raise InputError(f"--rows is {rows}; at least {_K} are needed")
    if not 1 <= in_flight <= 512:
        raise InputError(f"--in-flight is {in_flight}; from 1 to 512 are allowed")
    min_requests = _NUM_ROUNDS * in_flight
    if requests < min_requests:
        raise InputError(f"--requests is {requests}; at least {min_requests} are needed for {in_flight} in flight")
    rng = np.random.default_rng(0)
    queries = pack(rng.random((requests, bits)) < 0.5)
    with TemporaryDirectory() as temporary, ExitStack() as stack:
        root = Path(temporary)
        archive = RandomArchive.write(root, rows, bits, rng)
        say("starting the gateway and the empty service")
        gateway = stack.enter_context(start_gateway(archive, shards, local)).address
        response = root / "response.pb"
        response.write_bytes(asyncio.run(_response_of(gateway, queries[0])))
        floor = stack.enter_context(start_empty_service(response)).address
        addresses = {"gateway": gateway, "floor": floor}
        rates, lone, num_wrong = asyncio.run(_measure(addresses, queries, in_flight, archive))
        faiss_rate = _faiss_rate(archive.codes, queries)
    result = {
        **environment("serve", "orbithash", "grpcio", "ray"),
        "rows": rows,
        "bits": bits,
        "k": _K,
        "shards": f"{shards} {'in one process' if local else 'Ray actors'}",
        "in_flight": in_flight,
        "requests": requests,
        "wrong_answers": f"{num_wrong} of {_NUM_CHECKED}",
    }
    for name in addresses:
        result[f"{name}_requests_per_s"] = float(np.median(rates[name]))
        for share in (50, 95, 99):
            result[f"{name}_p{share}_ms"] = 1e3 * float(np.percentile(lone[name], share))
    # Per round, because a machine that is slow for a while slows both services.
    result["ratio_of_rates"] = float(np.median(np.divide(rates["gateway"], rates["floor"])))
    result["ratio_of_rates_target"] = f"at least {_MIN_RATE_RATIO:g}"
    result["ratio_of_p50"] = result["gateway_p50_ms"] / result["floor_p50_ms"]
    result["ratio_of_p50_target"] = f"at most {_MAX_P50_RATIO:g}"
    result["raw_faiss_queries_per_s"] = faiss_rate
    return result


async def _response_of(address: str, code: Codes) -> bytes:
    """Return a serialised response of the gateway, which the empty service repeats."""
    import grpc

    from orbithash.v1 import search_pb2, search_pb2_grpc

    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = search_pb2_grpc.SearchServiceStub(channel)
        response = await stub.Search(search_pb2.SearchRequest(code=code.tobytes(), k=_K), timeout=30)
        return bytes(response.SerializeToString())


async def _measure(
    addresses: dict[str, str], queries: Codes, in_flight: int, archive: RandomArchive
) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """Return requests per second of each round and seconds of lone queries by service, and the gateway's wrong answers.

    The wrong answers are a number out of `_NUM_CHECKED`.
    """
    rates: dict[str, list[float]] = {name: [] for name in addresses}
    lone: dict[str, list[float]] = {name: [] for name in addresses}
    codes = [code.tobytes() for code in queries]
    clients = {name: AsyncClient(address) for name, address in addresses.items()}
    try:
        num_wrong = await _num_wrong(clients["gateway"], queries[:_NUM_CHECKED], archive)
        for client in clients.values():
            await _rate(client, codes[:_NUM_WARM_UP], in_flight)
        for number in range(_NUM_ROUNDS):
            of_round = codes[number::_NUM_ROUNDS]
            # The order alternates, so that neither service always follows the other.
            for name in list(clients)[:: -1 if number % 2 else 1]:
                say(f"round {number + 1} of {_NUM_ROUNDS}: {name}")
                rates[name].append(await _rate(clients[name], of_round, in_flight))
                lone[name] += await _latencies(clients[name], of_round[: max(1, int(_LONE_SHARE * len(of_round)))])
    finally:
        for client in clients.values():
            await client.close()
    return rates, lone, num_wrong


async def _rate(client: AsyncClient, codes: Sequence[bytes], in_flight: int) -> float:
    """Return requests per second with `in_flight` requests at a time."""
    waiting = iter(codes)

    async def send() -> None:
        for code in waiting:
            await client.search(code=code, k=_K)

    begun = time.perf_counter()
    await asyncio.gather(*(send() for _ in range(in_flight)))
    return len(codes) / (time.perf_counter() - begun)


async def _latencies(client: AsyncClient, codes: Sequence[bytes]) -> list[float]:
    """Return the seconds of each request, sent one at a time."""
    seconds = []
    for code in codes:
        begun = time.perf_counter()
        await client.search(code=code, k=_K)
        seconds.append(time.perf_counter() - begun)
    return seconds


async def _num_wrong(client: AsyncClient, queries: Codes, archive: RandomArchive) -> int:
    """Return the number of answers that differ from the exact one.

    The rows of the archive are in the order of their ids, so sorting by row is sorting by id.
    """
    answers = [await client.search(code=query.tobytes(), k=_K) for query in queries]
    exact = archive.ids[nearest_rows(archive.codes, queries, _K)]
    return sum([hit.id for hit in answer.hits] != row.tolist() for answer, row in zip(answers, exact, strict=True))


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
