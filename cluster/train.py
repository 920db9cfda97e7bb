"""Training on Ray Train: the run folder, and the one training loop in each of its workers.

RUN/config.yaml      method and settings, as resolved
RUN/manifest.jsonl   which image is in which part
RUN/metrics.jsonl    one line an epoch
RUN/model/           the model folder of the best validation epoch; its presence says the run is complete
RUN/model-16/        models of a prefix of the code, where nested lengths were trained
RUN/ray/             Ray Train's storage: the last checkpoint and the best one
"""

import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from orbithash.cluster.progress import say, track
from orbithash.cluster.runtime import check_resources, connected, keeping_memory, worker_error
from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import Manifest, make_manifest
from orbithash.trainers.loop import best_epoch, export_models, train
from orbithash.trainers.methods import get_method
from orbithash.trainers.run import Run, check_run

__all__ = ["check_training", "claim_folder", "open_run", "prepare_run", "read_history", "train_on_ray"]

# A worker that dies is replaced this often, from the last checkpoint.
MAX_FAILURES = 2

PROGRESS_INTERVAL_S = 0.5


def prepare_run(
    method: str,
    data: Path,
    dataset: str | None = None,
    protocol: str | None = None,
    config: Path | None = None,
    settings: Sequence[str] = (),
    *,
    split_seed: int = 0,
    validation: float = 0.1,
    captions: Path | None = None,
    **given: Any,
) -> Run:
    """The run that the user asked for; `InputError` with all that is wrong with the settings, or with the data."""
    resolved = load_config(get_method(method).Config, config, settings, **given)
    manifest = make_manifest(data.absolute(), dataset, protocol, split_seed, validation, captions)
    return Run(method, resolved, manifest, data.absolute())


def open_run(folder: Path) -> Run:
    """The run that a folder holds; `root` is where its data lay. `InputError` when it is no run folder."""
    try:
        fields = yaml.safe_load((folder / "config.yaml").read_text())
        method, root = fields.pop("method"), Path(fields.pop("data"))
    except OSError as err:
        raise InputError(f"{folder}: not a run folder (config.yaml: {err.strerror}); training makes one") from err
    except (yaml.YAMLError, KeyError, AttributeError) as err:
        raise InputError(f"{folder}/config.yaml: damaged ({' '.join(str(err).split())})") from err
    config = load_config(get_method(method).Config, **fields)
    return Run(method, config, Manifest.read(folder / "manifest.jsonl"), root)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """One record for each epoch that has ended."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_on_ray(run: Run, folder: Path, num_workers: int = 1, gpus_per_worker: float = 0) -> list[dict[str, Any]]:
    """Trains `run` on Ray Train workers, goes on where an interrupted run of the same settings stopped.

    Returns the history; leaves the run folder described above. A complete run is left as it is.
    """
    folder = folder.absolute()
    if num_workers < 1 or not gpus_per_worker >= 0:
        raise InputError(f"{num_workers} workers with {gpus_per_worker:g} GPUs each; at least 1 with 0 is needed")
    check_training(run, folder, num_workers)
    if (folder / "model").is_dir():
        say(f"{folder} is complete already; nothing to train")
        return read_history(folder)
    is_new = claim_folder(run, folder)
    try:
        with connected():
            import ray

            num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // num_workers)
            check_resources(f"training with {num_workers} workers", num_workers, num_workers * gpus_per_worker)
            checkpoint = _fit(run, folder, num_workers, {"CPU": num_cpus, "GPU": gpus_per_worker})
    except InputError:
        if is_new and not (folder / "metrics.jsonl").exists():
            # Nothing is lost, and the same --out is free for the command with the fault mended.
            shutil.rmtree(folder)
        raise
    history = read_history(folder)
    model, shorter = export_models(run, checkpoint)
    for short in shorter:
        short.save(folder / f"model-{short.bits}")
    model.save(folder / "model")
    best = model.card.metrics
    metric = get_method(run.method).selection_metric
    if f"validation/{metric}" in best:
        why = f"the best on the validation part: {metric} {best[f'validation/{metric}']:.4f}"
    else:
        why = "the last one, as this method chooses" if metric is None else "the last one: there is no validation part"
    say(f"epoch {best['epoch']} of {len(history)} is {why}; the model is in {folder / 'model'}")
    return history


def check_training(run: Run, folder: Path, num_workers: int = 1) -> None:
    """`InputError` when the folder holds something else, or with all that the workers would find after a long start."""
    if (folder / "config.yaml").exists():
        there = open_run(folder)
        mine, theirs = run.config.model_dump(), there.config.model_dump()
        other = [f"{key} was {theirs[key]!r}, is {mine[key]!r}" for key in mine if mine[key] != theirs.get(key)]
        if there.method != run.method:
            other = [f"method was {there.method}, is {run.method}"]
        if there.manifest.sha256 != run.manifest.sha256:
            other.append("the data or their split are not the same")
        if other:
            raise InputError(f"{folder} holds another run ({'; '.join(other)}); give another --out")
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no run; give another --out")
    if not (folder / "model").is_dir():
        check_run(run, num_workers)


def claim_folder(run: Run, folder: Path) -> bool:
    """Makes the run folder; returns whether there was none."""
    if (folder / "config.yaml").exists():
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"{folder}: no folder can be made there ({err.strerror}); give another --out") from err
    run.manifest.write(folder / "manifest.jsonl")
    fields = {"method": run.method, "data": str(run.root.absolute()), **run.config.model_dump()}
    part = folder / ".config.yaml.part"
    part.write_text(yaml.safe_dump(fields, sort_keys=False))
    # Last: a folder with a config is a whole run folder.
    part.replace(folder / "config.yaml")
    return True


def _fit(run: Run, folder: Path, num_workers: int, resources: dict[str, float]) -> Path:
    """Runs the workers to the end and returns the best checkpoint's folder."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    board = ray.remote(num_cpus=0)(_Board).remote()
    trainer = TorchTrainer(
        _work,
        train_loop_config={"folder": str(folder), "root": str(run.root.absolute()), "board": board},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers, use_gpu=resources["GPU"] > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(folder),
            worker_runtime_env={"env_vars": {} if resources["GPU"] else keeping_memory()},
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            # The best one, and always the last one too.
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="score", checkpoint_score_order="max"
            ),
        ),
    )
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, run, done), daemon=True)
    watcher.start()
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as err:
        blame = ray.get(board.blame.remote())
        raise InputError(blame) if blame else worker_error(err) from err
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
    records = [record for _, record in result.best_checkpoints]
    checkpoint, _ = result.best_checkpoints[records.index(best_epoch(records))]
    return Path(checkpoint.path)


