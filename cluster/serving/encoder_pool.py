"""A pool of actors that encode queries; its size follows the load."""

import asyncio
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orbithash.cluster.runtime import check_resources
from orbithash.cluster.serving.shards import START_TIMEOUT_S
from orbithash.encoders.codes import Encoded, Kind
from orbithash.encoders.errors import InputError
from orbithash.search.protocol.errors import Unavailable

__all__ = ["EncoderPool", "EncoderPools", "Inputs", "Network"]

logger = logging.getLogger(__name__)

ENCODER_CPUS = 0.5

# Calls per actor before another actor is started: one runs, one waits.
_MAX_CALLS = 2
# Seconds without a call after which an actor above the minimum number ends.
_IDLE_S = 60.0
# Seconds before the pool tries again to grow after the cluster had no room.
_NO_ROOM_S = 60.0
_WATCH_INTERVAL_S = 1.0
_RETRY_INTERVAL_S = 0.1


class Inputs(NamedTuple):
    """What a model takes; see the attributes of `QueryEncoder`."""

    has_text: bool
    num_features: int
    embedding: str | None


class Network:
    """The network of a model, for prepared images, sentences and vectors."""

    def __init__(self, model: Path, num_networks: int | None = None, device: str = "cpu") -> None:
        """Load a model on the torch device `device`.

        `num_networks`: number of networks that share the cores of this machine; None: PyTorch's own number of threads,
        which is one in a Ray actor with a part of a CPU.
        """
        import torch

        from orbithash.encoders.networks.model import HashModel

        if num_networks is not None:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_networks))
        self._model = HashModel.load(model, device)
        # The first pass of a network is slow, so run it before the first query.
        if self.inputs().embedding is not None:
            self._model.encode_items("vector", np.zeros((1, self._model.num_features), np.float32))
        else:
            preprocessing = self._model.preprocessing
            self._model.encode([np.zeros((64, 64, preprocessing.channels), preprocessing.dtype)])

    def inputs(self) -> Inputs:
        """Return what the model takes."""
        backbone = self._model.card.network.backbone
        embedding = backbone.name if backbone.source == "embedding" else None
        return Inputs(self._model.has_text, self._model.num_features, embedding)

    def encode(self, kind: Kind, items: Any, with_outputs: bool) -> Encoded:
        """Return the codes, and on request the outputs, of prepared items, see `HashModel.encode_items`."""
        return self._model.encode_items(kind, items, with_outputs=with_outputs)


