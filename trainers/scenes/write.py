"""Writing scenes to a folder: images, then captions, then `scenes.json`, which marks the folder as complete.

While scenes are being written, the folder contains `scenes.partial.json` instead of `scenes.json`. Both files store the
parameters of the request: the same request is resumed after an interruption, and a different one is refused.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_file, write_file
from orbithash.trainers.scenes.captions import NUM_SENTENCES, sentences, tokens
from orbithash.trainers.scenes.classes import CLASSES
from orbithash.trainers.scenes.geometry import EXTENT
from orbithash.trainers.scenes.georeference import CRS, PLACE, PLACE_LAT, PLACE_LON, gsd_m, upper_left
from orbithash.trainers.scenes.moment import SEASONS
from orbithash.trainers.scenes.scene import Scene, draw_scene

__all__ = ["FORMAT_VERSION", "MAX_COUNT", "write_scenes"]

FORMAT_VERSION = 1
"""Version of the output. Increment it when a change makes the same seed give different files."""

MAX_COUNT = 1_000_000
MIN_SIZE_PX, MAX_SIZE_PX = 64, 512

# Number of scenes in each task of the process pool.
_CHUNK = 8

_COMPLETE, _PARTIAL, _CAPTIONS = "scenes.json", "scenes.partial.json", "captions.json"


@dataclass(frozen=True)
class _Request:
    """The parameters of a folder of scenes. They determine every byte of its files."""

    count: int
    seed: int
    size_px: int

    def described(self) -> dict[str, Any]:
        """Return the content of `scenes.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "seed": self.seed,
            "count": self.count,
            "size_px": self.size_px,
            "gsd_m": gsd_m(self.size_px),
            "second_gsd_m": gsd_m(self.size_px) / 2,
            "crs": CRS,
            "place": {"name": PLACE, "lon": PLACE_LON, "lat": PLACE_LAT},
            "classes": list(CLASSES),
            "seasons": {name: list(season.months) for name, season in SEASONS.items()},
        }


def write_scenes(
    directory: Path,
    count: int,
    seed: int = 0,
    size_px: int = 128,
    on_progress: Callable[[int], None] | None = None,
    processes: int = 1,
) -> None:
    """Draw `count` georeferenced land-use scenes and write them with their captions to a folder.

    The same arguments give the same bytes. Scene i depends only on the seed, the size and i, so a smaller folder is a
    prefix of a larger one. An incomplete folder, or one with fewer scenes of the same seed and size, is completed.

    Args:
        directory: the folder; it is created if it does not exist.
        count: number of scenes, 1 to 1,000,000; the classes alternate.
        seed: random seed, 0 or more.
        size_px: side of the RGB images in pixels, 64 to 512; panchromatic images have twice as many per side.
        on_progress: called after each scene with the number of scenes written so far.
        processes: number of processes that draw. A script that uses more than one needs the guard
            `if __name__ == "__main__"`, as always with multiprocessing.

    Raises:
        InputError: an argument is out of range, or the folder contains other files or other scenes.
    """
    request = _Request(count, seed, size_px)
    _check(request)
    if _is_done(directory, request):
        if on_progress:
            on_progress(count)
        return
    write_file(directory / _PARTIAL, _json(request.described()))
    (directory / _COMPLETE).unlink(missing_ok=True)
    for abandoned in directory.glob(f".{_CAPTIONS}.*"):
        abandoned.unlink()
    with (
        new_file(directory / _CAPTIONS) as captions,
        captions.open("w", encoding="utf-8", newline="\n") as page,
        _mapper(min(processes, count)) as map_in_order,
    ):
        page.write('{"dataset": "scenes", "images": [')
        for index, caption in enumerate(map_in_order(partial(_write_scene, directory, seed, size_px), range(count))):
            page.write(("\n" if index == 0 else ",\n") + caption)
            if on_progress:
                on_progress(index + 1)
        page.write("\n]}\n")
    write_file(directory / _COMPLETE, _json(request.described()))
    (directory / _PARTIAL).unlink()


def _check(request: _Request) -> None:
    """Raise `InputError` if a parameter is out of range."""
    if not 1 <= request.count <= MAX_COUNT:
        raise InputError(f"the number of scenes is {request.count}; it must lie between 1 and {MAX_COUNT}")
    if not MIN_SIZE_PX <= request.size_px <= MAX_SIZE_PX:
        raise InputError(
            f"the size of a scene is {request.size_px} pixels; it must lie between {MIN_SIZE_PX} and {MAX_SIZE_PX}"
        )
    if request.seed < 0:
        raise InputError(f"the seed is {request.seed}; it must be 0 or more")


def _is_done(directory: Path, request: _Request) -> bool:
    """Return whether the folder is complete already; raise `InputError` if it has other files or other scenes."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; name a folder that does not exist yet or is empty")
    # A process killed at the start leaves nothing but the temporary file of scenes.partial.json.
    if not directory.exists() or all(entry.name.startswith(f".{_PARTIAL}.") for entry in directory.iterdir()):
        return False
    found = [_described(directory / name) for name in (_PARTIAL, _COMPLETE) if (directory / name).exists()]
    if not found:
        raise InputError(f"{directory} holds other files; name a folder that does not exist yet or is empty")
    for key in ("format_version", "seed", "size_px"):
        wanted = request.described()[key]
        if found[0].get(key) != wanted:
            raise InputError(
                f"{directory} holds scenes of {key} {found[0].get(key)!r}, not {wanted!r}; name another folder"
            )
    there = found[0].get("count")
    if not isinstance(there, int) or there > request.count:
        raise InputError(f"{directory} holds {there} scenes, more than {request.count}; name another folder")
    return there == request.count and not (directory / _PARTIAL).exists()


def _described(page: Path) -> dict[str, Any]:
    """Read `scenes.json` or `scenes.partial.json`; raise `InputError` if it is not a JSON object."""
    try:
        content = json.loads(page.read_text(encoding="utf-8"))
    except ValueError as err:
        raise InputError(f"{page} is not readable as JSON ({err}); name another folder") from err
    if not isinstance(content, dict):
        raise InputError(f"{page} does not describe a folder of scenes; name another folder")
    return content


def _file_name(scene: Scene) -> str:
    """Return the path of an image of the scene, relative to `images/` and to `second/`."""
    return f"{scene.label}/{scene.label}_{scene.index // len(CLASSES):04d}.tif"


def _write_images(directory: Path, scene: Scene) -> None:
    """Write both images of a scene as GeoTIFFs of the same area."""
    color = np.moveaxis(scene.color, 2, 0)
    for folder, pixels in (("images", color), ("second", scene.panchromatic[None])):
        content = _geotiff(pixels, upper_left(scene.index), scene.taken)
        # Images are not flushed to disk one by one: scenes.json, which marks the folder as complete, comes last.
        write_file(directory / folder / _file_name(scene), content, durable=False)


def _geotiff(pixels: NDArray[np.uint8], corner: tuple[float, float], taken: datetime) -> bytes:
    """Return a GeoTIFF of uint8 pixels [bands, height, width]; the upper left corner is in metres of `CRS`."""
    from rasterio import Affine
    from rasterio.io import MemoryFile

    (bands, height, width), (left, top) = pixels.shape, corner
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            count=bands,
            height=height,
            width=width,
            dtype="uint8",
            crs=CRS,
            transform=Affine(EXTENT / width, 0, left, 0, -EXTENT / height, top),
            compress="deflate",
            predictor=2,
            interleave="pixel",
            photometric="RGB" if bands == 3 else "MINISBLACK",
        ) as image:
            image.write(pixels)
            image.update_tags(TIFFTAG_DATETIME=taken.strftime("%Y:%m:%d %H:%M:%S"))
        return bytes(memory.read())


@contextmanager
def _mapper(processes: int) -> Iterator[Callable[[Callable[[int], str], range], Iterator[str]]]:
    """Yield a function `map` that keeps the order: the built-in, or that of a pool of processes."""
    if processes <= 1:
        yield map
        return
    # Forking is unsafe when the caller has threads.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver"), _end_with_parent) as pool:
        try:
            yield partial(pool.map, chunksize=_CHUNK)
        except BaseException:
            # After Ctrl-C or an error such as a full disk, drop the scenes that are still queued.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Make this worker process exit when the process that started the pool exits."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "runs in a pool"
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _write_scene(directory: Path, seed: int, size_px: int, index: int) -> str:
    """Write both images of a scene and return its captions as one line of JSON.

    Lines are written to the captions file one by one, so memory does not grow with the number of scenes.
    """
    scene = draw_scene(index, seed, size_px)
    _write_images(directory, scene)
    first = index * NUM_SENTENCES
    spoken = [
        {"raw": text, "tokens": tokens(text), "imgid": index, "sentid": first + number}
        for number, text in enumerate(sentences(scene, seed))
    ]
    image = {
        "filename": f"images/{_file_name(scene)}",
        "imgid": index,
        "split": _split(index // len(CLASSES)),
        "sentids": [sentence["sentid"] for sentence in spoken],
        "sentences": spoken,
    }
    return json.dumps(image)


def _split(number: int) -> str:
    """Return the part of the split for scene `number` of a class: of ten, eight train, one val and one test."""
    return {3: "test", 6: "val"}.get(number % 10, "train")


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
