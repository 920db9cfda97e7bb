"""Contrastive training: the start, the loss against a loop, views, and what is refused."""

import numpy as np
import pytest
import torch
from method_parts import make_run, trained, with_draws, write_data

from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.data.loading import Part
from orbithash.trainers.data.views import view
from orbithash.trainers.loop.parts import load_training_part
from orbithash.trainers.methods import Batch, get_method
from orbithash.trainers.methods.label_free.projections import itq_rotation, principal_directions, unit, whitening

BITS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("contrastive") / "first")


def method_of(num_rows=60, **settings):
    kind = get_method("contrastive")
    return kind(load_config(kind.Config, **{"backbone": "resnet8", "bits": BITS, **settings}), 0, num_rows)


def tables(width, num_views=2, num_rows=60):
    """Return features of items and of their views, which differ most in the first dimensions."""
    rng = np.random.default_rng(0)
    items = rng.random((num_rows, width)) + 0.5
    noise = 0.3 * np.linspace(1, 0.1, width)
    names = ["image", *(f"view{i}" for i in range(1, num_views + 1))]
    return {name: (items + noise * rng.standard_normal(items.shape)).astype(np.float32) for name in names}


# The start.


def test_whitening_makes_the_differences_between_views_white():
    views = [unit(table) for table in tables(20, num_rows=500).values()]
    matrix = whitening(views, 1e-9)
    differences = np.stack(views).astype(float) - np.mean(np.stack(views).astype(float), axis=0)
    white = differences.reshape(-1, 20) @ matrix
    # A direction in which rows of unit length do not vary stays without variance.
    eigenvalues = np.linalg.eigvalsh(white.T @ white / (500 * 2))
    assert eigenvalues == pytest.approx(1, abs=1e-3)
    assert matrix == pytest.approx(matrix.T)
    covariance = differences.reshape(-1, 20).T @ differences.reshape(-1, 20) / (500 * 2)
    assert whitening(views, 1) == pytest.approx(np.eye(20) * (20 / np.trace(covariance)) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("start", ["whitened", "itq"])
def test_the_head_starts_as_itq_on_whitened_features(start):
    method = method_of(start=start, seed=2)
    features = tables(method.network.head.num_features)
    method.begin(Part(None, np.full(60, -1), [], features=features))
    views = [unit(table).astype(float) for table in features.values()]
    mean = np.mean(views, axis=(0, 1))
    matrix = whitening([unit(table) for table in features.values()], 0.1) if start == "whitened" else np.eye(len(mean))
    rows = ((np.mean(views, axis=0) - mean) @ matrix).astype(np.float32)
    principal = principal_directions(rows, BITS)
    rotation = itq_rotation((rows @ principal.T).astype(np.float32), 2)
    expected = np.stack([(view - mean) @ matrix @ principal.T @ rotation for view in views])
    expected /= expected.std()
    found = torch.stack([method.network.head(torch.from_numpy(table)) for table in features.values()])
    assert found.detach().numpy() == pytest.approx(np.tanh(expected), abs=1e-3)


# The loss.


def test_the_loss_is_nt_xent_of_two_views_with_quantisation_and_balance():
    method = method_of(temperature=0.4, quantisation_weight=0.2, bit_balance_weight=3.0)
    width, size, seed = method.network.head.num_features, 6, 5
    features = {name: torch.from_numpy(table[:size]) for name, table in tables(width).items()}
    batch = Batch(torch.arange(size), torch.full((size,), -1), None, features, seed)
    losses = {name: value.item() for name, value in method(with_draws(method, batch)).items()}

    hashes = np.stack([method.network.head(table).detach().numpy() for table in features.values()]).astype(float)
    order = torch.rand(size, 3, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)[:, :2].tolist()
    rows = np.array([hashes[order[i][side], i] for side in (0, 1) for i in range(size)])
    scaled = rows / np.linalg.norm(rows, axis=1)[:, None]
    total = 0.0
    for i in range(2 * size):
        terms = {j: np.exp(scaled[i] @ scaled[j] / 0.4) for j in range(2 * size) if j != i}
        total -= np.log(terms[(i + size) % (2 * size)] / sum(terms.values()))
    quantisation = ((rows - np.where(rows >= 0, 1, -1)) ** 2).mean()
    balance = (rows.mean(0) ** 2).mean()
    assert losses["contrastive"] == pytest.approx(total / (2 * size), rel=1e-4)
    assert losses["quantisation"] == pytest.approx(quantisation, rel=1e-4)
    assert losses["bit_balance"] == pytest.approx(balance, rel=1e-3)
    assert losses["loss"] == pytest.approx(total / (2 * size) + 0.2 * quantisation + 3 * balance, rel=1e-4)


def test_steps_bring_the_views_of_an_item_together():
    method = method_of(quantisation_weight=0, bit_balance_weight=0, start="itq")
    features = tables(method.network.head.num_features)
    method.begin(Part(None, np.full(60, -1), [], features=features))
    tensors = {name: torch.from_numpy(table) for name, table in features.items()}
    batch = Batch(torch.arange(60), torch.full((60,), -1), None, tensors, seed=0)
    optimizer, losses = method.build_optimizer(), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = method(with_draws(method, batch))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def test_the_last_epoch_is_the_model(data, tmp_path):
    history = trained(make_run(data, "contrastive", batch_size=8, num_views=1, validate_every=2), tmp_path).history
    assert [record["score"] for record in history] == [1, 2]
    assert 0 <= history[-1]["validation/ap_min@20"] <= 1


# Views.


def test_each_table_of_views_is_another_draw(data):
    run = make_run(data, "contrastive", num_views=2)
    part = load_training_part(run, run.build())
    assert list(part.features) == ["image", "view1", "view2"]
    one, other = part.features["view1"][:], part.features["view2"][:]
    assert (one != other).any(axis=1).all()
    again = load_training_part(run, run.build()).features
    assert (again["view1"][:] == one).all()


def test_a_crop_turn_is_a_square_of_parts_of_the_image():
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :, 0], image[:, :, 1] = np.arange(60) * 4, np.arange(40)[:, None] * 6
    seen = set()
    for seed in range(60):
        crop = view("crop-turn", image, np.random.default_rng(seed)).astype(int)
        assert crop.shape == (40, 40, 3)
        across, along = crop[:, 1:] - crop[:, :-1], crop[1:] - crop[:-1]
        red, green = ((across[..., channel].mean(), along[..., channel].mean()) for channel in (0, 1))
        seen.add(tuple(int(np.sign(round(value, 1))) for value in (*red, *green)))
        area = np.ptp(crop[..., 0]) / 236 * np.ptp(crop[..., 1]) / 234
        assert 0.3 < area <= 1
    # The gradient of each channel points in one of four directions, in eight combinations.
    assert len(seen) == 8


# Refusals.


def test_more_bits_than_features_or_images_are_refused():
    with pytest.raises(InputError, match="bits is 60: contrastive takes at most one bit for each feature and each"):
        method_of(bits=60)
    method = method_of()
    features = {name: np.tile(table[:4], (15, 1)) for name, table in tables(method.network.head.num_features).items()}
    part = Part(None, np.full(60, -1), [], features=features)
    with pytest.raises(InputError, match="vary in 3 directions only; give --bits 3 or fewer"):
        method.begin(part)


def test_settings_without_effect_are_refused():
    with pytest.raises(InputError, match="colour_jitter cannot be set: this method does not use it"):
        load_config(get_method("contrastive").Config, colour_jitter=0.2)
