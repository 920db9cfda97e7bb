"""Interface for the metrics of the service. `gateway.metrics` implements it for Prometheus."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

__all__ = ["Count", "Observer", "Stage"]

Stage = Literal["decode", "encode", "queue", "fan_out", "scan", "merge", "rescore", "commit", "show"]
Count = Literal[
    "partial_answers",
    "shed_queries",
    "failed_shard_calls",
    "hedged_shard_calls",
    "retried_shard_calls",
    "replicas_taken_out",
    "failed_showings",
    "rows_upserted",
    "rows_deleted",
]

_NOTHING = nullcontext()


class Observer:
    """An observer that ignores all events. Methods may be called from any thread."""

    def stage(self, name: Stage) -> AbstractContextManager[Any]:
        """Return a context manager that measures the work of a stage, whether it succeeds or fails."""
        return _NOTHING

    def took(self, name: Stage, seconds: float) -> None:
        """Record that the work of a stage took `seconds`."""

    def count(self, name: Count, number: int = 1) -> None:
        """Add `number` to a counter."""

    def batch(self, num_queries: int, waited_s: float) -> None:
        """Record that a batch of queries is sent to the shards; its oldest query has waited `waited_s` seconds."""

    def call_began(self, rpc: str) -> None:
        """Record that a call of the gateway has arrived."""

    def call_ended(self, rpc: str, outcome: str, seconds: float) -> None:
        """Record that a call has ended after `seconds`; `outcome` is the name of a gRPC status code."""
