"""Training on Ray Train: the one training loop in each of its workers, from the user's command to the model."""

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
from orbithash.cluster.training.recipes import find_config
from orbithash.cluster.training.tracking import Tracking, check_trackers
from orbithash.cluster.training.worker import PROGRESS_INTERVAL_S, Board, validate_checkpoint, work
from orbithash.encoders.errors import InputError
from orbithash.trainers.data.loading import LOADINGS
from orbithash.trainers.loop.export import best_epoch, export_models
from orbithash.trainers.loop.run import Run, make_run
from orbithash.trainers.loop.run_folder import (
    check_training,
    claim_folder,
    close_history,
    read_history,
    unvalidated,
)
from orbithash.trainers.methods import get_method

__all__ = ["prepare_run", "train_on_ray"]

# So often workers that died are replaced, all of them, from the last checkpoint. A rank whose peer is gone does not
# wait for it: Ray Train ends the whole group as soon as one of its actors is dead.
MAX_FAILURES = 5

# So long, and so often, Ray Train waits for room for the workers when others hold it. It begins anew after each wait,
# with fewer workers where that is allowed: for some seconds after a node is lost, it counts on it still.
START_TIMEOUT_S = 15
MAX_WAITS = 40


def prepare_run(
    method: str,
    data: Path,
    dataset: str | None = None,
    protocol: str | None = None,
    config: Path | str | None = None,
    settings: Sequence[str] = (),
    *,
    split_seed: int = 0,
    validation: float = 0.1,
    captions: Path | None = None,
    **given: Any,
) -> Run:
    """The run that the user asked for; `InputError` with all that is wrong with the settings, or with the data."""
    file = None if config is None else find_config(str(config))
    return make_run(
        method,
        data,
        file,
        settings,
        dataset=dataset,
        protocol=protocol,
        seed=split_seed,
        validation=validation,
        captions=captions,
        **given,
    )


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
) -> list[dict[str, Any]]:
    """Trains `run` on Ray Train workers, goes on where an interrupted run of the same settings stopped.

    Of a least and a most number of workers, as many train as the cluster has room for: when a node is lost the others
    go on from the last checkpoint, and when there is room again they start once more with as many as it allows.
    Followed on TensorBoard, and where `track` says. Of the checkpoints the last and the `keep` best stay, in the run
    folder or in `storage`, which a run that goes on need not be told again. `loading`: see `trainers.loop.train`. With
    `validate_beside`, epochs are validated by a task with the resources of one more worker, while the next ones train.

    Returns the history; leaves the run folder described above. A complete run is left as it is.
    """
    folder = folder.absolute()
    least, most = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    if least < 1:
        raise InputError(f"training with {least} workers; at least 1 is needed")
    check_gpu_share("--gpus-per-worker", gpus_per_worker, is_whole=True)
    if keep < 1:
        raise InputError(f"--keep is {keep}; at least 1 checkpoint is kept")
    if loading not in LOADINGS:
        raise InputError(f"--loading is {loading!r}; there are {', '.join(LOADINGS)}")
    if validate_beside and not run.manifest.part("validation"):
        raise InputError("--validate-beside, but there is no validation part; leave --validation above 0")
    check_trackers(track)
    check_training(run, folder, (least, most))
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
            num_cpus = cpus_per_worker(most + validate_beside, gpus_per_worker)
            resources = {"CPU": float(num_cpus), "GPU": gpus_per_worker}
            settings = {"folder": str(folder), "loading": loading, "validates": not validate_beside}
            checkpoint, epoch = _fit(run, folder, (least, most), resources, place, keep, settings, tracking)
        history = read_history(folder)
        if missing := unvalidated(run, history):
            say(f"not validated: epoch {', '.join(map(str, missing))}; the log of Ray Train's controller says why")
        best = next(record for record in history if record["epoch"] == epoch)
        with checkpoint.as_directory() as state:
            model, shorter = export_models(run, Path(state), best)
        close_history(folder)
    except InputError:
        if is_new and not (folder / "metrics.jsonl").exists():
            # Nothing is lost, and the same --out is free for the command with the fault mended.
            shutil.rmtree(folder)
        raise
    finally:
        if tracking is not None:
            tracking.close(best)
    for short in shorter:
        short.save(folder / f"model-{short.bits}")
    model.save(folder / "model")
    metric = get_method(run.method).selection_metric
    if f"validation/{metric}" in best:
        why = f"the best on the validation part: {metric} {best[f'validation/{metric}']:.4f}"
    else:
        why = "the last one, as this method chooses" if metric is None else "the last one: nothing was validated"
    say(f"epoch {best['epoch']} of {len(history)} is {why}; the model is in {folder / 'model'}")
    return history


def _storage_of(folder: Path, asked: str | None) -> Storage:
    """Where the checkpoints of a run are: as asked for, else where they are by now, else in its folder."""
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
    """Runs the workers to the end and returns Ray Train's best checkpoint, and its epoch."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    # On the driver's node, as Ray Train's own controller is: any other may be lost.
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
            # The best ones, and always the last one too.
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=keep, checkpoint_score_attribute="score", checkpoint_score_order="max"
            ),
        ),
    )
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, run, folder, tracking, done), daemon=True)
    watcher.start()
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as err:
        if blame := ray.get(board.blame.remote()):
            raise InputError(blame) from err
        if isinstance(err, ray.train.ControllerError) and "startup timed out" in str(err):
            raise RuntimeError(
                f"the cluster has had no room for {least} workers with {resources['CPU']:g} CPUs and "
                f"{resources['GPU']:g} GPUs each; the same command goes on after the last whole epoch"
            ) from err
        raise worker_error(err) from err
    except SystemExit:
        # What Ray Train makes of Ctrl-C when it has stopped its workers.
        say("interrupted; the same command goes on after the last whole epoch")
        raise KeyboardInterrupt from None
    finally:
        done.set()
        watcher.join()
        if threading.current_thread() is threading.main_thread():
            # Ray Train leaves its own handler behind, for a run that is over.
            signal.signal(signal.SIGINT, on_interrupt)
    if blame := ray.get(board.blame.remote()):
        raise InputError(blame)
    tracking.follow(read_history(folder))
    records = [record for _, record in result.best_checkpoints]
    best = best_epoch(records)
    checkpoint, _ = result.best_checkpoints[records.index(best)]
    return checkpoint, best["epoch"]


def _watch(board: Any, run: Run, folder: Path, tracking: Tracking, done: threading.Event) -> None:
    """Shows what the board says, and tells of each epoch where it is followed, until `done`."""
    import ray

    num_images = len(run.manifest.part("train"))
    say(f"training {run.method}, {run.config.bits} bits, on {num_images} images; the workers are starting")
    state = None
    while state is None and not done.wait(PROGRESS_INTERVAL_S):
        state = ray.get(board.state.remote())
    if state is None:
        return
    # Only the method knows how many steps an epoch has.
    _, _, num_steps, _ = state
    told = 0
    with track_progress("training", run.config.epochs * num_steps, "steps") as advance_to:
        while not done.wait(PROGRESS_INTERVAL_S):
            epoch, step, _, images_per_s = ray.get(board.state.remote())
            note = f"epoch {epoch}/{run.config.epochs}, {images_per_s:.0f} images/s"
            advance_to((epoch - 1) * num_steps + step, note)
            if epoch != told:
                history = read_history(folder)
                # In order, for W&B takes no other.
                tracking.follow(history[: min(unvalidated(run, history), default=len(history) + 1) - 1])
                told = epoch
