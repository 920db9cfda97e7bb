"""The calls of the service that read the archive."""

from collections.abc import Sequence
from functools import partial

from orbithash.search.engine.engine import Engine
from orbithash.search.engine.lookup import RowPage, count_rows, get_rows, rows_of_ids, scroll_rows
from orbithash.search.engine.pictures import heat_map, view_row
from orbithash.search.engine.query_codes import encode_query
from orbithash.search.engine.ranking import count_distances, count_groups, rank_rows
from orbithash.search.protocol.errors import SearchError
from orbithash.search.protocol.queries import Answer, Column, Query
from orbithash.search.protocol.rankings import (
    DistanceCounts,
    GroupBy,
    Groups,
    HeatMap,
    RankAnswer,
    Ranking,
    View,
    check_grouping,
)
from orbithash.search.protocol.rows import check_keys
from orbithash.search.service.batches import check_batch

__all__ = ["Reading"]


class Reading:
    """Reads the snapshot that the engine uses.

    Attributes:
        observer: receives the metrics of the engine, the service and the gateway.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.observer = engine.observer

    async def search(self, query: Query, timeout_s: float) -> Answer:
        """See `Engine.search`."""
        return await self._engine.search(query, timeout_s)

    async def search_many(self, queries: Sequence[Query], timeout_s: float) -> list[Answer | SearchError]:
        """Return an answer or an error for each of at most `MAX_QUERIES` queries."""
        check_batch(queries)
        return await self._engine.search_many(queries, timeout_s)

    async def get(self, keys: Sequence[str], include: Sequence[Column]) -> RowPage:
        """See `get_rows`."""
        return await get_rows(self._engine.snapshot, keys, include)

    async def rows(self, ids: Sequence[int], include: Sequence[Column]) -> RowPage:
        """See `rows_of_ids`."""
        return await rows_of_ids(self._engine.snapshot, ids, include)

    async def rank(self, ranking: Ranking, timeout_s: float) -> RankAnswer:
        """See `rank_rows`; raises `InvalidQuery` for an invalid ranking."""
        ranking.check()
        return await self._engine.read(partial(rank_rows, ranking=ranking, observer=self.observer), timeout_s)

    async def distances(self, query: Query, timeout_s: float) -> DistanceCounts:
        """See `count_distances`; raises `InvalidQuery` for an invalid query."""
        query.check()
        return await self._engine.read(partial(count_distances, query=query, observer=self.observer), timeout_s)

    async def count_by(self, by: GroupBy, filter_text: str, min_coverage: float, timeout_s: float) -> Groups:
        """See `count_groups`; raises `InvalidQuery` for an invalid argument."""
        check_grouping(by, filter_text, min_coverage)
        count = partial(count_groups, by=by, filter_text=filter_text, min_coverage=min_coverage, observer=self.observer)
        return await self._engine.read(count, timeout_s)

    async def encode(self, query: Query) -> tuple[bytes, str]:
        """Return the code of a query that passes `Query.check`, and the model that computed it."""
        snapshot = self._engine.snapshot
        return (await encode_query(query, snapshot)).codes[0].tobytes(), snapshot.archive.model_id

    async def view(self, key: str, max_side: int) -> View:
        """See `view_row`."""
        check_keys([key])
        return await view_row(self._engine.snapshot, key, max_side)

    async def heat_map(self, query: Query, key: str, cells: int) -> HeatMap:
        """See `pictures.heat_map`."""
        check_keys([key])
        return await heat_map(self._engine.snapshot, query, key, cells)

    async def count(self, filter_text: str) -> tuple[int, int]:
        """See `count_rows`."""
        return await count_rows(self._engine.snapshot, filter_text)

    async def scroll(self, filter_text: str, after: int | None, limit: int, include: Sequence[Column]) -> RowPage:
        """See `scroll_rows`."""
        return await scroll_rows(self._engine.snapshot, filter_text, after, limit, include)
