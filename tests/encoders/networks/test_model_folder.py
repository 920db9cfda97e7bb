"""The model folder: what was saved encodes the same again, and whatever is damaged is refused in one line."""

import dataclasses
import hashlib
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from orbithash.encoders.codes import unpack
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import Rendering
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks import model as model_module
from orbithash.encoders.networks.card import HeadSpec, ModelCard, NetworkSpec, read_model_folder, write_card
from orbithash.encoders.networks.hash_network import HashNetwork, NetworkOutput
from orbithash.encoders.networks.label_codes import label_table
from orbithash.encoders.networks.model import HashModel

BITS, SIDE = 20, 32
CLASSES = ("beach", "forest", "harbor", "river", "runway")


def make_card(**changes):
    fields = {
        "method": "dhcl",
        "network": NetworkSpec("mobilenet_v3_small", "group", "avg+max", HeadSpec(BITS), len(CLASSES)),
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
    network = HashNetwork(make_card(**changes).network)
    # A fresh classifier gives all images much the same logits.
    torch.nn.init.normal_(network.classifier.weight)
    return network


def make_images(num, seed=0):
    """Images of several sizes."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (int(rng.integers(30, 50)), 40, 3), np.uint8) for _ in range(num)]


def outputs(model, images):
    """What the network itself gives for each image alone: hashes [N, K], logits [N, C]."""
    prepared = [model.preprocessing.prepare(image) for image in images]
    with torch.inference_mode():
        rows = [model.network(model.normalise(image[None])) for image in prepared]
    return np.concatenate([row.hashes.numpy() for row in rows]), np.concatenate([row.logits.numpy() for row in rows])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model: the folder and what encoded before it was saved."""
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
    """Changes the fields of model.json; with `stated`, its model_id is that of the changed fields."""
    path = folder / "model.json"
    fields = json.loads(path.read_text())
    change(fields)
    if stated:
        del fields["model_id"]
        fields["model_id"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]
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


def test_the_model_id_is_of_the_weights_and_of_the_card(saved, tmp_path):
    _, model = saved
    same = HashModel(make_card(label_code="gray"), make_network())
    other_card = HashModel(make_card(label_code="gray", metrics={"validation/ap_min@20": 0.6}), make_network())
    other_weights = HashModel(make_card(label_code="gray"), make_network(seed=1))
    ids = [m.save(tmp_path / str(i)) for i, m in enumerate((same, other_card, other_weights))]
    assert ids[0] == model.model_id
    assert len({*ids}) == 3


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
    """A network whose outputs move in the last digits with the size of the batch, as those of a GPU do."""

    def hash(self, features):
        hashes, logits = super().hash(features)
        if len(features) == 1:
            return NetworkOutput(hashes, logits)
        noise = torch.Generator().manual_seed(len(features))
        return NetworkOutput(
            *(part + (torch.rand(part.shape, generator=noise) - 0.5) * 4e-5 for part in (hashes, logits))
        )


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


def in_batches(model, images, size):
    return np.concatenate([model.encode(images[i : i + size]) for i in range(0, len(images), size)])


def test_the_same_codes_whatever_the_batch_size():
    model, images = unsure_model(), make_images(50)
    alone = in_batches(model, images, 1)
    assert (in_batches(model, images, 7) == alone).all()
    assert (model.encode(images) == alone).all()
    assert (model.encode(images * 3) == np.tile(alone, (3, 1))).all()


def test_it_is_the_second_look_that_makes_them_the_same(monkeypatch):
    """Shows that the test above can fail: outputs on thresholds do fall differently without it."""
    monkeypatch.setattr(model_module, "MARGIN", 0.0)
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
    # Column 0 decides: one threshold at the output of two images, the others out of reach.
    thresholds = (float(hashes[3, 0]), float(hashes[17, 1]), *[2.0] * (BITS - 2))
    near |= (np.abs(hashes - np.array(thresholds)) < 1e-4).any(axis=1)
    network.backbone.register_forward_pre_hook(lambda module, inputs: looked_at.append(len(inputs[0])))
    HashModel(make_card(thresholds=thresholds), network).encode(images)
    assert looked_at.count(1) == near.sum()
    assert sum(looked_at) == 50 + near.sum()


@pytest.mark.parametrize("orientations", [1, 4, 8])
def test_features_are_the_mean_over_orientations(orientations):
    """Each orientation by transposing and mirroring the image itself, not the network's input."""
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


KEYS = [*make_card().to_json(), "format_version", "weights_sha256", "model_id"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("stated", [False, True])
def test_a_missing_key_is_found(copy, key, stated):
    rewrite(copy, lambda fields: fields.pop(key), stated=stated and key != "model_id")
    assert_refused(copy)


@pytest.mark.parametrize("key", ["backbone", "norm", "pooling", "head", "num_classes"])
def test_a_missing_key_of_the_network_is_found(copy, key):
    rewrite(copy, lambda fields: fields["network"].pop(key))
    assert_refused(copy, key)


def test_a_key_too_many_is_found(copy):
    rewrite(copy, lambda fields: fields.update(extra=1))
    assert_refused(copy)


@pytest.mark.parametrize("version", [0, 2, "3", None, [3]])
def test_another_format_version_is_refused(copy, version):
    rewrite(copy, lambda fields: fields.update(format_version=version))
    assert_refused(copy, "format version .*; this orbithash reads version 3")


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
        ("network", {**dataclasses.asdict(make_card().network), "pooling": ["avg"]}),
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
        NetworkSpec("resnet18", "group", "avg+max", HeadSpec(BITS), len(CLASSES)),
        NetworkSpec("mobilenet_v3_small", "frozen-batch", "avg+max", HeadSpec(BITS), len(CLASSES)),
        NetworkSpec("mobilenet_v3_small", "group", "avg+max", HeadSpec(BITS), 0),
        NetworkSpec("mobilenet_v3_small", "group", "avg+max", HeadSpec(BITS + 1), len(CLASSES)),
    ],
)
def test_weights_of_another_network_are_refused(copy, spec):
    weights_sha256 = hashlib.sha256((copy / "model.safetensors").read_bytes()).hexdigest()
    write_card(make_card(network=spec, thresholds=(0.0,) * spec.bits), weights_sha256, copy)
    assert_refused(copy, "does not fit the network")


class Trap:
    """Leaves a file behind when it is unpickled."""

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
