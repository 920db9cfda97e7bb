"""MrHash: losses against loops in Python floats, the autoencoder, and independence of labels and of ranks."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from method_parts import make_run, trained, with_draws, write_data
from safetensors.torch import save_file
from sklearn.cluster import KMeans

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.trainers.config import load_config
from orbithash.trainers.data.loading import Part
from orbithash.trainers.features.features import FeatureExtractor
from orbithash.trainers.loop.checkpoint import load_checkpoint
from orbithash.trainers.loop.export import export_models
from orbithash.trainers.loop.parts import load_training_part
from orbithash.trainers.loop.run import check_run
from orbithash.trainers.methods import Batch
from orbithash.trainers.methods.autoencoder import (
    Autoencoder,
    PreTraining,
    cluster_centres,
    cluster_entropy,
    pre_train,
    soft_assignment,
    target_distribution,
)
from orbithash.trainers.methods.mrhash import MrHash, MrHashConfig, kl_divergence

DTYPES = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float32: 1e-5, torch.float64: 1e-5}
SETTINGS = {"num_clusters": 4, "num_latents": 5, "autoencoder_epochs": 2, "hidden": (12,)}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shares_of(num, clusters=4, seed=0, dtype=torch.float32):
    return torch.softmax(2 * normal(num, clusters, seed=seed, dtype=torch.float64), dim=1).to(dtype)


# Soft clusters.


def slow_assignment(latents, centres, alpha):
    rows = []
    for z in latents.tolist():
        weights = [
            (1 + sum((a - b) ** 2 for a, b in zip(z, mu, strict=True)) / alpha) ** (-(alpha + 1) / 2)
            for mu in centres.tolist()
        ]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_soft_assignment(dtype, tolerance, alpha):
    latents, centres = normal(7, 3, dtype=dtype), normal(4, 3, seed=1, dtype=dtype)
    found = soft_assignment(latents, centres, alpha)
    torch.testing.assert_close(
        found.double(), torch.tensor(slow_assignment(latents, centres, alpha)).double(), rtol=tolerance, atol=tolerance
    )


def test_a_latent_on_its_centre_and_one_far_from_all_have_finite_gradients():
    centres = normal(3, 2)
    latents = torch.stack([centres[1], torch.tensor([1e4, -1e4])]).requires_grad_()
    shares = soft_assignment(latents, centres, 1.0)
    kl_divergence(shares_of(2, 3), shares, "mean").backward()
    assert shares[0].argmax() == 1
    assert torch.isfinite(shares).all()
    assert torch.isfinite(latents.grad).all()
    assert soft_assignment(latents[:0], centres, 1.0).shape == (0, 3)


def test_target_distribution():
    shares = shares_of(9)
    q = shares.tolist()
    sizes = [sum(row[j] for row in q) for j in range(4)]
    for row, found in zip(q, target_distribution(shares).tolist(), strict=True):
        weights = [share**2 / size for share, size in zip(row, sizes, strict=True)]
        assert found == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-5)
    hard = target_distribution(shares, hard=True)
    assert hard.sum() == 9
    assert (hard.argmax(1) == shares.argmax(1)).all()


def test_an_empty_cluster_leaves_the_target_finite():
    target = target_distribution(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert target.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
@pytest.mark.parametrize("num", [0, 1, 6])
@pytest.mark.parametrize(("reduction", "cells"), [("mean", lambda num: num * 4), ("batchmean", lambda num: num)])
def test_kl_divergence(dtype, tolerance, num, reduction, cells):
    target, shares = shares_of(num, dtype=dtype), shares_of(num, seed=1, dtype=dtype).requires_grad_()
    expected = sum(
        p * math.log(p / q)
        for row, other in zip(target.tolist(), shares.tolist(), strict=True)
        for p, q in zip(row, other, strict=True)
        if p > 0
    )
    found = kl_divergence(target, shares, reduction)
    found.backward()
    assert float(found.detach()) == pytest.approx(expected / max(1, cells(num)), rel=tolerance, abs=tolerance)
    assert (shares.grad <= 0).all()


def test_divergence_of_hard_targets_and_vanishing_shares_is_finite():
    shares = torch.tensor([[0.0, 1.0]], requires_grad=True)
    found = kl_divergence(torch.tensor([[1.0, 0.0]]), shares, "batchmean")
    found.backward()
    assert float(found.detach()) == pytest.approx(-math.log(1e-12), rel=1e-4)
    assert torch.isfinite(shares.grad).all()


def test_cluster_entropy_shows_a_collapse():
    assert float(cluster_entropy(torch.eye(4).repeat(3, 1))) == pytest.approx(1)
    assert float(cluster_entropy(torch.eye(4)[:2])) == pytest.approx(0.5)
    # All centres have become equal: every image is assigned evenly to all clusters.
    assert float(cluster_entropy(torch.full((8, 4), 0.25))) == 0


def test_centres_match_k_means():
    latents = normal(60, 3) + 6 * torch.eye(3).repeat(20, 1)
    found = cluster_centres(latents, 3, seed=5)
    expected = KMeans(3, n_init=20, random_state=5).fit(latents.numpy()).cluster_centers_
    torch.testing.assert_close(found, torch.from_numpy(expected))
    assert torch.equal(cluster_centres(latents, 3, seed=5), found)


# The autoencoder.


def sources(num=40, width=6):
    first = normal(num, width).numpy()
    return [first, (first @ normal(width, width, seed=1).numpy()).astype(np.float32)]


def settings(**given):
    defaults = {"epochs": 6, "batch_size": 8, "lr": 1e-2, "halve_epochs": 3, "held_out": 0.25, "first_weight": 0.1}
    return PreTraining(**(defaults | {"seed": 0} | given))


@pytest.mark.parametrize("num_sources", [1, 2])
def test_errors_are_mean_squared_errors(num_sources):
    torch.manual_seed(0)
    autoencoder = Autoencoder(6, 3, num_sources)
    assert len(autoencoder.decoders) == len(autoencoder.norms) == num_sources
    features = [torch.from_numpy(source) for source in sources()[:num_sources]]
    latents = autoencoder.latents(sources()[0])
    assert latents.shape == (40, 3)
    for error, decoder, source in zip(
        autoencoder.errors(latents, features), autoencoder.decoders, features, strict=True
    ):
        squares = [
            (a - b) ** 2 for a, b in zip(decoder(latents).ravel().tolist(), source.ravel().tolist(), strict=True)
        ]
        assert float(error.detach()) == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    names = [name for name, _ in autoencoder.named_parameters()]
    assert len(autoencoder.state_dict()) == len(set(names)) + 2 * num_sources


@pytest.mark.parametrize("num_sources", [1, 2])
def test_the_state_with_the_lowest_held_out_error_is_kept(num_sources):
    def made(epochs):
        torch.manual_seed(0)
        autoencoder = Autoencoder(6, 3, num_sources)
        return autoencoder, pre_train(autoencoder, sources()[:num_sources], settings(epochs=epochs, lr=0.03))

    kept, errors = made(12)
    best = int(np.argmin(errors))
    assert best < 11, "the best epoch must not be the last one"
    until_best, some = made(best + 1)
    assert some == errors[: best + 1]
    for one, other in zip(kept.state_dict().values(), until_best.state_dict().values(), strict=True):
        assert torch.equal(one, other)


# The method.


def part(num=24, width=576):
    features = dict(zip(("image", "second"), sources(num, width), strict=True))
    return Part(None, np.arange(num) % 3, [str(i) for i in range(num)], features)


def make_method(num=24, **given):
    config = load_config(MrHashConfig, backbone="mobilenet_v3_small", bits=16, **{**SETTINGS, **given})
    torch.manual_seed(config.seed)
    return MrHash(config, 3, num)


def batch_of(training, rows):
    return Batch(
        torch.tensor(rows),
        torch.from_numpy(training.labels[rows]),
        None,
        {name: torch.from_numpy(table[rows]) for name, table in training.features.items()},
        0,
    )


def test_the_loss_is_the_weighted_sum_of_its_parts():
    weights = {
        "reconstruction": 3.0,
        "code_reconstruction": 2.0,
        "quantisation": 0.5,
        "bit_balance": 0.25,
    }
    method = make_method(dropout=0, **{f"{name}_weight": weight for name, weight in weights.items()})
    training = part()
    method.begin(training)
    method.start_epoch(0, training)
    losses = method(with_draws(method, batch_of(training, [3, 1, 7, 20])))
    expected = losses["divergence"] + losses["latent_divergence"]
    expected = expected + sum(weight * losses[name] for name, weight in weights.items())
    torch.testing.assert_close(losses["loss"], expected)
    first, second = (torch.from_numpy(table[[3, 1, 7, 20]]) for table in training.features.values())
    autoencoder, hashes = method.autoencoder, method.network.head(first)
    predicted = method.bridge(hashes)
    squares = [
        (decoder(predicted) - norm(source)).square().mean()
        for decoder, norm, source in zip(autoencoder.decoders, autoencoder.norms, (first, second), strict=True)
    ]
    torch.testing.assert_close(losses["code_reconstruction"], squares[0] + squares[1])
    target = method.target[torch.tensor([3, 1, 7, 20])]
    shares = soft_assignment(predicted, method.centres, 1.0)
    torch.testing.assert_close(losses["divergence"], kl_divergence(target, shares, "mean"))
    torch.testing.assert_close(losses["bit_balance"], hashes.mean(0).square().mean())


def test_dropout_sets_features_to_their_mean():
    method, training = make_method(dropout=0.25), part(2000, 576)
    method.network.head.norm.fit(features := torch.from_numpy(training.features["image"]))
    mean = method.network.head.norm.mean
    batches = [Batch(torch.arange(2000), torch.zeros(2000), None, {}, seed) for seed in (7, 7, 8)]
    some, same, other = (method._dropped(features, with_draws(method, batch).draws["kept"]) for batch in batches)
    dropped = torch.isclose(some, mean.expand_as(some), atol=1e-6)
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.005)
    torch.testing.assert_close(some[~dropped], (mean + (features - mean) / 0.75)[~dropped], rtol=1e-4, atol=1e-5)
    assert torch.equal(some, same)
    assert not torch.equal(some, other)


def test_the_target_is_updated_every_target_epochs():
    training = part()
    method = make_method(target_epochs=2)
    method.begin(training)
    method.start_epoch(0, training)
    first = method.target.clone()
    with torch.no_grad():
        method.centres += normal(4, 5, seed=3)
    for epoch, is_new in ((1, False), (2, True)):
        method.start_epoch(epoch, training)
        assert torch.equal(method.target, first) != is_new
    shares = soft_assignment(method.autoencoder.latents(training.features["image"]), method.centres, 1.0)
    torch.testing.assert_close(method.target, target_distribution(shares).detach())


def test_a_collapse_is_reported():
    training = part()
    method = make_method()
    method.begin(training)
    method.start_epoch(0, training)
    assert float(method(with_draws(method, batch_of(training, [0, 1])))["cluster_entropy"]) > 0.3
    with torch.no_grad():
        method.centres.copy_(method.centres[0].expand_as(method.centres))
    method.start_epoch(1, training)
    assert float(method(with_draws(method, batch_of(training, [0, 1])))["cluster_entropy"]) == 0


def test_more_clusters_than_images_are_refused():
    with pytest.raises(InputError, match="num_clusters is 25: at most the number of training images, 24,"):
        make_method(num_clusters=25)


@pytest.mark.parametrize("fine_tune", [False, True])
def test_every_parameter_that_trains_is_in_one_group(fine_tune):
    method = make_method(fine_tune=fine_tune, lr=1e-2)
    groups = {group["name"]: group for group in method.build_optimizer().param_groups}
    rates = {id(p): group["lr"] for group in groups.values() for p in group["params"]}
    for name, parameter in method.named_parameters():
        if not name.startswith("network.backbone."):
            assert rates[id(parameter)] == 1e-2
        else:
            assert parameter.requires_grad == fine_tune
            assert rates.get(id(parameter)) == (pytest.approx(1e-4) if fine_tune else None)


# Whole runs.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "first")


@pytest.mark.parametrize("sources", ["both", "first"])
def test_labels_do_not_affect_training(data, tmp_path, sources):
    run = make_run(data, "mrhash", **SETTINGS, sources=sources)
    images = tuple(dataclasses.replace(i, labels=((i.labels[0] + 1) % 3,)) for i in run.manifest.images)
    unknown = tuple(dataclasses.replace(i, labels=()) for i in run.manifest.images)
    states, histories = [], []
    for number, some in enumerate((run.manifest.images, images, unknown)):
        folder = tmp_path / str(number)
        folder.mkdir()
        other = dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, images=some))
        histories.append(trained(other, folder).history)
        states.append(load_checkpoint(folder / "epoch2")["method"])
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())
    explained = [[record["validation/reconstructed_variance"] for record in history] for history in histories]
    assert explained[0] == explained[1] == explained[2]
    assert ["validation/ap_min@20" in history[-1] for history in histories] == [True, True, False]
    assert [record["score"] for record in histories[0]] == [1, 2]


def test_a_single_source_needs_no_second_one(data):
    run = make_run(data, "mrhash", **SETTINGS, sources="first", epochs=1)
    images = tuple(dataclasses.replace(image, second=None) for image in run.manifest.images)
    trained(dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, images=images)))
    assert len(run.build().autoencoder.decoders) == 1
    with pytest.raises(InputError, match="have no second source"):
        trained(
            dataclasses.replace(
                make_run(data, "mrhash", **SETTINGS), manifest=dataclasses.replace(run.manifest, images=images)
            )
        )


def weights_file(path, name, seed):
    torch.manual_seed(seed)
    save_file(torchvision.models.get_model(name).state_dict(), path)
    return str(path)


@pytest.mark.parametrize("fine_tune", [False, True])
def test_the_autoencoder_can_reconstruct_features_of_another_network(data, tmp_path, fine_tune):
    own = weights_file(tmp_path / "own.safetensors", "mobilenet_v3_small", 1)
    other = weights_file(tmp_path / "other.safetensors", "resnet18", 2)
    run = make_run(
        data,
        "mrhash",
        **SETTINGS,
        weights=own,
        feature_backbone="resnet18",
        feature_weights=other,
        epochs=1,
        fine_tune=fine_tune,
    )
    method = run.build()
    training = load_training_part(run, method)
    for name, backbone, weights, source in (
        ("image", "mobilenet_v3_small", own, "image"),
        ("first", "resnet18", other, "image"),
        ("second", "resnet18", other, "second"),
    ):
        network = HashNetwork(build_backbone(backbone, weights), HeadSpec(8))
        extractor = FeatureExtractor(network, run.preprocessing())
        np.testing.assert_array_equal(training.features[name], extractor(data, run.manifest.part("train"), source))
    assert method.network.head.norm.mean.shape == (576,)
    assert [norm.mean.shape for norm in method.autoencoder.norms] == [(512,), (512,)]
    method.begin(training)
    np.testing.assert_allclose(
        method.network.head.norm.mean, np.asarray(training.features["image"]).mean(0), rtol=1e-4, atol=1e-5
    )
    for norm, name in zip(method.autoencoder.norms, ("first", "second"), strict=True):
        np.testing.assert_allclose(norm.mean, np.asarray(training.features[name]).mean(0), rtol=1e-4, atol=1e-5)
    trained(run, tmp_path)
    for path in (own, other):
        Path(path).unlink()
    model, _ = export_models(run, tmp_path / "epoch1")
    assert model.encode_features(training.features["image"]).shape == (len(training.ids), 2)


def test_feature_weights_are_checked_before_workers_start(data, tmp_path):
    wrong = weights_file(tmp_path / "other.safetensors", "mobilenet_v3_small", 2)
    run = make_run(data, "mrhash", **SETTINGS, feature_backbone="resnet18", feature_weights=wrong)
    with pytest.raises(InputError, match="not the weights of backbone resnet18"):
        check_run(run, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_backbone": "resnet19"}, "feature_backbone is 'resnet19': unknown backbone 'resnet19'; did you mean"),
        ({"feature_weights": "IMAGENET1K_V1"}, "feature_weights is 'IMAGENET1K_V1', but feature_backbone is not set"),
        ({"feature_backbone": "alexnet", "image_size": 32}, "image_size is 32: alexnet needs at least 63 pixels"),
    ],
)
def test_invalid_feature_settings_are_refused(settings, message):
    with pytest.raises(InputError) as caught:
        load_config(MrHashConfig, **settings)
    assert message in str(caught.value)


def test_reconstructed_variance(data):
    method, training = make_method(), part()
    method.begin(training)
    latents = method.autoencoder.latents(training.features["image"])
    unexplained = total = 0.0
    for table, norm, decoder in zip(
        training.features.values(), method.autoencoder.norms, method.autoencoder.decoders, strict=True
    ):
        source = norm(torch.from_numpy(table)).numpy()
        unexplained += ((decoder(latents).detach().numpy() - source) ** 2).sum()
        total += ((source - source.mean(0)) ** 2).sum()
    assert method._explained_variance(latents, training) == pytest.approx(1 - unexplained / total, abs=1e-5)


def work(rank, folder):
    """Compute the target in one of two processes whose cluster centres differ."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    method, training = make_method(), part()
    with torch.no_grad():
        method.centres.copy_(normal(4, 5, seed=rank))
    method.start_epoch(0, training)
    torch.save({"target": method.target, "entropy": method.entropy}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_all_ranks_use_the_target_of_the_first(tmp_path):
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    method, training = make_method(), part()
    with torch.no_grad():
        method.centres.copy_(normal(4, 5))
    method.start_epoch(0, training)
    for name in one:
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], getattr(method, name))
