"""DUCH: losses against double loops over pairs and bits, hash networks and discriminator, captions, and whole runs."""

import dataclasses
import inspect
import math
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from backbone_models import OPEN_CLIP, write_open_clip
from method_parts import make_run, trained, with_draws, write_data, write_text_model, write_translators

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.imagery.preprocessing import resample
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.text_towers import text_tower
from orbithash.trainers.captions import augment_captions
from orbithash.trainers.config import load_config
from orbithash.trainers.data.loading import Part
from orbithash.trainers.evaluation.model_evaluation import draw_caption
from orbithash.trainers.loop.checkpoint import load_checkpoint
from orbithash.trainers.loop.export import export_models
from orbithash.trainers.loop.parts import load_training_part, load_validation_parts
from orbithash.trainers.loop.tables import load_tables
from orbithash.trainers.methods import METHODS, Batch
from orbithash.trainers.methods.duch import Duch, DuchConfig
from orbithash.trainers.methods.duch.losses import (
    REFERENCE_BATCH,
    Discriminator,
    balance_loss,
    consensus_loss,
    consensus_of,
    discriminator_loss,
    fooling_loss,
    gradient_penalty,
)
from orbithash.trainers.methods.losses import nt_xent

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Relative, for all dtypes: the losses compute in float32, and the oracle reads the already rounded inputs.
TOLERANCE = 1e-4


def views(num, bits=12, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.tanh(torch.randn(num, bits, generator=generator)).to(dtype) for _ in range(2)]


# The adversarial losses.


def oracle_gradient_norms(discriminator, points, step=1e-6):
    """Return the norm of the logit's gradient at each point, by central differences."""
    norms = []
    for point in points:
        squares = 0.0
        for k in range(len(point)):
            moved = torch.stack([point, point])
            moved[0, k] += step
            moved[1, k] -= step
            above, below = discriminator(moved).tolist()
            squares += ((above - below) / (2 * step)) ** 2
        norms.append(math.sqrt(squares))
    return norms


def test_the_gradient_penalty_matches_a_numeric_derivative():
    torch.manual_seed(0)
    discriminator = Discriminator(6).double()
    points = torch.rand(5, 6, dtype=torch.float64) * 2 - 1

    def oracle():
        with torch.no_grad():
            return sum((norm - 1) ** 2 for norm in oracle_gradient_norms(discriminator, points)) / 5

    penalty = gradient_penalty(discriminator, points)
    assert float(penalty.detach()) == pytest.approx(oracle(), rel=1e-6)
    weight = discriminator.hidden.weight
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert gradient.abs().max() > 1e-3
    for place in ((0, 0), (3, 2), (7, 5)):
        values = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                weight[place] += step
            values.append(oracle())
            with torch.no_grad():
                weight[place] -= step
        assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_losses_match_a_loop(dtype):
    torch.manual_seed(0)
    discriminator = Discriminator(8).to(torch.float64 if dtype == torch.float64 else torch.float32)
    texts, images = views(5, 8, dtype=dtype)
    shares = torch.rand(5, 8, dtype=discriminator.output.weight.dtype)
    sum_of_texts = sum_of_images = 0.0
    for text, image in zip(
        discriminator(texts.to(shares)).detach(), discriminator(images.to(shares)).detach(), strict=True
    ):
        sum_of_texts -= math.log(1 / (1 + math.exp(-float(text))))
        sum_of_images -= math.log(1 - 1 / (1 + math.exp(-float(image))))
    between = shares * texts.to(shares) + (1 - shares) * images.to(shares)
    penalty = float(gradient_penalty(discriminator, between).detach())
    found = discriminator_loss(discriminator, texts, images, shares, 10.0)
    expected = sum_of_texts / 5 + sum_of_images / 5 + 10 * penalty
    assert float(found.detach()) == pytest.approx(expected, rel=TOLERANCE)
    fooling = (
        -sum(math.log(1 / (1 + math.exp(-float(logit)))) for logit in discriminator(images.to(shares)).detach()) / 5
    )
    assert float(fooling_loss(discriminator, images).detach()) == pytest.approx(fooling, rel=TOLERANCE)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_adversarial_losses_of_huge_hashes_are_finite(batch_norm):
    discriminator = Discriminator(8, batch_norm)
    huge = torch.full((3, 8), 1e4, requires_grad=True)
    loss = discriminator_loss(discriminator, huge, -huge, torch.rand(3, 8), 10.0) + fooling_loss(discriminator, huge)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert all(parameter.grad.isfinite().all() for parameter in discriminator.parameters())


