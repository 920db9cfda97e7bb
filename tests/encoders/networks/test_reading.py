"""Reading images of a bucket: each one that is refused is named, and an outage ends the reading at once."""

import io

import numpy as np
import pytest
from PIL import Image

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.networks.reading import read_batches
from orbithash.encoders.sources import object_folders
from orbithash.encoders.sources.object_folders import RemoteFolder

PREPROCESSING = Preprocessing(Rendering(), resize=16, crop=16)
ROOT = RemoteFolder("s3://bucket/tiles")
NAMES = [f"{number}.png" for number in range(200)]


def content(number):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def store(monkeypatch):
    """Errors by the name of an object, which a test sets, and the names that were read."""
    errors, read = {}, []

    def read_object(uri, limits):
        name = uri.rpartition("/")[2]
        read.append(name)
        if name in errors:
            raise errors[name]
        return content(NAMES.index(name))

    monkeypatch.setattr(object_folders, "read_object", read_object)
    return errors, read


def refusal():
    with pytest.raises(InputError) as caught:
        list(read_batches(NAMES, PREPROCESSING, root=ROOT))
    return str(caught.value)


def test_images_of_a_bucket_in_order(store):
    pixels = np.concatenate(list(read_batches(NAMES, PREPROCESSING, root=ROOT)))
    assert pixels[:, 0, 0, 0].tolist() == list(range(200))


def test_every_absent_object_is_named(store):
    errors, _ = store
    # Two of one block, and one of another.
    errors |= {name: ImageError("there is no such object") for name in ("3.png", "7.png", "150.png")}
    lines = refusal().splitlines()
    assert lines[0] == f"{ROOT}: images that cannot be read: found 3 problems:"
    assert [line.split(": ")[1] for line in lines[1:]] == ["3.png", "7.png", "150.png"]


def test_an_outage_ends_the_reading_at_once(store):
    errors, read = store
    errors |= {name: InputError(f"{name}: no answer") for name in NAMES[20:]}
    errors["3.png"] = ImageError("there is no such object")
    assert refusal().endswith(".png: no answer")
    # No more than the batch that is read ahead.
    assert "150.png" not in read
