"""The model folder: a saved model gives the same codes again, and damage is refused in one line."""

import dataclasses
import hashlib
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from orbithash.encoders.codes import unpack
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import Rendering
from orbithash.encoders.imagery.preprocessing import Preprocessing, resample
from orbithash.encoders.networks import binarizer
from orbithash.encoders.networks import model as model_module
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec, ModelCard, NetworkSpec, read_model_folder, write_card
from orbithash.encoders.networks.hash_network import HashNetwork, NetworkOutput
from orbithash.encoders.networks.label_codes import label_table
from orbithash.encoders.networks.model import HashModel

BITS, SIDE = 20, 32
BACKBONE = build_backbone("mobilenet_v3_small", pooling="avg+max").spec
BACKBONE_JSON = dataclasses.asdict(BACKBONE)
CLASSES = ("beach", "forest", "harbor", "river", "runway")


def make_card(**changes):
    fields = {
        "method": "dhcl",
        "network": NetworkSpec(BACKBONE, HeadSpec(BITS), len(CLASSES)),
        "thresholds": (0.0,) * BITS,
        "label_code": "none",
        "label_weight": 1,
        "preprocessing": Preprocessing(Rendering(), SIDE, SIDE),
        "classes": CLASSES,
        "dataset": {"name": "scenes", "protocol": "random", "manifest_sha256": "0" * 64},
        "metrics": {"validation/ap_min@20": 0.5},
    }
    return ModelCard(**{**fields, **changes})


def make_network(seed=0, **changes):
    torch.manual_seed(seed)
    network = HashNetwork.from_spec(make_card(**changes).network)
    # A new classifier gives all images similar logits.
    torch.nn.init.normal_(network.classifier.weight)
    return network


def make_images(num, seed=0):
    """Images of several sizes."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (int(rng.integers(30, 50)), 40, 3), np.uint8) for _ in range(num)]


def outputs(model, images):
    """The outputs of the network for each image alone: hashes [N, K], logits [N, C]."""
    prepared = [model.preprocessing.prepare(image) for image in images]
    with torch.inference_mode():
        rows = [model.network(model.normalise(image[None])) for image in prepared]
    return np.concatenate([row.hashes.numpy() for row in rows]), np.concatenate([row.logits.numpy() for row in rows])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model: its folder, and the model before it was saved."""
    folder = tmp_path_factory.mktemp("run") / "model"
    model = HashModel(make_card(label_code="gray"), make_network())
    model.save(folder)
    return folder, model


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved[0], tmp_path / "model"))


def assert_refused(folder, message=None):
    with pytest.raises(InputError, match=message) as caught:
        HashModel.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def rewrite(folder, change, stated=True):
    """Change the fields of model.json; with `stated`, update card_sha256 too."""
    path = folder / "model.json"
    fields = json.loads(path.read_text())
    change(fields)
    if stated:
        fields.pop("card_sha256", None)
        fields["card_sha256"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(fields))


# Round trip.


def test_a_loaded_model_gives_the_same_codes_and_says_the_same_of_itself(saved):
    folder, before = saved
    after = HashModel.load(str(folder))
    images = make_images(5)
    codes = before.encode(images)
    assert (after.encode(images) == codes).all()
    assert len({code.tobytes() for code in codes}) > 1
    assert after.model_id == before.model_id
    assert after.card == before.card
    assert (after.bits, after.num_bytes) == (BITS + 3, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    assert not list(folder.parent.glob(".*"))


RENAMED = tuple(name.upper() for name in CLASSES)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"metrics": {"validation/ap_min@20": 0.6}},
        {"versions": {"orbithash": "9", "torch": "9"}},
        {"dataset": {"name": "renamed"}},
        {"method": "another"},
        {"classes": RENAMED},
    ],
)
def test_the_model_id_stays_when_the_codes_stay(saved, tmp_path, changes):
    """An archive of a model stays usable when a metric of the model is corrected."""
    model = HashModel(make_card(label_code="gray", **changes), make_network())
    assert model.save(tmp_path / "model") == saved[1].model_id == HashModel.load(tmp_path / "model").model_id
    assert model.card == HashModel.load(tmp_path / "model").card


