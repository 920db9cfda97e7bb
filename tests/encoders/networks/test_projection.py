"""Projections: stored vectors keep the cosines of features, and rounding is only unsure where it is said to be."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec, ModelCard, ProjectionSpec
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.projection import Projection

D = 48


def make_features(num, rank=12, seed=0):
    """Positive features with a large mean, as those of a network that ends in a ReLU, in a space of `rank` + 1."""
    rng, basis = np.random.default_rng(seed), np.random.default_rng(9).normal(size=(rank, D))
    return torch.from_numpy((8 + rng.normal(size=(num, rank)) @ basis / rank**0.5).astype(np.float32))


def cosines(vectors):
    units = F.normalize(torch.as_tensor(vectors).double(), dim=1)
    return units @ units.T


def test_stored_vectors_keep_the_cosines_of_features():
    projection = Projection.fit(make_features(500), 16)
    features = make_features(100, seed=1)
    vectors = projection.quantise(features)
    assert vectors.dtype == torch.int8
    assert vectors.shape == (100, 16)
    assert (cosines(vectors) - cosines(features)).abs().max() < 1e-3
    products = vectors.long() @ vectors.long().T * projection.spec.scale**2
    assert (products - cosines(features)).abs().max() < 2e-2


def test_one_scale_for_all_dimensions_loses_less_after_the_cosine_transform():
    features = make_features(300)
    units = F.normalize(features.double(), dim=1)
    principal = units @ torch.linalg.eigh(units.T @ units).eigenvectors[:, -13:]
    plain = (principal / principal.abs().max() * 127).round()
    ours = Projection.fit(features, 13).quantise(features)
    error = [(cosines(vectors) - cosines(features)).std() for vectors in (plain, ours)]
    assert error[1] < 0.6 * error[0]


@pytest.mark.parametrize(("num", "dims", "kept"), [(500, 64, D), (7, 64, 7), (500, 1, 1), (1, 8, 1)])
def test_there_are_at_most_as_many_dimensions_as_features_and_rows(num, dims, kept):
    projection = Projection.fit(make_features(num), dims)
    assert projection.spec.dims == kept
    products = projection.directions @ projection.directions.T
    assert torch.allclose(products, torch.eye(kept), atol=1e-5)


def test_no_component_of_the_sample_is_clipped():
    features = make_features(500)
    assert int(Projection.fit(features, 16).quantise(features).abs().max()) == 127


def test_components_beyond_the_sample_are_clipped():
    projection = Projection.fit(make_features(500), 16)
    vectors = projection.quantise(projection.directions[:1])
    assert vectors.abs().max() == 127
    assert projection(projection.directions[:1]).abs().max() > 127


def test_features_of_zeros_have_a_vector_of_zeros():
    assert not Projection.fit(make_features(50), 8).quantise(torch.zeros(2, D)).any()
    assert not Projection.fit(torch.zeros(5, D), 3).quantise(torch.zeros(2, D)).any()


def test_errors_of_the_features_change_no_vector_whose_rounding_is_sure():
    projection, features = Projection.fit(make_features(500), 16), make_features(2000, seed=2)
    margin = 6e-5
    is_near = projection.is_near_rounding(projection(features), margin)
    assert 0.02 < is_near.float().mean() < 0.9
    noise = F.normalize(torch.randn(features.shape, generator=torch.Generator().manual_seed(0)), dim=1)
    changed = projection.quantise(features + margin * noise * features.norm(dim=1, keepdim=True))
    has_changed = (changed != projection.quantise(features)).any(dim=1)
    assert has_changed.any()
    assert not (has_changed & ~is_near).any()


def make_model(projection):
    torch.manual_seed(0)
    network = HashNetwork(build_backbone("resnet8"), HeadSpec(16))
    preprocessing = Preprocessing(Rendering(), 32, 32)
    card = ModelCard("dhcl", network.spec, (0.0,) * 16, "none", 1, preprocessing, (), {}, {})
    if projection is not None:
        card = dataclasses.replace(card, projection=projection.spec)
    return HashModel(card, network, projection=projection)


def test_a_model_folder_holds_the_projection(tmp_path):
    num_features = make_model(None).network.head.num_features
    samples = [torch.rand(40, num_features, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    models = [make_model(None), *(make_model(Projection.fit(sample, 8)) for sample in samples)]
    ids = {model.save(tmp_path / str(number)) for number, model in enumerate(models)}
    assert len(ids) == 3
    assert HashModel.load(tmp_path / "0").projection is None
    loaded = HashModel.load(tmp_path / "1")
    assert loaded.card == models[1].card
    assert torch.equal(loaded.projection.quantise(samples[1]), models[1].projection.quantise(samples[1]))
    assert loaded.shortened(8).projection is loaded.projection


@pytest.mark.parametrize("wrong", [{"dims": 0}, {"dims": D + 1}, {"scale": 0.0}, {"scale": float("inf")}])
def test_a_projection_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(InputError, match="projection"):
        ProjectionSpec(**{"num_features": D, "dims": 8, "scale": 0.01, **wrong})
