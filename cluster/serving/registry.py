"""What gateways that share shards know of one another: a small named actor on their Ray cluster.

The first gateway creates the actor and publishes the archive and the actors that it serves with. Gateways that join
look it up, follow what is published, and pass moves to another archive on to the first gateway. The actor ends with the
first gateway.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from orbithash.cluster.serving.shards import NAMESPACE
from orbithash.encoders.archive.storage import normalise_location
from orbithash.encoders.errors import InputError
from orbithash.search.protocol.errors import InvalidQuery, SearchError, Unavailable
from orbithash.search.service.service import Target

__all__ = ["FirstGateway", "JoinedGateway", "OwnerGone", "Published"]

_PREFIX = "gateways-"

_GONE = "the gateway that started the shards has ended; start it again, then the gateways that join it"

# Seconds after which a gateway that has not asked is not counted, and a call of the actor has failed.
_COUNTED_S, _CALL_S = 3.0, 10.0


@dataclass(frozen=True)
class Published:
    """What the first gateway serves.

    Attributes:
        number: counts the moves to other archives or shards.
        target: absolute paths of the archive and its model, and the number of shards.
        shards: see `RayBackend.join`.
        encoders: see `EncoderPool.join`.
    """

    number: int
    target: Target
    shards: Any
    encoders: Any


class OwnerGone(InputError):
    """The gateway that started the shards has ended."""


class _Registry:
    """The actor. Its methods run in one event loop."""

    def __init__(self) -> None:
        self._published: Published | None = None
        self._moves: asyncio.Queue[tuple[Target, asyncio.Future[str]]] = asyncio.Queue()
        self._asked_at: dict[str, float] = {}
        # The outcome of the move that the first gateway is making.
        self._outcome: asyncio.Future[str] | None = None

    async def publish(self, published: Published) -> None:
        self._published = published

    async def published(self, gateway: str = "") -> tuple[Published | None, int]:
        """Return what is published and the number of gateways; `gateway` is the id of the one that asks."""
        now = time.monotonic()
        if gateway:
            self._asked_at[gateway] = now
        self._asked_at = {each: at for each, at in self._asked_at.items() if now - at < _COUNTED_S}
        return self._published, 1 + len(self._asked_at)

    async def move(self, target: Target) -> str:
        """Ask the first gateway to move; return its error, or "" after the move."""
        outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await self._moves.put((target, outcome))
        return await outcome

    async def next_move(self) -> Target:
        """Return the next move that was asked for; the first gateway reports its outcome by `moved`."""
        target, self._outcome = await self._moves.get()
        return target

    async def moved(self, error: str) -> None:
        if self._outcome is not None:
            self._outcome.set_result(error)
        self._outcome = None


class FirstGateway:
    """The registry as the first gateway sees it; created by `start`."""

    def __init__(self, actor: Any, name: str) -> None:
        """`name`: that of the actor, for `JoinedGateway.named`."""
        self.name = name
        self._actor = actor
        self._published: Published | None = None

    @classmethod
    async def start(cls) -> "FirstGateway":
        """Start the actor."""
        import ray

        name = _PREFIX + uuid.uuid4().hex
        options = {"name": name, "namespace": NAMESPACE, "max_restarts": -1}
        return cls(ray.remote(num_cpus=0)(_Registry).options(**options).remote(), name)

    async def publish(self, target: Target, shards: Any, encoders: Any) -> None:
        """Publish what is served now."""
        number = 1 if self._published is None else self._published.number + 1
        self._published = Published(number, target, shards, encoders)
        await self._actor.publish.remote(self._published)

    async def num_gateways(self) -> int:
        """Return the number of gateways that use the shards, this one included; publish again after a restart."""
        published, number = await self._actor.published.remote()
        if published is None and self._published is not None:
            await self._actor.publish.remote(self._published)
        return int(number)

    async def serve_move(self, move: Callable[[Target], Awaitable[object]]) -> None:
        """Wait for a move that another gateway asks for, and make it."""
        target = await self._actor.next_move.remote()
        error = "the move failed; the log of the first gateway says why"
        try:
            await move(target)
            error = ""
        except SearchError as failure:
            error = str(failure)
        finally:
            await self._actor.moved.remote(error)

    def close(self) -> None:
        """End the actor."""
        import ray

        ray.kill(self._actor)


class JoinedGateway:
    """The registry as a gateway that has joined sees it; created by `find` or `named`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._id = uuid.uuid4().hex

    @classmethod
    async def find(cls, archive: str) -> "JoinedGateway":
        """Return the registry of the gateway that serves `archive`. Raises `InputError` if there is none."""
        import ray

        location = normalise_location(archive)
        served = []
        for each in ray.util.list_named_actors(all_namespaces=True):
            if each["namespace"] != NAMESPACE or not each["name"].startswith(_PREFIX):
                continue
            try:
                found = cls(ray.get_actor(each["name"], NAMESPACE))
                # Without its id, so that it does not count as a gateway.
                published, _ = await found._call(found._actor.published.remote())
            except (ValueError, InputError):
                # It has ended meanwhile.
                continue
            if published is None:
                # It is still loading its shards.
                continue
            if published.target.archive == location:
                return found
            served.append(published.target.archive)
        others = f"; gateways of the cluster serve {', '.join(sorted(served))}" if served else ""
        raise InputError(
            f"no gateway on this Ray cluster serves {location}{others}: start `orbithash serve {archive}` on the "
            "cluster first, and give its address as RAY_ADDRESS"
        )

    @classmethod
    def named(cls, name: str) -> "JoinedGateway":
        """Return the registry with this name, whatever its gateway serves now. Raises `OwnerGone`."""
        import ray

        try:
            return cls(ray.get_actor(name, NAMESPACE))
        except ValueError as error:
            raise OwnerGone(_GONE) from error

    async def published(self) -> tuple[Published, int]:
        """Return what the first gateway serves, and the number of gateways. Raises `OwnerGone` and `Unavailable`."""
        published, number = await self._call(self._actor.published.remote(self._id))
        if published is None:
            # The actor has restarted.
            raise Unavailable("the gateway that started the shards publishes them again; try again later")
        return published, number

    async def move(self, target: Target) -> None:
        """Make the first gateway serve `target`. Raises `InvalidQuery` if it refuses."""
        try:
            error = await self._actor.move.remote(target)
        except Exception as failure:
            raise Unavailable("the gateway that started the shards does not answer; try again later") from failure
        if error:
            field, _, text = error.partition(": ")
            raise InvalidQuery((field, text) if text else ("archive", error))

    async def _call(self, reference: Any) -> Any:
        from ray.exceptions import ActorDiedError, RayActorError

        try:
            async with asyncio.timeout(_CALL_S):
                return await reference
        except ActorDiedError as error:
            raise OwnerGone(_GONE) from error
        except (TimeoutError, RayActorError) as error:
            raise Unavailable("the gateway that started the shards does not answer; try again later") from error