@pytest.mark.parametrize(
    "changes",
    [
        {"thresholds": (0.1,) * BITS},
        {"label_code": "binary"},
        {"label_weight": 2},
        {"preprocessing": Preprocessing(Rendering(), SIDE, SIDE, orientations=4)},
        {"preprocessing": Preprocessing(Rendering(), SIDE, SIDE, smaller=(24,))},
        {"preprocessing": Preprocessing(Rendering(stretch="range:0:100"), SIDE, SIDE)},
        {"network": dataclasses.replace(make_card().network, backbone=dataclasses.replace(BACKBONE, pooling="avg"))},
        {"seed": 1},
    ],
)
def test_the_model_id_changes_with_what_decides_codes(saved, tmp_path, changes):
    network = make_network(seed=changes.pop("seed", 0))
    model = HashModel(make_card(**{"label_code": "gray", **changes}), network)
    assert model.save(tmp_path / "model") != saved[1].model_id


def test_saving_over_an_older_model_leaves_only_the_new_one(saved, copy):
    (copy / "leftover.txt").write_text("of an older version")
    part = copy.with_name(".model.12345678.part")
    part.mkdir()
    (part / "junk").write_text("of a save that was killed")
    newer = HashModel(make_card(), make_network(seed=1))
    newer.save(copy)
    assert HashModel.load(copy).model_id == newer.model_id != saved[1].model_id
    assert sorted(path.name for path in copy.iterdir()) == ["model.json", "model.safetensors"]
    assert not part.exists()


def test_a_model_whose_replacement_was_killed_is_loaded(saved, copy):
    # Killed after the older folder was moved away, before the new one took its place.
    copy.rename(copy.with_name(".model.12345678.old"))
    assert HashModel.load(copy).model_id == saved[1].model_id
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


