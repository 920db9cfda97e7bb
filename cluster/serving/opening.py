"""Open the archive, the encoders and the shards of a gateway: its own, or those of the gateway that it joins."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from orbithash.cluster.serving.encoder_pool import EncoderPool, EncoderPools, Network
from orbithash.cluster.serving.query_encoders import LocalEncoder, PooledEncoder
from orbithash.cluster.serving.registry import FirstGateway, JoinedGateway
from orbithash.cluster.serving.settings import ServeSettings
from orbithash.cluster.serving.shards import RayBackend
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import cache_folder
from orbithash.encoders.networks.card import ModelCard, read_model_folder
from orbithash.search.engine.backend import Backend, LocalBackend
from orbithash.search.gateway.decoding import Decoder
from orbithash.search.gateway.image_roots import ImageRoots
from orbithash.search.observer import Observer
from orbithash.search.service.service import Target

__all__ = ["Joining", "Opening"]


class Opening:
    """Opens archives with shards of their own."""

    def __init__(
        self, settings: ServeSettings, decoder: Decoder, observer: Observer, report: Callable[[str], None]
    ) -> None:
        self.served = Target(settings.archive, str(settings.model), settings.num_shards)
        self._settings = settings
        self._decoder = decoder
        self._observer = observer
        self._report = report
        self._roots = ImageRoots(settings.images)
        self._pools = EncoderPools()
        # The encoders of the backend that was opened last.
        self._pool: EncoderPool | None = None

    async def open(self, target: Target) -> Backend:
        """Open an archive; raise `InputError` for one that this gateway may not serve."""
        settings, model = self._settings, Path(target.model)
        segments = settings.segments or cache_folder() / "segments"
        _check_beside(target.archive, self.served.archive, 1)
        _check_beside(target.model, self.served.model, 2)
        # In a thread, because searches continue while another archive is opened.
        archive, card = await asyncio.to_thread(_open, target.archive, model)
        self._report(f"loading {archive.num_rows} codes of {archive.bits} bits into {target.num_shards} shards")
        if settings.is_local:
            network = await asyncio.to_thread(Network, model)
            local_encoder = LocalEncoder(self._decoder, card.preprocessing, network, self._observer, self._roots)
            return LocalBackend(archive, local_encoder, target.num_shards, settings.index, segments)
        pool = self._pool = await self._pools.open(
            archive.model_id, model.absolute(), *settings.num_encoders, settings.gpus_per_encoder
        )
        encoder = PooledEncoder(self._decoder, card.preprocessing, pool, self._observer, self._roots)
        try:
            return await RayBackend.start(
                archive,
                encoder,
                pool.close,
                target.num_shards,
                settings.num_replicas,
                settings.index,
                self._observer,
                segments,
            )
        except BaseException:
            pool.close()
            raise

    async def publish(self, registry: FirstGateway, target: Target, backend: Backend) -> None:
        """Tell other gateways what is served now."""
        assert isinstance(backend, RayBackend), "other backends are not shared"
        assert self._pool is not None, "the backend was opened"
        target = Target(backend.archive.path, str(Path(target.model).absolute()), target.num_shards)
        await registry.publish(target, backend.joinable, self._pool.joinable)


class Joining:
    """Joins the shards that the first gateway has published."""

    def __init__(self, registry: JoinedGateway, settings: ServeSettings, decoder: Decoder, observer: Observer) -> None:
        self._registry = registry
        self._roots = ImageRoots(settings.images)
        self._decoder = decoder
        self._observer = observer
        # What was joined last; see `Published.number`.
        self.number = 0

    async def open(self, _: Target) -> Backend:
        """Join what the first gateway serves now."""
        published, _number = await self._registry.published()
        self.number = published.number
        archive, card = await asyncio.to_thread(_open, published.target.archive, Path(published.target.model))
        pool = EncoderPool.join(published.encoders)
        encoder = PooledEncoder(self._decoder, card.preprocessing, pool, self._observer, self._roots)
        return await RayBackend.join(archive, encoder, pool.close, published.shards, self._observer)


def _check_beside(path: str, served: str, levels: int) -> None:
    """Raise `InputError` unless `path` is below the folder `levels` above the path that `serve` was started with.

    A client with the permission to write rows must not be able to make the server read other files.
    """
    if path == served:
        return
    if "://" in served:
        is_beside = path.startswith(served.rstrip("/").rsplit("/", levels)[0] + "/") and ".." not in path.split("/")
    else:
        allowed = Path(served).absolute().parents[levels - 1]
        is_beside = "://" not in path and "\0" not in path
        is_beside = is_beside and Path(path).resolve().is_relative_to(allowed.resolve())
    if not is_beside:
        raise InputError(
            "a gateway moves only to archives and models beside those that it serves; start another gateway for others"
        )


def _open(archive: str, model: Path) -> tuple[Archive, ModelCard]:
    """Open an archive and its model's card; raise `InputError` if the archive was encoded by another model."""
    opened = Archive.open(archive)
    card, model_id, _ = read_model_folder(model)
    if (card.bits, model_id) != (opened.bits, opened.model_id):
        raise InputError(
            f"{opened.path} holds {opened.bits}-bit codes of model {opened.model_id}, and {model} is the "
            f"{card.bits}-bit model {model_id}; give the model that made the archive"
        )
    return opened, card
