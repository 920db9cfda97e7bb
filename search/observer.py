"""What the service tells of itself while it works. Here nobody listens; `metrics` counts."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

__all__ = ["Count", "Observer", "Stage"]

Stage = Literal["decode", "encode", "queue", "fan_out", "scan", "merge", "commit", "show"]
Count = Literal[
    "partial_answers",
    "shed_queries",
    "failed_shard_calls",
    "hedged_shard_calls",
    "retried_shard_calls",
    "rows_upserted",
    "rows_deleted",
]

_NOTHING = nullcontext()


class Observer:
    """Hears nothing, at no cost. May be told from any thread."""

    def stage(self, name: Stage) -> AbstractContextManager[Any]:
        """Around the work of a stage, whether it succeeds or not."""
        return _NOTHING

    def count(self, name: Count, number: int = 1) -> None:
        """Something happened `number` times."""

    def batch(self, num_queries: int, waited_s: float) -> None:
        """A batch of queries leaves for the shards; `waited_s` is how long its oldest query waited for that."""

    def call_began(self, rpc: str) -> None:
        """A call of the gateway has arrived."""

    def call_ended(self, rpc: str, outcome: str, seconds: float) -> None:
        """It has ended; `outcome` is the name of a gRPC status code."""