def test_adversarial_losses_of_an_empty_batch_are_zero():
    discriminator, nothing = Discriminator(8), torch.empty(0, 8, requires_grad=True)
    loss = discriminator_loss(discriminator, nothing, nothing, nothing, 10.0) + fooling_loss(discriminator, nothing)
    loss.backward()
    assert float(loss.detach()) == 0


# Quantisation and balance.


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantisation_and_balance_match_loops(dtype):
    hashes = torch.stack([*views(5, 6, dtype=dtype), *views(5, 6, seed=1, dtype=dtype)], dim=1)
    consensus = torch.where(views(5, 6, seed=2)[0] >= 0, 1, -1).to(torch.int8)
    h, b = hashes.double().tolist(), consensus.tolist()
    squares = [(h[n][v][k] - b[n][k]) ** 2 for n in range(5) for v in range(4) for k in range(6)]
    assert float(consensus_loss(hashes, consensus)) == pytest.approx(sum(squares) / len(squares), rel=TOLERANCE)
    rows = [sum(h[n][v]) ** 2 for n in range(5) for v in range(4)]
    assert float(balance_loss(hashes, "row")) == pytest.approx(sum(rows) / 20, rel=TOLERANCE)
    columns = [(sum(h[n][v][k] for n in range(5)) / 5) ** 2 for v in range(4) for k in range(6)]
    expected = REFERENCE_BATCH * sum(columns) / 4
    assert float(balance_loss(hashes, "column")) == pytest.approx(expected, rel=TOLERANCE)


def test_losses_equal_the_released_code_s_sums_over_two_rows_per_pair():
    num, bits = REFERENCE_BATCH, 8
    hashes = torch.stack([*views(num, bits), *views(num, bits, seed=1)], dim=1).double()
    consensus = torch.where(views(num, bits, seed=2)[0] >= 0, 1, -1).to(torch.int8)
    sums = {
        "quantisation": float((hashes - consensus[:, None]).square().sum()),
        "row": float(hashes.sum(dim=2).square().sum()),
        "column": float(hashes.sum(dim=0).square().sum()),
    }
    assert 2 * bits * float(consensus_loss(hashes, consensus)) == pytest.approx(sums["quantisation"] / (2 * num))
    for axis in ("row", "column"):
        assert 2 * float(balance_loss(hashes, axis)) == pytest.approx(sums[axis] / (2 * num))


def test_losses_of_an_empty_batch_are_zero():
    nothing = torch.empty(0, 4, 8, requires_grad=True)
    loss = consensus_loss(nothing, torch.empty(0, 8, dtype=torch.int8))
    loss = loss + balance_loss(nothing, "row") + balance_loss(nothing, "column")
    loss.backward()
    assert float(loss.detach()) == 0


def test_sums_in_half_precision_do_not_overflow():
    hashes = torch.full((4, 4, 512), 1e4, dtype=torch.float16)
    consensus = torch.ones(4, 512, dtype=torch.int8)
    for loss in (consensus_loss(hashes, consensus), balance_loss(hashes, "row"), balance_loss(hashes, "column")):
        assert math.isfinite(float(loss))


def test_the_consensus_weights_modalities_equally_and_has_no_zeros():
    images = torch.tensor([[[1.0, -1.0, 0.5, 0.9], [1.0, 1.0, -0.5, 0.9]]])
    texts = torch.tensor([[[-1.0, -0.5, 0.0, -0.5], [-0.5, -0.5, 0.0, -0.5], [-0.5, 0.0, 0.0, -0.5]]])
    # The last bit would be -1 if each view counted equally: there are three texts and two images.
    assert consensus_of(images, texts).tolist() == [[1, -1, 1, 1]]
    assert consensus_of(images, texts).dtype == torch.int8


# The method.


NUM = 12


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture
def make(text_model):
    def make(**settings):
        given = {"backbone": "mobilenet_v3_small", "bits": 16, "hidden": 10, "batch_size": 6, **settings}
        torch.manual_seed(0)
        method = Duch(DuchConfig(text_encoder=str(text_model), **given), 3, NUM)
        part = training_part(method)
        method.begin(part)
        method.start_epoch(0, part)
        return method.train(), part

    return make


