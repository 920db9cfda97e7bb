"""The description of what a gateway serves. Needs neither numpy nor protobuf."""

from dataclasses import dataclass

__all__ = ["Description", "ShardStatus"]


@dataclass(frozen=True)
class ShardStatus:
    """The state of one shard: its rows, its replicas, and the replicas that answered their last health check.

    `segments` is the number of segments of the version that is searched; `memory_bytes` is the memory of one replica
    for codes, ids, indexes and sets of rows of all versions. Both are 0 if they are unknown. `merges` and `evaluations`
    are the numbers of merges of segments and of filters evaluated over a segment since the replicas started.
    """

    rows: int
    replicas: int
    healthy_replicas: int
    segments: int = 0
    memory_bytes: int = 0
    merges: int = 0
    evaluations: int = 0


@dataclass(frozen=True)
class Description:
    """The archive version that is searched, its model, index and shards, and the server's version of orbithash.

    `num_features` is the number of dimensions of a vector that the model takes. `embedding` is the name of the
    published embedding that the model takes instead of images, which may be empty; None: the model takes images.
    `is_exact` tells whether the index is exact, `gateways` how many gateways share the shards. `vector_dims` is the
    number of components of a stored vector (0: the archive has none), `vector_scale` the length of one unit of them.
    `has_views` tells whether pictures of rows may be larger than thumbnails.
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
    is_exact: bool = True
    gateways: int = 1
    vector_dims: int = 0
    vector_scale: float = 0.0
    has_views: bool = False
