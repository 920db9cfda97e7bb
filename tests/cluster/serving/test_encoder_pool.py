"""The pool of query encoders: growth, restart, sharing and errors."""

import asyncio
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cluster_parts import BITS, family

from orbithash.cluster.serving import encoder_pool
from orbithash.cluster.serving.encoder_pool import EncoderPool, EncoderPools
from orbithash.cluster.serving.settings import ServeSettings
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.model import HashModel

pytestmark = pytest.mark.ray

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)


def networks():
    """Return the processes of the pool's actors in the cluster of this process."""

    def title(pid):
        try:
            return Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            return ""

    return {pid for pid in family(os.getpid()) if title(pid).startswith("ray::Network")}


async def codes_of(pool):
    return (await pool.encode("image", IMAGES)).codes


def run(scenario, model, low, high):
    async def call():
        pool = await EncoderPool.start(model, low, high)
        try:
            await scenario(pool, partial(codes_of, pool))
        finally:
            pool.close()

    asyncio.run(asyncio.wait_for(call(), 300))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.02)


def test_another_gateway_calls_the_same_actors(ray_cluster, model):
    async def scenario(pool, encode):
        joined = EncoderPool.join(pool.joinable)
        assert joined.inputs == pool.inputs
        np.testing.assert_array_equal(await codes_of(joined), await encode())
        # Not at once: actors of the tests before may still be ending.
        await until(lambda: len(networks()) == 1)
        joined.close()
        np.testing.assert_array_equal(await encode(), HashModel.load(model).encode_prepared(IMAGES))
        assert len(networks()) == 1

    run(scenario, model, 1, 2)


@pytest.mark.slow
def test_the_pool_follows_the_load(ray_cluster, model, monkeypatch):
    monkeypatch.setattr(encoder_pool, "_IDLE_S", 0.5)
    monkeypatch.setattr(encoder_pool, "_WATCH_INTERVAL_S", 0.05)
    expected = HashModel.load(model).encode_prepared(IMAGES)
    assert expected.shape == (5, BITS // 8)

    async def scenario(pool, encode):
        assert not pool.inputs.has_text
        assert pool.inputs.embedding is None
        assert pool.inputs.num_features == HashModel.load(model).num_features
        await until(lambda: len(networks()) == 1)
        np.testing.assert_array_equal(await encode(), expected)
        assert len(networks()) == 1, "one query at a time needs one actor"

        async def ask_until(is_enough):
            while not is_enough():
                np.testing.assert_array_equal(await encode(), expected)

        await asyncio.gather(*(ask_until(lambda: len(networks()) == 2) for _ in range(6)))
        # Not more than the maximum.
        await asyncio.gather(*(encode() for _ in range(30)))
        assert len(networks()) == 2
        await until(lambda: len(networks()) == 1)
        np.testing.assert_array_equal(await encode(), expected)

    run(scenario, model, 1, 2)


@pytest.mark.slow
def test_an_actor_that_dies_restarts(ray_cluster, model):
    async def scenario(pool, encode):
        expected = await encode()
        await until(lambda: len(networks()) == 1)
        (pid,) = networks()
        calls = [asyncio.create_task(encode()) for _ in range(4)]
        os.kill(pid, signal.SIGKILL)
        for codes in await asyncio.gather(*calls):
            np.testing.assert_array_equal(codes, expected)
        await until(lambda: networks() - {pid})

    run(scenario, model, 1, 1)


@pytest.mark.slow
def test_users_of_a_model_share_a_pool(ray_cluster, model):
    async def scenario():
        pools = EncoderPools()
        first = await pools.open("id", model, 1, 1)
        second = await pools.open("id", model, 1, 1)
        assert second is first
        first.close()
        assert len(await codes_of(second)) == len(IMAGES)
        second.close()
        await until(lambda: not networks())
        third = await pools.open("id", model, 1, 1)
        assert third is not first
        third.close()

    asyncio.run(asyncio.wait_for(scenario(), 300))


def test_a_pool_that_the_cluster_has_no_room_for(ray_cluster, model):
    with pytest.raises(InputError, match=r"encoding queries with 90 networks needs 45 CPUs, the cluster has 4"):
        asyncio.run(EncoderPool.start(model, 90, 90))


def test_errors_of_the_network_reach_the_caller_and_it_uses_all_cores(ray_cluster, model):
    def num_threads(network):
        import torch

        return torch.get_num_threads()

    async def scenario(pool, encode):
        (member,) = pool._members
        assert await member.actor.__ray_call__.remote(num_threads) == len(os.sched_getaffinity(0))
        with pytest.raises(InputError, match="encodes images only"):
            await pool.encode("text", ["boats"])

    run(scenario, model, 1, 1)


def test_encoders_have_the_gpus_that_were_asked_for(monkeypatch):
    """What Ray is asked for; the network itself needs a GPU."""
    import ray

    asked, checked = [], []

    class Method:
        async def remote(self):
            return encoder_pool.Inputs(has_text=False, num_features=4, embedding=None)

    class Actor:
        inputs = Method()

    def remote(**options):
        class Remote:
            @staticmethod
            def remote(*arguments):
                asked.append((options, arguments))
                return Actor()

        return lambda kind: Remote

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    monkeypatch.setattr(encoder_pool, "check_resources", lambda what, bundles: checked.append(bundles))

    async def started(gpus):
        pool = await EncoderPools().open("id", Path("model"), 2, 3, gpus)
        pool.close()

    for gpus, device in ((0, "cpu"), (0.25, "cuda"), (1, "cuda")):
        asked.clear()
        checked.clear()
        asyncio.run(started(gpus))
        assert checked == [[{"CPU": encoder_pool.ENCODER_CPUS, "GPU": gpus}] * 2]
        assert [options["num_gpus"] for options, _ in asked] == [gpus] * 2
        assert [arguments for _, arguments in asked] == [(Path("model"), 3, device)] * 2


def test_a_pool_that_the_cluster_has_no_gpus_for(ray_cluster, model):
    with pytest.raises(InputError, match=r"encoding queries with 1 networks needs 1 GPUs, the cluster has 0"):
        asyncio.run(EncoderPool.start(model, 1, 1, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus_per_encoder": 1.5}, "--gpus-per-encoder is 1.5; a whole number, or a part of one GPU such as 0.25"),
        ({"gpus_per_encoder": -1}, "--gpus-per-encoder is -1; a number of GPUs, 0 or more"),
        ({"gpus_per_encoder": 1, "is_local": True}, "got --local and --gpus-per-encoder"),
    ],
)
def test_gpus_that_no_encoder_can_have(settings, message):
    with pytest.raises(InputError, match=message):
        ServeSettings("archive", Path("model"), "127.0.0.1:0", **settings).check()