def training_part(method, num_captions=5):
    rng = np.random.default_rng(0)
    image, text = method.network.head.num_features, method.text_head.num_features
    features = {
        "image": rng.normal(3, 2, (NUM, image)),
        "image_augmented": rng.normal(3, 2, (NUM, image)),
        "text": rng.normal(-1, 2, (NUM, num_captions, text)),
    }
    features = {name: table.astype(np.float32) for name, table in features.items()}
    return Part(None, np.arange(NUM) % 3, [f"{i}.png" for i in range(NUM)], features)


def batch_of(part, rows, seed=7):
    features = {name: torch.from_numpy(table[rows]) for name, table in part.features.items()}
    return Batch(torch.tensor(rows), torch.from_numpy(part.labels[rows]), None, features, seed)


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before, module):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


def test_duch_is_registered():
    assert METHODS["duch"] is Duch


def test_the_recipe_loads():
    with resources.as_file(resources.files("orbithash.trainers") / "recipes" / "duch-plus.yaml") as file:
        config = load_config(DuchConfig, file, ["bits=16"])
    assert (config.bits, config.captions, config.near_as) == (16, "all", "positives")


def test_a_text_encoder_is_required():
    words = "text_encoder is not set, and backbone mobilenet_v3_small has no text tower"
    with pytest.raises(InputError, match=words) as error:
        Duch(DuchConfig(backbone="mobilenet_v3_small"), 3, NUM)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def dual_encoder(tmp_path_factory):
    return f"open_clip:{write_open_clip(tmp_path_factory.mktemp('clip') / 'model')}"


def test_the_text_tower_of_the_backbone_is_the_default_text_encoder(dual_encoder):
    method = Duch(DuchConfig(backbone=dual_encoder, image_size=32, bits=16, hidden=8), 3, NUM)
    assert method.has_joint_features
    assert method.text_head.num_features == method.network.head.num_features == OPEN_CLIP["embed_dim"]
    expected = text_tower(dual_encoder).encode(["a beach", "one river"])
    np.testing.assert_array_equal(method.text_encoder().encode(["a beach", "one river"]), expected)


def test_the_text_tower_of_another_network(dual_encoder, text_model):
    config = DuchConfig(backbone="mobilenet_v3_small", text_encoder=dual_encoder, bits=16, hidden=8)
    method = Duch(config, 3, NUM)
    assert not method.has_joint_features
    assert method.text_encoder().sha256 == text_tower(dual_encoder).sha256
    both = Duch(DuchConfig(backbone=dual_encoder, image_size=32, text_encoder=str(text_model), bits=16), 3, NUM)
    assert not both.has_joint_features
    assert both.text_head.num_features == 16


@pytest.mark.parametrize("settings", [{"text_pooling": "cls"}, {"text_normalise": True}])
def test_settings_of_a_text_model_are_refused_for_a_tower(dual_encoder, settings):
    with pytest.raises(InputError, match="are settings of a text model; the text tower of a dual encoder has its own"):
        Duch(DuchConfig(backbone=dual_encoder, image_size=32, **settings), 3, NUM)


def test_a_relative_folder_of_a_dual_encoder_becomes_absolute(dual_encoder, monkeypatch):
    folder = Path(dual_encoder.removeprefix("open_clip:"))
    monkeypatch.chdir(folder.parent)
    assert DuchConfig(text_encoder=f"open_clip:{folder.name}").text_encoder == dual_encoder


def test_each_step_updates_only_the_discriminator_or_only_the_hash_heads(make):
    method, part = make(weight_decay=0.1, critic_weight_decay=0.1)
    optimizer, batch = method.build_optimizer(), with_draws(method, batch_of(part, [0, 3, 4, 7, 9, 11]))
    assert not any(parameter.requires_grad for parameter in method.discriminator.parameters())
    # As in the training loop, the gradients of the previous step are still set.
    method(batch)["loss"].backward()
    before = state_of(method)
    method.before_step(batch, optimizer)
    moved = {name for name in changed(before, method) if "num_batches_tracked" not in name}
    assert moved == {f"discriminator.{name}" for name, _ in method.discriminator.named_parameters()}
    assert not any(parameter.requires_grad for parameter in method.discriminator.parameters())
    before = state_of(method)
    losses = method(batch)
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    optimizer.step()
    moved = changed(before, method)
    assert not {name for name in moved if name.startswith(("discriminator", "network.backbone"))}
    trained_parameters = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert trained_parameters <= moved


