"""Backbones of timm, transformers, open_clip and torchgeo: features, descriptions, weights, bands, refusals."""

import dataclasses
import json
import shutil

import pytest
import torch
from backbone_models import TIMM, TORCHGEO, write_hf
from safetensors.torch import load_file, save_file

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.build import build_backbone, default_preprocessing, rebuild_backbone
from orbithash.encoders.networks.card import BackboneSpec

SOURCES = ("timm", "hf", "hf dual", "open_clip", "torchgeo")


def build(settings, **options):
    return build_backbone(settings["backbone"], settings.get("weights"), **options).eval()


def features(backbone, images):
    with torch.no_grad():
        return backbone(images)


def images(num=3, channels=3, side=32, seed=0):
    return torch.rand(num, channels, side, side, generator=torch.Generator().manual_seed(seed))


def through_json(spec):
    return BackboneSpec.from_json(json.loads(json.dumps(dataclasses.asdict(spec))))


@pytest.mark.parametrize("source", SOURCES)
def test_the_description_rebuilds_the_network(tiny_backbones, source):
    backbone = build(tiny_backbones[source])
    found = features(backbone, images())
    assert found.shape == (3, backbone.num_features)
    assert found.dtype == torch.float32
    assert found.std(dim=0).max() > 0
    rebuilt = rebuild_backbone(through_json(backbone.spec)).eval()
    assert rebuilt.spec == backbone.spec
    rebuilt.load_state_dict(backbone.state_dict())
    assert torch.equal(features(rebuilt, images()), found)
    # An image has the same features in any batch and at any time.
    assert torch.allclose(features(backbone, images()[1:2]), found[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_blocks_train_with_checkpointing_as_without(tiny_backbones, source):
    backbone, gradients = build(tiny_backbones[source]).train(), []
    assert len(backbone.blocks()) >= 2
    assert bool(backbone.attention_linears) == (source != "torchgeo")
    for name in backbone.attention_linears:
        assert backbone.get_submodule(name)
    for _ in range(2):
        backbone.zero_grad()
        backbone(images()).square().sum().backward()
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
        backbone.enable_checkpointing()
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()) + 1e-9)


def test_features_are_those_of_the_libraries(tiny_backbones):
    import open_clip
    import timm
    from transformers import AutoModel

    x = images()
    plain = timm.create_model(TIMM)
    plain.load_state_dict(load_file(tiny_backbones["timm"]["weights"]))
    with torch.no_grad():
        expected = plain.eval().forward_head(plain.forward_features(x), pre_logits=True)
    # The position embeddings are resized from 160 to 32 pixels here and there.
    big = images(side=160)
    with torch.no_grad():
        expected = plain.forward_head(plain.forward_features(big), pre_logits=True)
    torch.testing.assert_close(features(build(tiny_backbones["timm"]), big), expected)

    folder = tiny_backbones["hf"]["backbone"].removeprefix("hf:")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(pixel_values=x).last_hidden_state
    torch.testing.assert_close(features(build(tiny_backbones["hf"], pooling="cls"), x), hidden[:, 0])
    torch.testing.assert_close(features(build(tiny_backbones["hf"], pooling="mean"), x), hidden.mean(dim=1))

    folder = tiny_backbones["hf dual"]["backbone"].removeprefix("hf:")
    with torch.no_grad():
        projected = AutoModel.from_pretrained(folder).eval().get_image_features(pixel_values=x).pooler_output
    torch.testing.assert_close(features(build(tiny_backbones["hf dual"]), x), projected)

    folder = tiny_backbones["open_clip"]["backbone"].removeprefix("open_clip:")
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        torch.testing.assert_close(features(build(tiny_backbones["open_clip"]), x), model.encode_image(x))


def test_the_card_says_where_weights_come_from_and_their_licence(tiny_backbones):
    spec = build(tiny_backbones["hf"]).spec
    assert (spec.name, spec.origin, spec.licence, spec.pooling) == ("hf", "folder hf", "apache-2.0", "cls")
    assert build(tiny_backbones["timm"]).spec.origin == "file test_vit.safetensors"
    spec = build_backbone("timm:vit_small_patch14_dinov2.lvd142m", "pretrained", read_weights=False).spec
    assert (spec.origin, spec.licence) == ("timm/vit_small_patch14_dinov2.lvd142m", "apache-2.0")
    assert build_backbone(f"timm:{TIMM}").spec.origin == "random weights"


def first_filters(backbone):
    return next(module.weight for module in backbone.modules() if isinstance(module, torch.nn.Conv2d))


