"""Metrics as Prometheus reads them, compared with the calls that were made; health, logs and request ids."""

import asyncio
import contextlib
import dataclasses
import io
import json
import logging
import math
import re
import urllib.request

import grpc
import numpy as np
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from search_parts import StubBackend, StubEncoder, StubShard, memory_shards, small_case, snapshot_of

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.search import logs
from orbithash.search.client import AsyncClient
from orbithash.search.engine.backend import LocalBackend
from orbithash.search.engine.engine import Engine
from orbithash.search.gateway import calls
from orbithash.search.gateway.gateway import start_gateway
from orbithash.search.gateway.limits import GatewayLimits
from orbithash.search.gateway.metrics import Metrics, exposed
from orbithash.search.index.answers import Scope
from orbithash.search.protocol.errors import GatewayError, KeyNotFound, Overloaded, Unavailable
from orbithash.search.protocol.queries import Query
from orbithash.search.protocol.rows import Row
from orbithash.search.service.service import Service, Target, open_service
from orbithash.search.shards.replicas import Hedging, Replica, ReplicatedShard
from orbithash.v1 import search_pb2, search_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def scrape(address):
    """Return samples by name and labels, as name[value][value]."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as response:
        text = response.read().decode()
    return {
        sample.name + "".join(f"[{value}]" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def counted(values, name):
    """Return the samples of one name that are not zero, by labels."""
    found = {key.removeprefix(name): value for key, value in values.items() if re.fullmatch(rf"{name}(\[.*\])?", key)}
    return {labels: value for labels, value in found.items() if value}


@contextlib.asynccontextmanager
async def running(service, metrics=None, limits=None):
    """Yield a gateway, a client of it, and a function that reads the metrics."""
    with contextlib.ExitStack() as stack:
        address = None
        if metrics is not None:
            metrics.watch(service)
            address = stack.enter_context(exposed(metrics, "127.0.0.1:0"))
        gateway = await start_gateway(service, "127.0.0.1:0", limits=limits)
        try:
            async with AsyncClient(gateway.address) as client:
                yield gateway, client, lambda: asyncio.to_thread(scrape, address)
        finally:
            await gateway.stop(grace_s=0)


async def nothing():
    pass


async def fails():
    raise RuntimeError("a shard's fault")


def stub_service(befores, metrics=None, encoder=None, **options):
    """Return a service over shards that call one of `befores` before each search, and the shards."""
    case = small_case()
    parts = memory_shards(case, len(befores))
    shards = [StubShard(part, before) for part, before in zip(parts, befores, strict=True)]
    engine = Engine(snapshot_of(case, shards, encoder), observer=metrics, **options)
    return Service(Target("", "", 2), StubBackend(), engine, None), shards


def test_searches_in_metrics():
    async def scenario():
        metrics = Metrics()
        service, shards = stub_service([nothing, nothing], metrics)
        async with running(service, metrics) as (_, client, metrics_now):
            before = await metrics_now()
            assert before["orbithash_requests_total[OK][Search]"] == 0
            assert counted(before, "orbithash_requests_total") == {}
            for _ in range(3):
                await client.search(code=b"ab")
            with pytest.raises(KeyNotFound):
                await client.search(key="nowhere")
            shards[1].before = fails
            assert (await client.search(code=b"ab")).coverage.fraction == 0.5
            with pytest.raises(Unavailable):
                await client.search(code=b"ab", min_coverage=0.9)
            await client.search_batch([Query(code=b"ab")] * 5)
            after = await metrics_now()

        # The client repeats a call that is unavailable, up to four attempts.
        assert counted(after, "orbithash_requests_total") == {
            "[OK][Search]": 4,
            "[NOT_FOUND][Search]": 1,
            "[UNAVAILABLE][Search]": 4,
            "[OK][SearchMany]": 1,
        }
        assert counted(after, "orbithash_request_seconds_count") == {"[Search]": 9, "[SearchMany]": 1}
        # The five queries of one call form one batch.
        batches = 3 + 1 + 4 + 1
        assert after["orbithash_batch_queries_count"] == batches
        assert after["orbithash_batch_queries_sum"] == 3 + 1 + 4 + 5
        assert (after["orbithash_batch_queries_bucket[4.0]"], after["orbithash_batch_queries_bucket[8.0]"]) == (8, 9)
        assert counted(after, "orbithash_stage_seconds_count") == {
            "[queue]": batches,
            "[fan_out]": batches,
            "[scan]": 2 * batches,
            "[merge]": batches,
        }
        assert after["orbithash_failed_shard_calls_total"] == 1 + 4 + 1
        assert after["orbithash_partial_answers_total"] == 1 + 5
        for name in ("shed_queries", "hedged_shard_calls", "retried_shard_calls", "rows_upserted", "rows_deleted"):
            assert after[f"orbithash_{name}_total"] == 0
        state = {"rows": 40, "archive_version": 7, "shards": 2, "queries_waiting": 0, "rows_waiting": 0}
        assert {name: after[f"orbithash_{name}"] for name in state} == state
        assert after["orbithash_calls_in_flight"] == 0
        for kind in ("replicas", "healthy_replicas"):
            assert counted(after, f"orbithash_{kind}") == {"[0]": 1, "[1]": 1}
        shares = [value for name, value in after.items() if name.startswith("orbithash_request_seconds_sum")]
        assert all(0 <= value < 60 and not math.isnan(value) for value in shares)

    asyncio.run(scenario())


def test_overload_in_metrics():
    async def scenario():
        gate, arrived = asyncio.Event(), asyncio.Event()

        async def hold():
            arrived.set()
            await gate.wait()

        metrics = Metrics()
        service, _ = stub_service([hold], metrics, max_fan_outs=1, max_waiting=1)
        async with running(service, metrics) as (_, client, metrics_now):
            first = asyncio.create_task(client.search(code=b"ab"))
            await arrived.wait()
            second = asyncio.create_task(client.search(code=b"ab"))
            while not service.num_queries_waiting:
                await asyncio.sleep(0.01)
            with pytest.raises(Overloaded):
                await client.search(code=b"ab")
            during = await metrics_now()
            assert (during["orbithash_queries_waiting"], during["orbithash_calls_in_flight"]) == (1, 2)
            assert during["orbithash_shed_queries_total"] == 1
            gate.set()
            await asyncio.gather(first, second)
            after = await metrics_now()
        assert (after["orbithash_queries_waiting"], after["orbithash_calls_in_flight"]) == (0, 0)
        assert counted(after, "orbithash_requests_total") == {"[OK][Search]": 2, "[RESOURCE_EXHAUSTED][Search]": 1}

    asyncio.run(scenario())


def test_a_call_that_is_given_up_is_counted_once():
    async def scenario():
        arrived = asyncio.Event()

        async def hold():
            arrived.set()
            await asyncio.Event().wait()

        metrics = Metrics()
        service, _ = stub_service([hold], metrics)
        async with running(service, metrics) as (_, client, metrics_now):
            task = asyncio.create_task(client.search(code=b"ab"))
            await arrived.wait()
            task.cancel()
            while (await metrics_now())["orbithash_calls_in_flight"]:
                await asyncio.sleep(0.01)
            assert counted(await metrics_now(), "orbithash_requests_total") == {"[CANCELLED][Search]": 1}

    asyncio.run(scenario())


def test_changes_in_metrics(tmp_path):
    async def scenario():
        metrics = Metrics()
        archive = Archive.create(tmp_path / "archive", 16, "m" * 32)

        async def open_backend(*_):
            return LocalBackend(archive, StubEncoder(), 3)

        service = await open_service(open_backend, Target("", "", 3), metrics)
        try:
            async with running(service, metrics) as (_, client, metrics_now):
                empty = archive.version
                assert await client.upsert([Row(key=f"k{i}", code=i.to_bytes(2)) for i in range(10)]) == 10
                assert await client.upsert([Row(key="k3", code=b"ab"), Row(key="new", code=b"ab")]) == 2
                assert await client.delete(["k0", "never", "k1"]) == 2
                await client.refresh()
                after = await metrics_now()
        finally:
            await service.close()
        assert (after["orbithash_rows"], after["orbithash_shards"], after["orbithash_rows_waiting"]) == (9, 3, 0)
        assert after["orbithash_archive_version"] == Archive.open(tmp_path / "archive").version > empty
        assert (after["orbithash_rows_upserted_total"], after["orbithash_rows_deleted_total"]) == (12, 2)
        assert counted(after, "orbithash_stage_seconds_count") == {"[commit]": 3, "[show]": 3}
        assert counted(after, "orbithash_requests_total") == {"[OK][Upsert]": 2, "[OK][Delete]": 1, "[OK][Refresh]": 1}

    asyncio.run(scenario())


def test_second_copies_in_metrics():
    async def scenario():
        metrics = Metrics()
        case = small_case()
        (part,) = memory_shards(case, 1)
        slow = asyncio.Event()
        clients = [StubShard(part, fails), StubShard(part, nothing)]
        latencies = Hedging()
        shard = ReplicatedShard(clients, [Replica(), Replica()], latencies, metrics)
        service = Service(Target("", "", 2), StubBackend(), Engine(snapshot_of(case, [shard]), observer=metrics), None)
        async with running(service, metrics) as (_, client, metrics_now):
            assert (await client.search(code=b"ab")).coverage.fraction == 1
            after = await metrics_now()
            assert after["orbithash_retried_shard_calls_total"] == 1
            assert after["orbithash_failed_shard_calls_total"] == 0
            assert counted(after, "orbithash_replicas") == {"[0]": 2}
            assert counted(after, "orbithash_healthy_replicas") == {"[0]": 1}

            for _ in range(20):
                latencies.took(0.001)
            clients[0].before, clients[1].before = nothing, slow.wait
            await shard.search(case.queries, 1, Scope(), 5.0)
            after = await metrics_now()
            assert after["orbithash_hedged_shard_calls_total"] == 1
            assert after["orbithash_retried_shard_calls_total"] == 1

    asyncio.run(scenario())


def test_two_gateways_of_a_process_count_apart():
    async def scenario():
        one, two = Metrics(), Metrics()
        async with (
            running(stub_service([nothing], one)[0], one) as (_, first, of_one),
            running(stub_service([nothing], two)[0], two) as (_, _, of_two),
        ):
            await first.search(code=b"ab")
            assert (await of_one())["orbithash_requests_total[OK][Search]"] == 1
            assert (await of_two())["orbithash_requests_total[OK][Search]"] == 0

    asyncio.run(scenario())


def test_the_page_ends_with_its_block_and_keeps_to_this_machine():
    with exposed(Metrics(), "127.0.0.1:0") as address:
        assert "orbithash_shed_queries_total" in scrape(address)
        with pytest.raises(InputError, match="give another port"), exposed(Metrics(), address):
            pass
    with pytest.raises(OSError, match="refused"):
        scrape(address)
    for wrong in ("0.0.0.0:0", "example.org:9090"):
        with pytest.raises(InputError, match="loopback"), exposed(Metrics(), wrong):
            pass
    with pytest.raises(InputError, match="HOST:PORT"), exposed(Metrics(), "9090"):
        pass
    with exposed(Metrics(), "0.0.0.0:0", allow_remote=True) as address:
        assert "orbithash_shed_queries_total" in scrape(address.replace("0.0.0.0", "127.0.0.1"))


# Health.


@pytest.mark.parametrize("name", ["", "orbithash.v1.SearchService", "orbithash.v1.ArchiveService"])
def test_health_follows_the_shards(name):
    async def scenario():
        service, shards = stub_service([nothing, nothing])
        async with running(service) as (gateway, client, _), grpc.aio.insecure_channel(gateway.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=name))
            assert (await watch.read()).status == SERVING
            shards[0].num_healthy = 0
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.2):
                    await watch.read()
            assert await client.is_serving(), "one part can be searched"
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=name))
            assert (await watch.read()).status == SERVING
            shards[1].num_healthy = 0
            assert (await watch.read()).status == NOT_SERVING
            assert not await client.is_serving()
            shards[0].num_healthy = 1
            assert (await watch.read()).status == SERVING
            watch.cancel()

    asyncio.run(scenario())


def test_health_is_reported_after_any_error(caplog):
    class Panic(BaseException):
        """Like a panic of native code: not an `Exception`."""

    errors = iter([RuntimeError("once"), Panic("native code")])

    class Failing:
        num_rows, num_replicas = 40, 1
        num_segments = num_bytes = num_merges = num_evaluations = 0

        @property
        def num_healthy(self):
            for error in errors:
                raise error
            return 0

    async def scenario():
        service, _ = stub_service([nothing])
        async with running(service) as (_, client, _):
            assert await client.is_serving()
            service._engine._snapshot = dataclasses.replace(service._engine.snapshot, shards=[Failing()])
            async with asyncio.timeout(60):
                while await client.is_serving():
                    await asyncio.sleep(0.05)

    asyncio.run(scenario())
    assert caplog.text.count("reporting the health failed") == 2


def test_health_of_a_gateway_that_begins_without_shards():
    async def scenario():
        service, shards = stub_service([nothing])
        shards[0].num_healthy = 0
        async with running(service) as (_, client, _):
            assert not await client.is_serving()
            shards[0].num_healthy = 1
            async with asyncio.timeout(60):
                while not await client.is_serving():
                    await asyncio.sleep(0.05)

    asyncio.run(scenario())


# Logs and request ids.


@pytest.fixture
def lines(monkeypatch):
    """Return the lines logged so far, as JSON objects. No call is logged for being slow."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(calls, "_SLOW_S", math.inf)
    with logs.log_to_stderr(logs.Format.JSON):
        assert logs.is_json()
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    assert not logs.is_json()


