"""Outputs of the head beside the codes: what they mean, and that they depend on nothing but the item."""

import dataclasses

import numpy as np
import pytest
import torch

from orbithash.encoders.codes import Encoded, outputs_of, unpack
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import Rendering
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks import binarizer
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec, ModelCard, TextSpec
from orbithash.encoders.networks.hash_network import HashHead, HashNetwork, NetworkOutput
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.projection import Projection
from orbithash.encoders.networks.rounding import is_near_half, scaled_outputs

BITS, SIDE, DIMS = 20, 16, 128
CLASSES = ("beach", "forest", "harbor", "river", "runway")


class Rounding(HashNetwork):
    """A network whose features and outputs differ in the last digits with the size of the batch."""

    def features(self, images):
        features = super().features(images)
        if len(features) == 1:
            return features
        generator = torch.Generator().manual_seed(len(features))
        return features * (1 + 4e-6 * (torch.rand(features.shape, generator=generator) - 0.5))

    def hash(self, features):
        hashes, logits = super().hash(features)
        if len(features) == 1:
            return NetworkOutput(hashes, logits)
        generator = torch.Generator().manual_seed(len(features))
        noise = 4e-5 * (torch.rand(hashes.shape, generator=generator) - 0.5)
        return NetworkOutput(hashes + noise, logits)


class StubTextEncoder:
    """Features of a sentence that follow from its characters, with an error that follows from the batch."""

    def __init__(self, num_features=12):
        self.num_features = num_features

    def encode(self, sentences):
        rows = [np.random.default_rng(list(sentence.encode())).normal(size=self.num_features) for sentence in sentences]
        noise = 1e-7 * np.random.default_rng(len(rows)).normal(size=(len(rows), self.num_features))
        return (np.array(rows).reshape(-1, self.num_features) + (len(rows) > 1) * noise).astype(np.float32)


def make_model(
    label_code="none",
    activation="tanh",
    thresholds=(0.0,) * BITS,
    with_text=False,
    with_projection=False,
    is_joint=False,
):
    torch.manual_seed(0)
    head = HeadSpec(BITS, activation=activation)
    network = HashNetwork(build_backbone("resnet8"), head, len(CLASSES))
    assert network.head.num_features == DIMS
    torch.nn.init.normal_(network.classifier.weight)
    network.__class__ = Rounding
    encoder = StubTextEncoder(DIMS if is_joint else 12)
    text = TextSpec("0" * 64, encoder.num_features, head, is_joint) if with_text else None
    card = ModelCard(
        method="dhcl",
        network=network.spec,
        thresholds=thresholds,
        label_code=label_code,
        label_weight=1,
        preprocessing=Preprocessing(Rendering(), SIDE, SIDE),
        classes=CLASSES,
        dataset={},
        metrics={},
        text=text,
    )
    projection = None
    if with_projection:
        projection = Projection.fit(torch.from_numpy(random_vectors(300)), DIMS)
        card = dataclasses.replace(card, projection=projection.spec)
    text_head = HashHead(encoder.num_features, head) if with_text else None
    return HashModel(card, network, "", "cpu", text_head, encoder if with_text else None, projection)


def random_vectors(num=60):
    return np.random.default_rng(1).normal(size=(num, DIMS)).astype(np.float32)


def random_pixels(num=12):
    return np.random.default_rng(2).integers(0, 256, (num, SIDE, SIDE, 3), np.uint8)


def alone(model, kind, items):
    """Encode each item in a call of its own."""
    parts = [model.encode_items(kind, items[row : row + 1], with_outputs=True) for row in range(len(items))]
    return Encoded.joined(parts)


def assert_equal(found, expected):
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.outputs, expected.outputs)
    np.testing.assert_array_equal(found.vectors, expected.vectors)


SENTENCES = [f"many boats in harbor {number}" for number in range(40)]


@pytest.mark.parametrize(
    ("kind", "items"), [("vector", random_vectors()), ("image", random_pixels()), ("text", SENTENCES)]
)
def test_parts_do_not_depend_on_batches(kind, items):
    plain = make_model(with_text=True, with_projection=True)
    # Some outputs lie on thresholds.
    outputs = plain.network.hash(torch.from_numpy(random_vectors(40)[:1])).hashes.detach()[0]
    for model in (plain, make_model(with_text=True, with_projection=True, thresholds=tuple(outputs.tolist()))):
        expected = alone(model, kind, items)
        assert len(np.unique(expected.codes, axis=0)) > 5
        for size in (None, 1, 3, 7, 1000):
            assert_equal(model.encode_items(kind, items, with_outputs=True, batch_size=size), expected)
        without = model.encode_items(kind, items)
        np.testing.assert_array_equal(without.codes, expected.codes)
        assert without.outputs is None
        np.testing.assert_array_equal(without.vectors, expected.vectors)
        assert (expected.vectors is None) == (kind == "text")


def test_without_the_margin_outputs_depend_on_batches(monkeypatch):
    monkeypatch.setattr(binarizer, "MARGIN", 0.0)
    model, items = make_model(with_projection=True), random_vectors(1000)
    found = model.encode_items("vector", items, with_outputs=True)
    assert (found.outputs != alone(model, "vector", items).outputs).any()
    pixels = np.random.default_rng(3).integers(0, 256, (600, SIDE, SIDE, 3), np.uint8)
    found = model.encode_items("image", pixels, batch_size=600)
    assert (found.vectors != alone(model, "image", pixels).vectors).any()


