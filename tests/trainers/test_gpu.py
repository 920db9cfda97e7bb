"""Training and encoding on a GPU. `make test-gpu` runs these tests alone; they need neither Ray nor Lance."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from method_parts import make_run, trained, write_data, write_text_model

from orbithash.encoders.codes import unpack
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec, ModelCard
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.image_features import gpu_pass
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.projection import Projection
from orbithash.encoders.networks.text import TextEncoder
from orbithash.trainers import evaluate, train
from orbithash.trainers.methods import METHODS, Fitted

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")

BITS, SIDE = 64, 96


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "first")


def make_model(activation, scale=1.0, backbone="resnet18", precision="float32"):
    """A model with random weights and a head whose outputs are `scale` times the usual ones."""
    torch.manual_seed(0)
    network = HashNetwork(build_backbone(backbone), HeadSpec(BITS, activation=activation))
    with torch.no_grad():
        network.head.output.weight *= scale
    preprocessing = Preprocessing(Rendering(), SIDE, SIDE)
    card = ModelCard("dhcl", network.spec, (0.0,) * BITS, "none", 1, preprocessing, (), {}, {}, precision=precision)
    return HashModel(card, network)


def make_images(num):
    """Images with structure at several scales, so that their codes differ."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (num, 6, 6, 3)).repeat(SIDE // 6, 1).repeat(SIDE // 6, 2)
    return np.clip(coarse + rng.integers(-40, 40, (num, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


@pytest.fixture
def reduced_precision():
    """A caller that allows TensorFloat-32, as training scripts do."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.conv.fp32_precision = before[1]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("activation", "scale"), [("tanh", 1.0), ("none", 1.0), ("none", 1000.0)])
def test_codes_on_a_gpu_do_not_depend_on_the_batch_size(reduced_precision, activation, scale):
    model, images = make_model(activation, scale).to("cuda"), make_images(200)
    alone = np.concatenate([model.encode_prepared(image[None]) for image in images])
    assert len({code.tobytes() for code in alone}) > 150
    for batch_size in (3, 17, 64, 200):
        np.testing.assert_array_equal(model.encode_prepared(images, batch_size=batch_size), alone)
    features = model.features(images)
    np.testing.assert_array_equal(model.encode_features(features), model.encode_features(features, batch_size=1))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_features_on_a_gpu_do_not_depend_on_place_and_batch(reduced_precision, backbone, precision):
    model, images = make_model("none", backbone=backbone, precision=precision).to("cuda"), make_images(70)
    assert model._image_features.pass_size == gpu_pass(SIDE)
    alone = np.concatenate([model.features(image[None]) for image in images])
    np.testing.assert_array_equal(model.features(images), alone)
    np.testing.assert_array_equal(model.features(images[::-1])[::-1], alone)


@needs_gpu
@pytest.mark.gpu
def test_outputs_and_stored_vectors_on_a_gpu_do_not_depend_on_the_batch_size(reduced_precision):
    plain, images = make_model("tanh"), make_images(100)
    projection = Projection.fit(torch.from_numpy(plain.features(images)), 16)
    card = dataclasses.replace(plain.card, projection=projection.spec)
    model = HashModel(card, plain.network, "", "cuda", projection=projection)
    alone = model.encode_items("image", images, with_outputs=True, batch_size=1)
    for batch_size in (3, 64, 100):
        for part, expected in zip(
            model.encode_items("image", images, with_outputs=True, batch_size=batch_size), alone, strict=True
        ):
            np.testing.assert_array_equal(part, expected)


@needs_gpu
@pytest.mark.gpu
def test_a_gpu_gives_the_codes_of_a_cpu_up_to_rounding(reduced_precision):
    images = make_images(100)
    on_cpu, on_gpu = make_model("none"), make_model("none").to("cuda")
    with torch.inference_mode():
        features = torch.from_numpy(on_cpu.features(images))
        outputs, scale = on_cpu.network.hash(features).hashes, on_cpu.network.error_scale(features).hashes
    differ = unpack(on_cpu.encode_prepared(images) ^ on_gpu.encode_prepared(images), BITS)
    # Only outputs at their thresholds may fall on different sides.
    assert (outputs.abs() < 1e-4 * scale).numpy()[differ].all()
    assert differ.mean() < 1e-3
    np.testing.assert_allclose(on_gpu.features(images), on_cpu.features(images), rtol=1e-3, atol=1e-4)


@needs_gpu
@pytest.mark.gpu
def test_a_model_moves_to_a_gpu_and_back(tmp_path):
    model, images = make_model("tanh"), make_images(20)
    before = model.encode_prepared(images)
    model_id = model.to("cuda").save(tmp_path / "model")
    loaded = HashModel.load(tmp_path / "model", "cuda:0")
    np.testing.assert_array_equal(loaded.encode_prepared(images), model.encode_prepared(images))
    assert loaded.model_id == model_id == HashModel.load(tmp_path / "model").model_id
    np.testing.assert_array_equal(model.to("cpu").encode_prepared(images), before)


@needs_gpu
@pytest.mark.gpu
def test_sentences_on_a_gpu(reduced_precision, tmp_path):
    encoder = TextEncoder(str(write_text_model(tmp_path / "text")))
    sentences = ["the river", "some beach", "a very long sentence about one forest and this river"]
    expected = encoder.encode(sentences)
    np.testing.assert_allclose(encoder.to("cuda").encode(sentences), expected, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_on_a_gpu_as_on_a_cpu(data, method):
    is_fitted = issubclass(METHODS[method], Fitted)
    run = make_run(data, method, **({} if is_fitted else {"epochs": 1, "batch_size": 6}))
    metric = "train/sign_cosine" if is_fitted else "train/loss"
    on_cpu, on_gpu, again = (trained(run, device=device).history[0] for device in ("cpu", "cuda", "cuda"))
    assert on_gpu[metric] == pytest.approx(on_cpu[metric], rel=0.05)
    assert on_gpu[metric] == pytest.approx(again[metric], rel=0.01)
    assert set(on_gpu) == set(on_cpu)


@needs_gpu
@pytest.mark.gpu
def test_training_in_bfloat16_on_a_gpu(data):
    run = make_run(data, "dhcl", epochs=2)
    half = dataclasses.replace(run, config=run.config.model_copy(update={"precision": "bfloat16"}))
    losses = [trained(each, device="cuda").history[-1]["train/loss"] for each in (run, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


@needs_gpu
@pytest.mark.gpu
def test_a_whole_run_on_a_gpu(data, tmp_path):
    settings = {"bits": 16, "backbone": "mobilenet_v3_small", "image_size": 32, "batch_size": 4, "epochs": 2}
    model = train("triplet", data, tmp_path / "run", device="cuda", **settings)
    assert model.device.type == "cuda"
    metrics = evaluate(tmp_path / "run", device="cuda")
    assert 0 <= metrics["metrics"]["ap_min@20"]["expected"] <= 1


def test_these_tests_need_neither_ray_nor_lance():
    code = "import sys, test_gpu; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    assert not {"ray", "lance"} & {*loaded.stdout.split()}
