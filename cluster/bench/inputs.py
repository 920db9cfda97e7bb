"""Generated inputs of the benchmarks: scenes, a model with random weights, an archive of given codes."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from orbithash.cluster.output import say
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.storage import schema_of
from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Ids

if TYPE_CHECKING:
    import pyarrow as pa

    from orbithash.encoders.networks.hash_network import HashNetwork
    from orbithash.encoders.networks.projection import Projection

__all__ = [
    "bench_rows",
    "write_archive",
    "write_bench_scenes",
    "write_random_model",
    "write_vector_model",
    "write_vector_table",
]

# Rows of a row group of a generated table.
_ROWS_PER_GROUP = 2**15

# Rows that are generated and written at a time.
_ROWS_PER_WRITE = 2**20
# Time of the first row, microseconds; each row is one minute later than the one before.
_FIRST_US = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
_FOOTPRINT_DEGREES = 0.02

_LABELS = ("beach", "forest", "harbor", "river")


def write_bench_scenes(folder: Path, count: int) -> Path:
    """Write `count` generated scenes and return the folder."""
    from orbithash.trainers.scenes import write_scenes

    say(f"drawing {count} scenes")
    write_scenes(folder, count, processes=len(os.sched_getaffinity(0)))
    return folder


def write_random_model(folder: Path, bits: int = 64) -> Path:
    """Write a model of usual size with random weights, which is as fast as a trained one; return the folder."""
    import torch

    from orbithash.encoders.networks.backbones.build import build_backbone
    from orbithash.encoders.networks.card import HeadSpec
    from orbithash.encoders.networks.hash_network import HashNetwork

    torch.manual_seed(0)
    backbone = build_backbone("mobilenet_v2", norm="frozen-batch", pooling="avg+max")
    network = HashNetwork(backbone, HeadSpec(bits=bits), num_classes=2)
    return _save_model(folder, "dhcl", network, classes=("a", "b"))


def write_vector_table(path: Path, count: int, dims: int) -> Path:
    """Write a Parquet file of random vectors float16 of `dims` dimensions with ids and places; return its path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.float16(), dims)
    schema = pa.schema([("id", pa.string()), ("embedding", kind), ("lon", pa.float64()), ("lat", pa.float64())])
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, count, _ROWS_PER_GROUP):
            number = min(_ROWS_PER_GROUP, count - start)
            vectors = rng.standard_normal((number, dims), np.float32).astype(np.float16)
            columns = [
                pa.array(np.arange(start, start + number)).cast(pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=kind),
                pa.array(rng.uniform(-180, 180, number)),
                pa.array(rng.uniform(-80, 80, number)),
            ]
            file.write_table(pa.table(columns, schema=schema))
    return path


def write_vector_model(folder: Path, dims: int, bits: int = 64) -> Path:
    """Write a model of vectors with a random linear head and stored vectors of 64 dimensions; return the folder."""
    import torch

    from orbithash.encoders.networks.backbones.build import build_backbone
    from orbithash.encoders.networks.backbones.embedding import embedding_backbone
    from orbithash.encoders.networks.card import HeadSpec
    from orbithash.encoders.networks.hash_network import HashNetwork
    from orbithash.encoders.networks.projection import Projection

    torch.manual_seed(0)
    backbone = build_backbone(embedding_backbone("random", dims, ""))
    network = HashNetwork(backbone, HeadSpec(bits, norm="unit", activation="none"))
    return _save_model(folder, "lsh", network, projection=Projection.fit(torch.randn(10_000, dims), 64))


def _save_model(
    folder: Path,
    method: str,
    network: "HashNetwork",
    classes: tuple[str, ...] = (),
    projection: "Projection | None" = None,
) -> Path:
    from orbithash.encoders.imagery.images import Rendering
    from orbithash.encoders.imagery.preprocessing import Preprocessing
    from orbithash.encoders.networks.card import ModelCard
    from orbithash.encoders.networks.model import HashModel

    card = ModelCard(
        method=method,
        network=network.spec,
        thresholds=(0.0,) * network.spec.bits,
        label_code="none",
        label_weight=1,
        preprocessing=Preprocessing(Rendering(), resize=160, crop=160),
        classes=classes,
        dataset={},
        metrics={},
        projection=None if projection is None else projection.spec,
    )
    HashModel(card, network, projection=projection).save(folder)
    return folder


def write_archive(
    path: Path, codes: Codes, bits: int, model_id: str, has_footprints: bool = False
) -> tuple[Ids, Codes]:
    """Write an archive of `codes` whose rows have every column that a hit shows; return its ids and codes.

    Keys are LABEL/tile_NUMBER.tif, labels take turns, places are uniformly random. With `has_footprints` each row also
    has a square of 0.02 degrees around its place.
    """
    archive = Archive.create(path, bits, model_id)
    rng = np.random.default_rng(1)
    fragments = []
    for start in range(0, len(codes), _ROWS_PER_WRITE):
        part = codes[start : start + _ROWS_PER_WRITE]
        fragments += Archive.write_fragments(path, bench_rows(part, bits, start, "tile", rng, has_footprints))
    archive.commit(fragments)
    return archive.codes()


def bench_rows(
    codes: Codes, bits: int, start: int, name: str, rng: np.random.Generator, has_footprints: bool = False
) -> "pa.Table":
    """Return rows of an archive for codes uint8 [N, B], numbered from `start`, with keys LABEL/NAME_NUMBER.tif."""
    import pyarrow as pa
    import pyarrow.compute as pc

    count = len(codes)
    # make_table checks each key in Python, which takes seconds for millions of rows.
    schema = schema_of(bits, "").remove_metadata()
    numbers = np.arange(start, start + count)
    labels = pa.DictionaryArray.from_arrays((numbers % len(_LABELS)).astype(np.int8), list(_LABELS)).cast(pa.string())
    names = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 8, "0")
    keys = pc.binary_join_element_wise(labels, pc.binary_join_element_wise(f"{name}_", names, ".tif", ""), "/")
    lon, lat = rng.uniform(-180, 180, count), rng.uniform(-80, 80, count)
    columns: dict[str, pa.Array] = {
        "key": keys,
        "code": pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(codes).reshape(-1)), type=schema.field("code").type
        ),
        "uri": pc.binary_join_element_wise("file:///tiles", keys, "/"),
        "label": labels,
        "datetime": pa.array(_FIRST_US + 60_000_000 * numbers).cast(schema.field("datetime").type),
        "lon": pa.array(lon),
        "lat": pa.array(lat),
    }
    if has_footprints:
        import shapely

        half = _FOOTPRINT_DEGREES / 2
        squares = shapely.box(lon - half, lat - half, lon + half, lat + half)
        columns["footprint"] = pa.array(shapely.to_wkb(squares), pa.binary())
    return pa.table([columns.get(field.name, pa.nulls(count, field.type)) for field in schema], schema=schema)
