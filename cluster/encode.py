"""Encoding on Ray Data: a source of images becomes rows of an archive.

    list (driver) -> decode -> encode (actor pool) -> write fragments (tasks) -> commit (driver)

Where decoding and encoding ask for equal resources, Ray Data fuses them into one actor, and no pixels are copied. What
a refused image leaves is a row of the archive's side table. Nothing is visible before the driver's commit, and every
commit is atomic: a job that dies at any moment goes on, when it is run again, with the images that are in neither
table.
"""

import dataclasses
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orbithash.cluster.progress import say, track
from orbithash.cluster.runtime import check_resources, connected, worker_error
from orbithash.encoders.archive import Archive
from orbithash.encoders.card import read_model_folder
from orbithash.encoders.codes import num_bytes
from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.preprocessing import Preprocessing
from orbithash.encoders.sources import Item, list_source

__all__ = ["EncodeSummary", "encode", "parse_workers"]

# Images in a block of the list, and in a batch of the stages that touch pixels.
BATCH_SIZE = 64

# Rows in a fragment, and so in a commit: what a killed job repeats at most, times the number of writers.
ROWS_PER_COMMIT = 1024

# Decoding and encoding get half a core each of what the other leaves; the kernel balances them, whichever is heavier.
DECODE_CPUS = 0.5
ENCODE_CPUS = 0.5
WRITE_CPUS = 0.25

# Of an archive in which nothing was committed yet.
FIRST_VERSION = 1

# Refused images that are told one by one.
NUM_TOLD = 10

# No stage takes this long for a batch; a stall is an error and not a silence.
NO_PROGRESS_TIMEOUT_S = 600

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
    ]
)

# Columns of a decoded or encoded batch that go into the archive as they are.
_ROW = ("key", "uri", "label", "caption", "datetime", "lon", "lat", "footprint", "thumbnail")


@dataclasses.dataclass(frozen=True)
class EncodeSummary:
    """What one run of `encode` did.

    `num_listed` images in the source, of which `num_done_before` were in the archive already; `num_encoded` and
    `num_refused` now. `start_s` passed until the first batch reached a network, `encode_s`
    from then to the last commit.
    """

    num_listed: int
    num_done_before: int
    num_encoded: int
    num_refused: int
    start_s: float
    encode_s: float
    rows_per_s: float
    rows_in_archive: int

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """What a person wants to know."""
        refused = f", refused {self.num_refused} (see the archive's side table)" if self.num_refused else ""
        before = f", {self.num_done_before} were done before" if self.num_done_before else ""
        rate = f" at {self.rows_per_s:.0f}/s after {self.start_s:.1f} s of start-up" if self.num_encoded else ""
        return (
            f"encoded {self.num_encoded} of {self.num_listed} images{rate}{before}{refused}; the archive has "
            f"{self.rows_in_archive} rows"
        )


def parse_workers(text: str | None) -> tuple[int, int] | None:
    """`MIN:MAX`, or one number for both."""
    if text is None:
        return None
    try:
        low, high = (int(part) for part in (text.split(":") if ":" in text else (text, text)))
    except ValueError:
        low = high = 0
    if not 1 <= low <= high:
        raise InputError(f"--workers is {text!r}; MIN:MAX with 1 <= MIN <= MAX, such as 1:8, or one number is needed")
    return low, high


def encode(
    source: str, model: Path, archive: str, workers: tuple[int, int] | None = None, tile_px: int | None = None
) -> EncodeSummary:
    """Encodes what of `source` the archive does not hold yet, on between `workers[0]` and `workers[1]` actors.

    `workers` is one for each CPU (or GPU) where None. Raises `InputError` for a source, model or archive that does not
    fit; an image that cannot be read is no error but a row of the side table.
    """
    items = list_source(source, tile_px)
    card, model_id, _ = read_model_folder(model)
    with _opened(archive, card.bits, model_id) as target:
        done = target.keys() | target.refused().keys()
        todo = [item for item in items if item.key not in done]
        say(f"{len(items)} images in {source}, {len(items) - len(todo)} of them done before")
        if not todo:
            return EncodeSummary(len(items), len(items), 0, 0, 0.0, 0.0, 0.0, target.num_rows)
        with connected():
            begun = time.time()
            first, num_encoded, num_refused = _run(todo, model.absolute(), card.preprocessing, target, workers)
            ended = time.time()
        target.optimize()
        target.clean_up()
        return EncodeSummary(
            num_listed=len(items),
            num_done_before=len(items) - len(todo),
            num_encoded=num_encoded,
            num_refused=num_refused,
            start_s=first - begun,
            encode_s=ended - first,
            rows_per_s=(num_encoded + num_refused) / max(ended - first, 1e-9),
            rows_in_archive=target.num_rows,
        )


@contextmanager
def _opened(path: str, bits: int, model_id: str) -> Iterator[Archive]:
    """The archive, for this process alone to write. A new one is gone again when the block fails without a row."""
    target = Archive.open_or_create(path, bits, model_id)
    with target.writing():
        try:
            yield target
        except BaseException:
            if target.version == FIRST_VERSION and not target.refused() and Path(target.path).is_dir():
                shutil.rmtree(target.path)
            raise


