"""The methods of `orbithash.v1`: from messages to the service and back."""

from collections.abc import AsyncIterator
from typing import Any

from orbithash.search.gateway.calls import Calls, within
from orbithash.search.gateway.protection import audited
from orbithash.search.gateway.streams import prepared
from orbithash.search.protocol import convert, convert_rankings
from orbithash.search.protocol.errors import InvalidQuery, SearchError
from orbithash.search.protocol.queries import Query
from orbithash.search.protocol.rankings import content_query
from orbithash.search.protocol.rows import MAX_ROWS, PreparedRow, RowUpdate
from orbithash.search.service.batches import check_num_queries
from orbithash.search.service.service import Service
from orbithash.search.service.writer import Committed
from orbithash.v1 import search_pb2, search_pb2_grpc

__all__ = ["ArchiveServicer", "SearchServicer"]

# The default size of a picture in pixels, and of a heat map in cells along a side.
_VIEW_PX, _CELLS = 1024, 7

_LATE = "not committed within {:.3g} s. The change may still be committed later; sending it again is safe"


class SearchServicer(search_pb2_grpc.SearchServiceServicer):
    """Reads the archive."""

    def __init__(self, service: Service, calls: Calls) -> None:
        self._service = service
        self._calls = calls

    async def Search(self, request: search_pb2.SearchRequest, context: Any) -> bytes:  # type: ignore[override]
        """See `search.proto`. Returns the serialised response, like `SearchMany`."""
        async with self._calls.call(context, "Search") as call:
            query = convert.query_from_pb(await call.read(request))
            return call.respond(convert.answer_to_bytes(await self._service.search(query, call.timeout_s)))
        raise AssertionError("abort raises")

    async def SearchMany(  # type: ignore[override]
        self, request: search_pb2.SearchManyRequest, context: Any
    ) -> bytes:
        """See `search.proto`."""
        async with self._calls.call(context, "SearchMany") as call:
            requests = (await call.read(request)).requests
            # Checked before the conversion: a message has room for millions.
            check_num_queries(len(requests))
            queries = [convert.query_from_pb(each) for each in requests]
            return call.respond(convert.results_to_bytes(await self._service.search_many(queries, call.timeout_s)))
        raise AssertionError("abort raises")

    async def Get(self, request: search_pb2.GetRequest, context: Any) -> search_pb2.GetResponse:
        """See `search.proto`."""
        async with self._calls.call(context, "Get") as call:
            message = await call.read(request)
            include = convert.include_from_pb(message.include)
            if message.ids and message.keys:
                raise InvalidQuery(("ids", f"give keys or ids, not both; got {len(message.keys)} keys"))
            if message.ids:
                _check_size("ids", len(message.ids))
                read = self._service.rows(list(message.ids), include)
            else:
                _check_size("keys", len(message.keys))
                read = self._service.get(list(message.keys), include)
            page = await within(call.timeout_s, read)
            rows = map(convert.row_to_pb, page.rows)
            return call.respond(search_pb2.GetResponse(rows=rows, archive_version=page.archive_version))
        raise AssertionError("abort raises")

    async def Count(self, request: search_pb2.CountRequest, context: Any) -> search_pb2.CountResponse:
        """See `search.proto`."""
        async with self._calls.call(context, "Count") as call:
            text = (await call.read(request)).filter
            rows, version = await within(call.timeout_s, self._service.count(text))
            return search_pb2.CountResponse(rows=rows, archive_version=version)
        raise AssertionError("abort raises")

    async def Scroll(self, request: search_pb2.ScrollRequest, context: Any) -> search_pb2.ScrollResponse:
        """See `search.proto`."""
        async with self._calls.call(context, "Scroll") as call:
            message = await call.read(request)
            include = convert.include_from_pb(message.include)
            after = message.after if message.HasField("after") else None
            page = await within(call.timeout_s, self._service.scroll(message.filter, after, message.limit, include))
            rows = map(convert.row_to_pb, page.rows)
            return call.respond(
                search_pb2.ScrollResponse(rows=rows, next=page.next, archive_version=page.archive_version)
            )
        raise AssertionError("abort raises")

    async def Rank(self, request: search_pb2.RankRequest, context: Any) -> bytes:  # type: ignore[override]
        """See `search.proto`. Returns the serialised response."""
        async with self._calls.call(context, "Rank") as call:
            ranking = convert_rankings.ranking_from_pb(await call.read(request))
            answer = await self._service.rank(ranking, call.timeout_s)
            return call.respond(convert_rankings.rank_answer_to_bytes(answer))
        raise AssertionError("abort raises")

    async def Distances(self, request: search_pb2.DistancesRequest, context: Any) -> search_pb2.DistancesResponse:
        """See `search.proto`."""
        async with self._calls.call(context, "Distances") as call:
            query = _content_of((await call.read(request)).search)
            return convert_rankings.distances_to_pb(await self._service.distances(query, call.timeout_s))
        raise AssertionError("abort raises")

    async def CountBy(self, request: search_pb2.CountByRequest, context: Any) -> search_pb2.CountByResponse:
        """See `search.proto`."""
        async with self._calls.call(context, "CountBy") as call:
            message = await call.read(request)
            by = convert_rankings.group_by_from_pb(message.by)
            groups = await self._service.count_by(by, message.filter, message.min_coverage, call.timeout_s)
            return call.respond(convert_rankings.groups_to_pb(groups))
        raise AssertionError("abort raises")

    async def Encode(self, request: search_pb2.EncodeRequest, context: Any) -> search_pb2.EncodeResponse:
        """See `search.proto`."""
        async with self._calls.call(context, "Encode") as call:
            message = await call.read(request)
            kind = message.WhichOneof("content")
            given: dict[str, Any] = {} if kind is None else {kind: getattr(message, kind)}
            code, model_id = await within(call.timeout_s, self._service.encode(content_query(given)))
            return search_pb2.EncodeResponse(code=code, model_id=model_id)
        raise AssertionError("abort raises")

    async def View(self, request: search_pb2.ViewRequest, context: Any) -> search_pb2.ViewResponse:
        """See `search.proto`."""
        async with self._calls.call(context, "View") as call:
            message = await call.read(request)
            read = self._service.view(message.key, message.max_side or _VIEW_PX)
            return call.respond(convert_rankings.view_to_pb(await within(call.timeout_s, read)))
        raise AssertionError("abort raises")

    async def HeatMap(self, request: search_pb2.HeatMapRequest, context: Any) -> search_pb2.HeatMapResponse:
        """See `search.proto`."""
        async with self._calls.call(context, "HeatMap") as call:
            message = await call.read(request)
            compute = self._service.heat_map(_content_of(message.search), message.key, message.cells or _CELLS)
            return convert_rankings.heat_map_to_pb(await within(call.timeout_s, compute))
        raise AssertionError("abort raises")


