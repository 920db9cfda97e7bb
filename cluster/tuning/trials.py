"""The trials of a search and their files, so that a search killed at any moment can be resumed.

TUNE/trials/00001.json   settings of trial 1, written when it starts; written again with its scores when it ends
TUNE/trials/00001/       checkpoint of trial 1 after its last scored epoch, written by its process

Each file appears whole or not at all, and these files alone decide which trials remain and which settings are sampled
next. The state that Ray Tune stores is not used: it is several files, copied one after the other at most every ten
seconds, which can contradict each other after a kill.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orbithash.encoders.files import write_file

__all__ = ["Record", "Trial", "checkpoint_of", "name_of", "read_record", "read_records", "write_record"]


@dataclass(frozen=True)
class Trial:
    """One trial and its best result.

    Attributes:
        number: 0 for the trial with the settings as given, then counting up.
        settings: values of the settings of the space.
        score: best value of the metric; None if no epoch was scored.
        epoch: epoch of the best value.
        epochs: number of epochs before the trial ended or was stopped.
        problem: the error that ended the trial, or "".
    """

    number: int
    settings: dict[str, Any]
    score: float | None
    epoch: int
    epochs: int
    problem: str


@dataclass(frozen=True)
class Record:
    """What is stored of a trial.

    Attributes:
        number: number of the trial.
        settings: values of the settings of the space.
        scores: pairs of an epoch and its score, in the order of epochs; none before the trial has ended.
        problem: the error that ended the trial, or "".
        is_ended: whether the trial has ended; otherwise it is resumed with the same settings.
    """

    number: int
    settings: dict[str, Any]
    scores: Sequence[tuple[int, float]] = ()
    problem: str = ""
    is_ended: bool = False

    def trial(self) -> Trial:
        """Return the trial with its best result."""
        if not self.scores:
            return Trial(self.number, self.settings, None, 0, 0, self.problem)
        epoch, score = max(self.scores, key=lambda scored: scored[1])
        return Trial(self.number, self.settings, score, epoch, self.scores[-1][0], self.problem)


def name_of(number: int) -> str:
    """Return the name of a trial in folders."""
    return f"{number:05}"


def checkpoint_of(folder: Path, number: int) -> Path:
    """Return the folder of the checkpoint of a trial."""
    return folder / "trials" / name_of(number)


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a trial."""
    write_file(_path(folder, record.number), json.dumps(dataclasses.asdict(record)))


def read_record(folder: Path, number: int) -> Record:
    """Return the record of a trial that was started."""
    return _read(_path(folder, number))


def read_records(folder: Path) -> list[Record]:
    """Return the records of the trials that were started, by number."""
    return [_read(path) for path in sorted((folder / "trials").glob("*.json"), key=lambda path: int(path.stem))]


def _path(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{name_of(number)}.json"


def _read(path: Path) -> Record:
    return Record(**json.loads(path.read_text()))
