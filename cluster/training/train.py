"""Train on Ray Train, from the command of the user to the exported model; `worker` runs in each worker."""

import os
import shutil
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from orbithash.cluster.output import say
from orbithash.cluster.output import track as track_progress
from orbithash.cluster.runtime import (
    check_gpu_share,
    check_resources,
    connected,
    cpus_per_worker,
    keeping_memory,
    worker_error,
)
from orbithash.cluster.training.checkpoints import NAME, Storage
from orbithash.cluster.training.tracking import Tracking, check_trackers
from orbithash.cluster.training.worker import PROGRESS_INTERVAL_S, Board, validate_checkpoint, work
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import BackboneSpec
from orbithash.trainers.data.loading import LOADINGS
from orbithash.trainers.dealing import deal
from orbithash.trainers.loop.export import best_epoch, export_models
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import (
    check_training,
    claim_folder,
    close_history,
    only_process,
    read_history,
    unvalidated,
)
from orbithash.trainers.methods import Fitted, get_method

__all__ = ["shares_of_batch", "train_on_ray"]

# Number of times that all workers are restarted from the last checkpoint after one of them died. A rank never waits for
# a dead peer: Ray Train ends the whole group as soon as one of its actors is dead.
MAX_FAILURES = 5

# Seconds to wait for free resources, and number of attempts. Each attempt may start fewer workers, if the user allows
# it: for some seconds after a node is lost, Ray Train still counts its resources.
START_TIMEOUT_S = 15
MAX_WAITS = 40


def train_on_ray(
    run: Run,
    folder: Path,
    num_workers: int | tuple[int, int] = 1,
    gpus_per_worker: float = 0,
    *,
    track: Sequence[str] = (),
    storage: str | None = None,
    keep: int = 1,
    loading: str = "auto",
    validate_beside: bool = False,
    side_by_side: int = 1,
) -> list[dict[str, Any]]:
    """Train `run` on Ray Train workers and write its run folder (see `run_folder`); return one record per epoch.

    An interrupted run with the same settings resumes after its last complete epoch. A complete run is not changed.

    Args:
        run: method, settings and data.
        folder: the run folder.
        num_workers: number of workers, or minimum and maximum. With a range, the cluster's free resources decide:
            after a lost node the others resume from the last checkpoint, and more workers start when there are
            resources again.
        gpus_per_worker: GPUs of each worker, a whole number.
        track: trackers in addition to TensorBoard.
        storage: path or URI of the checkpoints; None: that of the run when it began, else the run folder.
        keep: number of best checkpoints to keep, in addition to the last one.
        loading: see `trainers.loop.train`.
        validate_beside: validate in a task with the resources of one more worker while the next epochs train.
        side_by_side: number of such runs that share the CPUs of the cluster.

    Raises:
        InputError: wrong options, data or settings; too few resources; images that cannot be read; another process
            trains the run.
    """
    folder = folder.absolute()
    least, most = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    if least < 1:
        raise InputError(f"training with {least} workers; at least 1 is needed")
    check_gpu_share("--gpus-per-worker", gpus_per_worker, is_whole=True)
    if keep < 1:
        raise InputError(f"--keep is {keep}; at least 1 is needed")
    if loading not in LOADINGS:
        raise InputError(f"--loading is {loading!r}; the values are {', '.join(LOADINGS)}")
    if validate_beside and not run.manifest.part("validation"):
        raise InputError("--validate-beside needs a validation part; set --validation above 0")
    check_trackers(track)
    check_training(run, folder, (least, most))
    with only_process(folder):
        if (folder / "model").is_dir():
            say(f"{folder} is complete already; nothing to train")
            return read_history(folder)
        place = _storage_of(folder, storage)
        if place.uri != str(folder):
            place.check(is_new=not (folder / "config.yaml").exists())
        is_new = claim_folder(run, folder, None if storage is None else place.uri)
        tracking = None
        best: dict[str, Any] | None = None
        try:
            tracking = Tracking(run, folder, track)
            with connected():
                what = f"training with {least} workers" + (" and validation beside it" if validate_beside else "")
                check_resources(what, [{"CPU": 1, "GPU": gpus_per_worker}] * (least + validate_beside))
                num_cpus = cpus_per_worker((most + validate_beside) * side_by_side, gpus_per_worker)
                resources = {"CPU": float(num_cpus), "GPU": gpus_per_worker}
                settings = {"folder": str(folder), "loading": loading, "validates": not validate_beside}
                checkpoint, epoch = _fit(run, folder, (least, most), resources, place, keep, settings, tracking)
            history = read_history(folder)
            if missing := unvalidated(run, history):
                say(f"not validated: epoch {', '.join(map(str, missing))}; see the log of Ray Train's controller")
            best = next(record for record in history if record["epoch"] == epoch)
            with checkpoint.as_directory() as state:
                model, shorter = export_models(run, Path(state), best, _device(gpus_per_worker))
            close_history(folder)
        except InputError:
            if is_new and not (folder / "metrics.jsonl").exists():
                # No epoch is complete, so nothing is lost: the corrected command can use the same --out.
                shutil.rmtree(folder)
            raise
        finally:
            if tracking is not None:
                tracking.close(best)
        for short in shorter:
            short.save(folder / f"model-{short.bits}")
        model.save(folder / "model")
        _report_backbone(model.card.network.backbone)
        say(f"{_choice_of_epoch(run, history, best)}; the model is in {folder / 'model'}")
        return history


