"""Talk to a gateway: the blocking and the asyncio client, and what their methods take and return.

Needs grpcio and protobuf, with grpcio-status, grpcio-health-checking and googleapis-common-protos, and nothing else.
"""

from orbithash.search.client.async_client import AsyncClient
from orbithash.search.client.client import Client
from orbithash.search.client.connection import Tls
from orbithash.search.protocol.queries import Answer, Cursor, Example, Hit, Query
from orbithash.search.protocol.rankings import Linear, Place, RankCursor, Shuffle, TimeOrder
from orbithash.search.protocol.rows import Columns, Row

__all__ = [
    "Answer",
    "AsyncClient",
    "Client",
    "Columns",
    "Cursor",
    "Example",
    "Hit",
    "Linear",
    "Place",
    "Query",
    "RankCursor",
    "Row",
    "Shuffle",
    "TimeOrder",
    "Tls",
]