def _work(settings: dict[str, Any]) -> None:
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
    observer = _Reporter(folder, settings["board"], context.get_world_rank())
    checkpoint = ray.train.get_checkpoint()
    try:
        with checkpoint.as_directory() if checkpoint else nullcontext() as resume_from:
            train(
                run,
                observer,
                resume_from=Path(resume_from) if resume_from else None,
                device=str(ray.train.torch.get_device()),
            )
    except InputError as err:
        # The user's fault, which the driver is to say in one line.
        ray.get(settings["board"].blame_user.remote(str(err)))
        raise


class _Reporter:
    """The loop's observer in a worker: checkpoints and metrics to Ray Train, progress to the board."""

    def __init__(self, folder: Path, board: Any, rank: int) -> None:
        self._folder, self._board, self._rank = folder, board, rank
        self._told = 0.0

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        if self._rank == 0 and (step == num_steps or time.monotonic() - self._told > PROGRESS_INTERVAL_S):
            self._told = time.monotonic()
            self._board.update.remote(epoch, step, num_steps, images_per_s)

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        import ray.train

        record = history[-1]
        with tempfile.TemporaryDirectory() as temporary:
            checkpoint = None
            if self._rank == 0:
                write_checkpoint(Path(temporary))
                checkpoint = ray.train.Checkpoint.from_directory(temporary)
                part = self._folder / ".metrics.jsonl.part"
                part.write_text("".join(json.dumps(line) + "\n" for line in history))
                part.replace(self._folder / "metrics.jsonl")
            # A barrier: every rank reports every epoch.
            ray.train.report(record, checkpoint=checkpoint)


class _Board:
    """An actor on which the first worker notes how far it is, and any worker what the user has to mend."""

    def __init__(self) -> None:
        self._state: tuple[int, int, int, float] | None = None
        self._blame = ""

    def update(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        self._state = epoch, step, num_steps, images_per_s

    def state(self) -> tuple[int, int, int, float] | None:
        return self._state

    def blame_user(self, message: str) -> None:
        self._blame = message

    def blame(self) -> str:
        return self._blame


def _watch(board: Any, run: Run, done: threading.Event) -> None:
    """Shows what the board says until `done`."""
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
    with track("training", run.config.epochs * num_steps, "steps") as advance_to:
        while not done.wait(PROGRESS_INTERVAL_S):
            epoch, step, _, images_per_s = ray.get(board.state.remote())
            note = f"epoch {epoch}/{run.config.epochs}, {images_per_s:.0f} images/s"
            advance_to((epoch - 1) * num_steps + step, note)
