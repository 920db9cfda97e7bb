"""The stages that turn a list of images into rows: decode, encode, write. Free of Ray: any process can run them.

Each takes and gives an Arrow table. A batch carries the busy seconds of the stages behind it, row by row.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import num_bytes
from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.sources import Item

__all__ = ["STAGES", "Encoder", "decode", "item_table", "rows_within", "write"]

STAGES = ("decode", "encode", "write")

# Pixels of a batch between two stages.
MAX_BATCH_BYTES = 32 * 2**20

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
    ]
)

# Columns of a decoded or encoded batch that go into the archive as they are.
_ROW = ("key", "uri", "label", "caption", "datetime", "lon", "lat", "footprint", "thumbnail")


def item_table(items: Sequence[Item]) -> pa.Table:
    """What `decode` takes."""
    return pa.Table.from_pylist([dataclasses.asdict(item) for item in items], schema=_ITEMS)


def rows_within(most: int, preprocessing: Preprocessing) -> int:
    """`most` rows, or as many as have no more than `MAX_BATCH_BYTES` of pixels; at least one."""
    return max(1, min(most, MAX_BATCH_BYTES // (preprocessing.crop**2 * preprocessing.channels)))


def decode(items: pa.Table, preprocessing: Preprocessing) -> pa.Table:
    """Images read and prepared; a refused one has a reason and no pixels."""
    from orbithash.encoders.imagery.records import read_record

    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for fields in items.to_pylist():
        window = fields.pop("window")
        item = Item(**fields, window=None if window is None else tuple(window))
        row = {name: fields.get(name) for name in _ROW} | {"uri": item.path, "pixels": None, "reason": None}
        try:
            record = read_record(item, preprocessing)
        except ImageError as err:
            row["reason"] = str(err)
        else:
            row |= {name: getattr(record, name) for name in ("uri", "datetime", "lon", "lat", "footprint", "thumbnail")}
            row["pixels"] = record.pixels.tobytes()
        rows.append(row)
    return _timed(pa.Table.from_pylist(rows, schema=_decoded_schema()), "decode_s", began)


def _decoded_schema() -> pa.Schema:
    known = {field.name: field.type for field in _ITEMS}
    extra = {"uri": pa.string(), "thumbnail": pa.binary(), "pixels": pa.binary(), "reason": pa.string()}
    types = known | extra
    return pa.schema([(name, types[name]) for name in (*_ROW, "pixels", "reason")])


class Encoder:
    """The network, loaded once, and what it makes of decoded batches: codes in place of pixels."""

    def __init__(self, model: Path, device: str) -> None:
        """Loads the model folder onto `cpu` or `cuda`."""
        from orbithash.encoders.networks.model import HashModel

        self._model = HashModel.load(model, device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Column `code` is None for refused images; `began` is the time at which the network was called."""
        began, clock = time.time(), time.perf_counter()
        side = self._model.preprocessing.crop
        pixels = [np.frombuffer(p, np.uint8) for p in batch["pixels"].to_pylist() if p is not None]
        images = np.stack(pixels) if pixels else np.empty(0, np.uint8)
        images = images.reshape(-1, side, side, self._model.preprocessing.channels)
        codes = iter(self._model.encode_prepared(images))
        column = [None if reason is not None else next(codes).tobytes() for reason in batch["reason"].to_pylist()]
        encoded = (
            batch.drop_columns("pixels")
            .append_column("code", pa.array(column, pa.binary()))
            .append_column("began", pa.array([began] * len(batch), pa.float64()))
        )
        return _timed(encoded, "encode_s", clock)


def write(batch: pa.Table, archive: str) -> pa.Table:
    """Writes the encoded rows as fragments that nobody sees yet; one row that tells of them.

    Its columns: `fragments` (for `Archive.commit`), `num_rows` in them, `refused` keys and their `reasons`, `began`
    (when the first of the rows reached a network), and the busy seconds `decode_s`, `encode_s` and `write_s`.
    """
    clock = time.perf_counter()
    good = batch.filter(pc.is_null(batch["reason"]))
    bad = batch.filter(pc.is_valid(batch["reason"]))
    fragments = []
    if len(good):
        bits = Archive.open(archive).bits
        codes = np.frombuffer(b"".join(good["code"].to_pylist()), np.uint8).reshape(len(good), num_bytes(bits))
        columns = {name: good[name].to_pylist() for name in _ROW}
        fragments = Archive.write_fragments(archive, Archive.table(codes, bits, **columns))
    row = {
        "fragments": fragments,
        "num_rows": len(good),
        "refused": bad["key"].to_pylist(),
        "reasons": bad["reason"].to_pylist(),
        "began": pc.min(batch["began"]).as_py(),
        "decode_s": pc.sum(batch["decode_s"]).as_py(),
        "encode_s": pc.sum(batch["encode_s"]).as_py(),
        "write_s": time.perf_counter() - clock,
    }
    strings = pa.list_(pa.string())
    schema = [("fragments", strings), ("num_rows", pa.int64()), ("refused", strings), ("reasons", strings)]
    seconds = [(name, pa.float64()) for name in ("began", "decode_s", "encode_s", "write_s")]
    return pa.Table.from_pylist([row], schema=pa.schema([*schema, *seconds]))


def _timed(batch: pa.Table, name: str, began: float) -> pa.Table:
    """The batch with the seconds since `began`, each row its share."""
    share = (time.perf_counter() - began) / max(1, len(batch))
    return batch.append_column(name, pa.array([share] * len(batch), pa.float64()))
