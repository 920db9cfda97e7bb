"""The stages that turn a list of items into rows: decode, encode, write. They do not use Ray: any process can run them.

Each takes and returns an Arrow table. A batch carries the busy seconds of the stages before it, divided over its rows.
"""

import dataclasses
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.stamps import make_stamp
from orbithash.encoders.codes import num_bytes
from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.bands import BandInfo
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.sources.sources import Item

__all__ = ["STAGES", "Encoder", "Written", "as_stream", "decode", "item_table", "rows_within", "write", "written_table"]

STAGES = ("decode", "encode", "write")

# Pixels of a batch between two stages.
MAX_BATCH_BYTES = 32 * 2**20

# The fields of `BandInfo`.
_BANDS = pa.list_(pa.struct([("names", pa.list_(pa.string())), ("scale", pa.float64()), ("offset", pa.float64())]))

_ITEMS = pa.schema(
    [
        ("key", pa.string()),
        ("path", pa.string()),
        ("label", pa.string()),
        ("caption", pa.string()),
        ("datetime", pa.timestamp("us", "UTC")),
        ("lon", pa.float64()),
        ("lat", pa.float64()),
        ("footprint", pa.binary()),
        ("window", pa.list_(pa.int64())),
        ("problem", pa.string()),
        ("version", pa.string()),
        ("bands", _BANDS),
        # Whether the row takes the place of a row with its key.
        ("replaces", pa.bool_()),
    ]
)

# Columns of a decoded or encoded batch that go into the archive as they are.
_ROW = ("key", "uri", "label", "caption", "datetime", "lon", "lat", "footprint", "thumbnail", "stamp")

_STRINGS = pa.list_(pa.string())
_WRITTEN = pa.schema(
    [
        ("fragments", _STRINGS),
        ("replacing", pa.binary()),
        ("num_rows", pa.int64()),
        ("num_replaced", pa.int64()),
        ("refused", _STRINGS),
        ("reasons", _STRINGS),
        ("stamps", _STRINGS),
        ("began", pa.float64()),
        *[(f"{stage}_s", pa.float64()) for stage in STAGES],
    ]
)


@dataclasses.dataclass(frozen=True)
class Written:
    """The result of `write`.

    Attributes:
        fragments: new rows, for `Archive.commit`.
        replacing: rows that take the place of others, for `Archive.upsert`, as an Arrow stream; empty without any.
        num_rows: number of rows in both.
        num_replaced: number of rows in `replacing`.
        refused: keys of refused items.
        reasons: why they were refused.
        stamps: which content was refused; None for files that do not exist.
        began: when the first of the rows reached a network, seconds of the epoch.
        decode_s: busy seconds of the stage.
        encode_s: busy seconds of the stage.
        write_s: busy seconds of the stage.
    """

    fragments: list[str]
    replacing: bytes
    num_rows: int
    num_replaced: int
    refused: list[str]
    reasons: list[str]
    stamps: list[str | None]
    began: float
    decode_s: float
    encode_s: float
    write_s: float

    def refused_items(self) -> list[tuple[str, str]]:
        """Return key and reason of the refused items."""
        return list(zip(self.refused, self.reasons, strict=True))

    def replacing_rows(self) -> pa.Table | None:
        """Return the rows that take the place of others; None without any."""
        return pa.ipc.open_stream(self.replacing).read_all() if self.replacing else None


def item_table(items: Sequence[Item], replacing: Collection[str] = ()) -> pa.Table:
    """Return the items as `decode` takes them; those with keys in `replacing` become rows that replace others."""
    rows = [dataclasses.asdict(item) | {"replaces": item.key in replacing} for item in items]
    return pa.Table.from_pylist(rows, schema=_ITEMS)


