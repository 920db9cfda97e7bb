"""The folder of a run: what was asked for, and what came of it.

RUN/config.yaml      method and settings, as resolved
RUN/manifest.jsonl   which image is in which part
RUN/metrics.jsonl    one line an epoch
RUN/validation.jsonl what validation beside training found, until the run is complete
RUN/model/           the model folder of the best validation epoch; its presence says the run is complete
RUN/model-16/        models of a prefix of the code, where nested lengths were trained
RUN/ray/             Ray Train's storage: the last checkpoint and the best ones; elsewhere with --storage
RUN/tensorboard/     the same figures for TensorBoard
RUN/tracking.json    what TensorBoard, MLflow and W&B were told

Validation beside training notes what it found in a file of its own: the first worker writes the epochs, from its
checkpoint, which does not know of it.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import write_file
from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import Manifest
from orbithash.trainers.loop.loop import is_validated
from orbithash.trainers.loop.run import Run
from orbithash.trainers.methods import get_method

__all__ = [
    "claim_folder",
    "close_history",
    "note_validation",
    "open_run",
    "read_history",
    "unvalidated",
    "write_history",
]

HISTORY, BESIDE = "metrics.jsonl", "validation.jsonl"


def claim_folder(run: Run, folder: Path, storage: str | None = None) -> bool:
    """Makes the run folder; returns whether there was none. `storage`: where its checkpoints are, if not in it."""
    if (folder / "config.yaml").exists():
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"{folder}: no folder can be made there ({err.strerror}); give another --out") from err
    run.manifest.write(folder / "manifest.jsonl")
    fields = {"method": run.method, "data": str(run.root.absolute()), **run.config.model_dump()}
    if storage is not None:
        fields["storage"] = storage
    # Last: a folder with a config is a whole run folder.
    write_file(folder / "config.yaml", yaml.safe_dump(fields, sort_keys=False))
    return True


def open_run(folder: Path) -> Run:
    """The run that a folder holds; `root` is where its data lay. `InputError` when it is no run folder."""
    try:
        fields = yaml.safe_load((folder / "config.yaml").read_text())
        method, root = fields.pop("method"), Path(fields.pop("data"))
        # Where its checkpoints are changes nothing of the run.
        fields.pop("storage", None)
    except OSError as err:
        raise InputError(f"{folder}: not a run folder (config.yaml: {err.strerror}); training makes one") from err
    except (yaml.YAMLError, KeyError, AttributeError) as err:
        raise InputError(f"{folder}/config.yaml: damaged ({' '.join(str(err).split())})") from err
    config = load_config(get_method(method).Config, **fields)
    return Run(method, config, Manifest.read(folder / "manifest.jsonl"), root)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """One record for each epoch that has ended, with what was found of it beside training by now."""
    # An epoch that was trained anew was validated anew.
    beside = {record["epoch"]: record for record in _lines(folder / BESIDE)}
    return [record | beside.get(record["epoch"], {}) for record in _lines(folder / HISTORY)]


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """Makes these the epochs of the run."""
    _write(folder / HISTORY, history)


def note_validation(folder: Path, found: dict[str, Any]) -> None:
    """Notes what was found of an epoch beside training; one process at a time does it."""
    _write(folder / BESIDE, [*_lines(folder / BESIDE), found])


def close_history(folder: Path) -> None:
    """Makes one file of the epochs and of what was found of them beside training."""
    write_history(folder, read_history(folder))
    (folder / BESIDE).unlink(missing_ok=True)


def unvalidated(run: Run, history: list[dict[str, Any]]) -> list[int]:
    """The epochs that are validated beside training, and were not yet."""
    return [
        record["epoch"]
        for record in history
        if is_validated(run, record["epoch"]) and not any(name.startswith("validation/") for name in record)
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(record) + "\n" for record in records))
