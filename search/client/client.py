"""The blocking client of a gateway."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
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
from orbithash.search.client.exploring import Exploring
from orbithash.search.client.exporting import PAGE_ROWS, row_file
from orbithash.search.client.streams import exchange
from orbithash.search.protocol import convert
from orbithash.search.protocol.description import Description
from orbithash.search.protocol.errors import SearchError
from orbithash.search.protocol.forms import CodeLike, ImageLike, VectorLike
from orbithash.search.protocol.queries import Answer, Column, Cursor, Example, Query, Rescore, check_num_shards
from orbithash.search.protocol.rows import Columns, Row
from orbithash.v1 import search_pb2, search_pb2_grpc

__all__ = ["Client"]

_SERVING = health_pb2.HealthCheckResponse.SERVING


class Client(Exploring):
    """A client of the gateway at `address`, which blocks until an answer is there.

        with Client("127.0.0.1:50051") as client:
            answer = client.search(key="harbor/harbor_0001.tif", k=5, filter="label = 'harbor'")

    Threads may share a client. `timeout_s` of a method replaces the client's time limit. All methods raise:

        InvalidQuery: wrong arguments; what can be checked without the archive is not sent.
        KeyNotFound: no row has the key of a query.
        Unauthenticated, PermissionDenied: the gateway requires a token, or one of another role.
        GatewayUnreachable: no gateway answers at the address.
        DeadlineExceeded, Unavailable, Overloaded, GatewayError: the gateway could not answer.
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
        """Make a client; the gateway is not contacted before the first call.

        Args:
            address: HOST:PORT of the gateway.
            timeout_s: time limit of a call in seconds, repetitions included.
            token: the token to send, if the gateway requires one.
            tls: files of an encrypted connection; None: no encryption.
            options: arguments of the gRPC channel, which override those of this client.
        """
        self._connection = Connection(address, timeout_s, token, tls, options)
        credentials, arguments = self._connection.credentials, self._connection.options
        self._channel = (
            grpc.insecure_channel(address, options=arguments)
            if credentials is None
            else grpc.secure_channel(address, credentials, options=arguments)
        )
        self._search = search_pb2_grpc.SearchServiceStub(self._channel)
        self._archive = search_pb2_grpc.ArchiveServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def search(
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
        """Return the answer to one query.

        Args:
            query: the whole query; the fields below must then be left out.
            image: an image file as bytes, its path, or a PIL image.
            text: a sentence, for a model with a text encoder.
            vector: the input of the model's head of images, `describe().num_features` numbers: a float array or a list.
            key: the key of a row of the archive.
            code: a packed code: bytes or a uint8 array.
            positives: examples of what to find, in place of one image, text, vector, key or code.
            negatives: examples of what to avoid.
            k: maximum number of hits; 10 by default.
            radius: largest distance of a hit in bits, inclusive.
            filter: CQL2 text that rows have to pass.
            after: position after which hits begin; `Answer.next` of the page before.
            include: columns to return: uri, caption, thumbnail, footprint, code.
            min_coverage: raise `Unavailable` if less than this fraction of the archive was searched.
            rescore: rank a shortlist of the nearest rows again: `vector`, by the cosine of stored vectors, or
                `asymmetric`, by the query's real-valued outputs.
            oversampling: rows of the shortlist for each hit; 4 by default.
            timeout_s: time limit in seconds.
        """
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
        return convert.answer_from_pb(self._call(self._search.Search, request, timeout_s))

    def pages(
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
    ) -> Iterator[Answer]:
        """Yield the answer page by page, at most `k` hits each, to the end; see `search` for the arguments."""
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
            answer = self.search(page, timeout_s=timeout_s)
            yield answer
            if answer.next is None:
                return
            page = dataclasses.replace(page, after=answer.next)

    def search_batch(
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
        """Return the answer or the error of each query, in order.

        Give `queries`, or one of `images`, `texts`, `vectors` (such as a float array [N, dimensions]), `keys` and
        `codes` (such as a uint8 array [N, bytes]) with fields that hold for all of them; see `search`. `timeout_s` is
        the time limit of each call of up to 256 queries.
        """
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
            response = self._call(self._search.SearchMany, request, timeout_s)
            answers += map(convert.result_from_pb, response.results)
        return answers

    def get(
        self,
        keys: Iterable[str] | None = None,
        *,
        ids: Iterable[int] | None = None,
        include: Sequence[Column] = (),
        timeout_s: float | None = None,
    ) -> dict[str, Row]:
        """Return the rows with these keys, by key and in their order; keys without a row are left out.

        Give `ids` instead of keys for rows by id. `include` names further columns, as in `search`.
        """
        rows: dict[str, Row] = {}
        for request in get_requests(keys, ids, include):
            response = self._call(self._search.Get, request, timeout_s)
            rows |= {message.key: convert.row_from_pb(message) for message in response.rows}
        return rows

    def count(self, filter: str = "", *, timeout_s: float | None = None) -> int:
        """Return the number of rows that pass a filter; "": of all rows."""
        return int(self._call(self._search.Count, count_request(filter), timeout_s).rows)

    def scroll(
        self,
        filter: str = "",
        *,
        after: int | None = None,
        include: Sequence[Column] = (),
        page_size: int = 1000,
        timeout_s: float | None = None,
    ) -> Iterator[Row]:
        """Yield the rows that pass a filter, ordered by id; "": all rows.

        Args:
            filter: CQL2 text that rows have to pass.
            after: begin after the row with this id, to continue an earlier scroll.
            include: further columns to return, as in `search`.
            page_size: rows that are requested at a time, 1 to 1,000.
            timeout_s: time limit of each page in seconds.
        """
        request = scroll_request(filter, after, page_size, include)
        while True:
            response = self._call(self._search.Scroll, request, timeout_s)
            yield from map(convert.row_from_pb, response.rows)
            if not response.HasField("next"):
                return
            request.after = response.next

    def export(self, out: str | Path, filter: str = "", *, timeout_s: float | None = None) -> int:
        """Write the rows that pass a filter to a file, ordered by id; return their number.

            client.export("harbors.parquet", "label = 'harbor'")

        Needs the extra `web`. `orbithash export` reads an archive without a gateway, faster and in an order by place.

        Args:
            out: GeoParquet, GeoJSON or CSV by its ending; replaced if it exists. It appears whole or not at all.
            filter: CQL2 text that rows have to pass; "": all rows.
            timeout_s: time limit of each page of rows in seconds.

        Raises:
            InputError: another ending, or a file that cannot be written.
        """
        with row_file(out, self.describe(timeout_s=timeout_s)) as file:
            rows = self.scroll(filter, include=file.columns, page_size=PAGE_ROWS, timeout_s=timeout_s)
            while page := list(islice(rows, PAGE_ROWS)):
                file.write(page)
        return file.num_rows

    def describe(self, *, timeout_s: float | None = None) -> Description:
        """Return what the gateway serves."""
        return convert.description_from_pb(self._call(self._archive.Describe, search_pb2.DescribeRequest(), timeout_s))

    def is_serving(self, *, timeout_s: float | None = None) -> bool:
        """Return whether the gateway can answer searches: some shard has a healthy replica, and it is not stopping."""
        response = self._call(self._health.Check, health_pb2.HealthCheckRequest(), timeout_s)
        return bool(response.status == _SERVING)

    def upsert(self, rows: Iterable[Row], *, timeout_s: float | None = None) -> int:
        """Write rows; return their number. A row replaces the row with the same key, all columns of it.

        Rows are read and sent while earlier ones are committed; the method returns when all are committed and searches
        see them. `timeout_s` is the longest wait for one acknowledgement. If it raises, some of the rows may be
        written; sending all of them again is safe.
        """
        done = 0
        for response in self._stream(self._archive.Upsert, upsert_requests(rows), timeout_s):
            done = response.committed_rows
        return done

    def update(self, updates: Mapping[str, Columns], *, timeout_s: float | None = None) -> int:
        """Change columns of existing rows; return the number of rows that exist.

            client.update({"a.tif": {"label": "harbor", "caption": None}})

        `updates` maps keys to new values of columns; None clears a column. Other columns and the code stay. See
        `upsert` for time limits and errors.
        """
        updated = 0
        for response in self._stream(self._archive.Update, update_requests(updates), timeout_s):
            updated = response.updated_rows
        return updated

    def delete(
        self, keys: Iterable[str] | None = None, *, filter: str | None = None, timeout_s: float | None = None
    ) -> int:
        """Remove the rows with these keys, or the rows that pass a filter; return the number of removed rows.

        See `upsert` for time limits and errors.
        """
        removed = 0
        for response in self._stream(self._archive.Delete, delete_requests(keys, filter), timeout_s):
            removed = response.removed_rows
        return removed

    def refresh(
        self, archive: str = "", model: str = "", shards: int = 0, *, timeout_s: float = REFRESH_TIMEOUT_S
    ) -> None:
        """Move the gateway to the newest version of its archive, to another archive, or to another number of shards.

        "" and 0 leave the archive, the model and the number of shards as they are. If the time limit passes, the
        gateway completes the move all the same; `describe` shows when it is done.
        """
        check_num_shards(shards)
        request = search_pb2.RefreshRequest(archive=archive, model=model, shards=shards)
        self._call(self._archive.Refresh, request, timeout_s)

    def call(self, name: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """Return the protobuf answer of a call without streams, such as "Search", to its protobuf request."""
        stub = self._search if hasattr(self._search, name) else self._archive
        return self._call(getattr(stub, name), request, timeout_s)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        limit_s = self._connection.timeout(timeout_s)
        try:
            return method(request, timeout=limit_s, metadata=self._connection.metadata())
        except grpc.RpcError as error:
            raise self._connection.error(error, limit_s) from error

    def _stream(self, method: Any, requests: Iterator[Any], timeout_s: float | None) -> Iterator[Any]:
        return exchange(self._connection, method, requests, self._connection.timeout(timeout_s))