def test_a_save_that_fails_leaves_the_older_model(saved, copy, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(model_module, "write_card", fail)
    with pytest.raises(OSError, match="disk full"):
        HashModel(make_card(), make_network(seed=1)).save(copy)
    assert HashModel.load(copy).model_id == saved[1].model_id


# Codes.


@pytest.mark.parametrize("label_code", ["none", "binary", "gray", "one-hot"])
@pytest.mark.parametrize("label_weight", [1, 2])
def test_hash_bits_then_label_bits(label_code, label_weight):
    thresholds = tuple(np.linspace(-0.5, 0.5, BITS).tolist())
    card = make_card(label_code=label_code, label_weight=label_weight, thresholds=thresholds)
    model = HashModel(card, make_network())
    images = make_images(6)
    hashes, logits = outputs(model, images)
    assert len({int(row.argmax()) for row in logits}) > 1
    label_bits = label_table(label_code, len(CLASSES))
    expected = []
    for hash_row, logit_row in zip(hashes, logits, strict=True):
        bits = [bool(h >= t) for h, t in zip(hash_row, thresholds, strict=True)]
        predicted = max(range(len(CLASSES)), key=lambda c: logit_row[c])
        expected.append(bits + label_bits[predicted].tolist() * label_weight)
    assert model.bits == len(expected[0])
    assert unpack(model.encode(images), model.bits).tolist() == expected


def test_an_output_at_its_threshold_is_a_one():
    network = make_network()
    torch.nn.init.zeros_(network.head.output.weight)
    assert unpack(HashModel(make_card(), network).encode(make_images(2)), BITS).all()


class Rounding(HashNetwork):
    """A network whose outputs differ in the last digits with the size of the batch, as those of a GPU do."""

    noise = 4e-5

    def hash(self, features):
        hashes, logits = super().hash(features)
        if len(features) == 1:
            return NetworkOutput(hashes, logits)
        generator = torch.Generator().manual_seed(len(features))
        return NetworkOutput(
            *(part + (torch.rand(part.shape, generator=generator) - 0.5) * self.noise for part in (hashes, logits))
        )


class LargeRounding(Rounding):
    """The same for a linear head of outputs about 1,000 times as large."""

    noise = 4e-2


def unsure_model():
    """A model for which the outputs of some images lie on thresholds, and two classes are always equally likely."""
    network = make_network()
    network.__class__ = Rounding
    with torch.no_grad():
        network.classifier.weight[1] = network.classifier.weight[0]
        network.classifier.bias[:2] = 100
    model = HashModel(make_card(label_code="binary"), network)
    hashes, _ = outputs(model, make_images(50))
    thresholds = tuple(float(hashes[2 * bit, bit]) for bit in range(BITS))
    return HashModel(dataclasses.replace(model.card, thresholds=thresholds), network)


def large_model():
    """A linear head with large outputs, of which those of some images lie on thresholds."""
    card = make_card(network=dataclasses.replace(make_card().network, head=HeadSpec(BITS, activation="none")))
    network = make_network(network=card.network)
    network.__class__ = LargeRounding
    with torch.no_grad():
        network.head.output.weight *= 1000
    hashes, _ = outputs(HashModel(card, network), make_images(50))
    thresholds = tuple(float(hashes[2 * bit, bit]) for bit in range(BITS))
    return HashModel(dataclasses.replace(card, thresholds=thresholds), network)


def in_batches(model, images, size):
    return np.concatenate([model.encode(images[i : i + size]) for i in range(0, len(images), size)])


@pytest.mark.parametrize("make_model", [unsure_model, large_model])
def test_the_same_codes_whatever_the_batch_size(make_model):
    model, images = make_model(), make_images(50)
    alone = in_batches(model, images, 1)
    assert (in_batches(model, images, 7) == alone).all()
    assert (model.encode(images) == alone).all()
    assert (model.encode(images * 3) == np.tile(alone, (3, 1))).all()
    assert (model.encode(images, batch_size=13) == alone).all()


def test_it_is_the_second_look_that_makes_them_the_same(monkeypatch):
    """The test above can fail: without the second pass, outputs on thresholds give other bits."""
    monkeypatch.setattr(binarizer, "MARGIN", 0.0)
    model, images = unsure_model(), make_images(50)
    differ = unpack(in_batches(model, images, 1) ^ model.encode(images), model.bits)
    assert differ[:, :BITS].any()
    assert differ[:, BITS:].any()


def test_only_unsure_images_are_computed_twice():
    images = make_images(50)
    looked_at = []
    network = make_network()
    hashes, _ = outputs(HashModel(make_card(), network), images)
    near = np.zeros(50, bool)
    near[[3, 17]] = True
    # Two thresholds equal the output of one image each; the others are out of reach.
    thresholds = (float(hashes[3, 0]), float(hashes[17, 1]), *[2.0] * (BITS - 2))
    near |= (np.abs(hashes - np.array(thresholds)) < 1e-3).any(axis=1)
    network.backbone.register_forward_pre_hook(lambda module, inputs: looked_at.append(len(inputs[0])))
    HashModel(make_card(thresholds=thresholds), network).encode(images)
    assert 2 <= looked_at.count(1) <= near.sum() < 10
    assert sum(looked_at) == 50 + looked_at.count(1)


@pytest.mark.parametrize("orientations", [1, 4, 8])
def test_features_are_the_mean_over_orientations(orientations):
    """Orientations are made here by transposing and mirroring the image."""
    network, images = make_network(), make_images(5)
    model = HashModel(
        make_card(preprocessing=Preprocessing(Rendering(), SIDE, SIDE, orientations=orientations)), network
    )
    prepared = model.prepare(images)
    upright = [prepared, prepared[:, :, ::-1], prepared[:, ::-1], prepared[:, ::-1, ::-1]]
    turned = [view.transpose(0, 2, 1, 3) for view in upright]
    views = {1: upright[:1], 4: [upright[0], upright[3], turned[1], turned[2]], 8: upright + turned}[orientations]
    with torch.inference_mode():
        expected = np.mean([network.features(model.normalise(view)).numpy() for view in views], axis=0)
        hashes = network.hash(torch.from_numpy(expected)).hashes.numpy()
    found = model.features(prepared)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    sure = np.abs(hashes) > 1e-4
    assert (unpack(model.encode_prepared(prepared), BITS)[sure] == (hashes >= 0)[sure]).all()
    if orientations > 1:
        np.testing.assert_allclose(model.features(np.rot90(prepared, 1, (1, 2))), found, atol=1e-5)


def test_features_are_the_mean_over_sizes():
    network, images = make_network(), make_images(5)
    model = HashModel(make_card(preprocessing=Preprocessing(Rendering(), SIDE, SIDE, smaller=(24, 20))), network)
    prepared = model.prepare(images)
    inputs = [model.normalise(prepared)]
    for side in (24, 20):
        # Resampled by Pillow; linear, like the normalisation, so that their order does not matter.
        resampled = [resample(view.permute(1, 2, 0).numpy(), side, (0, 0, SIDE, SIDE)) for view in inputs[0]]
        inputs.append(torch.from_numpy(np.stack(resampled)).permute(0, 3, 1, 2))
    with torch.inference_mode():
        expected = np.mean([network.features(size).numpy() for size in inputs], axis=0)
    np.testing.assert_allclose(model.features(prepared), expected, atol=1e-4)
    alone = np.concatenate([model.encode_prepared(image[None]) for image in prepared])
    assert (model.encode_prepared(prepared, batch_size=5) == alone).all()


def test_no_images_give_no_codes(saved):
    assert saved[1].encode([]).shape == (0, 3)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, SIDE, SIDE, 3), np.float32),
        np.zeros((2, SIDE, SIDE + 1, 3), np.uint8),
        np.zeros((SIDE, SIDE, 3), np.uint8),
    ],
)
def test_what_is_not_prepared_is_refused(saved, images):
    with pytest.raises(InputError, match=r"prepared images are uint8 \[N, 32, 32, 3\]"):
        saved[1].encode_prepared(images)


