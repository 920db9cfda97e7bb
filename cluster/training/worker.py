"""What runs in a Ray Train worker: the one training loop, and how it reports to Ray and to the driver."""

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

# What no other attempt mends, where a checkpoint is written.
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Board:
    """An actor on which the first worker notes how far it is, and any worker what the user has to mend."""

    def __init__(self) -> None:
        self._state: tuple[int, int, int, float] | None = None
        self._blame = ""

    def update(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        """See `Observer.on_step`."""
        self._state = epoch, step, num_steps, images_per_s

    def state(self) -> tuple[int, int, int, float] | None:
        """What `update` was told last."""
        return self._state

    def blame_user(self, message: str) -> None:
        """Notes what is wrong with the user's input."""
        self._blame = message

    def blame(self) -> str:
        """What was noted; empty where nothing was."""
        return self._blame


def work(settings: dict[str, Any]) -> None:
    """What each worker runs."""
    import ray
    import ray.train
    import ray.train.torch

    if ray.get(settings["board"].blame.remote()):
        # Ray Train tries again whatever failed; what the user has to mend would only fail again.
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
        # The user's fault, which the driver is to say in one line.
        ray.get(settings["board"].blame_user.remote(str(err)))
        raise
    except OSError as err:
        if err.errno in DISK_FAULTS:
            ray.get(settings["board"].blame_user.remote(f"a checkpoint cannot be written: {err}; make room for it"))
        raise


def validate_checkpoint(checkpoint: Any, folder: str, device: str, loading: str) -> dict[str, Any]:
    """What a task of Ray Train's runs, while the next epochs train: metrics and score of one of the run's checkpoints.

    Ray Train runs one at a time, and again where a run that was cut short goes on.
    """
    with checkpoint.as_directory() as state:
        found = validate(open_run(Path(folder)), Path(state), device, loading)
    note_validation(Path(folder), found)
    return found


class _Reporter:
    """The loop's observer in a worker: checkpoints and metrics to Ray Train, progress to the board."""

    def __init__(self, run: Run, settings: dict[str, Any], rank: int) -> None:
        self._run, self._rank = run, rank
        self._folder, self._board = Path(settings["folder"]), settings["board"]
        self._is_remote, self._validates = settings["is_remote"], settings["validates"]
        self._told = 0.0

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        if self._rank == 0 and (step == num_steps or time.monotonic() - self._told > PROGRESS_INTERVAL_S):
            self._told = time.monotonic()
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
            # One upload at a time: a slow store must not leave a kill more than an epoch, or fill this disk.
            ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        # A barrier: every rank reports. To a store elsewhere the checkpoint goes while the next epoch
        # trains; Ray Train keeps their order, and a worker that is done waits for its uploads.
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
