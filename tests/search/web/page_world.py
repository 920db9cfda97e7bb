"""The archive that the tests of the page look at: small images of known classes and places."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import shapely
from backbone_models import write_hf_dual
from method_parts import trained
from PIL import Image

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.sources.records import make_thumbnail
from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import make_manifest
from orbithash.trainers.loop.export import export_models
from orbithash.trainers.loop.run import Run
from orbithash.trainers.methods import get_method

# Colours of the classes; the images of a class differ by noise and by a bright spot, so that codes differ too.
CLASSES = {
    "beach": (200, 180, 90),
    "forest": (30, 90, 40),
    "harbor": (90, 90, 110),
    "river": (40, 60, 160),
    "roofs": (170, 60, 50),
}
NUM_ROWS_PER_CLASS = 50
BITS = 24
# The south-west corner of the square of places; a place is a square of 0.01 degrees, two apart.
WEST, SOUTH, SIDE = 3.0, 51.0, 0.01
NUM_COLUMNS = 25

# Markup that would run a script if the page took a text of the archive for HTML.
ATTACK = "<img src=x onerror=document.title='owned'>"
HOSTILE = {
    "key": f"evil/\"'>{ATTACK}<script>document.title='owned'</script>.png",
    "label": f"</span>{ATTACK}",
    "caption": f"{{{{ 7 * 7 }}}} \" onload='document.title=1' {ATTACK} javascript:alert(1)",
}
# The row whose place has three times.
OFTEN = "river/river_00.png"
NUM_TIMES = 3


@dataclass(frozen=True)
class World:
    """An archive on disk.

    Attributes:
        archive, model: their folders.
        images: folder of the images; the key of a row is a path in it.
        num_rows: number of rows.
    """

    archive: Path
    model: Path
    images: Path
    num_rows: int


def write_world(root: Path) -> World:
    """Write images, a model with a text side that is fitted to them, and the archive of their codes."""
    rng = np.random.default_rng(0)
    images = root / "images"
    rows = [_row(images, name, number, rng) for name in CLASSES for number in range(NUM_ROWS_PER_CLASS)]
    often = next(row for row in rows if row["key"] == OFTEN)
    for later in range(1, NUM_TIMES):
        key = OFTEN.replace(".png", f"_later{later}.png")
        _write_image(images / key, CLASSES["river"], rng)
        rows.append({**often, "key": key, "datetime": often["datetime"] + timedelta(days=365 * later)})
    _write_image(root / "hostile.png", (250, 250, 250), rng)
    rows.append({**_row(images, "roofs", NUM_ROWS_PER_CLASS, rng), **HOSTILE, "file": root / "hostile.png"})
    model = _fitted_model(root, images)
    _write_archive(root / "archive", model, rows)
    return World(root / "archive", root / "model", images, len(rows))


def _row(images, name, number, rng):
    key = f"{name}/{name}_{number:02d}.png"
    _write_image(images / key, CLASSES[name], rng)
    place = list(CLASSES).index(name) * NUM_ROWS_PER_CLASS + number
    west, south = WEST + 2 * SIDE * (place % NUM_COLUMNS), SOUTH + 2 * SIDE * (place // NUM_COLUMNS)
    return {
        "key": key,
        "label": name,
        "caption": f"a {name} and some trees",
        "lon": west + SIDE / 2,
        "lat": south + SIDE / 2,
        "footprint": shapely.box(west, south, west + SIDE, south + SIDE).wkb,
        "datetime": datetime(2020, 1, 15, 12, tzinfo=UTC) + timedelta(days=20 * number),
    }


def _write_image(path, colour, rng, side=64):
    pixels = rng.integers(-25, 25, (side, side, 3)) + np.array(colour)
    left, top = rng.integers(0, side - 24, 2)
    pixels[top : top + 24, left : left + 24] += rng.integers(-70, 70, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


def _fitted_model(root, images):
    backbone = write_hf_dual(root / "clip")
    config = load_config(get_method("itq").Config, backbone=f"hf:{backbone}", bits=BITS, vector_dims=BITS)
    run = Run("itq", config, make_manifest(images, protocol="random"), images)
    trained(run, root / "run")
    model, _ = export_models(run, root / "run" / "epoch1")
    model.save(root / "model")
    return HashModel.load(root / "model")


def _write_archive(path, model, rows):
    images = Path(path.with_name("images"))
    files = [row.pop("file", images / row["key"]) for row in rows]
    pictures = [read_image(file, model.preprocessing.rendering) for file in files]
    encoded = model.encode_items("image", model.prepare(pictures))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    table = Archive.table(
        encoded.codes,
        BITS,
        vector=[vector.tobytes() for vector in encoded.vectors],
        uri=[str(file) for file in files],
        thumbnail=[make_thumbnail(model.preprocessing.rendering.picture(picture)) for picture in pictures],
        **columns,
    )
    made = Archive.create(path, BITS, model.model_id, model.card.vector)
    made.commit(Archive.write_fragments(path, table))