# Devices, files, sentences.


@pytest.mark.parametrize("device", ["mps", "xpu", "gpu", "cuda:99", "cpu:1", "", None, 3])
def test_an_unknown_device_is_refused_in_one_line(saved, device):
    for place in (lambda: HashModel.load(saved[0], device), lambda: HashModel.load(saved[0]).to(device)):
        with pytest.raises(InputError, match=r"^device is .* allowed$|^device is .*, but torch can use|^device is"):
            place()


def test_a_model_can_be_moved(saved):
    model = HashModel.load(saved[0])
    assert model.to("cpu") is model
    assert model.to(torch.device("cpu")).device.type == "cpu"
    assert (model.encode(make_images(3)) == saved[1].encode(make_images(3))).all()
    assert not model.has_text


def test_files_are_encoded_as_their_images(saved, tmp_path):
    images, paths, done = make_images(70), [], []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        PIL.Image.fromarray(image).save(paths[-1])
    model = saved[1]
    expected = model.encode(images)
    assert (model.encode_files(paths, on_progress=done.append) == expected).all()
    assert (model.encode_files([str(path) for path in paths], batch_size=9) == expected).all()
    assert done == [64, 70]
    assert model.encode_files([]).shape == (0, 3)
    paths[3].write_bytes(b"no image")
    paths[69].unlink()
    with pytest.raises(InputError, match="images that cannot be read: found 2 problems") as caught:
        model.encode_files(paths, root=tmp_path)
    assert [f"- {number}.png: " in str(caught.value) for number in (3, 4, 69)] == [True, False, True]
    with pytest.raises(InputError, match="batch_size is 0; at least 1 is needed"):
        model.encode_files(paths[:1], batch_size=0)


def test_the_callers_precision_does_not_change_codes(saved):
    """Products in bfloat16 or TensorFloat-32 are switched off for codes, and on again afterwards."""
    model, images = saved[1], make_images(20)
    expected, features = model.encode(images), model.features(model.prepare(images))
    before = torch.get_float32_matmul_precision()
    seen = []
    handle = model.network.head.output.register_forward_pre_hook(
        lambda module, inputs: seen.append((torch.backends.cuda.matmul.fp32_precision, inputs[0].dtype))
    )
    torch.set_float32_matmul_precision("medium")
    try:
        allowed = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        with torch.autocast("cpu", torch.bfloat16):
            assert (model.encode(images) == expected).all()
            np.testing.assert_array_equal(model.features(model.prepare(images)), features)
        after = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        assert after == allowed == ("tf32", "bf16")
    finally:
        torch.set_float32_matmul_precision(before)
        handle.remove()
    assert {*seen} == {("ieee", torch.float32)}


# Damage.


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("place", [0, 0.1, 0.37, 0.5, 0.81, 0.999])
def test_a_flipped_byte_is_found(copy, name, place):
    path = copy / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0xFF
    path.write_bytes(content)
    assert_refused(copy)


def test_a_flipped_bit_in_any_digit_of_the_card_is_found(copy):
    path = copy / "model.json"
    content = path.read_bytes()
    places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    assert len(places) > 100
    for i in places:
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(InputError):
            read_model_folder(copy)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("place", [0, 0.5, 0.99])
def test_a_truncated_file_is_found(copy, name, place):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: int(place * len(content))])
    assert_refused(copy)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_found(copy, name):
    (copy / name).unlink()
    assert_refused(copy, name)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert_refused(tmp_path / "absent", "not a model folder")


