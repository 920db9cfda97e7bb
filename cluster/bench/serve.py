"""Requests to a gateway beside requests to an empty gRPC service: what our part of a request costs.

Both are processes of their own; one client drives them in turns. They end with this process, however it ends: what
holds them is a pipe.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from orbithash.cluster.bench.engines import nearest_rows
from orbithash.cluster.output import say
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes, check_bits, pack
from orbithash.encoders.errors import InputError
from orbithash.search.client.client import AsyncClient
from orbithash.search.index.shard import Ids

__all__ = ["Child", "K", "bench_serve", "child", "started", "write_archive"]

K = 10
_ROUNDS, _WARM_UP = 8, 300
_LONE_SHARE = 1 / 4
_NUM_CHECKED = 20
_RAW_QUERIES = 128
_MIN_RATE_RATIO, _MAX_P50_RATIO = 0.6, 5.0
_START_S, _STOP_S = 180.0, 30.0
_LABELS = ("beach", "forest", "harbor", "river")


def bench_serve(rows: int, bits: int, shards: int, in_flight: int, requests: int, local: bool) -> dict[str, Any]:
    """Requests a second and latencies of `orbithash serve` over random codes, and of the empty service."""
    from orbithash.cluster.bench.throughput import circumstances, write_random_model
    from orbithash.encoders.networks.card import read_model_folder

    check_bits(bits)
    if rows < K:
        raise InputError(f"--rows is {rows}; at least {K} are needed")
    if not 1 <= in_flight <= 512:
        raise InputError(f"--in-flight is {in_flight}; from 1 to 512 are allowed")
    least = _ROUNDS * in_flight
    if requests < least:
        raise InputError(f"--requests is {requests}; at least {least} are needed for {in_flight} in flight")
    rng = np.random.default_rng(0)
    queries = pack(rng.random((requests, bits)) < 0.5)
    with TemporaryDirectory() as temporary, ExitStack() as stack:
        root = Path(temporary)
        say(f"writing an archive of {rows} rows")
        model = write_random_model(root / "model", bits)
        ids, codes = write_archive(root / "archive", pack(rng.random((rows, bits)) < 0.5), read_model_folder(model)[1])
        say("starting the gateway and the empty service")
        where = "local" if local else "ray"
        gateway = stack.enter_context(started("gateway", root / "archive", model, str(shards), where)).address
        prepared = root / "answer.pb"
        prepared.write_bytes(asyncio.run(_one_answer(gateway, queries[0])))
        floor = stack.enter_context(started("floor", prepared)).address
        addresses = {"gateway": gateway, "floor": floor}
        rates, lone, num_wrong = asyncio.run(_drive(addresses, queries, in_flight, ids, codes))
        raw = _raw_rate(codes, queries)
    result = {
        **circumstances("serve", "orbithash", "grpcio", "ray"),
        "rows": rows,
        "bits": bits,
        "k": K,
        "shards": f"{shards} {'in one process' if local else 'Ray actors'}",
        "in_flight": in_flight,
        "requests": requests,
        "wrong_answers": f"{num_wrong} of {_NUM_CHECKED}",
    }
    for name in addresses:
        result[f"{name}_requests_per_s"] = float(np.median(rates[name]))
        for share in (50, 95, 99):
            result[f"{name}_p{share}_ms"] = 1e3 * float(np.percentile(lone[name], share))
    # Round by round: what is slow for a while is slow for both.
    result["ratio_of_rates"] = float(np.median(np.divide(rates["gateway"], rates["floor"])))
    result["ratio_of_rates_target"] = f"at least {_MIN_RATE_RATIO:g}"
    result["ratio_of_p50"] = result["gateway_p50_ms"] / result["floor_p50_ms"]
    result["ratio_of_p50_target"] = f"at most {_MAX_P50_RATIO:g}"
    result["raw_faiss_queries_per_s"] = raw
    return result


def write_archive(path: Path, codes: Codes, model_id: str) -> tuple[Ids, Codes]:
    """An archive whose rows have all that a hit shows; its ids and codes."""
    from datetime import UTC, datetime, timedelta

    count, bits = len(codes), 8 * codes.shape[1]
    rng = np.random.default_rng(1)
    archive = Archive.create(path, bits, model_id)
    keys = [f"{_LABELS[row % len(_LABELS)]}/tile_{row:08d}.tif" for row in range(count)]
    begin = datetime(2024, 1, 1, tzinfo=UTC)
    rows = Archive.table(
        codes,
        bits,
        key=keys,
        uri=[f"file:///tiles/{key}" for key in keys],
        label=[_LABELS[row % len(_LABELS)] for row in range(count)],
        lon=rng.uniform(-180, 180, count).tolist(),
        lat=rng.uniform(-80, 80, count).tolist(),
        datetime=[begin + timedelta(minutes=row) for row in range(count)],
    )
    archive.commit(Archive.write_fragments(path, rows))
    return archive.codes()


@dataclass(frozen=True)
class Child:
    """A service in a process of its own."""

    address: str
    pid: int
    log: Path


@contextmanager
def started(*args: str | Path) -> Iterator[Child]:
    """A child of this process for as long as the block lasts, once it is ready."""
    program = "from orbithash.cluster.bench.serve import child; child()"
    with TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", program, *map(str, args)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                # Ctrl-C is for the parent, which ends its children in order.
                start_new_session=True,
            )
        try:
            yield Child(_address_of(process, log), process.pid, log)
        finally:
            assert process.stdin is not None, "it was asked for"
            process.stdin.close()
            try:
                process.wait(_STOP_S)
            except BaseException:
                process.kill()
                process.wait()
                raise


def _address_of(process: subprocess.Popen[bytes], log: Path) -> str:
    """HOST:PORT, once the child says so."""
    deadline = time.monotonic() + _START_S
    while not (found := re.search(r"ready at (\S+);", log.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text().splitlines() or ["it said nothing"]
            raise RuntimeError(f"a service did not start: {said[-1]}")
        time.sleep(0.05)
    return found[1]


def child() -> None:
    """The entry point of the children; the arguments are those of `started`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    kind, *args = sys.argv[1:]
    if kind == "floor":
        asyncio.run(_serve_prepared(Path(args[0])))
        return
    from orbithash.cluster.serving.serve import serve

    archive, model, shards, where = args
    # The model is there because serving takes one; queries by code do not ask it.
    serve(archive, Path(model), int(shards), "127.0.0.1:0", where == "local")


