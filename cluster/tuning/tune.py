"""Search for settings of a method on Ray Tune: TPE samples them, ASHA stops poor trials, finals compare the best.

TUNE/base/         the settings that all trials share and the split, as in a run folder
TUNE/search.yaml   the search space and the options of the search
TUNE/trials/       checkpoint, settings and scores of each trial
TUNE/ray/          Ray Tune's storage, with the logs of each start of the search
TUNE/finals/       trials/ and ray/ of the finals
TUNE/trials.json, report.html   settings and score of each trial, best first
TUNE/result.json   the comparison in the finals, and the chosen trial
TUNE/best.yaml     the chosen settings, for `train --config`

A trial is one process, so that trials never wait for workers of each other. The first trial uses the settings as given
and is trained to its end, as the reference for the others. The test part is never used.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orbithash.cluster.output import say
from orbithash.cluster.runtime import check_resources, connected
from orbithash.cluster.tuning.finals import Candidate, Finals, candidate, decide, final_seeds, finalists
from orbithash.cluster.tuning.options import Tuning, check_tuning
from orbithash.cluster.tuning.running import run_trials
from orbithash.cluster.tuning.sampling import sample_settings
from orbithash.cluster.tuning.trials import Record, Trial
from orbithash.cluster.tuning.worker import WORST, configured
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_folder, write_file
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import claim_folder, only_process

__all__ = ["Result", "best_config", "tune"]


@dataclass(frozen=True)
class Result:
    """The result of a search.

    Attributes:
        metric: metric on the validation part.
        trials: the trials of the search, the best one first.
        finals: the comparison over several seeds; None for a search without finals.
    """

    metric: str
    trials: list[Trial]
    finals: Finals | None

    @property
    def chosen(self) -> Trial:
        """The trial of the search with the chosen settings: the best mean of the finals, or else the best score."""
        if self.finals is None:
            return self.trials[0]
        return self._trial(self.finals.chosen)

    @property
    def given(self) -> Trial:
        """The trial with the settings as given."""
        return self._trial(0)

    def _trial(self, number: int) -> Trial:
        return next(trial for trial in self.trials if trial.number == number)

    def to_plain(self) -> dict[str, Any]:
        """Return what result.json holds, from which `read` makes the result again with the trials of trials.json."""
        finals = None if self.finals is None else dataclasses.asdict(self.finals)
        return {"metric": self.metric, "chosen": dataclasses.asdict(self.chosen), "finals": finals}

    @classmethod
    def read(cls, folder: Path) -> "Result":
        """Return the result of a search that is complete."""
        fields = json.loads((folder / "result.json").read_text())
        finals = fields["finals"]
        if finals is not None:
            finals = Finals(**{**finals, "candidates": [Candidate(**each) for each in finals["candidates"]]})
        trials = [Trial(**each) for each in json.loads((folder / "trials.json").read_text())]
        return cls(fields["metric"], trials, finals)


def tune(run: Run, tuning: Tuning, folder: Path) -> Result:
    """Run the trials and the finals; write trials.json and result.json.

    An interrupted search of the same options resumes.

    Raises:
        InputError: wrong options, before anything starts; no trial has a score.
    """
    folder = folder.absolute()
    check_tuning(run, tuning, folder)
    if (folder / "result.json").exists():
        say(f"{folder} is complete already; nothing to search")
        return Result.read(folder)
    with only_process(folder), connected():
        check_resources("a trial", [{"CPU": tuning.cpus, "GPU": tuning.gpus}])
        _claim(run, tuning, folder)
        trials = _search(run, tuning, folder)
        finals = _finals(run, tuning, folder, trials) if tuning.num_finalists else None
    result = Result(tuning.metric, trials, finals)
    write_file(folder / "result.json", json.dumps(result.to_plain(), indent=1))
    # As it is read again: without tuples.
    return Result.read(folder)


def _claim(run: Run, tuning: Tuning, folder: Path) -> None:
    """Write the options of the search, and the run folder that its trials share."""
    try:
        write_file(folder / "search.yaml", yaml.safe_dump(tuning.to_plain(), sort_keys=False))
        # Whole or not at all: a killed search would refuse an incomplete run folder when it is run again.
        if not (folder / "base" / "config.yaml").exists():
            with new_folder(folder / "base") as part:
                claim_folder(run, part)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error


def _search(run: Run, tuning: Tuning, folder: Path) -> list[Trial]:
    """Run the trials of the search and write trials.json; return them, the best one first."""

    def propose(number: int, records: Sequence[Record]) -> dict[str, Any]:
        return sample_settings(run.config, tuning.space, number, tuning.seed, records)

    trials = run_trials("trials", folder / "base", folder, tuning, tuning.num_trials, propose, run.config.epochs)
    trials.sort(key=_rank, reverse=True)
    if _rank(trials[0]) == WORST:
        raise InputError(f"no trial has a {tuning.metric}: {trials[0].problem or f'see the logs in {folder}/ray'}")
    write_file(folder / "trials.json", json.dumps([dataclasses.asdict(trial) for trial in trials], indent=1))
    return trials


def _rank(trial: Trial) -> float:
    """Return the score of a trial; the worst one if it ended with an error, as training with its settings would."""
    return WORST if trial.score is None or trial.problem else trial.score


def _finals(run: Run, tuning: Tuning, folder: Path, trials: Sequence[Trial]) -> Finals:
    """Train the finalists and the given settings with each seed, and compare them; `trials` has the best first."""
    seeds = final_seeds(run.config.seed, tuning.num_seeds)
    chosen = finalists(trials, tuning.num_finalists)
    plan = [{**finalist.settings, "seed": seed} for finalist in chosen for seed in seeds]

    def propose(number: int, records: Sequence[Record]) -> dict[str, Any]:
        return plan[number]

    runs = run_trials("runs of the finals", folder / "base", folder / "finals", tuning, len(plan), propose)
    of_finalist = [runs[start : start + len(seeds)] for start in range(0, len(runs), len(seeds))]
    finals = decide(seeds, list(map(candidate, chosen, of_finalist)))
    if finals is None:
        raise InputError(f"no settings have a score with every seed of the finals: {runs[0].problem}")
    return finals


def best_config(run: Run, chosen: Trial) -> str:
    """Return the chosen settings as YAML, for `train --config`."""
    config = configured(run, chosen.settings).config
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
