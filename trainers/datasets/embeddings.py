"""Tables of embeddings as datasets: a sample of the rows becomes the images of a manifest.

A row is named by its file and its number in it, and identified by the hash of its vector.
"""

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import listed
from orbithash.encoders.sources.embeddings.rows import EmbeddingRows
from orbithash.encoders.sources.embeddings.tables import EmbeddingTable
from orbithash.encoders.sources.folders import natural
from orbithash.trainers.datasets.images import Image, Images
from orbithash.trainers.datasets.layouts import first_problems

__all__ = ["EMBEDDINGS", "find_vectors", "read_vectors"]

# Name of the dataset.
EMBEDDINGS = "embeddings"

_log = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]


def find_vectors(
    root: Path, options: Sequence[str], max_rows: int | None, seed: int, min_rows: int
) -> tuple[Images, tuple[str, ...]]:
    """Return a random sample of a table's rows as images without a part, in the order of the table, and the classes.

    Rows that cannot be used are left out and counted in a warning, as are those of classes that are too small.

    Args:
        root: a Parquet file, or a folder of them.
        options: columns and layout, see `TableOptions`.
        max_rows: maximum size of the sample; None: all rows.
        seed: seed of the sample.
        min_rows: minimum number of rows of a class.

    Raises:
        InputError: as `EmbeddingTable.open` and `check_keys`, or no row can be used.
    """
    table = EmbeddingTable.open(root, options)
    table.check_keys()
    found: list[tuple[Image, str | None]] = []
    faults: list[str] = []
    for name, numbers, rows, chosen in _sampled(table, max_rows, seed):
        assert rows.vectors is not None, "read with vectors"
        labels, captions = (rows.columns.get(column) for column in ("label", "caption"))
        for number, position in zip(numbers, chosen.tolist(), strict=True):
            if position in rows.problems:
                faults.append(f"{name}#{number}: {rows.problems[position]}")
                continue
            caption = None if captions is None else captions[position].as_py()
            image = Image(
                id=rows.keys[position].as_py(),
                path=f"{name}#{number}",
                labels=(),
                split="",
                sha256=_hash(rows.vectors[position]),
                captions=() if caption is None else (caption,),
            )
            found.append((image, None if labels is None else labels[position].as_py()))
    if faults:
        _log.warning("%s: left out %d rows that cannot be used (first: %s)", root, len(faults), faults[0])
    if not found:
        raise listed(first_problems(faults), f"{root}: no row can be used")
    images, classes = _labelled(found, root, min_rows)
    return Images.of(images), classes


def read_vectors(root: Path, options: Sequence[str], images: Sequence[Image]) -> Vectors:
    """Return the vectors float32 [N, D] of the images of a manifest, in their order.

    Raises:
        InputError: the table has not these rows, or has other vectors than at the time of the split.
    """
    table = EmbeddingTable.open(root, options)
    vectors = np.zeros((len(images), table.dims), np.float32)
    places: dict[str, list[tuple[int, int]]] = {}
    for row, image in enumerate(images):
        name, _, number = image.path.rpartition("#")
        places.setdefault(name, []).append((int(number), row))
    # By file: numbers of the rows in it, ascending, and the places of their vectors in the result.
    sought = {name: np.array(sorted(pairs)).T for name, pairs in places.items()}
    is_read = np.zeros(len(images), np.bool_)
    for chunk in table.chunks():
        if chunk.name not in sought:
            continue
        numbers, targets = sought[chunk.name]
        if np.searchsorted(numbers, chunk.first) == np.searchsorted(numbers, chunk.stop):
            continue
        for rows in table.reader.read(chunk, places=False):
            assert rows.vectors is not None, "read with vectors"
            here = slice(*np.searchsorted(numbers, (rows.first, rows.first + len(rows.keys))))
            vectors[targets[here]] = rows.vectors[numbers[here] - rows.first]
            is_read[targets[here]] = True
    problems = [
        f"{image.path}: " + ("another vector than at the time of the split" if read else "absent")
        for image, read, vector in zip(images, is_read.tolist(), vectors, strict=True)
        if not read or _hash(vector) != image.sha256
    ]
    if problems:
        raise listed(first_problems(problems), f"{root} is not the data of this run's manifest")
    return vectors


def _sampled(
    table: EmbeddingTable, max_rows: int | None, seed: int
) -> Iterator[tuple[str, list[int], EmbeddingRows, npt.NDArray[np.int64]]]:
    """Yield the file's name, the numbers in the file, the rows of a batch, and the sample's positions in this batch."""
    rng = np.random.default_rng(seed)
    chunks = list(table.chunks())
    sizes = np.array([chunk.num_rows for chunk in chunks])
    # How many rows of each chunk a uniform sample without replacement has.
    num_rows = table.num_rows if max_rows is None else min(max_rows, table.num_rows)
    counts = rng.multivariate_hypergeometric(sizes, num_rows, method="marginals")
    for chunk, count in zip(chunks, counts.tolist(), strict=True):
        numbers = chunk.first + np.sort(rng.choice(chunk.num_rows, count, replace=False))
        if not count:
            continue
        for rows in table.reader.read(chunk):
            here = numbers[(numbers >= rows.first) & (numbers < rows.first + len(rows.keys))]
            yield chunk.name, here.tolist(), rows, here - rows.first


def _labelled(found: list[tuple[Image, str | None]], root: Path, min_rows: int) -> tuple[list[Image], tuple[str, ...]]:
    """Return the images with the indices of their classes, and the classes; classes that are too small are left out."""
    counts = Counter(label for _, label in found if label)
    small = {label for label, count in counts.items() if count < min_rows}
    if small == counts.keys():
        if small:
            _log.warning("%s: no class has %d rows, so labels are not used", root, min_rows)
        return [image for image, _ in found], ()
    if small:
        num = sum(counts[label] for label in small)
        _log.warning("%s: left out %d rows of %d classes with fewer than %d rows", root, num, len(small), min_rows)
    classes = tuple(sorted(counts.keys() - small, key=natural))
    indices = {name: index for index, name in enumerate(classes)}
    images = [
        dataclasses.replace(image, labels=(indices[label],) if label else ())
        for image, label in found
        if label not in small
    ]
    return images, classes


def _hash(vector: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(vector, np.float32).tobytes()).hexdigest()