def _choice_of_epoch(run: Run, history: list[dict[str, Any]], best: dict[str, Any]) -> str:
    """Return which epoch the model is of, and why, for a terminal."""
    method = get_method(run.method)
    if issubclass(method, Fitted):
        return f"fitted to {len(run.images('train'))} images"
    metric = method.selection_metric
    if f"validation/{metric}" in best:
        reason = f"the best on the validation part: {metric} {best[f'validation/{metric}']:.4f}"
    elif metric is None:
        reason = "the last one, which this method always exports"
    else:
        reason = "the last one: nothing was validated"
    return f"epoch {best['epoch']} of {len(history)} is {reason}"


def _device(gpus_per_worker: float) -> str:
    """Return the device of the driver: a GPU only if the workers use GPUs."""
    import torch

    return "cuda" if gpus_per_worker and torch.cuda.is_available() else "cpu"


def _storage_of(folder: Path, asked: str | None) -> Storage:
    """Return the storage of a run: the given one, else the one that it began with, else its folder."""
    file = folder / "config.yaml"
    there = yaml.safe_load(file.read_text()).get("storage") or str(folder) if file.exists() else None
    if asked is None:
        return Storage(there or str(folder))
    if there not in (None, Storage.of(asked).uri):
        raise InputError(f"--storage is {asked}; the checkpoints of {folder} are in {there}")
    return Storage.of(asked)