KEYS = [*make_card().to_json(), "format_version", "weights_sha256", "model_id", "card_sha256"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("stated", [False, True])
def test_a_missing_key_is_found(copy, key, stated):
    rewrite(copy, lambda fields: fields.pop(key), stated=stated and key != "card_sha256")
    assert_refused(copy)


@pytest.mark.parametrize("key", ["backbone", "head", "num_classes"])
def test_a_missing_key_of_the_network_is_found(copy, key):
    rewrite(copy, lambda fields: fields["network"].pop(key))
    assert_refused(copy, key)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(BACKBONE)])
def test_a_missing_key_of_the_backbone_is_found(copy, key):
    rewrite(copy, lambda fields: fields["network"]["backbone"].pop(key))
    assert_refused(copy, key)


def test_a_key_too_many_is_found(copy):
    rewrite(copy, lambda fields: fields.update(extra=1))
    assert_refused(copy)


@pytest.mark.parametrize("version", [0, 4, "5", None, [5]])
def test_another_format_version_is_refused(copy, version):
    rewrite(copy, lambda fields: fields.update(format_version=version))
    assert_refused(copy, "format version .*; this orbithash reads version 5")


@pytest.mark.parametrize("content", ["", "[]", "null", "3", '"text"', "{", "\udc80", "[" * 200_000])
def test_json_that_is_no_card_is_refused(copy, content):
    (copy / "model.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert_refused(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("thresholds", [math.nan] * BITS),
        ("thresholds", [math.inf] * BITS),
        ("thresholds", [0.0] * (BITS - 1)),
        ("thresholds", 0.0),
        ("label_code", "grey"),
        ("label_code", None),
        ("label_weight", "two"),
        ("label_weight", 1000),
        ("classes", ["beach"]),
        ("classes", 5),
        ("network", {}),
        (
            "network",
            {
                **dataclasses.asdict(make_card().network),
                "head": {**dataclasses.asdict(make_card().network.head), "bits": 4},
            },
        ),
        *[
            ("network", {**dataclasses.asdict(make_card().network), "backbone": {**BACKBONE_JSON, **changes}})
            for changes in (
                {"pooling": ["avg"]},
                {"pooling": "median"},
                {"norm": "median"},
                {"name": "resnet19"},
                {"source": "elsewhere"},
                {"config": None},
                {"channels": "3"},
                {"num_features": 0},
            )
        ],
        ("preprocessing", {**make_card().preprocessing.to_json(), "crop": 1, "std": [0, 0, 0]}),
        ("preprocessing", []),
        ("bits", 21),
        ("metrics", 1),
    ],
)
def test_a_wrong_value_is_refused_even_with_its_own_hash(copy, key, value):
    rewrite(copy, lambda fields: fields.update({key: value}))
    assert_refused(copy)


@pytest.mark.parametrize(
    "spec",
    [
        NetworkSpec(build_backbone("resnet18").spec, HeadSpec(BITS), len(CLASSES)),
        NetworkSpec(dataclasses.replace(BACKBONE, norm="frozen-batch"), HeadSpec(BITS), len(CLASSES)),
        NetworkSpec(BACKBONE, HeadSpec(BITS), 0),
        NetworkSpec(BACKBONE, HeadSpec(BITS + 1), len(CLASSES)),
    ],
)
def test_weights_of_another_network_are_refused(copy, spec):
    weights_sha256 = hashlib.sha256((copy / "model.safetensors").read_bytes()).hexdigest()
    write_card(make_card(network=spec, thresholds=(0.0,) * spec.bits), weights_sha256, copy)
    assert_refused(copy, "does not fit the network")


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_not_opened(copy, tmp_path):
    sprung = tmp_path / "sprung"
    content = pickle.dumps(Trap(sprung))
    (copy / "model.safetensors").write_bytes(content)
    assert_refused(copy, "damaged")
    write_card(make_card(), hashlib.sha256(content).hexdigest(), copy)
    assert_refused(copy, "does not fit")
    assert not sprung.exists()
    pickle.loads(content)
    assert sprung.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": (math.nan,) * BITS}, "one finite number for each of the 20 hash bits"),
        ({"thresholds": (0.0,) * 3}, "one finite number for each of the 20 hash bits"),
        ({"label_code": "binary", "classes": ("beach",)}, "5 outputs for 1 names"),
        ({"label_code": "one-hot", "label_weight": 200}, "bits is 1020"),
    ],
)
def test_a_card_that_makes_no_sense_cannot_be_made(changes, message):
    with pytest.raises(InputError, match=message):
        make_card(**changes)
