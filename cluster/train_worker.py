"""What runs in a Ray Train worker: the one training loop, and how it reports to Ray and to the driver."""

import errno
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.trainers.loop import train

__all__ = ["Board", "work"]

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

    from orbithash.cluster.train import open_run

    if ray.get(settings["board"].blame.remote()):
        # Ray Train tries again whatever failed; what the user has to mend would only fail again.
        return
    folder = Path(settings["folder"])
    run = open_run(folder)
    context = ray.train.get_context()
    observer = _Reporter(folder, settings["board"], context.get_world_rank(), settings["is_remote"])
    checkpoint = ray.train.get_checkpoint()
    try:
        with checkpoint.as_directory() if checkpoint else nullcontext() as resume_from:
            train(
                run,
                observer,
                resume_from=Path(resume_from) if resume_from else None,
                device=str(ray.train.torch.get_device()),
                loading=settings["loading"],
            )
    except InputError as err:
        # The user's fault, which the driver is to say in one line.
        ray.get(settings["board"].blame_user.remote(str(err)))
        raise
    except OSError as err:
        if err.errno in DISK_FAULTS:
            ray.get(settings["board"].blame_user.remote(f"a checkpoint cannot be written: {err}; make room for it"))
        raise


class _Reporter:
    """The loop's observer in a worker: checkpoints and metrics to Ray Train, progress to the board."""

    def __init__(self, folder: Path, board: Any, rank: int, is_remote: bool) -> None:
        self._folder, self._board, self._rank, self._is_remote = folder, board, rank, is_remote
        self._told = 0.0

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        if self._rank == 0 and (step == num_steps or time.monotonic() - self._told > PROGRESS_INTERVAL_S):
            self._told = time.monotonic()
            self._board.update.remote(epoch, step, num_steps, images_per_s)

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        import ray.train
        from ray.train import CheckpointConsistencyMode, CheckpointUploadMode

        checkpoint = None
        if self._rank == 0:
            temporary = Path(tempfile.mkdtemp())
            try:
                write_checkpoint(temporary)
            except BaseException:
                shutil.rmtree(temporary)
                raise
            checkpoint = ray.train.Checkpoint.from_directory(temporary)
            part = self._folder / ".metrics.jsonl.part"
            part.write_text("".join(json.dumps(line) + "\n" for line in history))
            part.replace(self._folder / "metrics.jsonl")
        if checkpoint is not None and self._is_remote:
            # One upload at a time: a slow store must not leave a kill more than an epoch, or fill this disk.
            ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        # A barrier: every rank reports every epoch. To a store elsewhere the checkpoint goes while the next epoch
        # trains; Ray Train keeps their order, and a worker that is done waits for its uploads.
        mode = CheckpointUploadMode.ASYNC if self._is_remote else CheckpointUploadMode.SYNC
        try:
            ray.train.report(
                history[-1],
                checkpoint=checkpoint,
                checkpoint_upload_mode=mode,
                delete_local_checkpoint_after_upload=True,
            )
        except BaseException:
            if checkpoint is not None:
                shutil.rmtree(checkpoint.path, ignore_errors=True)
            raise
