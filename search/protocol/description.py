"""The description of what a gateway serves. Needs neither numpy nor protobuf."""

from dataclasses import dataclass

__all__ = ["Description", "ShardStatus"]


@dataclass(frozen=True)
class ShardStatus:
    """The state of one shard: its rows, its replicas, and the replicas that answered their last health check."""

    rows: int
    replicas: int
    healthy_replicas: int


@dataclass(frozen=True)
class Description:
    """The archive version that is searched, its model, index and shards, and the server's version of orbithash.

    `num_features` is the number of dimensions of a vector that the model takes. `embedding` is the name of the
    published embedding that the model takes instead of images, which may be empty; None: the model takes images.
    """

    rows: int
    bits: int
    model_id: str
    archive_version: int
    index: str
    has_text: bool
    shards: tuple[ShardStatus, ...]
    orbithash_version: str
    num_features: int
    embedding: str | None