def _run(
    todo: list[Item], model: Path, preprocessing: Preprocessing, target: Archive, workers: tuple[int, int] | None
) -> tuple[float, int, int]:
    """Runs the pipeline; returns when the first batch reached a network, and how many were encoded and refused."""
    import ray
    import ray.data

    gpus = ray.cluster_resources().get("GPU", 0)
    low, high = workers or (1, max(1, int(gpus or ray.cluster_resources()["CPU"])))
    check_resources(f"encoding with {low} workers", low * ENCODE_CPUS + DECODE_CPUS, low if gpus else 0)
    blocks = [
        pa.Table.from_pylist([dataclasses.asdict(item) for item in todo[start : start + BATCH_SIZE]], schema=_ITEMS)
        for start in range(0, len(todo), BATCH_SIZE)
    ]
    first, num_encoded, num_refused = time.time(), 0, 0
    with _quiet_data(), track("encoding", len(todo), "images") as advance_to:
        results = (
            ray.data.from_arrow(blocks)
            .map_batches(
                _decode,
                fn_kwargs={"preprocessing": preprocessing},
                batch_size=BATCH_SIZE,
                batch_format="pyarrow",
                num_cpus=DECODE_CPUS,
            )
            .map_batches(
                _Encoder,
                fn_constructor_kwargs={"model": model, "device": "cuda" if gpus else "cpu"},
                compute=ray.data.ActorPoolStrategy(min_size=low, max_size=max(low, high)),
                batch_size=BATCH_SIZE,
                batch_format="pyarrow",
                num_cpus=ENCODE_CPUS,
                num_gpus=1 if gpus else 0,
            )
            .map_batches(
                _write,
                fn_kwargs={"archive": target.path},
                batch_size=ROWS_PER_COMMIT,
                batch_format="pyarrow",
                num_cpus=WRITE_CPUS,
            )
        )
        for result in _rows(results):
            refused = list(zip(result["refused"], result["reasons"], strict=True))
            # The side table first: a kill between the two commits then repeats work instead of losing a reason.
            target.refuse(refused)
            target.commit(list(result["fragments"]))
            first = min(first, result["began"]) if num_encoded + num_refused else result["began"]
            num_encoded += result["num_rows"]
            for key, reason in refused[: max(0, NUM_TOLD - num_refused)]:
                say(f"refused {key}: {reason}")
            num_refused += len(refused)
            advance_to(num_encoded + num_refused, f"{num_refused} refused" if num_refused else "")
    return first, num_encoded, num_refused


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    from ray.exceptions import RayError

    try:
        yield from dataset.iter_rows()
    except RayError as err:
        raise worker_error(err) from err


def _decode(items: pa.Table, preprocessing: Preprocessing) -> pa.Table:
    """Images read and prepared; a refused one has a reason and no pixels."""
    from orbithash.encoders.records import read_record

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
    return pa.Table.from_pylist(rows, schema=_decoded_schema())


def _decoded_schema() -> pa.Schema:
    known = {field.name: field.type for field in _ITEMS}
    extra = {"uri": pa.string(), "thumbnail": pa.binary(), "pixels": pa.binary(), "reason": pa.string()}
    types = known | extra
    return pa.schema([(name, types[name]) for name in (*_ROW, "pixels", "reason")])


class _Encoder:
    """An actor that holds the network."""

    def __init__(self, model: Path, device: str) -> None:
        from orbithash.encoders.model import HashModel

        self._model = HashModel.load(model, device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.time()
        side = self._model.preprocessing.crop
        pixels = [np.frombuffer(p, np.uint8) for p in batch["pixels"].to_pylist() if p is not None]
        images = np.stack(pixels) if pixels else np.empty(0, np.uint8)
        images = images.reshape(-1, side, side, self._model.preprocessing.channels)
        codes = iter(self._model.encode_prepared(images))
        column = [None if reason is not None else next(codes).tobytes() for reason in batch["reason"].to_pylist()]
        return (
            batch.drop_columns("pixels")
            .append_column("code", pa.array(column, pa.binary()))
            .append_column("began", pa.array([began] * len(batch), pa.float64()))
        )


def _write(batch: pa.Table, archive: str) -> pa.Table:
    """Writes the encoded rows as fragments that nobody sees yet; one row that tells the driver of them."""
    import pyarrow.compute as pc

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
    }
    strings = pa.list_(pa.string())
    schema = [("fragments", strings), ("num_rows", pa.int64()), ("refused", strings), ("reasons", strings)]
    return pa.Table.from_pylist([row], schema=pa.schema([*schema, ("began", pa.float64())]))


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Ray Data without its own progress report, and with an end to waiting; its settings are global, so put back."""
    import ray.data

    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.execution_no_progress_timeout_s
    logger = logging.getLogger("ray.data")
    level = logger.level
    context.enable_progress_bars, context.execution_no_progress_timeout_s = False, NO_PROGRESS_TIMEOUT_S
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars, context.execution_no_progress_timeout_s = before
        logger.setLevel(level)