def _fit(
    run: Run,
    folder: Path,
    workers: tuple[int, int],
    resources: dict[str, float],
    place: Storage,
    keep: int,
    settings: dict[str, Any],
    tracking: Tracking,
) -> tuple[Any, int]:
    """Run the workers to the end; return Ray Train's best checkpoint and its epoch."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    # On the driver's node, like Ray Train's own controller: other nodes may be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    least, most = workers
    environment = {"env_vars": {} if resources["GPU"] else keeping_memory()}
    validation = None
    if not settings["validates"]:
        task = {"folder": str(folder), "loading": settings["loading"], "device": "cuda" if resources["GPU"] else "cpu"}
        validation = ray.train.ValidationConfig(
            validate_checkpoint,
            ray.train.ValidationTaskConfig(task),
            {"num_cpus": resources["CPU"], "num_gpus": resources["GPU"], "runtime_env": environment},
        )
    trainer = TorchTrainer(
        work,
        validation_config=validation,
        train_loop_config={**settings, "board": board, "is_remote": place.is_remote},
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if least == most else workers,
            use_gpu=resources["GPU"] > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=NAME,
            storage_path=place.uri,
            worker_runtime_env=environment,
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=MAX_WAITS),
            # The best ones; Ray Train always keeps the last one in addition.
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=keep, checkpoint_score_attribute="score", checkpoint_score_order="max"
            ),
        ),
    )
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, run, folder, workers, tracking, done), daemon=True)
    watcher.start()
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as err:
        if blame := ray.get(board.blame.remote()):
            raise InputError(blame) from err
        if isinstance(err, ray.train.ControllerError) and "startup timed out" in str(err):
            raise RuntimeError(
                f"the cluster had no free resources for {least} workers with {resources['CPU']:g} CPUs and "
                f"{resources['GPU']:g} GPUs each; the same command resumes after the last complete epoch"
            ) from err
        raise worker_error(err) from err
    except SystemExit:
        # Ray Train raises it after Ctrl-C, when it has stopped its workers.
        say("interrupted; the same command resumes after the last complete epoch")
        raise KeyboardInterrupt from None
    finally:
        done.set()
        watcher.join()
        if threading.current_thread() is threading.main_thread():
            # Ray Train does not remove its own handler, which refers to the finished run.
            signal.signal(signal.SIGINT, on_interrupt)
    if blame := ray.get(board.blame.remote()):
        raise InputError(blame)
    tracking.follow(read_history(folder))
    records = [record for _, record in result.best_checkpoints]
    best = best_epoch(records)
    checkpoint, _ = result.best_checkpoints[records.index(best)]
    return checkpoint, best["epoch"]


def shares_of_batch(run: Run, workers: tuple[int, int]) -> str | None:
    """Return how many images of a batch each worker has, and the rule for the learning rate; None without steps."""
    kind, config = get_method(run.method), run.config
    if issubclass(kind, Fitted):
        return None

    def share(number: int) -> str:
        counts = deal(config.batch_size, kind.group_size, config.accumulate, number).of_ranks
        return f"{number} x {min(counts)}" + (f"-{max(counts)}" if min(counts) < max(counts) else "")

    of_each = " to ".join(share(number) for number in sorted(set(workers)))
    steps = f", in {run.config.accumulate} micro-batches" if run.config.accumulate > 1 else ""
    return (
        f"a batch has {run.config.batch_size} images, workers x images: {of_each}{steps}; learning rates are those of "
        "the whole batch for any number of workers"
    )


def _watch(
    board: Any, run: Run, folder: Path, workers: tuple[int, int], tracking: Tracking, done: threading.Event
) -> None:
    """Show the progress on the board, and log each epoch at the trackers, until `done`."""
    import ray

    num_images = len(run.manifest.part("train"))
    say(f"training {run.method}, {run.config.bits} bits, on {num_images} images; the workers are starting")
    if shares := shares_of_batch(run, workers):
        say(shares)
    state = None
    while state is None and not done.wait(PROGRESS_INTERVAL_S):
        state = ray.get(board.state.remote())
    if state is None:
        return
    # The number of steps per epoch depends on the method; the workers report it.
    _, _, num_steps, _ = state
    last_epoch = 0
    with track_progress("training", run.config.epochs * num_steps, "steps") as advance_to:
        while not done.wait(PROGRESS_INTERVAL_S):
            epoch, step, _, images_per_s = ray.get(board.state.remote())
            note = f"epoch {epoch}/{run.config.epochs}, {images_per_s:.0f} images/s"
            advance_to((epoch - 1) * num_steps + step, note)
            if epoch != last_epoch:
                history = read_history(folder)
                # Only up to the first epoch that is still being validated: W&B requires epochs in order.
                tracking.follow(history[: min(unvalidated(run, history), default=len(history) + 1) - 1])
                last_epoch = epoch


def _report_backbone(backbone: BackboneSpec) -> None:
    """Print where the weights come from, and their licence as the source states it."""
    if backbone.source != "embedding" and not backbone.has_random_weights:
        licence = f"; their licence is {backbone.licence}" if backbone.licence else ""
        say(f"the weights of {backbone.name} are from {backbone.origin}{licence}")
