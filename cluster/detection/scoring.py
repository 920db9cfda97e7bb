"""Score the rows of one fragment of an archive; free of Ray, so that it runs in any process."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.storage import open_dataset
from orbithash.encoders.archive.tables import fixed_size_rows
from orbithash.encoders.lance_errors import one_line_errors
from orbithash.search.detectors.detector import Detector

__all__ = ["COLUMNS", "Counts", "FragmentScorer"]

# Columns of the rows that are found, beside `id` and `score`.
COLUMNS = ("key", "label", "datetime", "lon", "lat", "uri", "caption", "footprint")
# Rows that are scored at a time.
_BATCH = 65_536


class Counts(NamedTuple):
    """Numbers of rows: of the archive, those that pass the filter, those of them without a vector, those found."""

    rows: int = 0
    matching: int = 0
    without_vector: int = 0
    found: int = 0

    def plus(self, other: "Counts") -> "Counts":
        """Return the sums."""
        return Counts(*(mine + its for mine, its in zip(self, other, strict=True)))


@dataclass(frozen=True)
class FragmentScorer:
    """Finds the rows of a fragment of one version of an archive.

    Attributes:
        archive, version: what is read.
        detector: decides the scores.
        min_score: the smallest score of a row that is found.
        filter: CQL2 text that rows have to pass; "": none.
    """

    archive: str
    version: int
    detector: Detector
    min_score: float
    filter: str

    def fragments(self) -> list[int]:
        """Return the ids of the fragments, in the order of the archive."""
        with one_line_errors(self.archive):
            return [fragment.fragment_id for fragment in open_dataset(self.archive, self.version).get_fragments()]

    def find(self, fragment_id: int) -> Iterator[tuple[Counts, pa.Table]]:
        """Yield counts and the rows found of each batch of rows; columns `id`, `score` and `COLUMNS`."""
        from orbithash.search.segments.filters.expressions import parse_filter

        passes = parse_filter(self.filter) if self.filter else None
        # Only vectors and what the filter reads are read of all rows.
        names = list(dict.fromkeys(["vector", *(passes.columns if passes else ())]))
        archive = Archive.open(self.archive, self.version)
        with one_line_errors(self.archive):
            dataset: Any = open_dataset(self.archive, self.version)
            fragment = dataset.get_fragment(fragment_id)
            for batch in fragment.to_batches(columns=names, with_row_id=True, batch_size=_BATCH):
                table = pa.Table.from_batches([batch])
                matching = len(table)
                if passes is not None:
                    table = table.filter(pa.array(passes.mask(table)))
                    matching = len(table)
                yield self._found(archive, table, Counts(batch.num_rows, matching))

    def _found(self, archive: Archive, table: pa.Table, counts: Counts) -> tuple[Counts, pa.Table]:
        vectors, has_vector = fixed_size_rows(table["vector"])
        ids = table["_rowid"].to_numpy()[has_vector]
        scores = self._scores(vectors[has_vector])
        is_found = scores >= self.min_score
        ids, scores = ids[is_found], scores[is_found]
        rows = archive.take(ids, COLUMNS)
        rows = rows.add_column(0, "id", pa.array(ids, pa.uint64())).append_column("score", pa.array(scores))
        return counts._replace(without_vector=int((~has_vector).sum()), found=len(ids)), rows

    def _scores(self, vectors: npt.NDArray[np.int8]) -> npt.NDArray[np.float64]:
        """Return the score of each row, as a ranking by `Linear` does: the sums are exact, and then one product."""
        # Integers below 2^31 in float64, whose product uses a fast library and is exact in every order.
        dots = vectors.astype(np.float64) @ np.array(self.detector.weights, np.float64)
        return self.detector.offset + self.detector.scale * dots
