"""`bench changes`: what changes, starts and new filters cost, in one shard and in a gateway that answers meanwhile."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from orbithash.cluster.bench.codes import BenchCodes, CodeSource, random_codes
from orbithash.cluster.bench.engines import nearest_rows
from orbithash.cluster.bench.inputs import bench_rows
from orbithash.cluster.bench.report import environment, print_table, show
from orbithash.cluster.bench.serving.disturbed import FILTER_TARGETS_S, measure_gateway
from orbithash.cluster.bench.serving.processes import ResidentBytes
from orbithash.cluster.bench.serving.services import ServedArchive
from orbithash.cluster.bench.serving.shard_process import ShardProcess, ShardSize
from orbithash.cluster.output import say
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import check_bits
from orbithash.encoders.errors import InputError

__all__ = ["ChangesBench", "Measurement", "bench_changes", "polygon", "show_changes"]

_K = 10
_NUM_QUERIES, _NUM_CHECKED = 512, 20
_NUM_VERSIONS, _ROWS_PER_VERSION = 5, 1000
_NUM_COMMITS, _ROWS_PER_COMMIT = 20, 20
_NUM_FILTERS = 4
_NUM_CORNERS, _POLYGON_SHARE = 200, 0.01
# Square degrees in which the rows of the archive lie.
_DEGREES = 360 * 160


class Measurement(NamedTuple):
    """A measured value, its unit, and the largest value that meets the target (None: no target)."""

    name: str
    value: float
    unit: str
    target: float | None = None


@dataclass(frozen=True)
class ChangesBench:
    """Settings of `bench changes`.

    Attributes:
        rows, bits: number and length of generated codes.
        source: where the codes come from.
        has_footprints: whether rows have outlines; without them they are points.
        shards: number of shards of the gateway.
        local: all shards in the gateway's process instead of Ray actors.
        seconds: duration of the stream of queries before each disturbance.
        parts: parts to measure: "shard", "gateway".
    """

    rows: int = 1_000_000
    bits: int = 64
    source: CodeSource = field(default_factory=lambda: CodeSource("mixture"))
    has_footprints: bool = False
    shards: int = 2
    local: bool = False
    seconds: float = 10.0
    parts: tuple[str, ...] = ("shard", "gateway")

    def check(self) -> None:
        """Raise `InputError` for an invalid setting."""
        check_bits(self.bits)
        self.source.check()
        least = 2 * _ROWS_PER_VERSION
        if self.source.archive is None and self.rows < least:
            raise InputError(f"--rows is {self.rows}; at least {least} are needed")
        if not 0.1 <= self.seconds <= 3600:
            raise InputError(f"--seconds is {self.seconds:g}; from 0.1 to 3600 are allowed")
        if unknown := [part for part in self.parts if part not in ("shard", "gateway")]:
            raise InputError(f"--part {unknown[0]} does not exist; allowed: shard, gateway")


def bench_changes(settings: ChangesBench) -> dict[str, Any]:
    """Return the measurements, each with its target."""
    settings.check()
    rng = np.random.default_rng(0)
    drawn = settings.source.draw(settings.rows, settings.bits, _NUM_QUERIES, rng)
    measurements: list[Measurement] = []
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        archive = ServedArchive.write(root, drawn.codes, drawn.bits, settings.has_footprints)
        say("indexing the keys")
        Archive.open(archive.path).update_index()
        result = {
            **environment("changes", "orbithash", "pylance", "numba"),
            "rows": len(archive.codes),
            "bits": drawn.bits,
            "codes": drawn.kind,
            "outlines": settings.has_footprints,
        }
        if "shard" in settings.parts:
            measurements += _measure_shard(archive, drawn, root / "segments", rng)
        if "gateway" in settings.parts:
            result["shards"] = f"{settings.shards} {'in one process' if settings.local else 'Ray actors'}"
            measurements += [
                Measurement(*each)
                for each in measure_gateway(
                    archive, drawn, settings.shards, settings.local, settings.seconds, _new_filters("gateway")
                )
            ]
    return {**result, "measurements": [each._asdict() for each in measurements]}


def show_changes(result: dict[str, Any], as_json: bool) -> None:
    """Print a result as JSON or as a table."""
    if as_json:
        show(result, True)
        return
    show({name: value for name, value in result.items() if name != "measurements"}, False)
    rows = []
    for each in (Measurement(**measurement) for measurement in result["measurements"]):
        target = "" if each.target is None else f"at most {each.target:g}"
        # NaN is not met.
        verdict = "" if each.target is None else "met" if each.value <= each.target else "missed"
        rows.append((each.name, f"{each.value:,.3f}", each.unit, target, verdict))
    print_table(("measured", "value", "unit", "target", ""), rows, width=120)


def _measure_shard(
    archive: ServedArchive, drawn: BenchCodes, folder: Path, rng: np.random.Generator
) -> Iterator[Measurement]:
    """Yield what one shard with all rows costs: its start, its memory, its part of commits, new filters."""
    writer = Archive.open(archive.path)
    count = len(archive.codes)
    say("one shard: start from the archive")
    shard = ShardProcess(writer.path, writer.bits, count, folder)
    try:
        yield Measurement("compilation at the start", shard.compile_s, "s")
        yield Measurement("start from the archive", shard.follow(writer.version), "s", 6 * count / 1e7)
        _, seconds = shard.search(writer.version, drawn.queries[:1], _K)
        yield Measurement("first query", 1e3 * seconds, "ms")
        yield from _sizes("one version", shard.size(), shard.before, 32)
        for kind, texts in _new_filters("shard").items():
            say(f"one shard: a new filter, {kind}")
            found = [shard.count(writer.version, text) for text in texts]
            yield Measurement(f"new filter, {kind}: rows", found[0][0] / count, "share")
            seconds = float(np.median([seconds for _, seconds in found]))
            yield Measurement(f"new filter, {kind}", seconds, "s", FILTER_TARGETS_S.get(kind))
        say(f"one shard: {_NUM_VERSIONS} versions of {_ROWS_PER_VERSION} changes")
        for number in range(_NUM_VERSIONS):
            _change(writer, number, _ROWS_PER_VERSION, rng)
            shard.follow(writer.version)
        yield from _sizes(f"{_NUM_VERSIONS + 1} versions", shard.size(), shard.before, 36)
        say(f"one shard: {_NUM_COMMITS} commits of {_ROWS_PER_COMMIT} rows")
        seconds_of = []
        for number in range(_NUM_COMMITS):
            _change(writer, _NUM_VERSIONS + number, _ROWS_PER_COMMIT, rng)
            seconds_of.append(1e3 * shard.follow(writer.version))
        yield Measurement(f"commit of {_ROWS_PER_COMMIT} rows, shard's part", float(np.median(seconds_of)), "ms", 20)
        yield Measurement(f"commit of {_ROWS_PER_COMMIT} rows, shard's part, slowest", max(seconds_of), "ms")
    finally:
        shard.close()
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    yield Measurement("files a row", files / count, "bytes")
    say("one shard: start from its own segments")
    shard = ShardProcess(writer.path, writer.bits, count, folder)
    try:
        yield Measurement("start from its own segments", shard.follow(writer.version), "s", 1)
        yield from _sizes("from files", shard.size(), shard.before, None)
        queries = drawn.queries[:_NUM_CHECKED]
        ids, codes = writer.codes()
        is_wrong = (shard.search(writer.version, queries, _K)[0] != ids[nearest_rows(codes, queries, _K)]).any(axis=1)
        yield Measurement("wrong answers after all of that", float(is_wrong.sum()), f"of {_NUM_CHECKED}", 0)
    finally:
        shard.close()


def _sizes(what: str, size: ShardSize, before: ResidentBytes, target: float | None) -> Iterator[Measurement]:
    """Yield the memory a row: what the shard reports, and the growth of its process."""
    rows = size.status.num_rows
    yield Measurement(f"memory a row, {what}", size.status.num_bytes / rows, "bytes", target)
    yield Measurement(f"resident memory a row, {what}", (size.memory.whole - before.whole) / rows, "bytes")
    anonymous = (size.memory.anonymous - before.anonymous) / rows
    yield Measurement(f"resident memory a row without mapped files, {what}", anonymous, "bytes")


def _change(writer: Archive, number: int, count: int, rng: np.random.Generator) -> None:
    """Commit `count` changes: half of them replace rows of the archive, half are new rows."""
    half = count // 2
    codes = random_codes(count, writer.bits, rng)
    replaced = bench_rows(codes[:half], writer.bits, number * _ROWS_PER_VERSION, "tile", rng)
    added = bench_rows(codes[half:], writer.bits, number * _ROWS_PER_VERSION, "added", rng)
    import pyarrow as pa

    writer.upsert(pa.concat_tables([replaced, added]))


def _new_filters(seed: str) -> dict[str, Sequence[str]]:
    """Return filters that were not evaluated before, by kind; `seed` makes them differ from those of another part."""
    shift = 1 + len(seed)
    return {
        "label": [f"label = '{name}' AND NOT key = '{seed}'" for name in ("beach", "forest", "harbor", "river")],
        "LIKE": [f"key LIKE '%{shift}{number}%'" for number in range(_NUM_FILTERS)],
        "LIKE with two gaps": [f"key LIKE '%{shift}%{number}.tif'" for number in range(_NUM_FILTERS)],
        "polygon": [
            f"S_INTERSECTS(footprint, {polygon(_POLYGON_SHARE, shift + 10 * number, 0)})"
            for number in range(_NUM_FILTERS)
        ],
    }


def polygon(share: float, lon: float, lat: float) -> str:
    """Return a star-shaped polygon with 200 corners, as WKT, that covers this share of the rows' places."""
    # The mean of (1 + 0.2 sin)^2 is 1.02.
    radius = math.sqrt(share * _DEGREES / (1.02 * math.pi))
    angles = np.linspace(0, 2 * math.pi, _NUM_CORNERS, endpoint=False)
    radii = radius * (1 + 0.2 * np.sin(5 * angles))
    corners = [f"{lon + r * math.cos(a):.6f} {lat + r * math.sin(a):.6f}" for r, a in zip(radii, angles, strict=True)]
    return f"POLYGON(({', '.join([*corners, corners[0]])}))"
