"""Evaluation of a run folder's model."""

from pathlib import Path
from typing import Any

from orbithash.cluster.progress import track
from orbithash.cluster.train import open_run, read_history
from orbithash.encoders.errors import InputError
from orbithash.encoders.images import read_image
from orbithash.encoders.model import HashModel
from orbithash.trainers.datasets import PROTOCOLS, make_manifest
from orbithash.trainers.evaluation import write_evaluation
from orbithash.trainers.model_evaluation import check_untrained, evaluate_model

__all__ = ["evaluate_run"]


def evaluate_run(folder: Path, data: Path, protocol: str | None = None) -> tuple[dict[str, Any], Path]:
    """Evaluates on the run's own test part, or on that of another protocol whose queries were not trained on.

    Leaves `RUN/evaluation/` (`metrics.json`, plots, `report.html`); returns the metrics and the page's path.
    """
    run = open_run(folder)
    if not (folder / "model").is_dir():
        raise InputError(f"{folder} has no model yet; run the same train command again, it goes on where it stopped")
    if not data.is_dir():
        raise InputError(f"{data} is not a folder; --data is the folder of the run's images")
    model = HashModel.load(folder / "model")
    manifest = run.manifest
    if protocol not in (None, manifest.protocol):
        manifest = make_manifest(data, manifest.dataset, protocol)
        check_untrained(manifest, run.manifest)
    num_images = len(manifest.part("test", *PROTOCOLS[manifest.protocol].database))
    with track("evaluating", num_images, "images") as advance_to:
        evaluation = evaluate_model(model, manifest, data, on_progress=lambda done: advance_to(done, ""))
    page = write_evaluation(
        folder / "evaluation",
        evaluation,
        read_image=lambda path: read_image(Path(path), model.preprocessing.rendering),
        history=read_history(folder),
    )
    return evaluation.metrics, page
