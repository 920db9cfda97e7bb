"""Make a folder of images without labels searchable on one machine: fit codes, encode, show the page.

    OUT/run/      the run folder with the model
    OUT/archive/  the codes of all images

Running it again keeps a complete model and encodes only new and changed images.
"""

from collections.abc import Sequence
from pathlib import Path

from orbithash.cluster.encoding.encode import encode
from orbithash.cluster.experiments.demo_page import show_page
from orbithash.cluster.output import say
from orbithash.cluster.runtime import connected
from orbithash.cluster.training.train import train_on_ray
from orbithash.trainers.loop.run import make_run

__all__ = ["WEIGHTS", "run_unlabelled"]

WEIGHTS = "IMAGENET1K_V2"
"""Weights of the backbone if none are given: those of torchvision, which downloads them once."""


def run_unlabelled(
    out: Path, data: Path, weights: str | None, settings: Sequence[str], with_page: bool = False
) -> None:
    """Write the model and the archive of all images below the folder `data` into the folder `out`.

    With `with_page`, then show the archive as a page until Ctrl-C.
    """
    out, data = out.absolute(), data.absolute()
    run = make_run("itq", data, settings=settings, weights=weights or WEIGHTS)
    if len(run.manifest.part("train")) <= run.config.bits:
        say(f"fewer than {run.config.bits} images to fit to: random projections (lsh) in place of ITQ")
        run = make_run("lsh", data, settings=settings, weights=weights or WEIGHTS)
    model, archive = out / "run" / "model", out / "archive"
    with connected():
        say("[1/2] fitting codes to features of the images")
        train_on_ray(run, out / "run", 1)
        say("[2/2] encoding all images")
        summary = encode(str(data), model, str(archive))
    say(f"done: {summary.rows_in_archive} images can be searched; the model is {model}, the archive {archive}")
    if with_page:
        show_page(archive, model, data)
