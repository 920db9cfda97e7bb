"""CSQ: the centres and their distances, the losses against loops over images and bits, the votes of several classes."""

import math

import numpy as np
import pytest
import torch

from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.methods import Batch
from orbithash.trainers.methods.csq import (
    Csq,
    CsqConfig,
    central_similarity_loss,
    hash_centres,
    log_cosh_loss,
    voted_centres,
)


def distances(centres):
    return {int((one != other).sum()) for number, one in enumerate(centres) for other in centres[:number]}


@pytest.mark.parametrize(("num_classes", "bits"), [(2, 8), (8, 8), (16, 8), (21, 32), (19, 64), (45, 128)])
def test_centres_of_a_hadamard_matrix(num_classes, bits):
    centres = hash_centres(num_classes, bits, seed=0)
    assert centres.shape == (num_classes, bits)
    assert centres.dtype == np.bool_
    assert distances(centres) <= {bits // 2, bits}
    assert bits in distances(centres) or num_classes <= bits


@pytest.mark.parametrize(("num_classes", "bits"), [(21, 48), (40, 16), (19, 100)])
def test_other_centres_are_drawn(num_classes, bits):
    centres = hash_centres(num_classes, bits, seed=3)
    assert centres.shape == (num_classes, bits)
    assert 0 not in distances(centres)
    assert abs(centres.mean() - 0.5) < 0.1
    assert (centres == hash_centres(num_classes, bits, seed=3)).all()
    assert (centres != hash_centres(num_classes, bits, seed=4)).any()
    singles = [np.random.default_rng([3, num_classes, bits]).integers(0, 2, (num_classes, bits)) for _ in range(1)]
    assert min(distances(centres)) >= min(distances(singles[0]))


def test_codes_too_short_for_distinct_centres_are_refused():
    with pytest.raises(InputError, match=r"bits=8 is too short for the centres of 300 classes, .*; use more bits"):
        hash_centres(300, 8, seed=0)


def test_one_class_or_none_has_centres():
    assert hash_centres(0, 8, 0).shape == (0, 8)
    assert hash_centres(1, 12, 0).shape == (1, 12)


def test_the_vote_of_several_classes_matches_a_loop():
    rng = np.random.default_rng(0)
    classes, centres = rng.random((30, 6)) < 0.4, rng.random((6, 12)) < 0.5
    tie_code = rng.random(12) < 0.5
    found = voted_centres(*map(torch.from_numpy, (classes, centres, tie_code))).tolist()
    num_ties = 0
    for row, bits in zip(classes, found, strict=True):
        for k, bit in enumerate(bits):
            ones = sum(centres[c][k] for c in range(6) if row[c])
            zeros = sum(not centres[c][k] for c in range(6) if row[c])
            num_ties += ones == zeros
            assert bit == (tie_code[k] if ones == zeros else ones > zeros)
    assert num_ties > 10


def test_one_class_votes_for_its_own_centre():
    centres = torch.from_numpy(hash_centres(5, 16, 0))
    assert torch.equal(voted_centres(torch.eye(5).bool(), centres, torch.zeros(16).bool()), centres)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_match_a_loop_over_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    outputs = (2 * torch.randn(5, 8, generator=generator)).to(dtype)
    centres = torch.rand(5, 8, generator=generator) < 0.5
    central = quantisation = 0.0
    for row, bits in zip(outputs.double().tolist(), centres.tolist(), strict=True):
        for x, c in zip(row, bits, strict=True):
            h = (math.tanh(x) + 1) / 2
            central -= math.log(h) if c else math.log(1 - h)
            quantisation += math.log(math.cosh(abs(2 * h - 1) - 1))
    assert float(central_similarity_loss(outputs, centres)) == pytest.approx(central / 40, rel=1e-4)
    assert float(log_cosh_loss(outputs)) == pytest.approx(quantisation / 40, rel=1e-4, abs=1e-7)


def test_saturated_outputs_on_the_wrong_side_have_a_gradient():
    outputs = torch.tensor([[1e4, -1e4, 50.0, 0.0]], requires_grad=True)
    loss = central_similarity_loss(outputs, torch.tensor([[False, True, False, True]])) + log_cosh_loss(outputs)
    loss.backward()
    assert loss.isfinite()
    assert outputs.grad.isfinite().all()
    assert outputs.grad[0, :3].tolist() == pytest.approx([0.5, -0.5, 0.5])


def make(**settings):
    torch.manual_seed(0)
    given = {"backbone": "resnet8", "image_size": 32, "bits": 16, **settings}
    return Csq(load_config(CsqConfig, **given), 3, 10)


def make_batch(labels):
    images = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(torch.arange(len(labels)), labels, images, {}, 0)


def test_the_loss_is_the_weighted_sum_of_its_parts_and_reaches_every_parameter():
    method = make(quantisation_weight=3)
    found = method(make_batch(torch.arange(6) % 3))
    assert float(found["loss"]) == pytest.approx(float(found["central_similarity"] + 3 * found["quantisation"]))
    found["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    grouped = [id(p) for group in method.build_optimizer().param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters())


def test_labels_of_both_forms_give_the_same_loss():
    labels = torch.arange(6) % 3
    method = make()
    one, other = (method(make_batch(given))["loss"] for given in (labels, torch.nn.functional.one_hot(labels).bool()))
    assert torch.equal(one, other)


def test_training_moves_codes_to_their_centres():
    method, batch = make(lr=1e-3, warm_up_epochs=0), make_batch(torch.arange(6) % 3)
    optimizer = method.build_optimizer()
    for _ in range(40):
        optimizer.zero_grad()
        method(batch)["loss"].backward()
        optimizer.step()
    codes = method.outputs(batch).hashes >= 0
    assert torch.equal(codes, method.centres[batch.labels])
