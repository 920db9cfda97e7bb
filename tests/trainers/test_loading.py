"""Loading: batches follow from (seed, epoch) alone, and ranks share out the batches of one process."""

import itertools

import numpy as np
import pytest
from PIL import Image

from orbithash.encoders.errors import InputError
from orbithash.encoders.images import Rendering
from orbithash.encoders.preprocessing import Preprocessing
from orbithash.trainers.datasets import Image as ManifestImage
from orbithash.trainers.loading import MIN_CROP_AREA, Part, augment, batches, load_part

SIDE = 24


def make_part(num, stored=30, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, stored, stored, 3), np.uint8)
    return Part(images, np.arange(num), [f"image {i}" for i in range(num)])


def all_batches(part, batch_size=4, seed=1, epoch=0, rank=0, world_size=1):
    return list(batches(part, SIDE, batch_size, seed, epoch, rank, world_size))


def same(one, other):
    return len(one) == len(other) and all(
        (a.images == b.images).all() and (a.labels == b.labels).all() for a, b in zip(one, other, strict=True)
    )


def test_the_same_seed_and_epoch_give_the_same_batches():
    part = make_part(11)
    assert same(all_batches(part), all_batches(part))


def test_other_seeds_and_epochs_give_other_batches():
    part = make_part(12)
    runs = [all_batches(part, seed=seed, epoch=epoch) for seed, epoch in itertools.product((0, 1), (0, 1))]
    for one, other in itertools.combinations(runs, 2):
        assert not all((a.labels == b.labels).all() for a, b in zip(one, other, strict=True))
    views = [{int(label): image for b in run for label, image in zip(b.labels, b.images, strict=True)} for run in runs]
    for one, other in itertools.combinations(views, 2):
        assert all((one[label] != other[label]).any() for label in range(12))


@pytest.mark.parametrize("num", [4, 11, 12, 13])
def test_an_epoch_is_every_image_once_but_for_the_ragged_end(num):
    found = all_batches(make_part(num))
    assert len(found) == num // 4
    for batch in found:
        assert batch.images.shape == (4, SIDE, SIDE, 3)
        assert batch.images.dtype == np.uint8
        assert batch.labels.dtype == np.int64
    labels = np.concatenate([batch.labels for batch in found]).tolist()
    assert len(set(labels)) == len(labels) == num // 4 * 4


def test_the_ragged_end_is_not_always_the_same_images():
    part = make_part(5)
    left_out = [set(range(5)) - set(all_batches(part, epoch=epoch)[0].labels.tolist()) for epoch in range(20)]
    assert set.union(*left_out) == set(range(5))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_out_the_batches_of_one_process(world_size):
    part = make_part(20)
    whole = all_batches(part, batch_size=6, epoch=3)
    ranks = [all_batches(part, 6, epoch=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    for i, batch in enumerate(whole):
        assert (np.concatenate([share[i].images for share in ranks]) == batch.images).all()
        assert (np.concatenate([share[i].labels for share in ranks]) == batch.labels).all()


def test_labels_belong_to_their_images():
    part = make_part(8)
    part.images[:] = (part.labels * 30)[:, None, None, None]
    for batch in all_batches(part):
        assert (batch.images == (batch.labels * 30)[:, None, None, None]).all()


# Augmentation.


def test_a_view_has_the_asked_size_and_follows_from_the_generator():
    image = make_part(1, stored=40).images[0]
    one, again, other = (augment(image, SIDE, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.shape == (SIDE, SIDE, 3)
    assert one.dtype == np.uint8
    assert (one == again).all()
    assert (one != other).any()


def test_the_image_itself_is_left_alone():
    image = make_part(1, stored=40).images[0]
    before = image.copy()
    for seed in range(10):
        augment(image, 40, np.random.default_rng(seed))
    assert (image == before).all()


def test_all_eight_orientations_occur():
    """Four colours in the corners tell an orientation whatever the crop."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:32, :32], image[:32, 32:], image[32:, :32], image[32:, 32:] = 10, 80, 150, 220
    counts = {}
    for seed in range(400):
        view = augment(image, SIDE, np.random.default_rng(seed))
        corners = tuple(int(view[r, c, 0]) for r in (0, -1) for c in (0, -1))
        counts[corners] = counts.get(corners, 0) + 1
    a, b, c, d = 10, 80, 150, 220
    square = [(a, b, c, d), (c, a, d, b), (d, c, b, a), (b, d, a, c)]
    mirrored = [(b, a, d, c), (a, c, b, d), (c, d, a, b), (d, b, c, a)]
    expected = {*square, *mirrored}
    assert expected <= counts.keys()
    # 400 draws of 8: fewer than 25 of one kind has odds of one in ten thousand, and the seeds are fixed.
    assert all(counts[corners] >= 25 for corners in expected)


def test_a_view_shows_at_least_the_stated_share_of_the_area():
    side = 240
    ramp = np.broadcast_to(np.arange(side, dtype=np.uint8)[:, None, None], (side, side, 3))
    both = np.stack([ramp[..., 0], ramp[..., 0].T, ramp[..., 0]], axis=2)
    shares = []
    for seed in range(200):
        view = augment(np.ascontiguousarray(both), 60, np.random.default_rng(seed)).astype(int)
        extents = [int(np.ptp(view[..., channel])) + 4 for channel in (0, 1)]
        shares.append(extents[0] * extents[1] / side**2)
    # A ramp loses up to a view's pixel (4 levels) at each end.
    assert min(shares) > MIN_CROP_AREA - 0.06
    assert min(shares) < 0.5
    assert max(shares) > 0.9


# Decoding.


def write_images(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (i * 20, 100, 200)).save(root / name)
    return [ManifestImage(name, name, i % 2, "train", "") for i, name in enumerate(names)]


def test_a_part_is_decoded_in_the_manifests_order(tmp_path):
    images = write_images(tmp_path, ["b/2.png", "a/1.png", "b/1.png"])
    part = load_part(tmp_path, images, Preprocessing(Rendering(), 32, 32))
    assert part.images.shape == (3, 32, 32, 3)
    assert part.images.dtype == np.uint8
    assert [int(image[5, 5, 0]) for image in part.images] == [0, 20, 40]
    assert part.labels.tolist() == [0, 1, 0]
    assert part.labels.dtype == np.int64
    assert part.ids == ["b/2.png", "a/1.png", "b/1.png"]


def test_no_images_are_an_empty_part(tmp_path):
    part = load_part(tmp_path, [], Preprocessing(Rendering(), 32, 32))
    assert part.images.shape == (0, 32, 32, 3)
    assert len(part.labels) == 0


def test_all_refused_images_are_listed(tmp_path):
    images = write_images(tmp_path, ["a/1.png", "a/2.png", "a/3.png", "a/4.png"])
    (tmp_path / "a/1.png").write_bytes(b"no image")
    (tmp_path / "a/3.png").unlink()
    Image.new("RGB", (40, 10)).save(tmp_path / "a/4.png")
    with pytest.raises(InputError) as caught:
        load_part(tmp_path, images, Preprocessing(Rendering(), 32, 32))
    message = str(caught.value)
    assert "found 3 problems" in message
    assert all(f"a/{i}.png: " in message for i in (1, 3, 4))
    assert "a/2.png" not in message