class _Member:
    """One actor of the pool."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.num_calls = 0
        self.is_restarting = False
        self.idle_since = 0.0


class EncoderPool:
    """A pool of `low` to `high` actors for one event loop; created by `start`.

    Each call goes to the actor with the fewest calls. If all are busy, another actor is started in the background; an
    actor that is idle for a minute ends.
    """

    def __init__(self, model: Path, low: int, high: int, gpus: float = 0) -> None:
        """Create a pool without actors, which will have `gpus` GPUs each, also a fraction of one."""
        self.inputs = Inputs(has_text=False, num_features=0, embedding=None)
        self._model = model
        self._low, self._high, self._gpus = low, high, gpus
        self._members: list[_Member] = []
        self._growing: asyncio.Task[None] | None = None
        self._full_until = 0.0
        self._watch: asyncio.Task[None] | None = None
        self._num_users = 1
        self._owns_actors = True

    @classmethod
    def join(cls, joinable: Any) -> "EncoderPool":
        """Return a pool that calls the actors of another gateway's pool, which has `joinable` and ends them."""
        inputs, actors = joinable
        pool = cls(Path(), len(actors), len(actors))
        pool.inputs = inputs
        pool._members = [_Member(actor) for actor in actors]
        pool._owns_actors = False
        pool._watch = asyncio.create_task(pool._keep_watch())
        return pool

    @classmethod
    async def start(cls, model: Path, low: int, high: int, gpus: float = 0) -> "EncoderPool":
        """Start `low` actors and wait until they are ready; raise `InputError` if the cluster has no room for them."""
        what = f"encoding queries with {low} networks"
        await asyncio.to_thread(check_resources, what, [{"CPU": ENCODER_CPUS, "GPU": gpus}] * low)
        pool = cls(model, low, high, gpus)
        try:
            await asyncio.gather(*(pool._add() for _ in range(low)))
        except BaseException:
            pool.close()
            raise
        pool._watch = asyncio.create_task(pool._keep_watch())
        return pool

    async def encode(self, kind: Kind, items: Any, with_outputs: bool = False) -> Encoded:
        """Return the result of `Network.encode`; raise the error that the network raised.

        Calls are repeated if their actor dies, which is safe because they change nothing. An actor that restarts fails
        its calls at once.
        """
        from ray.exceptions import RayActorError, RayTaskError

        while self._members:
            member = min(self._members, key=lambda each: (each.is_restarting, each.num_calls))
            if member.num_calls >= _MAX_CALLS:
                self._grow()
            member.num_calls += 1
            try:
                encoded: Encoded = await member.actor.encode.remote(kind, items, with_outputs)
                member.is_restarting = False
                return encoded
            except RayTaskError as err:
                raise err.cause from None
            except RayActorError:
                # The caller's deadline ends this loop.
                member.is_restarting = True
                await asyncio.sleep(_RETRY_INTERVAL_S)
            finally:
                member.num_calls -= 1
                member.idle_since = asyncio.get_running_loop().time()
        raise Unavailable("the encoders of queries have been stopped; send the query again")

    @property
    def joinable(self) -> Any:
        """What `join` requires in another process on the cluster: the actors that stay until the pool is closed."""
        return self.inputs, [member.actor for member in self._members[: self._low]]

    @property
    def max_calls(self) -> int:
        """Maximum number of calls that the pool can process, or keep waiting, at the same time."""
        return _MAX_CALLS * self._high

    def share(self) -> "EncoderPool":
        """Return this pool and count one more user."""
        self._num_users += 1
        return self

    @property
    def is_open(self) -> bool:
        """Whether the pool has a user."""
        return self._num_users > 0

    def close(self) -> None:
        """End all actors when the last user calls it."""
        import ray

        self._num_users -= 1
        if self.is_open:
            return
        for task in (self._watch, self._growing):
            if task is not None:
                task.cancel()
        for member in self._members if self._owns_actors else ():
            ray.kill(member.actor)
        self._members = []

    def _grow(self) -> None:
        is_growing = self._growing is not None and not self._growing.done()
        is_full = asyncio.get_running_loop().time() < self._full_until
        if len(self._members) < self._high and not is_growing and not is_full:
            self._growing = asyncio.create_task(self._try_to_add())

    async def _try_to_add(self) -> None:
        try:
            await self._add()
        except InputError as error:
            logger.warning("no further encoder of queries: %s", error)
            self._full_until = asyncio.get_running_loop().time() + _NO_ROOM_S

    async def _add(self) -> None:
        import ray
        from ray.exceptions import RayTaskError

        options = {"num_cpus": ENCODER_CPUS, "num_gpus": self._gpus, "max_restarts": -1}
        # Ray shows an actor its own GPUs only.
        actor = ray.remote(**options)(Network).remote(self._model, self._high, "cuda" if self._gpus else "cpu")
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self.inputs = await actor.inputs.remote()
        except BaseException as err:
            ray.kill(actor)
            if isinstance(err, TimeoutError):
                raise InputError(
                    f"an encoder was not ready after {START_TIMEOUT_S:.0f} s; check the cluster with `ray status`"
                ) from err
            if isinstance(err, RayTaskError):
                raise err.cause from err
            raise
        member = _Member(actor)
        member.idle_since = asyncio.get_running_loop().time()
        self._members.append(member)

    async def _keep_watch(self) -> None:
        """Mark restarted actors as ready, and end idle ones."""
        import ray

        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            for member in list(self._members):
                if member.is_restarting:
                    with suppress(Exception):
                        async with asyncio.timeout(_WATCH_INTERVAL_S):
                            await member.actor.inputs.remote()
                        member.is_restarting = False
            now = asyncio.get_running_loop().time()
            for member in self._members[self._low :]:
                if not member.num_calls and now - member.idle_since > _IDLE_S:
                    self._members.remove(member)
                    with suppress(Exception):
                        ray.kill(member.actor)


class EncoderPools:
    """Pools by model, so that a new backend with the same model uses the running actors."""

    def __init__(self) -> None:
        self._pools: dict[str, EncoderPool] = {}

    async def open(self, model_id: str, model: Path, low: int, high: int, gpus: float = 0) -> EncoderPool:
        """Return the pool of a model for one more user, who must close it.

        Pools are identified by `model_id`, because the folder `model` can contain another model later.
        """
        pool = self._pools.get(model_id)
        if pool is not None and pool.is_open:
            return pool.share()
        self._pools[model_id] = await EncoderPool.start(model, low, high, gpus)
        return self._pools[model_id]
