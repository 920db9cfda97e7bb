"""Experiment trackers: TensorBoard always, MLflow and Weights & Biases on request.

The driver logs each epoch, not a worker: the user's environment variables, by which these libraries find their servers,
are set in the driver. The number of logged epochs is stored, so that a resumed run continues its log.
"""

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from orbithash.cluster.output import say
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import write_file
from orbithash.trainers.loop.run import Run

__all__ = ["TRACKERS", "Tracking", "check_trackers"]

# File in the run folder: the identifiers of the run at the trackers, and the number of logged epochs.
STATE = "tracking.json"


class _Tracker(Protocol):
    """One experiment tracker. Every failure raises an exception."""

    def epoch(self, number: int, values: dict[str, float]) -> None:
        """Log a finished epoch."""

    def close(self, best: dict[str, float] | None) -> None:
        """Finish the log. `best`: values of the epoch that became the model; None: training did not complete."""


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, name: str, settings: dict[str, Any], state: dict[str, Any], folder: Path) -> None:
        from tensorboardX import SummaryWriter

        # By default files are named by the second: a run resumed within it would overwrite its own file.
        self._writer = SummaryWriter(str(folder / "tensorboard"), filename_suffix=f".{time.time_ns()}")
        if "tensorboard" not in state:
            state["tensorboard"] = name
            rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
            self._writer.add_text("settings", f"| | |\n|---|---|\n{rows}")

    def epoch(self, number: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, number)
        self._writer.flush()

    def close(self, best: dict[str, float] | None) -> None:
        for key, value in (best or {}).items():
            self._writer.add_scalar(f"best/{key}", value, int((best or {})["epoch"]))
        self._writer.close()


class _MLflow:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME, else `orbithash`, on the server MLFLOW_TRACKING_URI."""

    def __init__(self, name: str, settings: dict[str, Any], state: dict[str, Any], folder: Path) -> None:
        # The default is to retry an absent server for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if "mlflow" in state:
            self._client.update_run(state["mlflow"], status="RUNNING")
        else:
            experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "orbithash")
            experiment = self._client.get_experiment_by_name(experiment_name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(experiment_name)
            state["mlflow"] = self._client.create_run(number, run_name=name).info.run_id
            params = [Param(key, str(value)) for key, value in settings.items()]
            self._client.log_batch(state["mlflow"], params=params)
        self._run = state["mlflow"]

    def _log(self, values: dict[str, float], number: int) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        metrics = [Metric(key, value, now, number) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def epoch(self, number: int, values: dict[str, float]) -> None:
        self._log(values, number)

    def close(self, best: dict[str, float] | None) -> None:
        if best:
            self._log({f"best/{key}": value for key, value in best.items()}, int(best["epoch"]))
        self._client.set_terminated(self._run, "FINISHED" if best else "KILLED")


class _WandB:
    """A run of the project WANDB_PROJECT, else `orbithash`; its files are in RUN/wandb."""

    def __init__(self, name: str, settings: dict[str, Any], state: dict[str, Any], folder: Path) -> None:
        import wandb

        state.setdefault("wandb", uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "orbithash"),
            name=name,
            id=state["wandb"],
            resume="allow",
            dir=folder,
            config=settings,
            # No messages of W&B, no capture of the output.
            settings=wandb.Settings(silent=True, console="off"),
        )

    def epoch(self, number: int, values: dict[str, float]) -> None:
        self._run.log(values, step=number)

    def close(self, best: dict[str, float] | None) -> None:
        self._run.summary.update({f"best/{key}": value for key, value in (best or {}).items()})
        self._run.finish(exit_code=0 if best else 1)


# Tracker and the module that it needs, by name.
TRACKERS = {"mlflow": (_MLflow, "mlflow"), "wandb": (_WandB, "wandb")}


def check_trackers(names: Sequence[str]) -> None:
    """Raise `InputError` for an unknown tracker, or for one whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"--track is {name!r}; the trackers are {', '.join(TRACKERS)}")
        module = TRACKERS[name][1]
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"--track {name} needs {module}, which is not installed; run: pip install 'orbithash[{name}]'"
            )


class Tracking:
    """All trackers of one run. A tracker that fails is dropped; training continues."""

    def __init__(self, run: Run, folder: Path, names: Sequence[str] = ()) -> None:
        """Open the trackers; raise `InputError` if one of `names` cannot be reached or refuses this user."""
        self._file = folder / STATE
        self._state: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {"epochs": 0}
        settings = {
            "method": run.method,
            "data": str(run.root),
            "dataset": run.manifest.dataset,
            "manifest_sha256": run.manifest.sha256,
            **run.config.model_dump(),
        }
        kinds: dict[str, Any] = {"tensorboard": _TensorBoard, **{name: TRACKERS[name][0] for name in names}}
        self._trackers: dict[str, _Tracker] = {}
        for name, kind in kinds.items():
            try:
                self._trackers[name] = kind(folder.name, settings, self._state, folder)
            except Exception as err:
                self.close(None)
                raise InputError(f"--track {name}: {_first_line(err)}; see the environment variables it reads") from err
        self._save()

    def follow(self, history: list[dict[str, Any]]) -> None:
        """Log the epochs that are not logged yet."""
        for record in history[self._state["epochs"] :]:
            values = _values(record)
            for name, tracker in list(self._trackers.items()):
                try:
                    tracker.epoch(record["epoch"], values)
                except Exception as err:
                    self._drop(name, err)
            self._state["epochs"] = record["epoch"]
            self._save()

    def close(self, best: dict[str, Any] | None) -> None:
        """Finish the logs. `best`: record of the epoch that became the model; None: training did not complete."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.close(None if best is None else {"epoch": best["epoch"], **_values(best)})
            except Exception as err:
                self._drop(name, err)

    def _drop(self, name: str, err: Exception) -> None:
        del self._trackers[name]
        say(f"{name}: {_first_line(err)}; training continues without it")

    def _save(self) -> None:
        write_file(self._file, json.dumps(self._state))


def _values(record: dict[str, Any]) -> dict[str, float]:
    """Return the logged values of an epoch: losses, metrics, rates, and the fraction of its time spent on loading."""
    # TensorBoard and MLflow allow no @ in a name.
    values = {key.replace("@", "_at_"): float(value) for key, value in record.items() if key not in ("epoch", "score")}
    # A fitted method has no steps, for which images could be late.
    if "waited_for_data_s" in record:
        values["waited_share"] = record["waited_for_data_s"] / record["seconds"]
    return values


def _first_line(err: Exception) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[0] if lines else type(err).__name__