@pytest.mark.parametrize("source", ["timm", "hf", "hf dual", "open_clip"])
def test_filters_of_colours_stay_where_bands_are_added(tiny_backbones, source):
    """Also those of the patches of a transformer."""
    original = first_filters(build(tiny_backbones[source]))
    five = build(tiny_backbones[source], channels=5, rgb=(2, 1, 4))
    filters = first_filters(five)
    torch.testing.assert_close(filters[:, [2, 1, 4]], original, rtol=0, atol=0)
    for extra in (0, 3):
        torch.testing.assert_close(filters[:, extra], original.mean(dim=1) / 2)
    found = features(five, images(channels=5))
    rebuilt = rebuild_backbone(through_json(five.spec)).eval()
    rebuilt.load_state_dict(five.state_dict())
    assert torch.equal(features(rebuilt, images(channels=5)), found)


@pytest.mark.parametrize("source", ["timm", "hf", "hf dual"])
def test_images_of_another_size_are_taken(tiny_backbones, source):
    assert features(build(tiny_backbones[source]), images(side=44)).isfinite().all()


def test_open_clip_is_built_for_the_size_of_the_settings(tiny_backbones):
    backbone = build(tiny_backbones["open_clip"], image_size=48)
    assert features(backbone, images(side=48)).shape == (3, 24)
    for built in (backbone, rebuild_backbone(backbone.spec), build_backbone("timm:test_maxvit", image_size=48)):
        with pytest.raises(InputError, match="is built for images of 48 pixels, got 32; set image_size"):
            built(images(side=32))


def test_torchgeo_states_bands_statistics_and_units():
    found = default_preprocessing(f"torchgeo:{TORCHGEO}")
    assert (found.bands, found.values, found.size) == (("B04", "B03", "B02"), "reflectance", 224)
    assert (found.mean, found.std) == ((0.0,), (1.0,))
    all_bands = default_preprocessing("torchgeo:ViTSmall14_DINOv2_Weights.SENTINEL2_ALL_SOFTCON")
    assert all_bands.bands[:2] == ("B01", "B02")
    assert "B8A" in all_bands.bands
    assert (all_bands.mean[0], all_bands.std[0]) == pytest.approx((0.16129, 0.0791))
    radar = default_preprocessing("torchgeo:ResNet50_Weights.SENTINEL1_ALL_MOCO")
    assert (radar.bands, radar.values, radar.mean) == (("VV", "VH"), "decibel", (-12.59, -20.26))
    # Two normalisations after another are one.
    aerial = default_preprocessing("torchgeo:ResNet50_Weights.FMOW_RGB_GASSL")
    assert aerial.values == "picture"
    assert aerial.mean == pytest.approx((0.485, 0.456, 0.406))


