"""The code of a Ray Train worker: run the training loop, report to Ray Train and to the driver."""

import errno
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.trainers.loop.loop import is_checkpointed, is_validated, train, validate
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import note_validation, open_run, write_history

__all__ = ["Board", "validate_checkpoint", "work"]

PROGRESS_INTERVAL_S = 0.5

# Errors of writing a checkpoint that another attempt cannot avoid.
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Board:
    """An actor that holds the progress of the first worker, and the message of an error that the user must correct."""

    def __init__(self) -> None:
        self._state: tuple[int, int, int, float] | None = None
        self._blame = ""

    def update(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        """Store the progress; see `Observer.on_step`."""
        self._state = epoch, step, num_steps, images_per_s

    def state(self) -> tuple[int, int, int, float] | None:
        """Return the arguments of the last `update`, or None."""
        return self._state

    def blame_user(self, message: str) -> None:
        """Store what is wrong with the user's input."""
        self._blame = message

    def blame(self) -> str:
        """Return the stored message, or ""."""
        return self._blame


def work(settings: dict[str, Any]) -> None:
    """Run the training loop in one worker."""
    import ray
    import ray.train
    import ray.train.torch

    if ray.get(settings["board"].blame.remote()):
        # Ray Train retries every failure; wrong input would only fail again.
        return
    folder = Path(settings["folder"])
    run = open_run(folder)
    context = ray.train.get_context()
    observer = _Reporter(run, settings, context.get_world_rank())
    checkpoint = ray.train.get_checkpoint()
    try:
        with checkpoint.as_directory() if checkpoint else nullcontext() as resume_from:
            train(
                run,
                observer,
                resume_from=Path(resume_from) if resume_from else None,
                device=str(ray.train.torch.get_device()),
                loading=settings["loading"],
                validates=settings["validates"],
            )
    except InputError as err:
        # Wrong input: the driver reports it in one line.
        ray.get(settings["board"].blame_user.remote(str(err)))
        raise
    except OSError as err:
        if err.errno in DISK_FAULTS:
            ray.get(settings["board"].blame_user.remote(f"a checkpoint cannot be written: {err}; free some space"))
        raise


def validate_checkpoint(checkpoint: Any, folder: str, device: str, loading: str) -> dict[str, Any]:
    """Return metrics and score of a checkpoint; runs as a task of Ray Train while the next epochs train.

    Ray Train runs one such task at a time, and repeats an interrupted one when the run resumes.
    """
    with checkpoint.as_directory() as state:
        record = validate(open_run(Path(folder)), Path(state), device, loading)
    note_validation(Path(folder), record)
    return record


class _Reporter:
    """The observer of the training loop: passes checkpoints and metrics to Ray Train, progress to the board."""

    def __init__(self, run: Run, settings: dict[str, Any], rank: int) -> None:
        self._run, self._rank = run, rank
        self._folder, self._board = Path(settings["folder"]), settings["board"]
        self._is_remote, self._validates = settings["is_remote"], settings["validates"]
        self._last_update = 0.0

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        if self._rank == 0 and (step == num_steps or time.monotonic() - self._last_update > PROGRESS_INTERVAL_S):
            self._last_update = time.monotonic()
            self._board.update.remote(epoch, step, num_steps, images_per_s)

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        import ray.train
        from ray.train import CheckpointConsistencyMode, CheckpointUploadMode

        if not is_checkpointed(self._run, len(history)):
            # Ray's report is a barrier that takes about a second, longer than an epoch on a small set.
            if self._rank == 0:
                write_history(self._folder, history)
            return
        checkpoint = None
        if self._rank == 0:
            temporary = Path(tempfile.mkdtemp())
            try:
                write_checkpoint(temporary)
            except BaseException:
                shutil.rmtree(temporary)
                raise
            checkpoint = ray.train.Checkpoint.from_directory(temporary)
            write_history(self._folder, history)
        if checkpoint is not None and self._is_remote:
            # Wait for the previous upload: a slow store must not cost more than one epoch if the run is killed, and
            # must not fill this disk.
            ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        # A barrier: every rank reports. Uploads to a remote store run while the next epoch trains; Ray Train keeps
        # their order, and a worker that has finished waits for its uploads.
        mode = CheckpointUploadMode.ASYNC if self._is_remote else CheckpointUploadMode.SYNC
        try:
            ray.train.report(
                history[-1],
                checkpoint=checkpoint,
                checkpoint_upload_mode=mode,
                delete_local_checkpoint_after_upload=True,
                validation=checkpoint is not None and not self._validates and is_validated(self._run, len(history)),
            )
        except BaseException:
            if checkpoint is not None:
                shutil.rmtree(checkpoint.path, ignore_errors=True)
            raise
