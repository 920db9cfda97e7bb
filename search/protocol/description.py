"""What a gateway serves, as both its ends see it. Free of numpy and of protobuf."""

from dataclasses import dataclass

__all__ = ["Description", "ShardStatus"]


@dataclass(frozen=True)
class ShardStatus:
    """One part of the archive: its rows, its copies, and those that answered when they were last asked."""

    rows: int
    replicas: int
    healthy_replicas: int


@dataclass(frozen=True)
class Description:
    """The version of an archive that a search which begins now is over, and the version of the server."""

    rows: int
    bits: int
    model_id: str
    archive_version: int
    index: str
    has_text: bool
    shards: tuple[ShardStatus, ...]
    orbithash_version: str