def test_the_discriminator_learns_to_distinguish_captions_from_images(make):
    method, part = make(critic_lr=0.02)
    optimizer, batch = method.build_optimizer(), batch_of(part, list(range(NUM)))
    for seed in range(150):
        method.before_step(with_draws(method, batch._replace(seed=seed)), optimizer)
    with torch.no_grad():
        images, texts, _ = method._hashes(batch)
        assert method.discriminator(texts[:, 0]).mean() > 0.5 > -0.5 > method.discriminator(images[:, 0]).mean()


def test_consensus_codes_are_updated_for_the_rows_of_the_batch(make):
    method, part = make(adversarial_weight=0)
    before = method.consensus.clone()
    assert method.consensus.dtype == torch.int8
    assert set(before.unique().tolist()) == {-1, 1}
    rows = [1, 2, 5, 8]
    batch = batch_of(part, rows)
    # In training mode, batch norm gives the same hashes for the same batch.
    images, texts, others = method._hashes(batch)
    losses = method(batch)
    hashes = torch.cat([images, texts, others], dim=1)
    assert float(losses["quantisation"]) == pytest.approx(float(consensus_loss(hashes, before[rows])))
    mean = hashes.mean(dim=1)
    assert torch.equal(method.consensus[rows], torch.where(mean >= 0, 1, -1).to(torch.int8))
    others = [i for i in range(NUM) if i not in rows]
    assert torch.equal(method.consensus[others], before[others])


@pytest.mark.parametrize("kind", ["per-dimension", "scalar"])
def test_standardisation_is_fitted_on_unaugmented_training_features(make, kind):
    method, part = make(standardisation=kind)
    for head, name in ((method.network.head, "image"), (method.text_head, "text")):
        table = part.features[name].reshape(-1, part.features[name].shape[-1]).astype(np.float64)
        axis = 0 if kind == "per-dimension" else None
        np.testing.assert_allclose(head.norm.mean, np.broadcast_to(table.mean(axis), table.shape[1]), rtol=1e-5)
        np.testing.assert_allclose(head.norm.std, np.broadcast_to(table.std(axis), table.shape[1]), rtol=1e-5)


def test_captions_are_drawn_by_setting_seed_and_epoch(make):
    def chosen(**settings):
        method, part = make(**settings)
        drawn = []
        for epoch in (0, 0, *range(1, 20)):
            method.start_epoch(epoch, part)
            drawn.append(method._chosen)
        return drawn

    fixed = chosen(captions="fixed")
    assert all(torch.equal(fixed[0], other) for other in fixed)
    assert not torch.equal(fixed[0], chosen(captions="fixed", seed=1)[0])
    drawn = chosen()
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    pairs = torch.cat(drawn)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert set(pairs[:, 0].tolist()) == set(pairs[:, 1].tolist()) == set(range(5))
    reworded = chosen(text_augmentation="rule")[2]
    assert torch.equal(reworded[:, 0], reworded[:, 1])


def test_a_single_caption_serves_as_both_text_views(make):
    method, _ = make()
    part = training_part(method, num_captions=1)
    method.start_epoch(0, part)
    assert not method._chosen.any()
    assert math.isfinite(float(method(batch_of(part, [0, 1, 2]))["loss"].detach()))


def test_text_views_are_the_drawn_captions(make):
    method, part = make(captions="random")
    method.eval()
    rows = [2, 7, 5]
    _, texts, others = method._hashes(batch_of(part, rows))
    for view, hashes in enumerate((texts, others)):
        for place, row in enumerate(rows):
            caption = torch.from_numpy(part.features["text"][row, method._chosen[row, view]])
            torch.testing.assert_close(hashes[place, 0], method.text_head(caption[None])[0])


def test_with_all_captions_the_contrastive_loss_averages_over_them(make):
    method, part = make(captions="all", temperature=0.5)
    method.eval()
    batch = batch_of(part, [2, 7, 5, 0])
    images = method.network.head(batch.features["image"])
    augmented = method.network.head(batch.features["image_augmented"])
    texts = [method.text_head(batch.features["text"][:, c]) for c in range(5)]
    between = sum(nt_xent(images, text, 0.5) for text in texts) / 5
    of_texts = sum(nt_xent(texts[c], texts[(c + 1) % 5], 0.5) for c in range(5)) / 5
    expected = between + nt_xent(images, augmented, 0.5) + of_texts
    losses = method(batch)
    torch.testing.assert_close(losses["contrastive"], expected)
    consensus = method.consensus[batch.rows]
    second = torch.sign((images + augmented) / 2 + sum(texts) / 5)
    assert torch.equal(consensus.float(), second)