class ArchiveServicer(search_pb2_grpc.ArchiveServiceServicer):
    """Describes and changes the archive."""

    def __init__(self, service: Service, calls: Calls) -> None:
        self._service = service
        self._calls = calls

    async def Describe(self, request: search_pb2.DescribeRequest, context: Any) -> search_pb2.DescribeResponse:
        """See `search.proto`."""
        async with self._calls.call(context, "Describe") as call:
            await call.read(request)
            return convert.description_to_pb(self._service.describe())
        raise AssertionError("abort raises")

    async def Upsert(
        self, request_iterator: AsyncIterator[search_pb2.UpsertRequest], context: Any
    ) -> AsyncIterator[search_pb2.UpsertResponse]:
        """See `search.proto`."""
        async with self._calls.call(context, "Upsert", is_stream=True) as call:

            async def prepare(message: search_pb2.UpsertRequest) -> tuple[int, list[PreparedRow] | SearchError]:
                _check_size("rows", len(message.rows))
                rows = [convert.row_from_pb(row) for row in message.rows]
                try:
                    return len(rows), await within(call.timeout_s, self._service.prepare(rows), _LATE)
                except SearchError as error:
                    return len(rows), error

            num_rows = 0
            async for size, rows in prepared(request_iterator, prepare, self._calls):
                with audited(call.caller, "Upsert", f"{size} rows", call.request_id) as entry:
                    if isinstance(rows, SearchError):
                        raise rows
                    done = await within(call.timeout_s, self._service.write(rows, call.timeout_s), _LATE)
                    entry.version = done.version
                num_rows += size
                yield search_pb2.UpsertResponse(committed_rows=num_rows, archive_version=done.version)

    async def Update(
        self, request_iterator: AsyncIterator[search_pb2.UpdateRequest], context: Any
    ) -> AsyncIterator[search_pb2.UpdateResponse]:
        """See `search.proto`."""

        async def prepare(message: search_pb2.UpdateRequest) -> list[RowUpdate]:
            _check_size("updates", len(message.updates))
            return [convert.update_from_pb(update) for update in message.updates]

        num_updates = num_updated = 0
        async with self._calls.call(context, "Update", is_stream=True) as call:
            async for updates in prepared(request_iterator, prepare, self._calls):
                with audited(call.caller, "Update", f"{len(updates)} rows", call.request_id) as entry:
                    done = await within(call.timeout_s, self._service.update(updates, call.timeout_s), _LATE)
                    entry.version = done.version
                num_updates += len(updates)
                num_updated += done.updated
                yield search_pb2.UpdateResponse(
                    committed_updates=num_updates, updated_rows=num_updated, archive_version=done.version
                )

    async def Delete(
        self, request_iterator: AsyncIterator[search_pb2.DeleteRequest], context: Any
    ) -> AsyncIterator[search_pb2.DeleteResponse]:
        """See `search.proto`."""

        async def prepare(message: search_pb2.DeleteRequest) -> tuple[list[str], str]:
            if message.filter and message.keys:
                raise InvalidQuery(("filter", f"give keys or a filter, not both; got {len(message.keys)} keys"))
            if not message.filter:
                _check_size("keys", len(message.keys))
            return list(message.keys), message.filter

        num_keys = num_removed = 0
        async with self._calls.call(context, "Delete", is_stream=True) as call:
            async for keys, text in prepared(request_iterator, prepare, self._calls):
                what = f"rows that pass {text[:200]!a}" if text else f"{len(keys)} keys"
                with audited(call.caller, "Delete", what, call.request_id) as entry:
                    timeout_s = call.timeout_s
                    steps = self._service.delete_matching(text, timeout_s) if text else self._delete(keys, timeout_s)
                    while (step := await within(call.timeout_s, anext(steps, None), _LATE)) is not None:
                        size, done = step
                        entry.version = done.version
                        num_keys += size
                        num_removed += done.removed
                        yield search_pb2.DeleteResponse(
                            committed_keys=num_keys, removed_rows=num_removed, archive_version=done.version
                        )

    async def _delete(self, keys: list[str], timeout_s: float) -> AsyncIterator[tuple[int, Committed]]:
        """Remove rows by key in one step; see `Service.delete_matching`."""
        yield len(keys), await self._service.delete(keys, timeout_s)

    async def Refresh(self, request: search_pb2.RefreshRequest, context: Any) -> search_pb2.RefreshResponse:
        """See `search.proto`."""
        async with self._calls.call(context, "Refresh") as call:
            message = await call.read(request)
            what = f"archive {message.archive[:200]!a}" if message.archive else "the archive"
            what += f" in {message.shards} shards" if message.shards else ""
            with audited(call.caller, "Refresh", what, call.request_id) as entry:
                now = await self._service.refresh(message.archive, message.model, message.shards)
                entry.version = now.archive_version
            return search_pb2.RefreshResponse(archive_version=now.archive_version, rows=now.rows, model_id=now.model_id)
        raise AssertionError("abort raises")


def _content_of(request: search_pb2.SearchRequest) -> Query:
    """Return the query of a request without the fields that only a search has."""
    for field in ("radius", "after", "include", "rescore", "oversampling"):
        request.ClearField(field)  # type: ignore[arg-type]
    request.k = 1
    return convert.query_from_pb(request)


def _check_size(field: str, count: int) -> None:
    if not 1 <= count <= MAX_ROWS:
        raise InvalidQuery((field, f"a message has from 1 to {MAX_ROWS:,} {field}, got {count:,}"))
