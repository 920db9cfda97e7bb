"""The trials of a search and their files, so that a search killed at any moment can be resumed.

TUNE/trials/00001/       checkpoint of trial 1 after its last scored epoch, written by its process
TUNE/trials/00001.json   its outcome, written by the search when it ends

Each file appears whole or not at all, and these files alone decide which trials remain. The state that Ray Tune stores
is not used: it is several files, copied one after the other at most every ten seconds, which can contradict each other
after a kill.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orbithash.encoders.files import write_file

__all__ = ["Outcome", "Trial", "checkpoint_of", "name_of", "read_outcomes", "write_outcome"]


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
class Outcome:
    """Stored outcome of a trial that ended; `scores` are pairs of an epoch and its score, in the order of epochs."""

    number: int
    settings: dict[str, Any]
    scores: list[tuple[int, float]]
    problem: str

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


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write the outcome of a trial: from now on, it counts as ended."""
    write_file(folder / "trials" / f"{name_of(outcome.number)}.json", json.dumps(dataclasses.asdict(outcome)))


def read_outcomes(folder: Path) -> list[Outcome]:
    """Return the outcomes of the trials that ended, by number."""
    paths = sorted((folder / "trials").glob("*.json"), key=lambda path: int(path.stem))
    return [Outcome(**json.loads(path.read_text())) for path in paths]
