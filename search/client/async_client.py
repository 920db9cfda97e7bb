"""The asyncio client of a gateway."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from orbithash.search.client.arguments import (
    as_queries,
    as_query,
    batches,
    check_has_pages,
    count_request,
    delete_requests,
    get_requests,
    scroll_request,
    update_requests,
    upsert_requests,
)
from orbithash.search.client.connection import REFRESH_TIMEOUT_S, Connection, Tls
from orbithash.search.client.exploring import AsyncExploring
from orbithash.search.client.exporting import PAGE_ROWS, row_file
from orbithash.search.client.streams import exchange_async
from orbithash.search.protocol import convert
from orbithash.search.protocol.description import Description
from orbithash.search.protocol.errors import SearchError
from orbithash.search.protocol.forms import CodeLike, ImageLike, VectorLike
from orbithash.search.protocol.queries import Answer, Column, Cursor, Example, Query, Rescore, check_num_shards
from orbithash.search.protocol.rows import Columns, Row
from orbithash.v1 import search_pb2, search_pb2_grpc

__all__ = ["AsyncClient"]

_SERVING = health_pb2.HealthCheckResponse.SERVING


class AsyncClient(AsyncExploring):
    """`Client` for asyncio. A client belongs to one event loop.

    async with AsyncClient("127.0.0.1:50051") as client:
        answer = await client.search(text="boats in a harbor", k=5)
    """

    def __init__(
        self,
        address: str,
        timeout_s: float = 10.0,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """See `Client`."""
        self._connection = Connection(address, timeout_s, token, tls, options)
        credentials, arguments = self._connection.credentials, self._connection.options
        self._channel = (
            grpc.aio.insecure_channel(address, options=arguments)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=arguments)
        )
        self._search: Any = search_pb2_grpc.SearchServiceStub(self._channel)
        self._archive: Any = search_pb2_grpc.ArchiveServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def search(
        self,
        query: Query | None = None,
        *,
        image: ImageLike | None = None,
        text: str | None = None,
        vector: VectorLike | None = None,
        key: str | None = None,
        code: CodeLike | None = None,
        positives: Iterable[Example] | None = None,
        negatives: Iterable[Example] | None = None,
        k: int | None = None,
        radius: int | None = None,
        filter: str | None = None,
        after: Cursor | None = None,
        include: Iterable[Column] | None = None,
        min_coverage: float | None = None,
        rescore: Rescore | None = None,
        oversampling: float | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """See `Client.search`."""
        request = convert.query_to_pb(
            as_query(
                query,
                image=image,
                text=text,
                vector=vector,
                key=key,
                code=code,
                positives=positives,
                negatives=negatives,
                k=k,
                radius=radius,
                filter=filter,
                after=after,
                include=include,
                min_coverage=min_coverage,
                rescore=rescore,
                oversampling=oversampling,
            )
        )
        return convert.answer_from_pb(await self._call(self._search.Search, request, timeout_s))

    async def pages(
        self,
        query: Query | None = None,
        *,
        image: ImageLike | None = None,
        text: str | None = None,
        vector: VectorLike | None = None,
        key: str | None = None,
        code: CodeLike | None = None,
        positives: Iterable[Example] | None = None,
        negatives: Iterable[Example] | None = None,
        k: int | None = None,
        radius: int | None = None,
        filter: str | None = None,
        after: Cursor | None = None,
        include: Iterable[Column] | None = None,
        min_coverage: float | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Answer]:
        """See `Client.pages`."""
        page = as_query(
            query,
            image=image,
            text=text,
            vector=vector,
            key=key,
            code=code,
            positives=positives,
            negatives=negatives,
            k=k,
            radius=radius,
            filter=filter,
            after=after,
            include=include,
            min_coverage=min_coverage,
        )
        check_has_pages(page)
        while True:
            answer = await self.search(page, timeout_s=timeout_s)
            yield answer
            if answer.next is None:
                return
            page = dataclasses.replace(page, after=answer.next)

    async def search_batch(
        self,
        queries: Iterable[Query] | None = None,
        *,
        images: Iterable[ImageLike] | None = None,
        texts: Iterable[str] | None = None,
        vectors: Iterable[VectorLike] | None = None,
        keys: Iterable[str] | None = None,
        codes: Iterable[CodeLike] | None = None,
        k: int | None = None,
        radius: int | None = None,
        filter: str | None = None,
        include: Iterable[Column] | None = None,
        min_coverage: float | None = None,
        rescore: Rescore | None = None,
        oversampling: float | None = None,
        timeout_s: float | None = None,
    ) -> list[Answer | SearchError]:
        """See `Client.search_batch`."""
        listed = as_queries(
            queries,
            images=images,
            texts=texts,
            vectors=vectors,
            keys=keys,
            codes=codes,
            k=k,
            radius=radius,
            filter=filter,
            include=include,
            min_coverage=min_coverage,
            rescore=rescore,
            oversampling=oversampling,
        )
        answers: list[Answer | SearchError] = []
        for request in batches(listed):
            response = await self._call(self._search.SearchMany, request, timeout_s)
            answers += map(convert.result_from_pb, response.results)
        return answers

    async def get(
        self,
        keys: Iterable[str] | None = None,
        *,
        ids: Iterable[int] | None = None,
        include: Sequence[Column] = (),
        timeout_s: float | None = None,
    ) -> dict[str, Row]:
        """See `Client.get`."""
        rows: dict[str, Row] = {}
        for request in get_requests(keys, ids, include):
            response = await self._call(self._search.Get, request, timeout_s)
            rows |= {message.key: convert.row_from_pb(message) for message in response.rows}
        return rows

    async def count(self, filter: str = "", *, timeout_s: float | None = None) -> int:
        """See `Client.count`."""
        return int((await self._call(self._search.Count, count_request(filter), timeout_s)).rows)

    async def scroll(
        self,
        filter: str = "",
        *,
        after: int | None = None,
        include: Sequence[Column] = (),
        page_size: int = 1000,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Row]:
        """See `Client.scroll`."""
        request = scroll_request(filter, after, page_size, include)
        while True:
            response = await self._call(self._search.Scroll, request, timeout_s)
            for message in response.rows:
                yield convert.row_from_pb(message)
            if not response.HasField("next"):
                return
            request.after = response.next

    async def export(self, out: str | Path, filter: str = "", *, timeout_s: float | None = None) -> int:
        """See `Client.export`."""
        with row_file(out, await self.describe(timeout_s=timeout_s)) as file:
            page: list[Row] = []
            async for row in self.scroll(filter, include=file.columns, page_size=PAGE_ROWS, timeout_s=timeout_s):
                page.append(row)
                if len(page) == PAGE_ROWS:
                    await asyncio.to_thread(file.write, page)
                    page = []
            await asyncio.to_thread(file.write, page)
            await asyncio.to_thread(file.close)
        return file.num_rows

    async def describe(self, *, timeout_s: float | None = None) -> Description:
        """See `Client.describe`."""
        return convert.description_from_pb(
            await self._call(self._archive.Describe, search_pb2.DescribeRequest(), timeout_s)
        )

    async def is_serving(self, *, timeout_s: float | None = None) -> bool:
        """See `Client.is_serving`."""
        response = await self._call(self._health.Check, health_pb2.HealthCheckRequest(), timeout_s)
        return bool(response.status == _SERVING)

    async def upsert(self, rows: Iterable[Row], *, timeout_s: float | None = None) -> int:
        """See `Client.upsert`."""
        done = 0
        async for response in self._stream(self._archive.Upsert, upsert_requests(rows), timeout_s):
            done = response.committed_rows
        return done

    async def update(self, updates: Mapping[str, Columns], *, timeout_s: float | None = None) -> int:
        """See `Client.update`."""
        updated = 0
        async for response in self._stream(self._archive.Update, update_requests(updates), timeout_s):
            updated = response.updated_rows
        return updated

    async def delete(
        self, keys: Iterable[str] | None = None, *, filter: str | None = None, timeout_s: float | None = None
    ) -> int:
        """See `Client.delete`."""
        removed = 0
        async for response in self._stream(self._archive.Delete, delete_requests(keys, filter), timeout_s):
            removed = response.removed_rows
        return removed

    async def refresh(
        self, archive: str = "", model: str = "", shards: int = 0, *, timeout_s: float = REFRESH_TIMEOUT_S
    ) -> None:
        """See `Client.refresh`."""
        check_num_shards(shards)
        request = search_pb2.RefreshRequest(archive=archive, model=model, shards=shards)
        await self._call(self._archive.Refresh, request, timeout_s)

    async def call(self, name: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """Return the protobuf answer of a call without streams, such as "Search", to its protobuf request."""
        stub = self._search if hasattr(self._search, name) else self._archive
        return await self._call(getattr(stub, name), request, timeout_s)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        limit_s = self._connection.timeout(timeout_s)
        try:
            return await method(request, timeout=limit_s, metadata=self._connection.metadata())
        except grpc.RpcError as error:
            raise self._connection.error(error, limit_s) from error

    def _stream(self, method: Any, requests: Iterator[Any], timeout_s: float | None) -> AsyncIterator[Any]:
        return exchange_async(self._connection, method, requests, self._connection.timeout(timeout_s))
