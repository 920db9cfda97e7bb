"""Settings of `serve`."""

from dataclasses import dataclass, field
from pathlib import Path

from orbithash.cluster.runtime import check_gpu_share
from orbithash.encoders.errors import InputError
from orbithash.search.gateway.protection import Protection
from orbithash.search.index.row_index import is_exact_index
from orbithash.search.logs import Format
from orbithash.search.protocol.queries import MAX_SHARDS

__all__ = ["MAX_GATEWAYS", "ServeSettings", "default_shards"]

MAX_GATEWAYS = 64


def default_shards(is_local: bool) -> int:
    """Return the number of shards if none is given.

    One in one process: a search probes few buckets of one large segment sooner than those of two.
    """
    return 1 if is_local else 2


@dataclass(frozen=True)
class ServeSettings:
    """What to serve, with which shards, at which address.

    Attributes:
        archive: folder or URI of the archive.
        model: folder of its model; None: that of the gateway that is joined.
        address: HOST:PORT; port 0 takes a free one.
        num_shards: parts of the archive.
        num_replicas: replicas of each shard.
        num_encoders: minimum and maximum number of actors that encode queries.
        gpus_per_encoder: GPUs of each of them, also a fraction of one; 0: they encode on CPUs.
        index: name of the index.
        images: folders and URIs below which images of rows may be read, for larger pictures and heat maps.
        segments: folder of the shards' files on each node; None: in the cache folder.
        is_local: run everything in this process, without Ray.
        num_gateways: processes that answer at the address.
        joins: use the shards of a gateway that runs.
        protection: who may call.
        metrics_address: HOST:PORT of the page for Prometheus; further gateways take the ports after it. None: no page.
        open_metrics: let other machines read the metrics.
        web_address: HOST:PORT of the page; None: no page.
        web_hosts: names under which browsers reach the page, besides localhost and IP addresses.
        base_map: template of the addresses of map tiles for the page; None: the built-in map only.
        log_format: format of the log on stderr.
    """

    archive: str
    model: Path | None
    address: str
    num_shards: int = 2
    num_replicas: int = 1
    num_encoders: tuple[int, int] = (1, 1)
    gpus_per_encoder: float = 0
    index: str = "exact"
    images: tuple[str, ...] = ()
    segments: Path | None = None
    is_local: bool = False
    num_gateways: int = 1
    joins: bool = False
    protection: Protection = field(default_factory=Protection)
    metrics_address: str | None = None
    open_metrics: bool = False
    web_address: str | None = None
    web_hosts: tuple[str, ...] = ()
    base_map: str | None = None
    log_format: Format = Format.TEXT

    def check(self) -> None:
        """Raise `InputError` for values or combinations that are not allowed."""
        for number, name, maximum in (
            (self.num_shards, "shards", MAX_SHARDS),
            (self.num_replicas, "replicas of each shard", MAX_SHARDS),
            (self.num_gateways, "gateways", MAX_GATEWAYS),
        ):
            if not 1 <= number <= maximum:
                raise InputError(f"{number} {name}; from 1 to {maximum:,} are allowed")
        check_gpu_share("--gpus-per-encoder", self.gpus_per_encoder, is_whole=False)
        # Raises an error for an unknown name.
        is_exact_index(self.index)
        if self.model is None and not self.joins:
            raise InputError("no model was given; give the folder of the archive's model as --model")
        given = [
            option
            for option, is_given in (
                ("--encoders", self.num_encoders != (1, 1)),
                ("--gpus-per-encoder", self.gpus_per_encoder > 0),
                ("--replicas", self.num_replicas > 1),
                ("--gateways", self.num_gateways > 1),
                ("--join", self.joins),
            )
            if is_given
        ]
        if self.is_local and given:
            raise InputError(f"got --local and {given[0]}; --local runs everything in one process, so omit {given[0]}")
        if self.web_address is None and (self.web_hosts or self.base_map):
            raise InputError("--web-host and --base-map belong to the page: give its address as --web, too")
        tls = self.protection.tls
        if self.web_address is not None and tls is not None and tls.client_ca is not None:
            raise InputError(
                "got --web and --client-ca: the page needs a certificate of its own to call the gateway, so start it "
                "by itself: orbithash web --gateway HOST:PORT --ca FILE --cert FILE --cert-key FILE"
            )
        if self.joins and self.num_gateways > 1:
            raise InputError("got --join and --gateways; each gateway that joins is one process, so omit --gateways")
