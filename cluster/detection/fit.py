"""Fit a detector to marked rows of the archive of a gateway."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import write_file
from orbithash.encoders.text_files import read_lines
from orbithash.search.client.client import Client
from orbithash.search.detectors.detector import Detector
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.rankings import Shuffle

__all__ = ["fit_to_keys", "read_detector", "read_keys", "summary", "write_detector"]


def read_keys(option: str, values: Sequence[str]) -> list[str]:
    """Return keys: each value is a key, or @FILE with one key per line. Raises `InputError` for an invalid file."""
    keys: list[str] = []
    for value in values:
        if not value.startswith("@"):
            keys.append(value)
            continue
        try:
            keys += [line for line in read_lines(Path(value[1:])) if line.strip()]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or f"it {error}"
            raise InputError(f"{option} {value}: the keys cannot be read: {reason}") from error
    return keys


def fit_to_keys(client: Client, good: Sequence[str], bad: Sequence[str], seed: int = 0) -> Detector:
    """Return the detector of rows marked by key; rows that `seed` draws from the archive are weak negatives.

    Raises:
        InputError: a key without a row or with two marks, an archive or a row without stored vectors, no good row.
    """
    import numpy as np

    from orbithash.encoders.vectors import VectorSpec
    from orbithash.search.detectors.fitting import MAX_BACKGROUND, fit_detector

    good, bad = list(dict.fromkeys(good)), list(dict.fromkeys(bad))
    if both := set(good) & set(bad):
        raise InputError(f"{min(both)!r} is both good and bad; give it once")
    served = client.describe()
    if not served.vector_dims:
        raise InvalidQuery(
            (
                "detector",
                "the archive has no stored vectors; encode it again with a model that stores vectors (vector_dims)",
            )
        )
    rows = client.get([*good, *bad], include=("vector",))
    for key in (*good, *bad):
        if key not in rows:
            raise InputError(f"no row of the archive has the key {key!r}")
        if not rows[key].stored_vector:
            raise InputError(f"the row {key!r} has no stored vector; mark another one")
    drawn = client.rank(Shuffle(seed), k=MAX_BACKGROUND, include=("vector",))
    marked = {row.id for row in rows.values()}
    background = [hit.extra.get("vector") or b"" for hit in drawn.hits if hit.id not in marked]
    vectors = ([rows[key].stored_vector or b"" for key in good], [rows[key].stored_vector or b"" for key in bad])
    spec = VectorSpec(served.vector_dims, served.vector_scale)
    parts = [np.frombuffer(b"".join(part), np.int8).reshape(-1, spec.dims) for part in (*vectors, background)]
    return fit_detector(parts[0], parts[1], served.model_id, spec, parts[2])


def summary(detector: Detector) -> dict[str, Any]:
    """Return the marks and the estimates of a detector, for --json."""
    names = ("model_id", "num_good", "num_bad", "num_background", "precision", "recall", "folds")
    return {name: getattr(detector, name) for name in names}


def write_detector(detector: Detector, path: Path) -> None:
    """Write the file of a detector. Raises `InputError` if it cannot be written."""
    try:
        write_file(path, detector.to_json())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def read_detector(path: Path) -> Detector:
    """Return the detector of a file. Raises `InputError` if it cannot be read, or is no valid detector."""
    from orbithash.search.detectors.detector import MAX_JSON_CHARS

    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_CHARS + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        return Detector.from_json(content)
    except InvalidQuery as error:
        raise InputError(f"{path}: {error.violations[0][1]}") from error
