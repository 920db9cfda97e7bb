"""The verbs `upsert` and `delete`: rows of a source or a list of keys, sent to a gateway."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orbithash.cluster.output import track
from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.text_files import read_lines, split_lines
from orbithash.search.client.client import Client
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import MAX_IMAGE_BYTES
from orbithash.search.protocol.rows import Row

if TYPE_CHECKING:
    from orbithash.encoders.sources.sources import Item
    from orbithash.search.protocol.description import Description

__all__ = ["Upserted", "delete_keys", "upsert_source"]

# Images that are read before they are sent, or rows with thumbnails.
_BATCH = 64

# Columns of a table of codes that a row has.
_OF_ROWS = ("uri", "label", "caption", "datetime", "lon", "lat", "footprint", "thumbnail")


@dataclass(frozen=True)
class Upserted:
    """The outcome of a source: the number of rows written, and the reason of each refused item by key."""

    num_written: int
    refused: dict[str, str]


def upsert_source(client: Client, source: str, asset: str | None = None, codes: Sequence[str] = ()) -> Upserted:
    """Send the images of `source` (see `list_source`) to be encoded by the gateway; refused items are skipped.

    The rows of a table of codes (see `CodeTable`) are sent with their codes. A gateway whose model takes vectors gets
    those of a table of embeddings (see `EmbeddingTable`).
    """
    # Imported here because `delete` needs no library for images, and before the gateway is asked, so that a missing
    # library is named first.
    from orbithash.encoders.imagery.georeference import check_projections
    from orbithash.encoders.sources.codes.code_tables import describes_codes
    from orbithash.encoders.sources.listings import scene_suffixes
    from orbithash.encoders.sources.sources import list_source
    from orbithash.trainers.datasets import find_items

    served = client.describe()
    if codes or describes_codes(Path(source)):
        return _upsert_codes(client, source, codes, served)
    if served.embedding is not None:
        return _upsert_vectors(client, source, served.embedding, served.num_features)
    items = list_source(source, asset=asset, find_items=find_items)
    if any(item.path.lower().endswith(scene_suffixes()) for item in items):
        check_projections()
    refused: dict[str, str] = {}
    num_written = 0
    with track("writing", len(items), "images") as advance_to:
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            rows = []
            for item in batch:
                try:
                    rows.append(_row(item))
                except InputError as err:
                    refused[item.key] = str(err)
            num_written += _send(client, rows, refused)
            advance_to(start + len(batch), f"{len(refused)} refused" if refused else "")
    return Upserted(num_written, refused)


def _upsert_vectors(client: Client, source: str, embedding: str, dims: int) -> Upserted:
    from orbithash.encoders.sources.embeddings.tables import EmbeddingTable

    table = EmbeddingTable.open(source)
    table.check_embedding(embedding, dims)
    table.check_keys()
    refused: dict[str, str] = {}
    num_written = num_read = 0
    with track("writing", table.num_rows, "rows") as advance_to:
        for chunk in table.chunks():
            for batch in table.reader.read(chunk):
                assert batch.vectors is not None, "they are read"
                rows = []
                for row, (key, vector) in enumerate(zip(batch.keys.to_pylist(), batch.vectors, strict=True)):
                    if row in batch.problems:
                        refused[key] = batch.problems[row]
                    else:
                        columns = {name: column[row].as_py() for name, column in batch.columns.items()}
                        uri = columns.pop("uri", None) or chunk.path
                        rows.append(Row(key=key, vector=vector, uri=uri, **columns))
                num_written += _send(client, rows, refused)
                num_read += len(batch.keys)
                advance_to(num_read, f"{len(refused)} refused" if refused else "")
    return Upserted(num_written, refused)


def _upsert_codes(client: Client, source: str, options: Sequence[str], served: "Description") -> Upserted:
    """Send the rows of a table of codes; their stored vectors and stamps cannot be sent."""
    from orbithash.encoders.sources.codes.code_tables import CodeTable

    table = CodeTable.open(source, options)
    described = table.description
    if (described.model_id, described.bits) != (served.model_id, served.bits):
        raise InputError(
            f"{table.root} has {described.bits}-bit codes of the model {described.model_id}; the gateway serves "
            f"{served.bits}-bit codes of {served.model_id}: encode the images with its model"
        )
    num_rows = table.check()
    refused: dict[str, str] = {}
    num_written = num_read = 0
    with track("writing", num_rows, "rows") as advance_to:
        for chunk in table.chunks():
            for batch in table.read(chunk):
                keys = batch.keys.to_pylist()
                refused |= {keys[row]: problem for row, problem in batch.problems.items()}
                columns = {name: values.to_pylist() for name, values in batch.columns.items() if name in _OF_ROWS}
                uris = columns.pop("uri", [None] * len(keys))
                good = [row for row in range(len(keys)) if row not in batch.problems]
                rows = [
                    Row(
                        key=keys[row],
                        code=batch.codes[row].tobytes(),
                        uri=uris[row] or chunk.path,
                        **{name: values[row] for name, values in columns.items()},
                    )
                    for row in good
                ]
                for start in range(0, len(rows), _BATCH):
                    num_written += _send(client, rows[start : start + _BATCH], refused)
                num_read += len(keys)
                advance_to(num_read, f"{len(refused)} refused" if refused else "")
    return Upserted(num_written, refused)


def delete_keys(client: Client, keys: Sequence[str], file: Path | None) -> int:
    """Remove rows by key and return their number; `file` has one key per line ("-" reads standard input)."""
    if not keys and file is None:
        raise InputError("give keys, or --keys FILE with one key per line")
    lines: list[str] = []
    if file is not None:
        try:
            lines = list(split_lines(sys.stdin) if str(file) == "-" else read_lines(file))
        except ValueError as err:
            raise InputError(f"{file}: the keys cannot be read: it {err}") from err
    return client.delete([*keys, *lines])


def _row(item: "Item") -> Row:
    from orbithash.encoders.imagery.georeference import read_georeference
    from orbithash.encoders.imagery.rendering import Limits
    from orbithash.encoders.sources.remote import is_remote, read_object

    if item.problem is not None:
        raise ImageError(item.problem)
    if item.window is not None:
        raise ImageError("it is a tile of a scene, which cannot be sent alone; `orbithash encode` reads it")
    try:
        image = read_object(item.path, Limits()) if is_remote(item.path) else Path(item.path).read_bytes()
    except OSError as err:
        raise ImageError(f"cannot be read ({err.strerror})") from err
    if not 0 < len(image) <= MAX_IMAGE_BYTES:
        raise ImageError(f"has {len(image):,} bytes; 1 to {MAX_IMAGE_BYTES:,} can be sent, `encode` takes larger ones")
    place = read_georeference(image if is_remote(item.path) else Path(item.path))
    return Row(
        key=item.key,
        image=image,
        uri=item.path,
        label=item.label,
        caption=item.caption,
        datetime=item.datetime or place.datetime,
        lon=place.lon if item.lon is None else item.lon,
        lat=place.lat if item.lat is None else item.lat,
        footprint=item.footprint or place.footprint,
    )


def _send(client: Client, rows: Sequence[Row], refused: dict[str, str]) -> int:
    """Write rows and return their number. If one is refused, send them one by one and note the refused ones."""
    try:
        return client.upsert(rows)
    except InvalidQuery as err:
        if len(rows) == 1:
            refused[rows[0].key] = str(err)
            return 0
    return sum(_send(client, [row], refused) for row in rows)
