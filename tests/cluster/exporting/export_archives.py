"""Archives to export: rows at usual and at unusual places."""

from datetime import UTC, datetime, timedelta

import numpy as np
import shapely

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.imagery.outlines import normalize
from orbithash.encoders.vectors import VectorSpec

BITS = 20
VECTOR = VectorSpec(6, 0.05)
MODEL_ID = "0123456789abcdef" * 2

DATE_LINE = normalize(shapely.box(179.5, -17, 180.5, -16))
POLE = normalize(shapely.Polygon([(-180, 80), (-60, 80), (60, 80), (180, 80), (180, 90), (-180, 90)]))
ODD_KEYS = ["a,b;c\"d'e", "<b>&amp;</b>", "naïve/日本 🛰.tif", "=1+1", "a'b`c$(d)", "%2e%2e/x#0,0,1,1"]


def codes(count, seed=0):
    """Return random codes of `BITS` bits, uint8 [count, 3]."""
    return np.packbits(np.random.default_rng(seed).integers(0, 2, (count, BITS), np.uint8), axis=1)


def make_archive(path, count, vector=VECTOR, **changed):
    """Create an archive of `count` rows with squares over the Earth, times, labels; `changed` replaces columns."""
    rng = np.random.default_rng(1)
    lon, lat = rng.uniform(-179, 178, count), rng.uniform(-89, 88, count)
    begin = datetime(2024, 1, 1, tzinfo=UTC)
    columns = {
        "uri": [f"tiles/{number}.tif" for number in range(count)],
        "label": [f"kind {number % 3}" for number in range(count)],
        "caption": [None if number % 2 else f"scene {number}" for number in range(count)],
        "datetime": [begin + timedelta(days=number, microseconds=number) for number in range(count)],
        "lon": lon,
        "lat": lat,
        "footprint": [shapely.box(x, y, x + 0.5, y + 0.5).wkb for x, y in zip(lon, lat, strict=True)],
        "thumbnail": [rng.bytes(40) for _ in range(count)],
        "stamp": [f"stamp {number}" for number in range(count)],
    }
    columns |= changed
    keys = columns.pop("key", [f"row {number}" for number in range(count)])
    vectors = None if vector is None else rng.integers(-127, 128, (count, vector.dims)).astype(np.int8)
    archive = Archive.create(path, BITS, MODEL_ID, vector)
    if count:
        # Several fragments.
        table = Archive.table(codes(count), BITS, keys, vector=vectors, **columns)
        step = -(-count // 3)
        for start in range(0, count, step):
            archive.write(table.slice(start, step))
    return archive


def unusual_archive(path):
    """Create an archive whose rows lie on the date line, on a pole, nowhere; with odd keys and without values."""
    places = [
        (180.0, -16.5, DATE_LINE.wkb),
        (0.0, 90.0, POLE.wkb),
        (-180.0, -90.0, None),
        (None, None, None),
        (float("nan"), 5.0, None),
        (7.0, 8.0, b"no geometry"),
    ]
    count = len(ODD_KEYS)
    lon, lat, footprint = (list(column) for column in zip(*places, strict=True))
    times = [None if number % 2 else datetime(1969, 12, 31, 23, 59, 59, 999999, UTC) for number in range(count)]
    nothing = [None] * count
    return make_archive(
        path,
        count,
        key=ODD_KEYS,
        uri=ODD_KEYS,
        lon=lon,
        lat=lat,
        footprint=footprint,
        datetime=times,
        label=[*ODD_KEYS[:3], None, None, None],
        caption=nothing,
        thumbnail=nothing,
        stamp=nothing,
    )