async def wait_for(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def test_lines_of_a_request_carry_its_id(lines):
    async def scenario():
        service, _ = stub_service([nothing, fails])
        async with running(service) as (gateway, _, _), grpc.aio.insecure_channel(gateway.address) as channel:
            stub = search_pb2_grpc.SearchServiceStub(channel)

            async def ask(request_id, **fields):
                request = json_format.ParseDict({"k": 3, **fields}, search_pb2.SearchRequest())
                return await stub.Search(request, metadata=[("orbithash-request-id", request_id)])

            await ask("good-but-partial", key="place/3.tif")
            (line,) = lines()
            assert (line["level"], line["logger"]) == ("WARNING", "orbithash.search.engine.fan_out")
            assert line["message"] == "shard 1 of 2 did not answer: a shard's fault"
            assert line["request_id"] == "good-but-partial"
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
            with pytest.raises(grpc.aio.AioRpcError):
                await ask("a-wrong-one", key="nowhere")
            await wait_for(lambda: len(lines()) == 2)
            line = lines()[1]
            assert (line["level"], line["request_id"]) == ("INFO", "a-wrong-one")
            assert (line["rpc"], line["outcome"]) == ("Search", "NOT_FOUND")
            assert line["ms"] >= 0
            assert line["peer"].startswith("ipv4:127.0.0.1:")

    asyncio.run(scenario())


def test_good_calls_are_a_line_only_when_slow(lines, monkeypatch):
    async def scenario():
        service, _ = stub_service([nothing])
        async with running(service) as (_, client, _):
            await client.search(code=b"ab")
            await client.describe()
            assert lines() == []
            monkeypatch.setattr(calls, "_SLOW_S", 0.0)
            await client.search(code=b"ab")
            await wait_for(lines)
            (line,) = lines()
            assert (line["rpc"], line["outcome"]) == ("Search", "OK")
            assert line["ms"] > 0

    asyncio.run(scenario())


def test_a_batch_names_the_requests_it_is_for(lines):
    async def scenario():
        gate, arrived = asyncio.Event(), asyncio.Event()

        async def hold():
            arrived.set()
            await gate.wait()
            raise RuntimeError("first\nsecond")

        service, _ = stub_service([nothing, hold])
        async with running(service) as (gateway, _, _), grpc.aio.insecure_channel(gateway.address) as channel:
            stub = search_pb2_grpc.SearchServiceStub(channel)

            def ask(request_id):
                request = search_pb2.SearchRequest(code=b"ab", k=3)
                return stub.Search(request, metadata=[("orbithash-request-id", request_id)])

            first = ask("a")
            await arrived.wait()
            others = [ask("b")]
            await wait_for(lambda: service.num_queries_waiting == 1)
            others.append(ask("c"))
            await wait_for(lambda: service.num_queries_waiting == 2)
            gate.set()
            await asyncio.gather(first, *others)
        assert [line["request_id"] for line in lines()] == ["a", "b,c"]

    asyncio.run(scenario())


def test_faults_of_the_server_are_whole_in_the_log_and_named_to_the_caller(lines):
    async def crash(images):
        raise RuntimeError("a secret\nof the server")

    async def scenario():
        service, _ = stub_service([nothing], encoder=StubEncoder(crash))
        async with running(service) as (_, client, _):
            with pytest.raises(GatewayError) as caught:
                await client.search(image=b"x")
            await wait_for(lambda: len(lines()) == 2)
        fault, access = lines()
        assert caught.value.request_id == fault["request_id"] == access["request_id"]
        assert caught.value.request_id in str(caught.value)
        assert "a secret\nof the server" in fault["exception"]
        assert access["outcome"] == "INTERNAL"

    asyncio.run(scenario())


def test_other_errors_know_their_request_too_and_do_not_show_it():
    async def scenario():
        service, _ = stub_service([nothing])
        async with running(service, limits=GatewayLimits()) as (_, client, _):
            with pytest.raises(KeyNotFound) as caught:
                await client.search(key="nowhere")
            assert re.fullmatch("[0-9a-f]{32}", caught.value.request_id)
            assert caught.value.request_id not in str(caught.value)
        assert KeyNotFound("made here").request_id is None

    asyncio.run(scenario())


def test_lines_as_text(capsys):
    with logs.log_to_stderr(logs.Format.TEXT):
        logging.getLogger("orbithash.search").info("a line", extra={"rpc": "Search"})
        logging.getLogger("a.library").info("not for users")
    logging.getLogger("orbithash.search").info("after it")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\S+Z INFO orbithash.search a line", line)


def test_json_takes_what_it_is_given(lines):
    logging.getLogger("orbithash.x").warning("%d rows", 3, extra={"rows": np.int64(3), "path": "ä\n"})
    (line,) = lines()
    assert (line["message"], line["rows"], line["path"]) == ("3 rows", "3", "ä\n")
    assert "request_id" not in line
