"""Loading: random choices depend on (seed, epoch, row) only."""

import itertools
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import Rendering
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.trainers.data import loading
from orbithash.trainers.data.augmentation import Augmentation, augment
from orbithash.trainers.data.loading import (
    StreamedImages,
    fits_in_memory,
    load_images,
    views_of_steps,
)
from orbithash.trainers.datasets import Image as ManifestImage
from orbithash.trainers.datasets import Images
from orbithash.trainers.methods.base import shuffled

SIDE = 24


def pixels(num, stored=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, stored, stored, 3), np.uint8)


def stream_views(images, steps, seed=1, epoch=0):
    return views_of_steps(images, np.asarray(steps), SIDE, Augmentation(), seed, epoch)


def all_views(*arguments):
    return list(stream_views(*arguments))


@pytest.fixture
def torch_threads():
    """Set the number of CPUs."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_views_of_each_step_follow_from_seed_epoch_and_row():
    images = pixels(6)
    found = all_views(images, [[0, 3], [5, 1]])
    assert [(step.shape, step.dtype) for step in found] == [((2, SIDE, SIDE, 3), np.uint8)] * 2
    for views, rows in zip(found, ([0, 3], [5, 1]), strict=True):
        for view, row in zip(views, rows, strict=True):
            assert (view == augment(images[row], SIDE, np.random.default_rng([1, 0, row]))).all()


def test_other_seeds_and_epochs_give_other_views():
    runs = [all_views(pixels(4), [[0, 1, 2, 3]], seed, epoch)[0] for seed, epoch in itertools.product((0, 1), (0, 1))]
    for one, other in itertools.combinations(runs, 2):
        assert all((a != b).any() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_the_number_of_threads_changes_no_view(num_threads, monkeypatch, torch_threads):
    images, steps = pixels(9), [[0, 3, 8, 2], [5, 1, 7, 4], [6, 0, 1, 2]]
    torch_threads(1)
    expected = all_views(images, steps)
    torch_threads(num_threads)
    # One CPU is left to training.
    threads, expected_threads, are_all_there = set(), max(1, num_threads - 1), threading.Event()

    def noted(*arguments):
        threads.add(threading.get_ident())
        if len(threads) == expected_threads:
            are_all_there.set()
        # Or a thread could take the rows of one that has not started yet.
        assert are_all_there.wait(60)
        return augment(*arguments)

    monkeypatch.setattr(loading, "augment", noted)
    found = all_views(images, steps)
    assert len(found) == len(expected)
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))
    assert len(threads) == expected_threads


def test_the_next_step_is_made_while_the_last_one_is_used():
    made, used = threading.Event(), []

    class Images(np.ndarray):
        def __getitem__(self, row):
            if row == 3:
                made.set()
            return np.asarray(super().__getitem__(row))

    for _ in stream_views(pixels(4).view(Images), [[0], [3]]):
        used.append(made.wait(timeout=60))
    assert used == [True, True]


def test_a_view_that_cannot_be_made_is_told():
    with pytest.raises(IndexError):
        all_views(pixels(2), [[0, 1], [1, 5]])


# Order.


@pytest.mark.parametrize("num", [4, 11, 12, 13])
def test_an_epoch_is_every_row_once_but_for_the_ragged_end(num):
    steps = shuffled(num, 4, 1, 0)
    assert steps.shape == (num // 4, 4)
    assert steps.dtype == np.int64
    assert len(set(steps.ravel().tolist())) == steps.size


def test_the_ragged_end_leaves_out_other_rows_each_time():
    left_out = [set(range(5)) - set(shuffled(5, 4, 1, epoch).ravel().tolist()) for epoch in range(20)]
    assert len(set.union(*left_out)) == 5


# Augmentation.


def test_a_view_has_the_asked_size_and_follows_from_the_generator():
    image = pixels(1, stored=40)[0]
    one, again, other = (augment(image, SIDE, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.shape == (SIDE, SIDE, 3)
    assert one.dtype == np.uint8
    assert (one == again).all()
    assert (one != other).any()


def test_the_image_itself_is_left_alone():
    image = pixels(1, stored=40)[0]
    before = image.copy()
    for seed in range(10):
        augment(image, 40, np.random.default_rng(seed))
    assert (image == before).all()


def test_all_eight_orientations_occur():
    """Four colours in the corners identify the orientation in every crop."""
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
    assert min(shares) > Augmentation().min_crop_area - 0.06
    assert min(shares) < 0.5
    assert max(shares) > 0.9


def test_colours_change_only_where_asked_for():
    image = pixels(1, stored=40)[0]
    image[..., 0] //= 4
    plain = augment(image, SIDE, np.random.default_rng(3))
    grey = augment(image, SIDE, np.random.default_rng(3), Augmentation(grayscale=1))
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 1] == grey[..., 2]).all()
    jittered = augment(image, SIDE, np.random.default_rng(3), Augmentation(colour_jitter=0.4))
    assert (jittered != plain).any()
    # The crop and the orientation are the same.
    assert np.corrcoef(jittered.mean(2).ravel(), plain.mean(2).ravel())[0, 1] > 0.7


# Decoding.


def write_images(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (i * 20, 100, 200)).save(root / name)
    return Images.of(ManifestImage(name, name, (i % 2,), "train", "0" * 64) for i, name in enumerate(names))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_images_are_decoded_in_the_manifests_order(tmp_path, num_threads, torch_threads):
    torch_threads(num_threads)
    images = write_images(tmp_path, ["b/2.png", "a/1.png", "b/1.png"])
    found = load_images(tmp_path, images, Preprocessing(Rendering(), 32, 32))
    assert found.shape == (3, 32, 32, 3)
    assert found.dtype == np.uint8
    assert [int(image[5, 5, 0]) for image in found] == [0, 20, 40]


def test_no_images_are_an_empty_array(tmp_path):
    assert load_images(tmp_path, Images.of([]), Preprocessing(Rendering(), 32, 32)).shape == (0, 32, 32, 3)


def test_all_refused_images_are_listed(tmp_path):
    images = write_images(tmp_path, ["a/1.png", "a/2.png", "a/3.png", "a/4.png"])
    (tmp_path / "a/1.png").write_bytes(b"no image")
    (tmp_path / "a/3.png").unlink()
    Image.new("RGB", (40, 10)).save(tmp_path / "a/4.png")
    with pytest.raises(InputError) as caught:
        load_images(tmp_path, images, Preprocessing(Rendering(), 32, 32))
    message = str(caught.value)
    assert "found 3 problems" in message
    assert all(f"a/{i}.png: " in message for i in (1, 3, 4))
    assert "a/2.png" not in message


# Streaming.


def test_streamed_images_are_those_in_memory(tmp_path):
    images = write_images(tmp_path, [f"a/{i}.png" for i in range(7)])
    preprocessing = Preprocessing(Rendering(), 32, 32)
    kept, streamed = load_images(tmp_path, images, preprocessing), StreamedImages(tmp_path, images, preprocessing)
    assert (streamed.shape, len(streamed)) == (kept.shape, len(kept))
    assert all((streamed[row] == kept[row]).all() for row in range(7))
    assert (streamed[2:5] == kept[2:5]).all()
    steps = np.array([[0, 3, 6], [5, 1, 2]])
    for one, other in zip(
        views_of_steps(streamed, steps, SIDE, Augmentation(), 1, 0),
        views_of_steps(kept, steps, SIDE, Augmentation(), 1, 0),
        strict=True,
    ):
        assert (one == other).all()


def test_a_refused_image_is_named_when_it_is_needed(tmp_path):
    images = write_images(tmp_path, ["a/1.png", "a/2.png", "a/3.png"])
    (tmp_path / "a/3.png").write_bytes(b"no image")
    streamed = StreamedImages(tmp_path, images, Preprocessing(Rendering(), 32, 32))
    views = views_of_steps(streamed, np.array([[0, 1], [1, 2]]), SIDE, Augmentation(), 1, 0)
    next(views)
    with pytest.raises(InputError, match=r"images that cannot be read: a/3.png: "):
        next(views)


def test_images_of_all_ranks_of_a_machine_have_to_fit(monkeypatch):
    preprocessing = Preprocessing(Rendering(), 1024, 1024)
    # 300 MiB of pixels, with half of the free memory allowed.
    monkeypatch.setattr(loading, "available_memory_mb", lambda: 601)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert fits_in_memory(100, preprocessing)
    assert not fits_in_memory(101, preprocessing)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert fits_in_memory(50, preprocessing)
    assert not fits_in_memory(51, preprocessing)
