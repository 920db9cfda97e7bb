"""Methods of the clients to look around in an archive: other orders of rows, counts, codes and pictures."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, TypedDict, Unpack

from orbithash.search.client.arguments import as_content, as_query
from orbithash.search.protocol import convert, convert_rankings
from orbithash.search.protocol.forms import CodeLike, ImageLike, VectorLike
from orbithash.search.protocol.queries import Column, Example, Query, check_include
from orbithash.search.protocol.rankings import (
    By,
    DistanceCounts,
    GroupBy,
    Groups,
    HeatMap,
    RankAnswer,
    RankCursor,
    Ranking,
    View,
    check_cells,
    check_grouping,
    check_side,
)
from orbithash.search.protocol.rows import check_keys
from orbithash.v1 import search_pb2

__all__ = ["AsyncExploring", "Exploring", "QueryFields"]


class QueryFields(TypedDict, total=False):
    """What to search for, and among which rows: fields of a `Query`."""

    image: ImageLike
    text: str
    vector: VectorLike
    key: str
    code: CodeLike
    positives: Iterable[Example]
    negatives: Iterable[Example]
    filter: str
    min_coverage: float


def _ranking(by: By, **fields: Any) -> Ranking:
    include = fields["include"]
    if isinstance(include, str):
        check_include(include)
    fields["include"] = tuple(include)
    ranking = Ranking(by=by, **fields)
    ranking.check()
    return ranking


def _distances_request(query: Query | None, fields: QueryFields) -> search_pb2.DistancesRequest:
    return search_pb2.DistancesRequest(search=convert.query_to_pb(as_query(query, **fields)))


def _count_by_request(by: GroupBy, filter_text: str, min_coverage: float) -> search_pb2.CountByRequest:
    check_grouping(by, filter_text, min_coverage)
    return search_pb2.CountByRequest(
        by=convert_rankings.group_by_to_pb(by), filter=filter_text, min_coverage=min_coverage
    )


def _encode_request(**content: Any) -> search_pb2.EncodeRequest:
    kind, value = as_content(**content)
    given: dict[str, Any] = {kind: value}
    return search_pb2.EncodeRequest(**given)


def _view_request(key: str, max_side: int) -> search_pb2.ViewRequest:
    check_keys([key])
    check_side(max_side)
    return search_pb2.ViewRequest(key=key, max_side=max_side)


def _heat_map_request(key: str, cells: int, query: Query | None, fields: QueryFields) -> search_pb2.HeatMapRequest:
    check_keys([key])
    check_cells(cells)
    search = convert.query_to_pb(as_query(query, **fields))
    return search_pb2.HeatMapRequest(key=key, cells=cells, search=search)


class Exploring(ABC):
    """Methods of `Client`, which raise what its other methods raise."""

    _search: Any

    def rank(
        self,
        by: By,
        *,
        k: int = 10,
        filter: str = "",
        min_score: float | None = None,
        after: RankCursor | None = None,
        include: Iterable[Column] = (),
        min_coverage: float = 0.0,
        timeout_s: float | None = None,
    ) -> RankAnswer:
        """Return rows in another order than that of search.

            client.rank(Place(139.7, 35.6, max_distance_m=2000), k=20, filter="label = 'harbor'")

        Args:
            by: `Linear`, `Place`, `Shuffle` or `TimeOrder`.
            k: maximum number of hits, from 1 to 10,000; at most 1,000 with thumbnails, footprints or vectors.
            filter: CQL2 text that rows have to pass.
            min_score: the smallest score of a hit; only with `Linear`.
            after: return hits after this position, `RankAnswer.next` of the page before.
            include: further columns, as in `search`.
            min_coverage: raise `Unavailable` if less than this fraction of the archive was searched.
            timeout_s: time limit in seconds.
        """
        ranking = _ranking(
            by, k=k, filter=filter, min_score=min_score, after=after, include=include, min_coverage=min_coverage
        )
        return self._rank(ranking, timeout_s)

    def rank_pages(
        self,
        by: By,
        *,
        k: int = 1000,
        filter: str = "",
        min_score: float | None = None,
        after: RankCursor | None = None,
        include: Iterable[Column] = (),
        min_coverage: float = 0.0,
        timeout_s: float | None = None,
    ) -> Iterator[RankAnswer]:
        """Yield the answer page by page, at most `k` hits each, to the end; see `rank` for the arguments."""
        ranking = _ranking(
            by, k=k, filter=filter, min_score=min_score, after=after, include=include, min_coverage=min_coverage
        )
        while True:
            answer = self._rank(ranking, timeout_s)
            yield answer
            if answer.next is None:
                return
            ranking = dataclasses.replace(ranking, after=answer.next)

    def distances(
        self, query: Query | None = None, *, timeout_s: float | None = None, **fields: Unpack[QueryFields]
    ) -> DistanceCounts:
        """Return the number of rows at each distance of a query, under its filter.

            client.distances(text="boats in a harbor", filter="label = 'harbor'").rows[:5]

        Give a `Query` or its fields; k, radius, pages, columns and rescoring have no effect.
        """
        request = _distances_request(query, fields)
        return convert_rankings.distances_from_pb(self._call(self._search.Distances, request, timeout_s))

    def count_by(
        self, by: GroupBy, filter: str = "", *, min_coverage: float = 0.0, timeout_s: float | None = None
    ) -> Groups:
        """Return the number of rows of each class ("label"), "month" or "year" among those that pass a filter."""
        request = _count_by_request(by, filter, min_coverage)
        return convert_rankings.groups_from_pb(self._call(self._search.CountBy, request, timeout_s))

    def encode(
        self,
        *,
        image: ImageLike | None = None,
        text: str | None = None,
        vector: VectorLike | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        """Return the packed code of an image, a sentence or a vector, which `search` takes as `code`."""
        request = _encode_request(image=image, text=text, vector=vector)
        return bytes((self._call(self._search.Encode, request, timeout_s)).code)

    def view(self, key: str, max_side: int = 1024, *, timeout_s: float | None = None) -> View:
        """Return a picture of the row with a key, with sides of at most `max_side` pixels, from 1 to 4,096.

        It is the thumbnail unless the server may read the images of rows (`serve --images`).
        """
        request = _view_request(key, max_side)
        return convert_rankings.view_from_pb(self._call(self._search.View, request, timeout_s))

    def heat_map(
        self,
        row_key: str,
        query: Query | None = None,
        *,
        cells: int = 7,
        timeout_s: float | None = None,
        **fields: Unpack[QueryFields],
    ) -> HeatMap:
        """Return which parts of a row's image make it near a query; give a `Query` or its fields.

        The image is divided into `cells` x `cells` parts, from 2 to 16. The server runs the network once for each of
        them, so it takes as long as a query by as many images.
        """
        request = _heat_map_request(row_key, cells, query, fields)
        return convert_rankings.heat_map_from_pb(self._call(self._search.HeatMap, request, timeout_s))

    def _rank(self, ranking: Ranking, timeout_s: float | None) -> RankAnswer:
        request = convert_rankings.ranking_to_pb(ranking)
        return convert_rankings.rank_answer_from_pb(self._call(self._search.Rank, request, timeout_s))

    @abstractmethod
    def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        """Return the answer to a request."""


class AsyncExploring(ABC):
    """Methods of `AsyncClient`."""

    _search: Any

    async def rank(
        self,
        by: By,
        *,
        k: int = 10,
        filter: str = "",
        min_score: float | None = None,
        after: RankCursor | None = None,
        include: Iterable[Column] = (),
        min_coverage: float = 0.0,
        timeout_s: float | None = None,
    ) -> RankAnswer:
        """See `Exploring.rank`."""
        ranking = _ranking(
            by, k=k, filter=filter, min_score=min_score, after=after, include=include, min_coverage=min_coverage
        )
        return await self._rank(ranking, timeout_s)

    async def rank_pages(
        self,
        by: By,
        *,
        k: int = 1000,
        filter: str = "",
        min_score: float | None = None,
        after: RankCursor | None = None,
        include: Iterable[Column] = (),
        min_coverage: float = 0.0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[RankAnswer]:
        """See `Exploring.rank_pages`."""
        ranking = _ranking(
            by, k=k, filter=filter, min_score=min_score, after=after, include=include, min_coverage=min_coverage
        )
        while True:
            answer = await self._rank(ranking, timeout_s)
            yield answer
            if answer.next is None:
                return
            ranking = dataclasses.replace(ranking, after=answer.next)

    async def distances(
        self, query: Query | None = None, *, timeout_s: float | None = None, **fields: Unpack[QueryFields]
    ) -> DistanceCounts:
        """See `Exploring.distances`."""
        request = _distances_request(query, fields)
        return convert_rankings.distances_from_pb(await self._call(self._search.Distances, request, timeout_s))

    async def count_by(
        self, by: GroupBy, filter: str = "", *, min_coverage: float = 0.0, timeout_s: float | None = None
    ) -> Groups:
        """See `Exploring.count_by`."""
        request = _count_by_request(by, filter, min_coverage)
        return convert_rankings.groups_from_pb(await self._call(self._search.CountBy, request, timeout_s))

    async def encode(
        self,
        *,
        image: ImageLike | None = None,
        text: str | None = None,
        vector: VectorLike | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        """See `Exploring.encode`."""
        request = _encode_request(image=image, text=text, vector=vector)
        return bytes((await self._call(self._search.Encode, request, timeout_s)).code)

    async def view(self, key: str, max_side: int = 1024, *, timeout_s: float | None = None) -> View:
        """See `Exploring.view`."""
        request = _view_request(key, max_side)
        return convert_rankings.view_from_pb(await self._call(self._search.View, request, timeout_s))

    async def heat_map(
        self,
        row_key: str,
        query: Query | None = None,
        *,
        cells: int = 7,
        timeout_s: float | None = None,
        **fields: Unpack[QueryFields],
    ) -> HeatMap:
        """See `Exploring.heat_map`."""
        request = _heat_map_request(row_key, cells, query, fields)
        return convert_rankings.heat_map_from_pb(await self._call(self._search.HeatMap, request, timeout_s))

    async def _rank(self, ranking: Ranking, timeout_s: float | None) -> RankAnswer:
        request = convert_rankings.ranking_to_pb(ranking)
        return convert_rankings.rank_answer_from_pb(await self._call(self._search.Rank, request, timeout_s))

    @abstractmethod
    async def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        """Return the answer to a request."""