def test_compat_txt_view_repeats_the_first_text_view(make):
    for captions in ("random", "all"):
        method, part = make(captions=captions, compat_txt_view=True)
        _, texts, others = method._hashes(batch_of(part, [0, 1, 2, 3]))
        assert torch.equal(texts, others)
        method, part = make(captions=captions)
        _, texts, others = method._hashes(batch_of(part, [0, 1, 2, 3]))
        assert not torch.equal(texts, others)


@pytest.mark.parametrize("text_only", [False, True])
def test_the_adversarial_loss_trains_the_image_head_or_with_compat_the_text_head(make, text_only):
    method, part = make(compat_adv_text_only=text_only)
    losses = method(batch_of(part, [0, 1, 2, 3]))
    losses["adversarial"].backward()
    of_images, of_texts = method.network.head.output.weight.grad, method.text_head.output.weight.grad
    (still, moved) = (of_images, of_texts) if text_only else (of_texts, of_images)
    assert still is None or not still.any()
    assert moved.abs().max() > 0


def test_the_loss_is_the_weighted_sum(make):
    weights = {"adversarial_weight": 0.3, "quantisation_weight": 0.2, "balance_weight": 0.1}
    method, part = make(**weights)
    losses = {name: float(value.detach()) for name, value in method(batch_of(part, [0, 1, 2, 3])).items()}
    expected = losses["contrastive"] + 0.3 * losses["adversarial"]
    expected += 2 * 0.2 * 16 * losses["quantisation"] + 2 * 0.1 * losses["balance"]
    assert losses["loss"] == pytest.approx(expected, rel=1e-5)


def test_near_pairs_have_similar_captions(make):
    method, part = make(near_as="positives", near_cosine=0.9)
    assert method._near(batch_of(part, [0, 1, 2])).tolist() == torch.eye(3, dtype=torch.bool).tolist()
    # The second image has the first one's captions in reverse order.
    part.features["text"][1] = part.features["text"][0][::-1]
    near = method._near(batch_of(part, [0, 1, 2]))
    assert near.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert make()[0]._near(batch_of(part, [0, 1])) is None


def test_a_learned_temperature_trains_and_stays_in_range(make):
    method, part = make(learn_temperature=True, temperature=0.5)
    optimizer, batch = method.build_optimizer(), batch_of(part, [0, 1, 2, 3])
    assert float(method(batch)["temperature"]) == pytest.approx(0.5)
    method(batch)["loss"].backward()
    optimizer.step()
    assert float(method(batch)["temperature"]) != pytest.approx(0.5, rel=1e-4)
    with torch.no_grad():
        method.log_temperature.fill_(-20.0)
    assert float(method._temperature()) == pytest.approx(0.01)
    assert math.isfinite(float(method(batch)["loss"].detach()))
    assert "log_temperature" not in dict(make()[0].named_parameters())


# Runs.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "first")


def test_mean_and_deviation_are_those_of_the_training_part_alone(data, tmp_path):
    run = make_run(data, "duch", epochs=1, hidden=8)
    assert run.manifest.part("validation")
    trained(run, tmp_path)
    state = load_checkpoint(tmp_path / "epoch1")["method"]
    method = run.build()
    part = load_training_part(run, method)
    assert len(part.ids) == len(run.manifest.part("train"))
    for name, prefix in (("image", "network.head"), ("text", "text_head")):
        table = np.asarray(part.features[name]).reshape(-1, part.features[name].shape[-1])
        np.testing.assert_allclose(state[f"{prefix}.norm.mean"], table.mean(0), rtol=1e-4, atol=1e-5)


