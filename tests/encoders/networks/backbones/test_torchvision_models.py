"""Backbones: their feature maps, and the weight files that they accept."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.build import build_backbone, rebuild_backbone
from orbithash.encoders.networks.backbones.names import MIN_SIDE_PX, TORCHVISION
from orbithash.encoders.networks.backbones.rgb import rgb_channels
from orbithash.encoders.networks.card import BackboneSpec


def images(num, side=64, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num, 3, side, side)).astype(np.float32))


def random_state(name, seed=0, **options):
    """The state of a torchvision model with running statistics unlike those of a new model."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(name, weights=None, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model, model.state_dict()


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """A torchvision resnet18 with random weights, and the safetensors file of its state."""
    model, state = random_state("resnet18")
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(state, path)
    return model.eval(), path


@pytest.mark.parametrize("name", TORCHVISION)
def test_an_image_has_the_same_features_in_any_batch(name):
    x = images(3, side=96)
    for norm in ("frozen-batch", "group"):
        torch.manual_seed(0)
        # In training mode: batch statistics and random branches would change the result.
        backbone = build_backbone(name, norm=norm).train()
        with torch.no_grad():
            batch = backbone.body(x)
            alone = torch.cat([backbone.body(x[i : i + 1]) for i in range(3)])
        assert batch.ndim == 4
        assert batch.isfinite().all()
        assert torch.allclose(batch, alone, rtol=1e-4, atol=1e-4 * float(batch.abs().max()))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_no_norm_keeps_statistics_of_batches(name):
    for norm in ("frozen-batch", "group"):
        backbone = build_backbone(name, norm=norm).train()
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        backbone(images(2))
        assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_features_of_a_weights_file_are_those_of_torchvision(resnet18):
    model, path = resnet18
    x = images(2)
    with torch.no_grad():
        found = build_backbone("resnet18", str(path)).body.train()(x)
        y = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        expected = model.layer4(model.layer3(model.layer2(model.layer1(y))))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_features_of_inceptions_are_those_of_torchvision(name, tmp_path):
    """With a state like torchvision's weights: with auxiliary classifiers, for pixels from -1 to 1."""
    model, state = random_state(name, init_weights=False, aux_logits=True, transform_input=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            # The default initialisation would shrink the signal in these deep networks.
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    assert any("aux" in key.lower() for key in state)
    save_file(state, tmp_path / "w.safetensors")
    x, found = images(2, side=96), {}
    model.avgpool.register_forward_pre_hook(lambda module, inputs: found.update(maps=inputs[0]))
    with torch.no_grad():
        model.eval()(x)
        backbone = build_backbone(name, str(tmp_path / "w.safetensors")).body.train()
        scale = float(found["maps"].std())
        torch.testing.assert_close(backbone(x), found["maps"], rtol=1e-4, atol=1e-4 * scale)
        # Grey pixels, normalised as bands other than RGB: the features of a brighter grey RGB image, because the two
        # extra bands weigh as much as one colour.
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        pixels = (x[:, :1].clamp(-2, 2) + 2) / 4
        brighter = (2 * pixels - 1) * 4 / 3 / 2 + 0.5
        grey = backbone(((brighter - mean) / std).float())
        five = build_backbone(name, str(tmp_path / "w.safetensors"), channels=5).body
        torch.testing.assert_close(five(((pixels - 0.5) / 0.25).repeat(1, 5, 1, 1)), grey, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("name", MIN_SIDE_PX)
def test_the_least_side_is_the_least(name):
    body, side = build_backbone(name).body, MIN_SIDE_PX[name]
    with torch.no_grad():
        assert min(body(images(1, side)).shape[2:]) >= 1
        with pytest.raises((RuntimeError, ValueError)):
            body(images(1, side - 1))


def test_the_number_of_features_is_that_of_the_map():
    for channels in (3, 5):
        backbone = build_backbone("googlenet", norm="batch", channels=channels).train()
        assert backbone.num_features == 1024
        with torch.no_grad():
            assert backbone(torch.zeros(2, channels, 64, 64)).shape == (2, 1024)


def test_a_file_without_the_step_counters_is_taken(resnet18, tmp_path):
    model, path = resnet18
    state = {key: value for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    save_file(state, tmp_path / "converted.safetensors")
    one, other = (build_backbone("resnet18", str(p)) for p in (path, tmp_path / "converted.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def damage(state, kind):
    if kind == "missing":
        del state["layer1.0.conv1.weight"]
    elif kind == "foreign":
        state["extra.weight"] = torch.zeros(1)
    else:
        state["layer1.0.conv1.weight"] = torch.zeros(3, 3)
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"1 tensors missing, 0 unknown, 0 of another shape \(first: layer1.0.conv1.weight\)"),
        ("foreign", r"0 tensors missing, 1 unknown, 0 of another shape \(first: extra.weight\)"),
        ("misshaped", r"0 tensors missing, 0 unknown, 1 of another shape \(first: layer1.0.conv1.weight\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(resnet18, tmp_path, kind, message):
    save_file(damage(dict(resnet18[0].state_dict()), kind), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        build_backbone("resnet18", str(tmp_path / "w.safetensors"))
    assert "\n" not in str(caught.value)
    assert "resnet18" in str(caught.value)


def test_weights_of_another_backbone_are_refused(resnet18):
    with pytest.raises(InputError, match="not the weights of backbone mobilenet_v3_small"):
        build_backbone("mobilenet_v3_small", str(resnet18[1]))


def test_a_pickle_is_not_opened(tmp_path):
    path = tmp_path / "weights.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        build_backbone("mobilenet_v3_small", str(path))
    named_otherwise = path.rename(tmp_path / "weights.pth")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        build_backbone("mobilenet_v3_small", str(named_otherwise))


@pytest.mark.parametrize(
    ("name", "weights", "options", "message"),
    [
        ("resnet19", None, {}, r"'resnet19'; did you mean resnet18\? Allowed are mobilenet_v2, .*resnet101"),
        ("resnet18", None, {"norm": "instance"}, r"'instance'; frozen-batch, group, batch are allowed"),
        ("resnet18", None, {"pooling": "median"}, r"pooling is 'median'; avg, max, avg\+max are allowed"),
        ("resnet18", None, {"channels": 1}, "channels is 1; 2 or more is allowed"),
        ("resnet18", "DEFAULT", {"norm": "group"}, "but norm is group; use frozen-batch or no weights"),
        ("resnet18", "absent.safetensors", {}, "absent.safetensors: no such weights file"),
        ("resnet18", "IMAGENET", {}, r"'IMAGENET'.*IMAGENET1K_V1"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(name, weights, options, message):
    with pytest.raises(InputError, match=message):
        build_backbone(name, weights, **options)


def test_the_description_rebuilds_the_network_and_says_where_weights_come_from(resnet18):
    backbone = build_backbone("resnet18", str(resnet18[1]), channels=5)
    assert (backbone.spec.origin, backbone.spec.norm) == ("file resnet18.safetensors", "frozen-batch")
    rebuilt = rebuild_backbone(BackboneSpec.from_json(json.loads(json.dumps(dataclasses.asdict(backbone.spec)))))
    rebuilt.load_state_dict(backbone.state_dict())
    x = torch.randn(2, 5, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(x), backbone(x), rtol=0, atol=0)
    unread = build_backbone("resnet18", str(resnet18[1]), channels=5, read_weights=False)
    assert unread.spec == backbone.spec


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    backbone, gradients = build_backbone("resnet8"), []
    for _ in range(2):
        backbone.zero_grad()
        backbone(images(2)).sum().backward()
        gradients.append([p.grad.clone() for p in backbone.parameters()])
        backbone.enable_checkpointing()
    assert len(backbone.blocks()) > 3
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@pytest.mark.parametrize("failure", [OSError("no route"), RuntimeError("invalid hash value")])
def test_a_download_that_fails_is_the_users_to_mend(monkeypatch, failure):
    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(InputError, match=f"download failed .{failure}.; give a local file"):
        build_backbone("mobilenet_v3_small", "IMAGENET1K_V1")


def test_the_real_mobilenet_weights_load(shared):
    path = shared / "weights" / "mobilenet_v2_imagenet.safetensors"
    backbone = build_backbone("mobilenet_v2", str(path)).body.eval()
    with torch.no_grad():
        features = backbone(images(1))
    assert features.shape == (1, 1280, 2, 2)
    # ReLU6 features of a trained network: neither dead nor saturated.
    assert 0 < float((features > 0).float().mean()) < 0.9
    assert 0 < float(features.max()) <= 6


def first_filters(backbone):
    return next(module.weight for module in backbone.modules() if isinstance(module, torch.nn.Conv2d))


@pytest.mark.parametrize(
    ("bands", "rgb"),
    [
        (None, (0, 1, 2)),
        ((1, 2, 3, 4), (0, 1, 2)),
        ((4, 3, 2, 1), (3, 2, 1)),
        ((8, 4, 3, 5), (0, 1, 2)),
        (("B02", "B03", "B04", "B08"), (2, 1, 0)),
        (("nir", "Red", "green", "Blue"), (1, 2, 3)),
        (("B4", "B3", "B2", "B5"), (0, 1, 2)),
        (("SR_B2", "SR_B3", "SR_B4", "SR_B5"), (2, 1, 0)),
        (("VV", "VH"), None),
        (("B05", "B06", "B07", "B8A"), None),
    ],
)
def test_red_green_and_blue_are_found_among_the_bands(bands, rgb):
    assert rgb_channels(bands) == rgb


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "alexnet"])
def test_extra_bands_leave_the_filters_of_colours_as_they_are(name, tmp_path):
    model = torchvision.models.get_model(name, weights=None, **({"init_weights": True} if name == "googlenet" else {}))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors")
    original = first_filters(build_backbone(name, weights))
    filters = first_filters(build_backbone(name, weights, channels=5, rgb=(2, 1, 4)))
    torch.testing.assert_close(filters[:, [2, 1, 4]], original, rtol=0, atol=0)
    for extra in (0, 3):
        torch.testing.assert_close(filters[:, extra], original.mean(dim=1) / 2)


def test_bands_without_colours_have_the_features_of_the_grey_image(tmp_path):
    model = torchvision.models.get_model("resnet18", weights=None)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    weights, x = str(tmp_path / "w.safetensors"), images(2)[:, :1]
    with torch.no_grad():
        expected = build_backbone("resnet18", weights).body(x.expand(-1, 3, -1, -1))
        for channels in (2, 4, 13):
            found = build_backbone("resnet18", weights, channels=channels, rgb=None).body(
                x.expand(-1, channels, -1, -1)
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
