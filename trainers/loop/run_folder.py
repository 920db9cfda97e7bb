"""The folder of a run: settings, manifest, history and models.

RUN/config.yaml      method and all settings
RUN/manifest.parquet the part of each image
RUN/metrics.jsonl    one line per epoch
RUN/validation.jsonl metrics of validation that runs beside training, until the run is complete
RUN/model/           the model of the best validation epoch; it exists if and only if the run is complete
RUN/model-16/        models of prefixes of the code, if nested lengths were trained
RUN/ray/             Ray Train's checkpoints, the last and the best ones; elsewhere with --storage
RUN/checkpoints/     checkpoints of `orbithash.trainers.train`, until the run is complete
RUN/tensorboard/     the same metrics for TensorBoard
RUN/.lock            held by the process that trains
RUN/tracking.json    state of TensorBoard, MLflow and W&B

Validation beside training writes a file of its own, because the first worker rewrites `metrics.jsonl` from its
checkpoint, which lacks these metrics.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import write_file
from orbithash.encoders.sources.image_roots import image_root
from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import MANIFEST, Manifest
from orbithash.trainers.locks import LOCK, claim
from orbithash.trainers.loop.loop import is_validated
from orbithash.trainers.loop.run import Run, check_run
from orbithash.trainers.methods import get_method

__all__ = [
    "check_training",
    "claim_folder",
    "close_history",
    "note_validation",
    "only_process",
    "open_run",
    "read_history",
    "unvalidated",
    "write_history",
]

CONFIG, HISTORY, BESIDE = "config.yaml", "metrics.jsonl", "validation.jsonl"


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Run the block as the only process that works in a folder; it is created, and removed if it stays empty.

    Raises:
        InputError: another process works there, or the folder cannot be created.
    """
    _create(folder)
    release = claim(folder / LOCK)
    if release is None:
        raise InputError(f"{folder}: another process works there; wait until it has ended, or give another --out")
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
            # Fails for all but an empty folder.
            folder.rmdir()
        release()


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"{folder}: no folder can be created there ({err.strerror}); give another --out") from err


def claim_folder(run: Run, folder: Path, storage: str | None = None) -> bool:
    """Create the run folder and return whether it is new; `storage` is the place of its checkpoints, if another."""
    if (folder / CONFIG).exists():
        return False
    _create(folder)
    fields = {"method": run.method, "data": str(image_root(run.root)), **run.config.model_dump()}
    if storage is not None:
        fields["storage"] = storage
    try:
        run.manifest.write(folder / MANIFEST)
        # Written last: a folder with a config is complete.
        write_file(folder / CONFIG, yaml.safe_dump(fields, sort_keys=False))
    except OSError as err:
        reason = err.strerror or str(err)
        raise InputError(f"{folder}: the run cannot be written there ({reason}); give another --out") from err
    return True


def _is_begun(folder: Path) -> bool:
    """Return whether the folder holds only what `claim_folder` had written when it was killed."""
    begun = tuple(f".{name}." for name in (MANIFEST, CONFIG))
    if any(path.name not in (MANIFEST, LOCK) and not path.name.startswith(begun) for path in folder.iterdir()):
        return False
    try:
        return not (folder / MANIFEST).exists() or bool(Manifest.read(folder / MANIFEST).images)
    except InputError:
        # Another file of this name.
        return False


def check_training(run: Run, folder: Path, num_workers: int | tuple[int, int] = 1) -> None:
    """Raise `InputError` if the folder holds something else, or if `check_run` finds a problem of an unfinished run."""
    if (folder / CONFIG).exists():
        existing = open_run(folder)
        new, old = run.config.model_dump(), existing.config.model_dump()
        differences = [f"{key} was {old[key]!r}, is {new[key]!r}" for key in new if new[key] != old.get(key)]
        if existing.method != run.method:
            differences = [f"method was {existing.method}, is {run.method}"]
        if existing.manifest.sha256 != run.manifest.sha256:
            differences.append("the data or their split are not the same")
        if differences:
            raise InputError(f"{folder} holds another run ({'; '.join(differences)}); give another --out")
    elif folder.is_dir() and not _is_begun(folder):
        raise InputError(f"{folder} is not empty and holds no run; give another --out")
    if not (folder / "model").is_dir():
        check_run(run, num_workers)


def open_run(folder: Path) -> Run:
    """Return the run of a folder, with the data folder of its training as `root`; `InputError` for any other folder."""
    try:
        fields = yaml.safe_load((folder / CONFIG).read_text())
        method, root = fields.pop("method"), image_root(fields.pop("data"))
        # The place of the checkpoints is not part of the run.
        fields.pop("storage", None)
    except OSError as err:
        raise InputError(f"{folder}: not a run folder (config.yaml: {err.strerror}); training creates one") from err
    except (yaml.YAMLError, KeyError, AttributeError, TypeError, UnicodeDecodeError) as err:
        raise InputError(f"{folder}/config.yaml: damaged ({' '.join(str(err).split())})") from err
    config = load_config(get_method(method).Config, **fields)
    return Run(method, config, Manifest.read(folder / MANIFEST), root)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return one record per completed epoch, with the metrics of validation beside training that exist so far."""
    # Of an epoch that was trained twice, the later validation counts.
    beside = {record["epoch"]: record for record in _lines(folder / BESIDE)}
    return [record | beside.get(record["epoch"], {}) for record in _lines(folder / HISTORY)]


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write the records of all epochs."""
    _write(folder / HISTORY, history)


def note_validation(folder: Path, found: dict[str, Any]) -> None:
    """Add the metrics of one epoch, computed beside training; only one process may call it at a time."""
    _write(folder / BESIDE, [*_lines(folder / BESIDE), found])


def close_history(folder: Path) -> None:
    """Merge the metrics of validation beside training into `metrics.jsonl`."""
    write_history(folder, read_history(folder))
    (folder / BESIDE).unlink(missing_ok=True)


def unvalidated(run: Run, history: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of the epochs whose validation beside training is missing."""
    return [
        record["epoch"]
        for record in history
        if is_validated(run, record["epoch"]) and not any(name.startswith("validation/") for name in record)
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(record) + "\n" for record in records))