def _end_with_parent() -> None:
    # The parent writes nothing: this returns when its end of the pipe is closed.
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP_S)
    os._exit(1)


async def _serve_prepared(prepared: Path) -> None:
    """The floor: the same messages through the same server, with nothing between."""
    import grpc

    from orbithash.v1 import search_pb2

    answer = search_pb2.SearchResponse.FromString(prepared.read_bytes())

    async def search(request: search_pb2.SearchRequest, context: Any) -> search_pb2.SearchResponse:
        return answer

    method = grpc.unary_unary_rpc_method_handler(
        search, search_pb2.SearchRequest.FromString, search_pb2.SearchResponse.SerializeToString
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service = grpc.method_handlers_generic_handler("orbithash.v1.SearchService", {"Search": method})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(f"ready at 127.0.0.1:{port}; an empty service")
    await server.wait_for_termination()


async def _one_answer(address: str, code: Codes) -> bytes:
    """A real answer, for the empty service to give."""
    import grpc

    from orbithash.v1 import search_pb2, search_pb2_grpc

    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = search_pb2_grpc.SearchServiceStub(channel)
        answer = await stub.Search(search_pb2.SearchRequest(code=code.tobytes(), k=K), timeout=30)
        return bytes(answer.SerializeToString())


async def _drive(
    addresses: dict[str, str], queries: Codes, in_flight: int, ids: Ids, codes: Codes
) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """Requests a second of each round, seconds of lone queries, both by service, and wrong answers of the gateway."""
    rates: dict[str, list[float]] = {name: [] for name in addresses}
    lone: dict[str, list[float]] = {name: [] for name in addresses}
    asked = [code.tobytes() for code in queries]
    clients = {name: AsyncClient(address) for name, address in addresses.items()}
    try:
        num_wrong = await _num_wrong(clients["gateway"], queries[:_NUM_CHECKED], ids, codes)
        for client in clients.values():
            await _rate(client, asked[:_WARM_UP], in_flight)
        for number in range(_ROUNDS):
            part = asked[number::_ROUNDS]
            # There and back, so that neither always follows the other.
            for name in list(clients)[:: -1 if number % 2 else 1]:
                say(f"round {number + 1} of {_ROUNDS}: {name}")
                rates[name].append(await _rate(clients[name], part, in_flight))
                lone[name] += await _latencies(clients[name], part[: max(1, int(_LONE_SHARE * len(part)))])
    finally:
        for client in clients.values():
            await client.close()
    return rates, lone, num_wrong


async def _rate(client: AsyncClient, codes: Sequence[bytes], in_flight: int) -> float:
    waiting = iter(codes)

    async def ask() -> None:
        for code in waiting:
            await client.search(code=code, k=K)

    begun = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(in_flight)))
    return len(codes) / (time.perf_counter() - begun)


async def _latencies(client: AsyncClient, codes: Sequence[bytes]) -> list[float]:
    seconds = []
    for code in codes:
        begun = time.perf_counter()
        await client.search(code=code, k=K)
        seconds.append(time.perf_counter() - begun)
    return seconds


async def _num_wrong(client: AsyncClient, queries: Codes, ids: Ids, codes: Codes) -> int:
    """Answers that are not the exact one. The rows are by ascending id, so rows and ids sort alike."""
    answers = [await client.search(code=query.tobytes(), k=K) for query in queries]
    wanted = ids[nearest_rows(codes, queries, K)]
    return sum([hit.id for hit in answer.hits] != row.tolist() for answer, row in zip(answers, wanted, strict=True))


def _raw_rate(codes: Codes, queries: Codes) -> float:
    """Queries a second of FAISS alone: as many threads as cores, each with queries of its own."""
    import faiss

    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index.add(codes)
    num_threads = len(os.sched_getaffinity(0))
    part = queries[:_RAW_QUERIES]

    def search(_: int) -> None:
        # Of the calling thread only. OpenMP's own threads wait for each other, which a busy machine makes long.
        faiss.omp_set_num_threads(1)
        index.search(part, K)

    rates = []
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(search, range(num_threads)))
        for _ in range(_ROUNDS):
            begun = time.perf_counter()
            list(pool.map(search, range(num_threads)))
            rates.append(num_threads * len(part) / (time.perf_counter() - begun))
    return float(np.median(rates))
