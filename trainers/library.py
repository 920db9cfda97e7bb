"""Training and evaluation as plain functions, in one process and without Ray."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_folder
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.sources.embeddings.tables import EmbeddingTable
from orbithash.encoders.sources.image_roots import ImageRoot, image_root, local_folder, sources_of
from orbithash.trainers.datasets import PROTOCOLS, Images, Manifest, resplit
from orbithash.trainers.datasets.embeddings import EMBEDDINGS, read_vectors
from orbithash.trainers.evaluation.evaluation import metrics_of, without_baselines
from orbithash.trainers.evaluation.model_evaluation import (
    FeaturesOf,
    check_untrained,
    evaluate_model,
    wanted_features,
    wanted_if_unsure,
)
from orbithash.trainers.evaluation.report import write_evaluation
from orbithash.trainers.features.features import FeatureExtractor, Wanted
from orbithash.trainers.features.store import with_writable_store
from orbithash.trainers.loop.export import best_epoch, export_models
from orbithash.trainers.loop.loop import is_checkpointed
from orbithash.trainers.loop.loop import train as train_run
from orbithash.trainers.loop.run import Run, make_run
from orbithash.trainers.loop.run_folder import (
    check_training,
    claim_folder,
    only_process,
    open_run,
    read_history,
    write_history,
)

__all__ = ["OnProgress", "evaluate", "evaluate_run", "train"]

CHECKPOINTS = "checkpoints"

# Called with the number of images encoded so far and the number of all images.
OnProgress = Callable[[int, int], None]


def train(
    method: str,
    data: Path | str,
    out: Path | str,
    *,
    config: Path | str | None = None,
    dataset: str | None = None,
    protocol: str | None = None,
    captions: Path | str | None = None,
    split_seed: int | None = None,
    validation: float | None = None,
    device: str | torch.device | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> HashModel:
    """Train a method on a folder of images in this process and return the model of the best validation epoch.

    >>> history = []
    >>> model = train("dhcl", "images", "runs/gray", epochs=1, batch_size=8, on_epoch=history.append, label_code="gray")
    >>> model.bits, history[0]["epoch"]
    (66, 1)

    Args:
        method: name of a method, such as "dhcl"; `orbithash methods` lists them.
        data: folder of images, for example one subfolder per class; or the path or URI of a packed data set.
        out: run folder, which `evaluate` and the command line read. An interrupted run is resumed, and the model of a
            complete run is loaded.
        config: YAML file of settings, or the name of a shipped recipe; `orbithash methods` lists them.
        dataset: name of a known data set; None: recognised from the folder.
        protocol: how the images are split; None: that of `config`, else the data set's own protocol.
        captions: JSON file with the captions of the images.
        split_seed: seed of the split; None: that of `config`, else 0.
        validation: share of the training images used for validation; None: that of `config`, else 0.1.
        device: `cpu`, `cuda` or `cuda:N`; None: a GPU if there is one.
        on_epoch: called after each epoch with its record: losses, metrics, times.
        settings: settings of the method, such as `bits=64`; they override those of `config`.

    Raises:
        InputError: settings or data are wrong, or `out` holds another run.
    """
    folder = Path(out).absolute()
    run = make_run(
        method,
        data,
        config,
        dataset=dataset,
        protocol=protocol,
        split_seed=split_seed,
        validation=validation,
        captions=None if captions is None else Path(captions),
        **settings,
    )
    check_training(run, folder)
    place = _device(device)
    with only_process(folder):
        if (folder / "model").is_dir():
            return HashModel.load(folder / "model", place)
        if (folder / "ray").exists():
            raise InputError(f"{folder} holds a run of the command line; resume it there, or give another folder")
        is_new = claim_folder(run, folder)
        observer = _RunFolder(run, folder, on_epoch)
        try:
            train_run(run, observer, observer.last if observer.last.is_dir() else None, place)
        except InputError:
            if is_new and not (folder / "metrics.jsonl").exists():
                # The same folder can be used after the problem is solved.
                shutil.rmtree(folder)
            raise
        model, shorter = export_models(run, observer.best, best_epoch(read_history(folder)), place)
        for short in shorter:
            short.save(folder / f"model-{short.bits}")
        model.save(folder / "model")
        shutil.rmtree(folder / CHECKPOINTS)
    return HashModel.load(folder / "model", place)


class _RunFolder:
    """An observer that keeps the last and the best checkpoint, and the history, in the run folder."""

    def __init__(self, run: Run, folder: Path, on_epoch: Callable[[dict[str, Any]], None] | None) -> None:
        self.last, self.best = folder / CHECKPOINTS / "last", folder / CHECKPOINTS / "best"
        self._run, self._folder, self._on_epoch = run, folder, on_epoch

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        """Do nothing."""

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        """Write checkpoints; the last one after the best one, so that a resumed run has both."""
        write_history(self._folder, history)
        if is_checkpointed(self._run, len(history)):
            if best_epoch(history) is history[-1]:
                with new_folder(self.best) as part:
                    write_checkpoint(part)
            with new_folder(self.last) as part:
                write_checkpoint(part)
        if self._on_epoch is not None:
            self._on_epoch(history[-1])


def evaluate(
    run: Path | str,
    data: Path | str | None = None,
    *,
    protocol: str | None = None,
    baselines: bool = False,
    cutoffs: Sequence[int] = (20, 100),
    bits: int | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Evaluate the model of a run folder on test images and return the metrics.

    >>> metrics = evaluate("runs/gray", cutoffs=[5])
    >>> 0 <= metrics["metrics"]["ap_hits@5"]["expected"] <= 1
    True

    Also writes `metrics.json`, plots and `report.html` to the run folder; see `evaluate_run`.

    Args:
        run: folder of a run of `train` or of the command line.
        data: folder of the images, or their packed data set; None: where they were at training.
        protocol: evaluate by another protocol whose test images were not trained on; None: the run's.
        baselines: whether simple methods on features of the pretrained backbone are evaluated too.
        cutoffs: the k of average precision.
        bits: a shorter length of a run with nested lengths; None: the whole code.
        device: `cpu`, `cuda` or `cuda:N`; None: a GPU if there is one.

    Raises:
        InputError: the folder holds no complete run, or the images are not those of its manifest.
    """
    folder = Path(run)
    root = open_run(folder).root if data is None else data
    return evaluate_run(folder, root, protocol, baselines, cutoffs, bits, device)[0]