def rows_within(maximum: int, preprocessing: Preprocessing) -> int:
    """Return the number of rows, at most `maximum`, that have `MAX_BATCH_BYTES` of pixels; at least one."""
    return max(1, min(maximum, MAX_BATCH_BYTES // preprocessing.num_bytes))


def decode(items: pa.Table, preprocessing: Preprocessing) -> pa.Table:
    """Read and prepare images; a refused item has a reason and no pixels."""
    from orbithash.encoders.sources.records import read_record

    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for fields in items.to_pylist():
        window, replaces = fields.pop("window"), fields.pop("replaces")
        bands = tuple(BandInfo(tuple(band["names"]), band["scale"], band["offset"]) for band in fields.pop("bands"))
        item = Item(**fields, bands=bands, window=None if window is None else tuple(window))
        row = {name: fields.get(name) for name in _ROW} | {"uri": item.path, "pixels": None, "reason": None}
        try:
            record = read_record(item, preprocessing)
        except ImageError as err:
            row["reason"] = str(err)
        else:
            row |= {name: getattr(record, name) for name in ("uri", "datetime", "lon", "lat", "footprint", "thumbnail")}
            row["pixels"] = record.pixels.tobytes()
        rows.append(row | {"stamp": make_stamp(item.path, item.version), "replaces": replaces})
    return _timed(pa.Table.from_pylist(rows, schema=_decoded_schema()), "decode_s", began)


def _decoded_schema() -> pa.Schema:
    types = {field.name: field.type for field in _ITEMS}
    types |= {"uri": pa.string(), "thumbnail": pa.binary(), "stamp": pa.string()}
    types |= {"pixels": pa.binary(), "reason": pa.string()}
    return pa.schema([(name, types[name]) for name in (*_ROW, "replaces", "pixels", "reason")])


class Encoder:
    """The network, loaded once, which replaces the pixels of decoded batches by codes and stored vectors."""

    def __init__(self, model: Path, device: str) -> None:
        """Load the model folder onto `cpu` or `cuda`."""
        from orbithash.encoders.networks.model import HashModel

        self._model = HashModel.load(model, device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the batch with the columns `code`, `vector` and `began`, the time of the call.

        Code and vector are None for refused items, and the vector for all items of a model without a projection.
        """
        began, clock = time.time(), time.perf_counter()
        side, dtype = self._model.preprocessing.crop, self._model.preprocessing.dtype
        pixels = [np.frombuffer(p, dtype) for p in batch["pixels"].to_pylist() if p is not None]
        images = np.stack(pixels) if pixels else np.empty(0, dtype)
        images = images.reshape(-1, side, side, self._model.preprocessing.channels)
        items = self._model.encode_items("image", images)
        is_good = pc.is_null(batch["reason"]).to_numpy()
        encoded = (
            batch.drop_columns("pixels")
            .append_column("code", _bytes_where(is_good, items.codes))
            .append_column("vector", _bytes_where(is_good, items.vectors))
            .append_column("began", pa.array([began] * len(batch), pa.float64()))
        )
        return _timed(encoded, "encode_s", clock)


def write(batch: pa.Table, archive: str) -> pa.Table:
    """Write the encoded rows as fragments that are not committed yet; return one row, the fields of `Written`."""
    clock = time.perf_counter()
    good = batch.filter(pc.is_null(batch["reason"]))
    bad = batch.filter(pc.is_valid(batch["reason"]))
    fragments, replacing, num_replaced = [], b"", 0
    if len(good):
        bits = Archive.open(archive).bits
        codes = np.frombuffer(b"".join(good["code"].to_pylist()), np.uint8).reshape(len(good), num_bytes(bits))
        columns = {name: good[name].to_pylist() for name in _ROW}
        rows = Archive.table(codes, bits, vector=good["vector"].to_pylist(), **columns)
        new, changed = rows.filter(pc.invert(good["replaces"])), rows.filter(good["replaces"])
        fragments = Archive.write_fragments(archive, new) if len(new) else []
        replacing, num_replaced = as_stream(changed), len(changed)
    written = Written(
        fragments=fragments,
        replacing=replacing,
        num_rows=len(good),
        num_replaced=num_replaced,
        refused=bad["key"].to_pylist(),
        reasons=bad["reason"].to_pylist(),
        stamps=bad["stamp"].to_pylist(),
        began=pc.min(batch["began"]).as_py(),
        decode_s=pc.sum(batch["decode_s"]).as_py(),
        encode_s=pc.sum(batch["encode_s"]).as_py(),
        write_s=time.perf_counter() - clock,
    )
    return written_table(written)


def written_table(written: Written) -> pa.Table:
    """Return a table of one row with the fields of `Written`."""
    return pa.Table.from_pylist([dataclasses.asdict(written)], schema=_WRITTEN)


def _bytes_where(is_good: npt.NDArray[np.bool_], values: npt.NDArray[Any] | None) -> pa.Array:
    """Return a binary column with the rows of `values` in order where `is_good`, and None elsewhere."""
    rows = iter([] if values is None else values)
    return pa.array([next(rows).tobytes() if good and values is not None else None for good in is_good], pa.binary())


def as_stream(rows: pa.Table) -> bytes:
    """Return rows as an Arrow stream; empty without rows."""
    if not len(rows):
        return b""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    return bytes(sink.getvalue())


def _timed(batch: pa.Table, name: str, began: float) -> pa.Table:
    """Return the batch with a column of the seconds since `began`, divided over its rows."""
    share = (time.perf_counter() - began) / max(1, len(batch))
    return batch.append_column(name, pa.array([share] * len(batch), pa.float64()))
