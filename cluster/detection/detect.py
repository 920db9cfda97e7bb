"""Run a detector over an archive and write the rows that it finds to a file of places."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from orbithash.cluster.detection.scoring import Counts, FragmentScorer
from orbithash.cluster.output import track
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_file
from orbithash.encoders.places.writers import format_of, open_writer
from orbithash.search.detectors.detector import Detector

__all__ = ["MAX_ROWS_HERE", "Detection", "detect"]

# Archives with more rows are read by Ray Data, which takes seconds to start.
MAX_ROWS_HERE = 1_000_000
# Columns of the file: a detector has no query, and so no distances.
_COLUMNS = ("id", "label", "datetime", "lon", "lat", "uri", "caption", "score")


@dataclass(frozen=True)
class Detection:
    """What was read and found.

    Attributes:
        archive_version: the version that was read.
        counts: numbers of rows.
        out: the file of the rows found.
    """

    archive_version: int
    counts: Counts
    out: Path

    def to_json(self) -> dict[str, Any]:
        """Return the values for --json."""
        return {"archive_version": self.archive_version, **self.counts._asdict(), "out": str(self.out)}

    def __str__(self) -> str:
        rows, matching, without_vector, found = self.counts
        among = f" ({matching:,} pass the filter)" if matching < rows else ""
        missing = f"; {without_vector:,} rows have no stored vector and were not scored" if without_vector else ""
        return f"{self.out}: found {found:,} of {rows:,} rows{among} of version {self.archive_version}{missing}"


def detect(
    archive: str,
    detector: Detector,
    out: Path,
    min_score: float = 0.0,
    filter_text: str = "",
    max_rows_here: int = MAX_ROWS_HERE,
) -> Detection:
    """Write the rows of an archive whose score is at least `min_score`, in the order of the archive.

    The file appears whole or not at all. It is written in portions: memory does not grow with the number of rows.

    Args:
        archive: folder or URI; its newest version is read.
        detector: decides the scores.
        out: GeoParquet, GeoJSON or CSV by its ending; replaced if it exists.
        min_score: cut-off; 0 is that of the detector.
        filter_text: CQL2 text that rows have to pass.
        max_rows_here: an archive with more rows is read by Ray Data.

    Raises:
        InputError: a detector of another model, an archive that cannot be read or has no vectors, an invalid filter or
            file name.
    """
    if math.isnan(min_score):
        raise InputError("--min-score is nan; give a number, such as 0, the cut-off of the detector")
    if filter_text:
        from orbithash.search.segments.filters.expressions import parse_filter

        parse_filter(filter_text)
    format_name = format_of(out)
    opened = Archive.open(archive)
    detector.check_archive(opened.model_id, opened.vector)
    scorer = FragmentScorer(opened.path, opened.version, detector, min_score, filter_text)
    num_rows = opened.num_rows
    counts = Counts()
    with ExitStack() as stack:
        try:
            part = stack.enter_context(new_file(out))
            file = stack.enter_context(part.open("wb"))
        except OSError as error:
            raise InputError(f"{out} cannot be written: {error.strerror}") from error
        # Closed before the file, also after an error.
        writer = stack.enter_context(closing(open_writer(format_name, file, columns=_COLUMNS)))
        on_ray = num_rows > max_rows_here
        results = _found_on_ray(scorer, stack) if on_ray else _found_here(scorer)
        advance_to = stack.enter_context(track("scoring", num_rows, "rows"))
        for more, found in results:
            counts = counts.plus(more)
            writer.write_table(found)
            advance_to(counts.rows, f"{counts.found:,} found" if counts.found else "")
    return Detection(opened.version, counts, out)


def _found_here(scorer: FragmentScorer) -> Iterator[tuple[Counts, pa.Table]]:
    for fragment in scorer.fragments():
        yield from scorer.find(fragment)


def _found_on_ray(scorer: FragmentScorer, stack: ExitStack) -> Iterator[tuple[Counts, pa.Table]]:
    """Yield the results of tasks of Ray Data, one for each fragment, in the order of the archive."""
    from orbithash.cluster.encoding.encode import quiet_data
    from orbithash.cluster.runtime import connected, worker_error

    # Ray is imported within: it reads the authentication that `connected` sets up.
    stack.enter_context(connected())
    import ray.data
    from ray.exceptions import RayError

    def find(block: pa.Table) -> Iterator[pa.Table]:
        for fragment in block["fragment"].to_pylist():
            for counts, found in scorer.find(fragment):
                yield _packed(counts, found)

    stack.enter_context(quiet_data())
    fragments = pa.table({"fragment": scorer.fragments()})
    blocks = [fragments.slice(number, 1) for number in range(len(fragments))]
    dataset = ray.data.from_arrow(blocks).map_batches(find, batch_size=1, batch_format="pyarrow", num_cpus=1)
    dataset.context.execution_options.preserve_order = True
    try:
        for row in dataset.iter_rows():
            yield _unpacked(row)
    except RayError as error:
        raise worker_error(error) from error


def _packed(counts: Counts, found: pa.Table) -> pa.Table:
    """Return a row with the counts, and the rows found as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, found.schema) as stream:
        stream.write_table(found)
    columns: dict[str, Any] = {name: [value] for name, value in counts._asdict().items()}
    return pa.table({**columns, "table": pa.array([sink.getvalue().to_pybytes()], pa.large_binary())})


def _unpacked(row: dict[str, Any]) -> tuple[Counts, pa.Table]:
    with pa.ipc.open_stream(row["table"]) as stream:
        found = stream.read_all()
    return Counts(*(int(row[name]) for name in Counts._fields)), found
