import asyncio
import contextlib
import re

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from search_parts import (
    StubBackend,
    StubShard,
    local_engine,
    memory_shards,
    oracle,
    random_case,
    small_case,
    snapshot_of,
)

from orbithash.encoders.errors import ImageError, InputError
from orbithash.search.engine.engine import Engine
from orbithash.search.gateway.gateway import start_gateway
from orbithash.search.gateway.limits import GatewayLimits
from orbithash.search.service.service import Service, Target
from orbithash.v1 import search_pb2, search_pb2_grpc

SERVICE = "orbithash.v1.SearchService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@contextlib.asynccontextmanager
async def running(engine, limits=None):
    """Yield a gateway on a free port and a channel to it."""
    gateway = await start_gateway(Service(Target("", "", 2), StubBackend(), engine, None), "127.0.0.1:0", limits=limits)
    options = [("grpc.max_send_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.port}", options=options) as channel:
            yield gateway, channel
    finally:
        # A server that is left running keeps the process from ending.
        await gateway.stop(grace_s=0)


async def failure(call):
    """Return code, message and details (BadRequest, ErrorInfo, RetryInfo) of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    status = await rpc_status.aio.from_call(error_as_call(error))
    details = {}
    for detail in status.details if status else ():
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            message = kind()
            if detail.Unpack(message):
                details[kind.__name__] = message
    return error.code(), error.details(), details


def error_as_call(error):
    """Return the error as a finished call: rpc_status needs coroutines where the error has plain methods."""

    class Call:
        async def trailing_metadata(self):
            return error.trailing_metadata()

        async def code(self):
            return error.code()

        async def details(self):
            return error.details()

    return Call()


def request(**fields):
    return search_pb2.SearchRequest(**{"k": 5, **fields})


@pytest.mark.parametrize("seed", range(5000, 5012))
def test_over_the_wire_equals_the_oracle(seed):
    case = random_case(seed, max_rows=800)

    async def scenario():
        async with running(local_engine(case)) as (_, channel):
            stub = search_pb2_grpc.SearchServiceStub(channel)
            wanted = [(query, k) for k in case.ks for query in case.queries]
            responses = await asyncio.gather(*(stub.Search(request(code=query.tobytes(), k=k)) for query, k in wanted))
            for (query, k), response in zip(wanted, responses, strict=True):
                hits = [(hit.distance, hit.id) for hit in response.hits]
                assert (hits, response.ties_at_cutoff) == oracle(case.ids, case.codes, query, k)
                assert response.coverage.fraction == 1.0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "code", "reason", "bad_fields"),
    [
        ({"code": b"abc"}, "INVALID_ARGUMENT", "INVALID_QUERY", ["code"]),
        ({"code": b"ab", "k": 0}, "INVALID_ARGUMENT", "INVALID_QUERY", ["k"]),
        ({"code": b"ab", "k": 10_001}, "INVALID_ARGUMENT", "INVALID_QUERY", ["k"]),
        ({"k": 0}, "INVALID_ARGUMENT", "INVALID_QUERY", ["query", "k"]),
        ({"image": b"no image"}, "INVALID_ARGUMENT", "INVALID_QUERY", ["image"]),
        ({"image": bytes(12 * 2**20)}, "INVALID_ARGUMENT", "INVALID_QUERY", ["image"]),
        ({"key": "nowhere"}, "NOT_FOUND", "KEY_NOT_FOUND", None),
        ({"key": "\U0001f6f0" * 4000}, "NOT_FOUND", "KEY_NOT_FOUND", None),
    ],
)
def test_wrong_requests(fields, code, reason, bad_fields):
    async def refuse(images):
        raise ImageError("not an image: its first bytes are b'no im', " + "\U0001f6f0" * 5000)

    async def scenario():
        async with running(local_engine(small_case(), refuse)) as (_, channel):
            got, message, details = await failure(search_pb2_grpc.SearchServiceStub(channel).Search(request(**fields)))
        assert got == grpc.StatusCode[code]
        assert "\n" not in message
        assert (details["ErrorInfo"].reason, details["ErrorInfo"].domain) == (reason, "orbithash")
        named = [violation.field for violation in details["BadRequest"].field_violations] if bad_fields else None
        assert named == bad_fields
        if "image" in fields and len(fields["image"]) < 100:
            assert "its first bytes" in message

    asyncio.run(scenario())


def test_a_message_over_the_limit_is_refused_by_grpc():
    async def scenario():
        async with running(local_engine(small_case())) as (_, channel):
            call = search_pb2_grpc.SearchServiceStub(channel).Search(request(image=bytes(20 * 2**20)))
            code, message, details = await failure(call)
        assert (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, {})
        assert "larger than max" in message

    asyncio.run(scenario())


def test_an_unexpected_failure_leaks_nothing(caplog):
    async def crash(images):
        raise RuntimeError("a secret of the server")

    async def scenario():
        async with running(local_engine(small_case(), crash)) as (_, channel):
            return await failure(search_pb2_grpc.SearchServiceStub(channel).Search(request(image=b"x")))

    code, message, details = asyncio.run(scenario())
    assert code == grpc.StatusCode.INTERNAL
    request_id = re.fullmatch(r"internal error, request id ([0-9a-f]{32})", message)[1]
    assert details["ErrorInfo"].reason == "INTERNAL"
    assert "a secret of the server" not in str(details)
    assert request_id in caplog.text
    assert "a secret of the server" in caplog.text


def stub_engine(case, before, num_shards=1, **options):
    shards = [StubShard(shard, before) for shard in memory_shards(case, num_shards)]
    return Engine(snapshot_of(case, shards), **options), shards


def test_failing_shards():
    async def fails():
        raise RuntimeError("a secret of the shard")

    async def scenario():
        engine, shards = stub_engine(small_case(), fails, num_shards=2)
        async with running(engine) as (_, channel):
            stub = search_pb2_grpc.SearchServiceStub(channel)
            code, message, details = await failure(stub.Search(request(code=b"ab")))
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
            assert "secret" not in message

            async def works():
                pass

            shards[0].before = works
            response = await stub.Search(request(code=b"ab"))
            coverage = response.coverage
            assert (coverage.searched_rows, coverage.total_rows, coverage.fraction) == (20, 40, 0.5)
            assert (coverage.answered_shards, coverage.total_shards) == (1, 2)

    asyncio.run(scenario())


async def never():
    await asyncio.Event().wait()


def test_a_late_shard_is_a_passed_deadline_and_the_server_has_its_own():
    async def scenario():
        engine, shards = stub_engine(small_case(), never)
        async with running(engine, GatewayLimits(max_timeout_s=0.2)) as (_, channel):
            stub = search_pb2_grpc.SearchServiceStub(channel)
            for timeout in (None, 60.0, 0.1):
                code, _, _ = await failure(stub.Search(request(code=b"ab"), timeout=timeout))
                assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert all(timeout_s <= 0.2 for _, _, timeout_s in shards[0].calls)

    asyncio.run(scenario())


def test_an_overloaded_engine_says_when_to_try_again():
    async def scenario():
        gate, arrived = asyncio.Event(), asyncio.Event()

        async def hold():
            arrived.set()
            await gate.wait()

        engine, _ = stub_engine(small_case(), hold, max_fan_outs=1, max_waiting=0)
        async with running(engine) as (_, channel):
            stub = search_pb2_grpc.SearchServiceStub(channel)
            first = stub.Search(request(code=b"ab"))
            await arrived.wait()
            code, _, details = await failure(stub.Search(request(code=b"ab")))
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0
            gate.set()
            assert len((await first).hits) == 5

    asyncio.run(scenario())


def test_more_calls_than_allowed_are_refused():
    async def scenario():
        gate, arrived = asyncio.Event(), asyncio.Event()

        async def hold():
            arrived.set()
            await gate.wait()

        engine, _ = stub_engine(small_case(), hold)
        async with running(engine, GatewayLimits(max_concurrent_rpcs=1)) as (_, channel):
            stub = search_pb2_grpc.SearchServiceStub(channel)
            first = stub.Search(request(code=b"ab"))
            await arrived.wait()
            code, _, _ = await failure(stub.Search(request(code=b"ab")))
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            gate.set()
            assert len((await first).hits) == 5

    asyncio.run(scenario())


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_goes_from_serving_to_not_serving_before_calls_in_flight_end(service):
    async def scenario():
        gate, arrived = asyncio.Event(), asyncio.Event()

        async def hold():
            arrived.set()
            await gate.wait()

        engine, _ = stub_engine(small_case(), hold)
        async with running(engine) as (gateway, channel):
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service=service))
            assert (await watch.read()).status == SERVING
            in_flight = search_pb2_grpc.SearchServiceStub(channel).Search(request(code=b"ab"))
            await arrived.wait()
            stopping = asyncio.create_task(gateway.stop(grace_s=30))
            assert (await watch.read()).status == NOT_SERVING
            assert not in_flight.done()
            gate.set()
            assert len((await in_flight).hits) == 5
            watch.cancel()
            await stopping
            code, _, _ = await failure(search_pb2_grpc.SearchServiceStub(channel).Search(request(code=b"ab")))
            assert code == grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_health_of_an_unknown_service():
    async def scenario():
        async with running(local_engine(small_case())) as (_, channel):
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="other"))
            assert (await failure(check))[0] == grpc.StatusCode.NOT_FOUND

    asyncio.run(scenario())


def test_a_port_in_use_is_one_clear_line(capfd):
    async def scenario():
        engine = local_engine(small_case())
        async with running(engine) as (gateway, channel):
            with pytest.raises(InputError, match="in use") as caught:
                await (await start_gateway(engine, gateway.address)).stop(grace_s=0)
            assert "\n" not in str(caught.value)
            assert capfd.readouterr() == ("", "")
            response = await search_pb2_grpc.SearchServiceStub(channel).Search(request(key="place/3.tif"))
            assert response.hits[0].id == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:50051", "example.org:50051"])
def test_addresses_that_others_can_reach_are_refused(address):
    with pytest.raises(InputError, match="loopback"):
        asyncio.run(start_gateway(local_engine(small_case()), address))


def test_a_wrong_address_is_refused():
    with pytest.raises(InputError, match="HOST:PORT"):
        asyncio.run(start_gateway(local_engine(small_case()), "50051"))


def test_images_travel_unchanged():
    image = np.random.default_rng(0).bytes(10 * 2**20)

    async def encode(images):
        assert images == [image]
        return small_case().codes[:1]

    async def scenario():
        async with running(local_engine(small_case(), encode)) as (_, channel):
            response = await search_pb2_grpc.SearchServiceStub(channel).Search(request(image=image))
            assert response.hits[0].distance == 0

    asyncio.run(scenario())


def test_very_many_problems_fit_into_a_status():
    async def scenario():
        async with running(local_engine(small_case())) as (_, channel):
            stub = search_pb2_grpc.SearchServiceStub(channel)
            keys = [f"{number}\n" + "\U0001f6f0" * 500 for number in range(300)]
            code, message, details = await failure(stub.Get(search_pb2.GetRequest(keys=keys)))
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert "more problems" in message or len(message) == 300
            assert 1 <= len(details["BadRequest"].field_violations) < 300
            example = search_pb2.Example(image=b"")
            wrong = request(examples={"positives": [example] * 64}, k=0, filter="x" * 500_001, min_coverage=9)
            code, message, details = await failure(stub.Search(wrong))
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_QUERY")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"vector": b""}, "vector"),
        ({"vector": bytes(12)}, "vector"),
        ({"vector": bytes(15)}, "vector"),
        ({"vector": np.float32([0, np.nan, 0, 0]).tobytes()}, "vector"),
        ({"vector": bytes(4 * 16_385)}, "vector"),
        ({"examples": {"positives": [{"vector": bytes(12)}, {"code": b"ab"}]}}, "vector"),
        ({"examples": {"positives": [{"code": b"ab", "weight": 0}]}}, "weight"),
        ({"examples": {"positives": [{"code": b"ab", "weight": float("nan")}]}}, "weight"),
        ({"examples": {"positives": [{"code": b"ab"}], "negatives": [{"code": b"ab", "weight": 1001}]}}, "weight"),
    ],
)
def test_vectors_and_weights_that_no_client_of_ours_sends(fields, field):
    async def scenario():
        async with running(local_engine(small_case())) as (_, channel):
            stub = search_pb2_grpc.SearchServiceStub(channel)
            code, message, details = await failure(stub.Search(search_pb2.SearchRequest(k=1, **fields)))
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert [each.field for each in details["BadRequest"].field_violations] == [field]
            assert "\n" not in message

    asyncio.run(scenario())


def test_requests_in_progress_are_limited_in_bytes():
    async def scenario():
        gate, arrived = asyncio.Event(), asyncio.Event()

        async def encode(images):
            arrived.set()
            await gate.wait()
            return small_case().codes[: len(images)]

        limits = GatewayLimits(max_request_bytes=10_000)
        async with running(local_engine(small_case(), encode), limits) as (_, channel):
            stub = search_pb2_grpc.SearchServiceStub(channel)
            first = stub.Search(request(image=bytes(6000)))
            await arrived.wait()
            code, message, details = await failure(stub.Search(request(image=bytes(6000))))
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert "bytes are in progress" in message
            assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0
            # Small requests still have room.
            assert len((await stub.Search(request(code=b"ab"))).hits) == 5
            gate.set()
            assert len((await first).hits) == 5
            # The bytes of finished and of refused requests are free again.
            for _ in range(3):
                assert len((await stub.Search(request(image=bytes(6000)))).hits) == 5

    asyncio.run(scenario())


def test_watching_the_health_leaves_room_for_searches():
    async def scenario():
        limits = GatewayLimits(max_concurrent_rpcs=8, max_streams=3)
        async with running(local_engine(small_case()), limits) as (_, channel):
            health = health_pb2_grpc.HealthStub(channel)
            watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
            for watch in watches:
                assert (await watch.read()).status == SERVING
            for _ in range(10):
                code, message, _ = await failure(health.Watch(health_pb2.HealthCheckRequest()).read())
                assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "3 streams of /grpc.health.v1.Health/Watch are open" in message
            search = search_pb2_grpc.SearchServiceStub(channel)
            assert len((await search.Search(request(code=b"ab"))).hits) == 5
            # A stream that ends makes room for another one.
            watches[0].cancel()
            status = None
            while status is None:
                watch = health.Watch(health_pb2.HealthCheckRequest())
                with contextlib.suppress(grpc.aio.AioRpcError):
                    status = (await watch.read()).status
            assert status == SERVING
            for each in (*watches, watch):
                each.cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize("method", [f"{SERVICE}/Search", "grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"])
def test_calls_that_never_send_their_message_end(method):
    """Such calls would block all others, and need no token."""

    async def scenario():
        limits = GatewayLimits(max_concurrent_rpcs=8, max_streams=100, max_idle_s=0.3)
        async with running(local_engine(small_case()), limits) as (_, channel):
            silent = [channel.stream_stream(f"/{method}")() for _ in range(8)]
            for call in silent:
                assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            search = search_pb2_grpc.SearchServiceStub(channel)
            assert len((await search.Search(request(code=b"ab"))).hits) == 5
            empty = channel.stream_unary(f"/{SERVICE}/Search")(iter(()))
            assert await empty.code() == grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(scenario())


def test_messages_that_arrive_slowly_are_limited():
    """The size of a message is not known before it has arrived; fast messages are not affected."""

    async def scenario():
        limits = GatewayLimits(max_slow_messages=2)
        async with running(local_engine(small_case()), limits) as (_, channel):
            # A unary call whose message is not sent.
            silent = channel.stream_unary(f"/{SERVICE}/Search")
            calls = [silent() for _ in range(2)]
            for call in calls:
                await call.wait_for_connection()
            await asyncio.sleep(0.3)
            third = silent()
            await third.wait_for_connection()
            code, message, details = await failure(third)
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert "2 messages arrive slowly" in message
            assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0
            search = search_pb2_grpc.SearchServiceStub(channel)
            assert len((await search.Search(request(code=b"ab"))).hits) == 5
            for call in calls:
                call.cancel()
            fourth = silent()
            await fourth.wait_for_connection()
            await fourth.write(request(code=b"ab").SerializeToString())
            await fourth.done_writing()
            assert len(search_pb2.SearchResponse.FromString(await fourth).hits) == 5

    asyncio.run(scenario())


def test_responses_in_progress_are_limited_in_bytes():
    async def scenario():
        limits = GatewayLimits(max_response_bytes=150_000)
        async with running(local_engine(small_case(num_rows=4000)), limits) as (_, channel):
            stub = search_pb2_grpc.SearchServiceStub(channel)
            sizes = {k: (await stub.Search(request(code=b"ab", k=k))).ByteSize() for k in (500, 2000)}
            assert sizes[500] < 2**16 < sizes[2000] < 150_000
            code, message, details = await failure(stub.Search(request(code=b"ab", k=4000)))
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert "responses of 0 bytes are in progress" in message
            assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0
            # The bytes of responses that were sent are free again.
            for _ in range(10):
                assert len((await stub.Search(request(code=b"ab", k=2000))).hits) == 2000

    asyncio.run(scenario())


def test_idle_connections_are_closed_and_opened_again():
    async def scenario():
        async with running(local_engine(small_case()), GatewayLimits(max_idle_connection_s=0.2)) as (_, channel):
            stub = search_pb2_grpc.SearchServiceStub(channel)
            for _ in range(2):
                assert len((await stub.Search(request(code=b"ab"))).hits) == 5
                async with asyncio.timeout(60):
                    while (state := channel.get_state()) is grpc.ChannelConnectivity.READY:
                        await channel.wait_for_state_change(state)

    asyncio.run(scenario())
