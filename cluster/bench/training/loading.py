"""`bench loading`: views of images that do not fit into memory, from a folder and from the same images packed.

All contestants decode the same images and make the same views, with as many threads. The bare loop divides the rows of
an epoch among its threads and keeps nothing. They take turns in rounds; each ratio is of one round, so that a slow
phase of the machine affects all.
"""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.cluster.bench.inputs import write_bench_scenes
from orbithash.cluster.bench.report import environment
from orbithash.cluster.output import say
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Pixels, Rendering
from orbithash.encoders.networks.reading import num_decoding_threads
from orbithash.encoders.ranges import check_integer
from orbithash.encoders.sources.image_roots import image_root
from orbithash.trainers.data.augmentation import Augmentation, augment
from orbithash.trainers.data.loading import StreamedImages, views_of_steps
from orbithash.trainers.datasets import Images, make_manifest
from orbithash.trainers.datasets.protocols import PROTOCOLS
from orbithash.trainers.packing import pack
from orbithash.trainers.scenes.classes import CLASSES

__all__ = ["bench_loading"]

# Side of a view and of an image before it, pixels; images of a step.
_VIEW, _STORED, _BATCH = 128, 154, 64
# A manifest needs some scenes of each class, and the classes alternate.
_MIN_COUNT = max(_BATCH, PROTOCOLS["random"].min_images * len(CLASSES))
_MAX_COUNT, _MAX_ROUNDS = 10**6, 1000

Rows = npt.NDArray[np.int64]


def bench_loading(count: int, rounds: int) -> dict[str, Any]:
    """Measure and return views per second.

    Args:
        count: number of generated scenes, a multiple of the 64 of a step is used.
        rounds: number of epochs of each contestant.

    Raises:
        InputError: an argument is out of its range.
    """
    check_integer(count, "--count", _MIN_COUNT, _MAX_COUNT)
    check_integer(rounds, "--rounds", 1, _MAX_ROUNDS)
    with TemporaryDirectory() as temporary:
        folder, packed = write_bench_scenes(Path(temporary) / "scenes", count), Path(temporary) / "scenes.lance"
        say("packing")
        began = time.perf_counter()
        size = pack(folder, str(packed)).num_bytes
        pack_s = time.perf_counter() - began
        manifest = make_manifest(folder)
        assert make_manifest(image_root(packed)) == manifest, "the same images"
        used = count // _BATCH * _BATCH
        in_order = np.arange(used).reshape(-1, _BATCH)
        shuffled = np.random.default_rng(0).permutation(used).reshape(-1, _BATCH)
        contestants: dict[str, Callable[[], str]] = {
            "folder": lambda: _views(folder, manifest.images, shuffled),
            "packed": lambda: _views(packed, manifest.images, shuffled),
            "packed_in_order": lambda: _views(packed, manifest.images, in_order),
            "bare_loop": lambda: _bare_loop(folder, manifest.images.paths, shuffled),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds + 1):
            say(f"round {number} of {rounds}" if number else "first round, not counted")
            made = {}
            for name, run in contestants.items():
                began = time.perf_counter()
                made[name] = run()
                seconds[name].append(time.perf_counter() - began)
            assert made["packed"] == made["folder"] == made["bare_loop"], "the same views"
    taken = {name: np.array(of_rounds[1:]) for name, of_rounds in seconds.items()}
    return {
        **environment("loading", "pylance", "pillow", "rasterio", "torch"),
        "images": used,
        "mean_file_bytes": size / count,
        "view_px": _VIEW,
        "rounds": rounds,
        "threads": _num_threads(),
        "pack_s": pack_s,
        **{f"{name}_images_per_s": used / float(np.median(taken[name])) for name in contestants},
        "folder_to_bare_loop": _ratio(taken["bare_loop"], taken["folder"]),
        "packed_to_bare_loop": _ratio(taken["bare_loop"], taken["packed"]),
        "packed_to_folder": _ratio(taken["folder"], taken["packed"]),
        "shuffled_to_in_order": _ratio(taken["packed_in_order"], taken["packed"]),
    }


def _ratio(others: npt.NDArray[np.float64], own: npt.NDArray[np.float64]) -> float:
    """Return the median ratio of the speed of one contestant to that of another, given the seconds of each round."""
    return float(np.median(others / own))


def _num_threads() -> int:
    return max(1, num_decoding_threads() - 1)


def _preprocessing() -> Preprocessing:
    return Preprocessing(Rendering(), resize=_STORED, crop=_STORED)


def _views(root: Path, images: Images, steps: Rows) -> str:
    """Make all views as training does; return a hash of those of the first step."""
    streamed, first = StreamedImages(image_root(root), images, _preprocessing()), ""
    for views in views_of_steps(streamed, steps, _VIEW, Augmentation(), seed=0, epoch=0):
        first = first or hashlib.sha256(views.tobytes()).hexdigest()
    return first


def _bare_loop(root: Path, paths: list[str], steps: Rows) -> str:
    """Make all views in threads without a common order, and return the hash of those of the first step."""
    preprocessing, rows = _preprocessing(), steps.ravel()
    kept: dict[int, Pixels] = {}

    def make(places: Rows) -> None:
        for place in places.tolist():
            row = int(rows[place])
            image = preprocessing.prepare(read_image(root / paths[row], preprocessing.rendering))
            view = augment(image, _VIEW, np.random.default_rng([0, 0, row]))
            if place < _BATCH:
                kept[place] = view

    with ThreadPoolExecutor(_num_threads()) as pool:
        list(pool.map(make, np.array_split(np.arange(len(rows)), _num_threads())))
    return hashlib.sha256(np.stack([kept[place] for place in range(_BATCH)]).tobytes()).hexdigest()