def test_a_saved_model_encodes_sentences_and_images_alike(data, tmp_path):
    run = make_run(data, "duch", epochs=2, hidden=8)
    history = trained(run, tmp_path).history
    names = {f"validation/{way}_{metric}@20" for way in ("i2t", "t2i") for metric in ("ap_first_k", "ap_min")}
    assert names <= history[1].keys()
    assert all(0 < history[1][name] <= 1 for name in names)
    # The score rises with the epoch: as published, the last epoch becomes the model.
    assert history[1]["score"] > history[0]["score"]
    model, _ = export_models(run, tmp_path / "epoch2")
    model.save(tmp_path / "model")
    loaded = HashModel.load(tmp_path / "model")
    sentences = ["a beach", "some forest", "this river", "one river"]
    codes = model.encode_texts(sentences)
    assert len(np.unique(codes, axis=0)) > 1
    assert (loaded.encode_texts(sentences) == codes).all()
    features = run.build().text_encoder().encode(sentences)
    assert (loaded.encode_text_features(features) == codes).all()
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert (loaded.encode_prepared(images) == model.encode_prepared(images)).all()
    assert (loaded.encode_features(model.features(images)) == model.encode_prepared(images)).all()


def test_without_labels_no_validation_metrics_are_logged(data, tmp_path):
    run = make_run(data, "duch", epochs=1, hidden=8)
    images = tuple(dataclasses.replace(image, labels=()) for image in run.manifest.images)
    run = dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, images=images))
    history = trained(run, tmp_path).history
    assert not any(name.startswith("validation/") for name in history[0])