def test_stored_vectors_are_those_of_the_projection():
    model, vectors = make_model(with_projection=True), random_vectors()
    expected = np.concatenate([model.projection.quantise(torch.from_numpy(row[None])).numpy() for row in vectors])
    np.testing.assert_array_equal(model.encode_items("vector", vectors).vectors, expected)
    assert make_model().encode_items("vector", vectors).vectors is None


def test_sentences_have_vectors_where_their_features_are_in_the_space_of_images():
    model = make_model(with_text=True, with_projection=True, is_joint=True)
    expected = alone(model, "text", SENTENCES)
    assert expected.vectors.shape == (len(SENTENCES), DIMS)
    assert_equal(model.encode_items("text", SENTENCES, with_outputs=True), expected)


def test_codes_alone_cost_no_projection(monkeypatch):
    model = make_model(with_projection=True)
    monkeypatch.setattr(Projection, "forward", lambda *arguments: pytest.fail("not needed for codes"))
    model.encode_prepared(random_pixels())
    model.encode_features(random_vectors())


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "none"])
def test_outputs_are_distances_to_thresholds_in_127ths_of_the_largest(activation):
    thresholds = tuple(np.linspace(0.2, 0.7, BITS).tolist())
    model, vectors = make_model(activation=activation, thresholds=thresholds), random_vectors()
    encoded = model.encode_items("vector", vectors, with_outputs=True)
    with torch.inference_mode():
        hashes = torch.cat([model.network.hash(torch.from_numpy(row[None])).hashes for row in vectors]).double().numpy()
    differences = hashes - np.array(thresholds)
    expected = 127 * differences / np.abs(differences).max(axis=1, keepdims=True)
    np.testing.assert_allclose(encoded.outputs, expected, atol=0.501)
    assert encoded.outputs.dtype == np.int8
    assert (np.abs(encoded.outputs.astype(int)).max(axis=1) == 127).all()
    bits = unpack(encoded.codes, BITS)
    assert ((encoded.outputs == 0) | ((encoded.outputs > 0) == bits)).all()
    np.testing.assert_array_equal(encoded.codes, model.encode_features(vectors))


def test_label_bits_have_the_largest_outputs():
    model, vectors = make_model(label_code="gray"), random_vectors()
    encoded = model.encode_items("vector", vectors, with_outputs=True)
    label_bits = unpack(encoded.codes, model.bits)[:, BITS:]
    assert len(np.unique(label_bits, axis=0)) > 1
    np.testing.assert_array_equal(encoded.outputs[:, BITS:], np.where(label_bits, 127, -127))
    assert_equal(encoded, alone(model, "vector", vectors))


def test_outputs_on_all_thresholds_are_zero():
    model = make_model()
    with torch.no_grad():
        model.network.head.output.weight.zero_()
    encoded = model.encode_items("vector", random_vectors(1), with_outputs=True)
    assert (encoded.outputs == 0).all()
    assert unpack(encoded.codes, BITS).all()


def test_an_image_and_its_features_give_the_same():
    model, pixels = make_model(), random_pixels()
    of_images = model.encode_items("image", pixels, with_outputs=True)
    features = np.concatenate([model.features(pixels[row : row + 1]) for row in range(len(pixels))])
    assert_equal(of_images, model.encode_items("vector", features, with_outputs=True))


def test_no_items():
    model = make_model(with_text=True)
    for kind, items in (("vector", random_vectors(0)), ("image", random_pixels(0)), ("text", [])):
        encoded = model.encode_items(kind, items, with_outputs=True)
        assert (encoded.codes.shape, encoded.outputs.shape) == ((0, 3), (0, BITS))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((2, DIMS + 1), np.float32), r"vectors of this model are float32 \[N, 128\], got float32 \(2, 129\)"),
        (np.zeros((2, DIMS)), r"vectors of this model are float32 \[N, 128\], got float64 \(2, 128\)"),
        (np.zeros(DIMS, np.float32), r"got float32 \(128,\)"),
        (np.full((2, DIMS), np.nan, np.float32), "vector 0 of 2 has NaN or infinity"),
        (np.array([[0] * DIMS, [0] * (DIMS - 1) + [np.inf]], np.float32), "vector 1 of 2 has NaN or infinity"),
    ],
)
def test_invalid_vectors_are_refused(vectors, message):
    with pytest.raises(InputError, match=message) as caught:
        make_model().encode_items("vector", vectors)
    assert "\n" not in str(caught.value)


def test_a_model_of_images_refuses_sentences():
    with pytest.raises(InputError, match="encodes images only"):
        make_model().encode_items("text", ["boats"], with_outputs=True)


def test_rows_near_half_an_integer():
    values = torch.tensor([[0.4, 2.0], [0.499, 2.0], [0.501, 2.0], [-1.5, 0.0], [3.0, 4.0]])
    assert is_near_half(values, 0.01).tolist() == [False, True, True, True, False]
    assert is_near_half(values, torch.tensor([0.2, 0.6])).tolist() == [True] * 5
    outputs, could_differ = scaled_outputs(torch.tensor([[1.0, -0.5], [0.0, 0.0]]), torch.full((2, 2), 1e-9))
    assert outputs.tolist() == [[127, -64], [0, 0]]
    assert could_differ.tolist() == [True, True]


def test_outputs_of_codes():
    codes = np.array([[0b10100000, 0b10000000]], np.uint8)
    assert outputs_of(codes, 9).tolist() == [[127, -127, 127, -127, -127, -127, -127, -127, 127]]