def evaluate_run(
    folder: Path,
    data: Path | str | ImageRoot,
    protocol: str | None = None,
    baselines: bool = True,
    cutoffs: Sequence[int] = (20, 100),
    bits: int | None = None,
    device: str | torch.device | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[dict[str, Any], Path, str | None]:
    """Return the metrics, the path of the report, and why there are no baselines; None: there are.

    Writes `metrics.json`, plots and `report.html` to `RUN/evaluation/`, or to `RUN/evaluation-PROTOCOL/` or
    `RUN/evaluation-BITS/` for another protocol or length. The arguments are those of `evaluate`.
    """
    root = image_root(data)
    run, model, manifest, name = _opened(folder, root, protocol, bits, _device(device))
    is_of_embeddings = run.manifest.dataset == EMBEDDINGS
    features_of = _pretrained_features(run, model, root) if baselines else "switched off"
    reason = features_of if isinstance(features_of, str) else None
    vectors_of = _vectors(run, model, root) if is_of_embeddings else None
    num_images = len(manifest.part("test", *PROTOCOLS[manifest.protocol].database))
    evaluated = with_writable_store(
        lambda: evaluate_model(
            model,
            manifest,
            root,
            on_progress=None if on_progress is None else lambda done: on_progress(done, num_images),
            baseline_model=None if isinstance(features_of, str) else features_of,
            cutoffs=cutoffs,
            vectors_of=vectors_of,
        )
    )
    if reason is not None:
        if isinstance(evaluated, dict):
            evaluated["image->image"] = without_baselines(evaluated["image->image"], reason)
        else:
            evaluated = without_baselines(evaluated, reason)
    rendering = model.preprocessing.rendering

    def picture(path: str) -> npt.NDArray[np.uint8]:
        return rendering.picture(read_image(sources_of(root, [path])[0], rendering))

    page = write_evaluation(
        folder / name,
        evaluated,
        read_image=None if is_of_embeddings else picture,
        history=read_history(folder),
        source=str(data),
    )
    metrics = metrics_of(evaluated) if isinstance(evaluated, dict) else evaluated.metrics
    return metrics, page, reason


def evaluation_features(
    folder: Path, data: ImageRoot, protocol: str | None, baselines: bool, bits: int | None, device: str
) -> dict[str, Wanted]:
    """Return the features that `evaluate_run` with these arguments looks up first; see `wanted_features`."""
    run, model, manifest, _ = _opened(folder, data, protocol, bits, device)
    extractor = _pretrained_extractor(run, model) if baselines else ""
    return wanted_features(model, manifest, data, None if isinstance(extractor, str) else extractor)


def unsure_features(
    folder: Path,
    data: ImageRoot,
    protocol: str | None,
    bits: int | None,
    rows: npt.NDArray[np.int64],
    device: str,
) -> dict[str, Wanted]:
    """Return the features that `evaluate_run` looks up last; see `wanted_if_unsure`."""
    _, model, manifest, _ = _opened(folder, data, protocol, bits, device)
    return wanted_if_unsure(model, manifest, data, rows)


def unsure_rows(
    folder: Path, data: ImageRoot, protocol: str | None, bits: int | None, device: str
) -> npt.NDArray[np.int64]:
    """Return the `rows` of `unsure_features`; features that are not kept are computed."""
    _, model, manifest, _ = _opened(folder, data, protocol, bits, device)
    wanted = wanted_features(model, manifest, data)
    return np.flatnonzero(~model.is_certain(wanted["others"].table())) if "others" in wanted else np.empty(0, np.int64)


def check_evaluation(folder: Path, data: ImageRoot, protocol: str | None, bits: int | None) -> None:
    """Raise `InputError` if `evaluate_run` would, because of its arguments, or of images other than the manifest's."""
    run, _, manifest, _ = _opened(folder, data, protocol, bits, "cpu")
    if run.manifest.dataset == EMBEDDINGS:
        raise InputError(f"{data} has vectors, which are evaluated without workers; omit --workers")
    manifest.check_files(data)


def _opened(
    folder: Path, data: ImageRoot, protocol: str | None, bits: int | None, device: str | torch.device
) -> tuple[Run, HashModel, Manifest, str]:
    """Return the run, the model of a length, the manifest of a protocol, and the name of the evaluation's folder."""
    run = open_run(folder)
    if isinstance(data, Path) and not data.is_dir() and run.manifest.dataset != EMBEDDINGS:
        raise InputError(f"{data} is not a folder; --data is the folder of the run's images")
    model, is_whole = _load_model(folder, bits, device)
    manifest, name = run.manifest, "evaluation"
    if protocol not in (None, manifest.protocol):
        manifest, name = resplit(manifest, protocol), f"{name}-{protocol}"
        check_untrained(manifest, run.manifest)
    return run, model, manifest, name if is_whole else f"{name}-{bits}"


def _load_model(folder: Path, bits: int | None, device: str | torch.device) -> tuple[HashModel, bool]:
    """Return the model of a length, None: the whole code, and whether it is that of the whole code."""
    if not (folder / "model").is_dir():
        raise InputError(f"{folder} has no model yet; run the same train command again to resume training")
    whole = HashModel.load(folder / "model", device)
    if bits in (None, whole.bits):
        return whole, True
    shorter = folder / f"model-{bits}"
    if not shorter.is_dir():
        lengths = sorted(int(path.name[6:]) for path in folder.glob("model-*") if path.name[6:].isdecimal())
        existing = " and ".join(map(str, [*lengths, whole.bits]))
        raise InputError(f"{folder} has no model of {bits} bits; there is {existing}")
    return HashModel.load(shorter, device), False


def _pretrained_features(run: Run, model: HashModel, data: ImageRoot) -> FeaturesOf | str:
    """Return a function that computes features with the weights before training, or why there is none."""
    if run.manifest.dataset == EMBEDDINGS:
        return _vectors(run, model, data)
    extractor = _pretrained_extractor(run, model)
    return extractor if isinstance(extractor, str) else lambda images: extractor(data, images)


def _pretrained_extractor(run: Run, model: HashModel) -> FeatureExtractor | str:
    """Return what computes features with the weights before training, or why there is none."""
    if model.card.network.backbone.has_random_weights:
        return "the run began with random weights, whose features say little"
    # Pretrained weights belong to batch norm with their own statistics, whatever norm the run uses.
    config = run.config.model_copy(update={"norm": "frozen-batch"})
    try:
        network = config.build_network(model.card.network.head)
    except InputError as err:
        return str(err)
    return FeatureExtractor(network, model.preprocessing, model.device, model.card.precision)


def _vectors(run: Run, model: HashModel, data: ImageRoot) -> Callable[[Images], npt.NDArray[np.float32]]:
    """Return a function that reads the vectors of a manifest's items; `InputError` for those of another embedding."""
    backbone = model.card.network.backbone
    folder = local_folder(data, "tables of embeddings")
    EmbeddingTable.open(folder, run.config.table).check_embedding(backbone.name, backbone.num_features, backbone.origin)
    return lambda images: read_vectors(folder, run.config.table, images)


def _device(given: str | torch.device | None) -> str | torch.device:
    if given is not None:
        return given
    return "cuda" if torch.cuda.is_available() else "cpu"