def test_the_second_text_view_has_the_reworded_captions(data, monkeypatch):
    signature = inspect.signature(augment_captions)

    def reverse(*given, **settings):
        arguments = signature.bind(*given, **settings).arguments
        assert arguments["how"] == "rule"
        assert arguments["encoder"] is not None
        return [[" ".join(reversed(text.split())) for text in group] for group in arguments["captions"]]

    monkeypatch.setattr("orbithash.trainers.captions.augment_captions", reverse)
    run = make_run(data, "duch", hidden=8, text_augmentation="rule")
    method = run.build()
    part = load_training_part(run, method)
    first = run.manifest.part("train")[0].captions[2]
    expected = method.text_encoder().encode([" ".join(reversed(first.split()))])[0]
    np.testing.assert_allclose(part.features["text_augmented"][0, 2], expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(part.features["text_augmented"], part.features["text"])


def reworded_features(run):
    """Return the training part's features of reworded captions, its captions, and a function that encodes sentences."""
    method = run.build()
    part = load_training_part(run, method)
    captions = [list(image.captions) for image in run.manifest.part("train")]

    def features(words):
        return method.text_encoder().encode(words)

    return part.features["text_augmented"], captions, features


def test_captions_are_translated_by_the_given_models(data, tmp_path, monkeypatch):
    write_translators(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    run = make_run(data, "duch", hidden=8, text_augmentation="translate-chain", translators="models")
    # Workers have another working directory.
    monkeypatch.chdir("/")
    table, captions, features = reworded_features(run)
    expected = augment_captions(captions[:1], "translate-chain", translators=str(tmp_path / "models"))
    np.testing.assert_allclose(table[0], features(expected[0]), rtol=1e-5, atol=1e-6)


def test_the_rule_reads_word_vectors_from_a_file(data, tmp_path):
    (tmp_path / "glove.txt").write_text("beach 1 0\nshore 0.9 0.1\nforest 0 1\nriver -1 0\n")
    run = make_run(data, "duch", hidden=8, text_augmentation="rule", glove=str(tmp_path / "glove.txt"))
    table, captions, features = reworded_features(run)
    row = next(row for row, group in enumerate(captions) if group[1] == "the beach")
    np.testing.assert_allclose(table[row, 1], features(["the shore"])[0], rtol=1e-5, atol=1e-6)


def test_captions_of_the_validation_part_are_not_reworded(data, monkeypatch):
    num_captions = []

    def same(captions, *given, **settings):
        num_captions.append(len(captions))
        return captions

    monkeypatch.setattr("orbithash.trainers.captions.augment_captions", same)
    run = make_run(data, "duch", epochs=1, hidden=8, text_augmentation="rule")
    trained(run)
    assert run.manifest.part("validation")
    assert num_captions == [len(run.manifest.part("train"))]
    method = run.build()
    tables = load_tables(run.root, run.manifest.part("validation"), method, run.preprocessing(), training=False)
    assert set(tables) == {"image", "text"}


def work(rank, root, folder):
    """Load the training part in one of two processes: each would reword captions differently, then rewording fails."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    calls = []

    def reword(sentences, *models):
        calls.append(rank)
        return [f"{text} {'one' if rank else 'some'}" for text in sentences]

    def refuse(sentences, *models):
        raise InputError("no such words")

    run = make_run(root, "duch", hidden=8, text_augmentation="rule")
    method = run.build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORBITHASH_CACHE", str(folder / f"cache{rank}"))
        patch.setattr("orbithash.trainers.captions._by_rule", reword)
        features = load_training_part(run, method).features
        patch.setattr("orbithash.trainers.captions._by_rule", refuse)
        # By now each rank has the captions in its own cache.
        assert len(list((folder / f"cache{rank}" / "captions").iterdir())) == 1
        load_training_part(run, method)
        other = make_run(root, "duch", hidden=8, text_augmentation="rule", seed=1)
        with pytest.raises(InputError, match="no such words"):
            load_training_part(other, other.build())
    torch.save((features["text_augmented"][:], calls), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_use_the_captions_of_the_first(data, tmp_path):
    torch.multiprocessing.spawn(work, (data, tmp_path), nprocs=2)
    (one, calls), (other, others) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert (calls, others) == ([0], [])
    np.testing.assert_array_equal(one, other)
    run = make_run(data, "duch", hidden=8)
    expected = run.build().text_encoder().encode([f"{text} some" for text in run.manifest.part("train")[0].captions])
    np.testing.assert_allclose(one[0], expected, rtol=1e-5, atol=1e-6)


def test_the_original_view_can_be_the_centre_crop(data, tmp_path):
    whole, middle = (
        make_run(data, "duch", hidden=8, epochs=1, image_size=64, original_view=view)
        for view in ("whole", "center-crop")
    )
    tables = []
    for run in (whole, middle):
        method = run.build()
        tables.append(load_training_part(run, method).features)
    # Augmented views have their own crop.
    np.testing.assert_array_equal(tables[0]["image_augmented"], tables[1]["image_augmented"])
    assert not np.allclose(tables[0]["image"], tables[1]["image"])
    # The images are 40 pixels wide and 44 high; the released code crops 200 / 256 of the shorter side.
    side = 40 * 200 / 256
    box = (20 - side / 2, 22 - side / 2, 20 + side / 2, 22 + side / 2)
    trained(middle, tmp_path)
    model, _ = export_models(middle, tmp_path / "epoch1")
    images = [read_image(data / image.path) for image in middle.manifest.part("train")]
    expected = model.features(np.stack([resample(image, 64, box) for image in images]))
    found = model.features(model.prepare(images))
    np.testing.assert_allclose(found, tables[1]["image"], atol=1e-4)
    # The crop is rounded to whole pixels, so that features differ slightly.
    assert np.abs(found - expected).mean() < 0.2 * np.abs(found - tables[0]["image"]).mean()


def test_text_normalise_lowers_case_and_strips_punctuation(data, tmp_path):
    run = make_run(data, "duch", hidden=8, epochs=1, text_normalise=True, text_pooling="last4-padded")
    trained(run, tmp_path)
    model, _ = export_models(run, tmp_path / "epoch1")
    model.save(tmp_path / "model")
    loaded = HashModel.load(tmp_path / "model")
    assert (loaded.encode_texts(["The Beach!"]) == model.encode_texts(["the beach"])).all()
    encoder = run.build().text_encoder()
    assert (encoder.normalise, encoder.pooling) == (True, "last4-padded")
    assert not make_run(data, "duch").build().text_encoder().normalise


def test_validation_and_evaluation_draw_the_same_captions(data):
    run = make_run(data, "duch", hidden=8, seed=3)
    images = [
        dataclasses.replace(image, captions=image.captions[: 1 + number % 5])
        for number, image in enumerate(run.manifest.images)
    ]
    run = dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, images=tuple(images), seed=8))
    method, encoded = run.build(), []
    training = load_training_part(run, method)
    parts = load_validation_parts(run, method, training.features, "cpu", "auto")

    class Encoder:
        bits = 16

        def encode_features(self, features):
            return np.zeros((len(features), 2), np.uint8)

        def encode_text_features(self, features):
            encoded.append(features)
            return np.zeros((len(features), 2), np.uint8)

    method.validate(Encoder(), *reversed(parts))
    for split, found in zip(("validation", "train"), encoded[::-1], strict=True):
        sentences = [draw_caption(image, run.manifest.seed) for image in run.manifest.part(split)]
        np.testing.assert_allclose(found, method.text_encoder().encode(sentences), rtol=1e-5, atol=1e-6)