def test_weights_of_torchgeo_are_downloaded_and_read_without_running_code(monkeypatch, tmp_path, tiny_backbones):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def download(url, path, **options):
        asked.append(url)
        torch.save(load_file(tiny_backbones["torchgeo"]["weights"]), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    expected = features(build(tiny_backbones["torchgeo"]), images())
    found = build_backbone(f"torchgeo:{TORCHGEO}").eval()
    assert torch.equal(features(found, images()), expected)
    assert [found.spec.origin] == asked

    def fail(url, path, **options):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    shutil.rmtree(tmp_path / "hub")
    refused(f"torchgeo:{TORCHGEO}", "the download failed (no route); give a local file")


def refused(name, message, weights=None, **options):
    with pytest.raises(InputError) as caught:
        build_backbone(name, weights, **options)
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_smal_patch16_224", "timm has no network 'vit_smal_patch16_224'; did you mean vit_small_patch16_224"),
        ("timm:resnet18.nothing", "timm has no weights 'nothing' of resnet18; there are a1_in1k"),
        ("timm:", "has no name after the colon; write timm:NAME"),
        ("tim:resnet18", "unknown backbone 'tim:resnet18'"),
        ("open_clip:ViT-B-33", "open_clip has no network 'ViT-B-33', and there is no folder 'ViT-B-33'; did you mean"),
        ("open_clip:ViT-B-32/nothing", "open_clip has no weights 'nothing' of ViT-B-32; there are openai"),
        ("open_clip:coca_ViT-B-32", "CoCa, which generates text, is not supported"),
        ("torchgeo:ResNet18_Weights.SENTINEL2", "did you mean ResNet18_Weights.SENTINEL2_"),
        ("torchgeo:DOFABase16_Weights.DOFA_MAE", "networks of the kind dofa_base_patch16_224 are not supported"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(name, message):
    refused(name, message)


def test_weights_that_do_not_fit_are_refused(tiny_backbones, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    for source in ("timm", "hf", "open_clip", "torchgeo"):
        name = tiny_backbones[source]["backbone"]
        refused(name, "not the weights of backbone", str(tmp_path / "w.safetensors"))
        refused(name, "no such weights file", str(tmp_path / "absent.safetensors"))
        refused(name, f"run: orbithash convert {tmp_path / 'w.pth'} w.safetensors", str(tmp_path / "w.pth"))


def test_settings_that_a_source_does_not_have_are_refused(tiny_backbones):
    refused(tiny_backbones["timm"]["backbone"], "pooling is 'pooler'; for timm auto, avg", pooling="pooler")
    refused(tiny_backbones["hf"]["backbone"], "pooling is 'max'; for hf auto, cls, mean, pooler", pooling="max")
    refused(tiny_backbones["hf dual"]["backbone"], "is a dual encoder and has its own", pooling="cls")
    refused(tiny_backbones["open_clip"]["backbone"], "have their own: use pooling=auto", pooling="cls")
    weights = tiny_backbones["torchgeo"]["weights"]
    refused(f"torchgeo:{TORCHGEO}", "takes 3 bands (B04, B03, B02), and there are 5", weights, channels=5)
    refused("timm:test_resnet", "norm is group, which is for networks of torchvision", norm="group")
    refused("open_clip:ViT-B-32", "write open_clip:ViT-B-32/TAG for published weights", "pretrained")


def test_folders_that_are_no_image_model_are_refused(tmp_path):
    refused(f"hf:{tmp_path}", "not a Hugging Face model folder (it has no config.json)")
    refused(f"open_clip:{tmp_path}", "no model of open_clip (it has no open_clip_config.json")
    sizes = {"vocab_size": 30, "image_size": 1, "patch_size": 1}
    write_hf(tmp_path / "bert", "BertModel", **sizes)
    refused(f"hf:{tmp_path / 'bert'}", "not a model of images (its input is input_ids)")
    write_hf(tmp_path / "mae", "ViTMAEModel")
    refused(f"hf:{tmp_path / 'mae'}", "the features of an image differ between two calls")
    # A missing pooler is an extra layer for classifiers, unless it is used.
    folder = write_hf(tmp_path / "vit")
    state = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in state.items() if "pooler" not in name}, folder / "model.safetensors")
    assert build_backbone(f"hf:{folder}").spec.pooling == "cls"
    refused(f"hf:{folder}", "2 weights are missing (first: pooler.", pooling="pooler")


def test_code_of_a_models_authors_is_not_run(tmp_path):
    own = {"model_type": "own_vit", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    refused(f"hf:{tmp_path}", "needs Python code of its authors (trust_remote_code), which is not run")
    assert not (tmp_path / "sprung").exists()


class Response:
    def __init__(self, status):
        self.status_code, self.headers, self.request = status, {}, None


@pytest.mark.parametrize(
    "name", ["hf:org/gated", "open_clip:hf-hub:org/gated", "timm:vit_small_patch16_dinov3.lvd1689m"]
)
@pytest.mark.parametrize("kind", ["gated", "offline"])
def test_a_hub_that_denies_access_or_is_absent_is_one_line(monkeypatch, name, kind):
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*arguments, **options):
        if kind == "gated":
            raise errors.GatedRepoError("403 Client Error.\nAccess is restricted", response=Response(403))
        raise errors.LocalEntryNotFoundError("Cannot find the files in the cache.\nCheck your connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    message = "could not be downloaded"
    if name.startswith("hf:"):
        message = "no such folder, and no model of that name could be downloaded"
    if kind == "gated":
        message = "accept its licence at https://huggingface.co/"
    refused(name, message, "pretrained" if name.startswith("timm") else None)
    if kind == "gated":
        refused(name, "set HF_TOKEN", "pretrained" if name.startswith("timm") else None)


def test_a_network_that_a_package_registers_with_timm_needs_no_description(monkeypatch):
    import sys

    from timm.models import _registry, register_model

    class Means(torch.nn.Module):
        """The mean of each band."""

        head_hidden_size = 3

        def forward(self, x):
            return x.mean(dim=(2, 3))

    def orbithash_test_means(pretrained=False, **kwargs):
        return Means()

    monkeypatch.setattr(sys.modules[__name__], "__all__", [], raising=False)
    for name in ("_model_entrypoints", "_model_to_module"):
        monkeypatch.setattr(_registry, name, dict(getattr(_registry, name)))
    register_model(orbithash_test_means)
    defaults = default_preprocessing("timm:orbithash_test_means")
    assert (defaults.size, defaults.bands) == (224, None)
    backbone = build_backbone("timm:orbithash_test_means")
    assert torch.equal(features(backbone, images()), images().mean(dim=(2, 3)))
    assert rebuild_backbone(through_json(backbone.spec)).num_features == 3
    _registry._model_entrypoints.pop("orbithash_test_means")
    with pytest.raises(InputError, match=r"timm has no network 'orbithash_test_means'; .* import that package first"):
        rebuild_backbone(through_json(backbone.spec))
