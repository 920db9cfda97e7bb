"""The state of a gateway, as a table or as JSON."""

import dataclasses
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from orbithash.cluster.cli.gateway.query import WIDTH_WITHOUT_TERMINAL
from orbithash.search.client.client import Client
from orbithash.search.protocol.description import Description

__all__ = ["Status", "as_fields", "as_table", "read_status"]


@dataclasses.dataclass(frozen=True)
class Status:
    """The description of a gateway, and the result of its health check."""

    description: Description
    is_serving: bool

    @property
    def is_whole(self) -> bool:
        """Whether the gateway is serving and each shard has a healthy replica."""
        return self.is_serving and all(shard.healthy_replicas for shard in self.description.shards)


def read_status(client: Client) -> Status:
    """Return the state of the gateway; raises the errors of `Client`."""
    return Status(client.describe(), client.is_serving())


def as_fields(status: Status) -> dict[str, Any]:
    """Return the fields of `--json`."""
    return {**dataclasses.asdict(status.description), "is_serving": status.is_serving, "is_whole": status.is_whole}


def as_table(status: Status) -> None:
    """Print the state as tables."""
    served = status.description
    about = Table(box=None, pad_edge=False, show_header=False)
    about.add_column(style="bold")
    about.add_column(overflow="fold")
    for name, value in (
        ("rows", f"{served.rows:,}"),
        ("bits", served.bits),
        ("model", served.model_id),
        ("archive version", served.archive_version),
        ("index", served.index if served.is_exact else f"{served.index} (approximate)"),
        ("dimensions of a vector", served.num_features),
        ("image queries", "yes" if served.embedding is None else "no"),
        ("text queries", "yes" if served.has_text else "no"),
        ("gateways", served.gateways),
        ("orbithash", served.orbithash_version),
        ("health", "serving" if status.is_serving else "not serving"),
    ):
        about.add_row(name, str(value))
    shards = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("shard", "rows", "healthy", "replicas", "segments", "bytes/row"):
        shards.add_column(name, justify="right")
    for number, shard in enumerate(served.shards):
        size = f"{shard.memory_bytes / shard.rows:.1f}" if shard.memory_bytes and shard.rows else ""
        shards.add_row(
            *(str(number), f"{shard.rows:,}", str(shard.healthy_replicas), str(shard.replicas)),
            *(str(shard.segments or ""), size),
        )
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
    console.print(about)
    console.print()
    console.print(shards)
    dead = [str(number) for number, shard in enumerate(served.shards) if not shard.healthy_replicas]
    if dead:
        console.print(f"answers are partial: no healthy replica of shard {', '.join(dead)}")
