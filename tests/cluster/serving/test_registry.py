"""What gateways that share shards know of one another."""

import asyncio

import pytest

from orbithash.cluster.serving.registry import FirstGateway, JoinedGateway, OwnerGone
from orbithash.encoders.errors import InputError
from orbithash.search.protocol.errors import InvalidQuery, Unavailable
from orbithash.search.service.service import Target

pytestmark = pytest.mark.ray


def run(scenario):
    async def call():
        first = await FirstGateway.start()
        try:
            async with asyncio.timeout(120):
                await scenario(first)
        finally:
            first.close()

    asyncio.run(call())


async def until_it_fails(call):
    while True:
        await call()


def test_what_is_published_is_found_by_its_archive_until_the_first_gateway_ends(ray_cluster, tmp_path):
    archive, other = str(tmp_path / "archive"), str(tmp_path / "other")

    async def scenario(first):
        with pytest.raises(InputError, match=r"no gateway on this Ray cluster serves .*/archive: start") as caught:
            await JoinedGateway.find(archive)
        assert "\n" not in str(caught.value)
        await first.publish(Target(archive, "model", 2), ["shards"], ["encoders"])
        with pytest.raises(InputError, match=r"gateways of the cluster serve .*/archive"):
            await JoinedGateway.find(other)
        joined = await JoinedGateway.find(archive)
        assert await first.num_gateways() == 1
        published, number = await joined.published()
        assert (published.number, published.target, published.shards) == (1, Target(archive, "model", 2), ["shards"])
        assert number == await first.num_gateways() == 2
        await first.publish(Target(other, "model", 3), ["more shards"], ["encoders"])
        published, _ = await joined.published()
        assert (published.number, published.target.archive) == (2, other)
        await JoinedGateway.find(other)
        published, _ = await JoinedGateway.named(first.name).published()
        assert published.number == 2
        first.close()
        with pytest.raises(OwnerGone, match="has ended; start it again"):
            await until_it_fails(joined.published)
        with pytest.raises(Unavailable):
            await joined.move(Target(archive, "model", 2))
        with pytest.raises(InputError, match="no gateway on this Ray cluster"):
            await JoinedGateway.find(other)
        with pytest.raises(OwnerGone):
            JoinedGateway.named(first.name)

    run(scenario)


def test_a_registry_that_dies_is_restarted_and_filled_again(ray_cluster, tmp_path):
    async def scenario(first):
        import ray

        await first.publish(Target(str(tmp_path), "model", 2), ["shards"], ["encoders"])
        joined = await JoinedGateway.find(str(tmp_path))
        ray.kill(first._actor, no_restart=False)
        found = None
        while found is None:
            try:
                await first.num_gateways()
                found, _ = await joined.published()
            except (Unavailable, ray.exceptions.RayActorError):
                await asyncio.sleep(0.05)
        assert (found.number, found.shards) == (1, ["shards"])

    run(scenario)


def test_a_move_is_made_by_the_first_gateway(ray_cluster, tmp_path):
    archive = str(tmp_path / "archive")

    async def scenario(first):
        await first.publish(Target(archive, "model", 2), None, None)
        joined = await JoinedGateway.find(archive)
        moves = []

        async def move(target):
            moves.append(target)
            if target.num_shards == 9:
                raise InvalidQuery(("archive", "it does not exist: nowhere"))
            if target.num_shards == 10:
                raise RuntimeError("a secret of the server")

        async def serve():
            for _ in range(3):
                try:
                    await first.serve_move(move)
                except RuntimeError:
                    continue

        serving = asyncio.create_task(serve())
        await joined.move(Target(archive, "model", 8))
        with pytest.raises(InvalidQuery) as caught:
            await joined.move(Target(archive, "model", 9))
        assert caught.value.violations == (("archive", "it does not exist: nowhere"),)
        with pytest.raises(InvalidQuery, match="the log of the first gateway says why"):
            await joined.move(Target(archive, "model", 10))
        await serving
        assert [target.num_shards for target in moves] == [8, 9, 10]

    run(scenario)
