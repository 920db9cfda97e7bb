"""Text towers of dual encoders: sentences in the space of images, saved and read without the source."""

import json
import shutil

import numpy as np
import pytest
import torch
from backbone_models import write_hf_dual, write_open_clip

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.text_towers import load_text_encoder, text_tower

SENTENCES = ["a river and some trees", "the runway", "a red plane and the road", "the beach"]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    root = tmp_path_factory.mktemp("towers")
    return {
        "clip": f"hf:{write_hf_dual(root / 'clip')}",
        "siglip": f"hf:{write_hf_dual(root / 'siglip', 'Siglip')}",
        "open_clip": f"open_clip:{write_open_clip(root / 'open_clip')}",
    }


@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
def test_features_are_those_of_the_library(names, kind):
    folder = names[kind].partition(":")[2]
    encoder = text_tower(names[kind])
    if kind == "open_clip":
        import open_clip

        model = open_clip.create_model(f"local-dir:{folder}").eval()
        with torch.no_grad():
            expected = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(SENTENCES))
    else:
        from transformers import AutoModel, AutoTokenizer

        padding = "max_length" if kind == "siglip" else True
        tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=padding, max_length=16, return_tensors="pt")
        mask = {} if kind == "siglip" else {"attention_mask": tokens["attention_mask"]}
        with torch.no_grad():
            model = AutoModel.from_pretrained(folder).eval()
            expected = model.get_text_features(input_ids=tokens["input_ids"], **mask).pooler_output
    found = encoder.encode(SENTENCES)
    assert found.dtype == np.float32
    assert found.shape == (4, encoder.num_features)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert len(np.unique(found.round(4), axis=0)) == 4


@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
def test_a_sentence_does_not_depend_on_the_others(names, kind):
    encoder = text_tower(names[kind])
    alone = np.concatenate([encoder.encode([sentence]) for sentence in SENTENCES])
    np.testing.assert_allclose(encoder.encode(SENTENCES * 20), np.tile(alone, (20, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
def test_a_saved_tower_is_read_without_its_source(names, kind, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(names[kind].partition(":")[2], source)
    encoder = text_tower(f"{names[kind].partition(':')[0]}:{source}")
    assert encoder.sha256 == text_tower(names[kind]).sha256
    encoder.save(tmp_path / "saved")
    shutil.rmtree(source)
    loaded = load_text_encoder(tmp_path / "saved")
    assert loaded.sha256 == encoder.sha256
    # Rounding depends on the address of the weights.
    np.testing.assert_allclose(loaded.encode(SENTENCES), encoder.encode(SENTENCES), rtol=1e-4, atol=1e-4)
    # The image tower is not saved.
    assert "vision" not in " ".join(loaded._network.state_dict())
    loaded.save(tmp_path / "again")
    assert load_text_encoder(tmp_path / "again").sha256 == encoder.sha256

    card = json.loads((tmp_path / "saved" / "encoder.json").read_text())
    weights = tmp_path / "saved" / "model.safetensors"
    content = weights.read_bytes()
    for damage in (content[:-4], content[:-4] + b"abcd"):
        weights.write_bytes(damage)
        with pytest.raises(InputError, match="a damaged text encoder"):
            load_text_encoder(tmp_path / "saved")
    weights.unlink()
    with pytest.raises(InputError, match="a damaged text encoder"):
        load_text_encoder(tmp_path / "saved")
    (tmp_path / "saved" / "encoder.json").write_text(json.dumps({**card, "source": "timm"}))
    with pytest.raises(InputError, match="'timm' has no text towers"):
        load_text_encoder(tmp_path / "saved")


def test_words_of_one_token(names):
    for kind in ("clip", "open_clip"):
        assert text_tower(names[kind]).is_one_token(["river", "river road"]) == [True, False]


def test_bad_sentences_are_named(names):
    with pytest.raises(InputError, match="sentence 1 contains no word"):
        text_tower(names["clip"]).encode(["a river", " "])


@pytest.mark.parametrize("backbone", ["resnet18", "timm:test_vit", "torchgeo:ResNet18_Weights.SENTINEL2_RGB_MOCO"])
def test_a_tower_without_text_is_refused_in_one_line(backbone):
    with pytest.raises(InputError, match="has no text tower, so it cannot encode sentences; give a dual") as caught:
        text_tower(backbone)
    assert "\n" not in str(caught.value)


def test_a_vision_model_of_transformers_is_no_dual_encoder(tiny_backbones):
    with pytest.raises(InputError, match="not a dual encoder, so it has no text tower"):
        text_tower(tiny_backbones["hf"]["backbone"])


def test_a_text_tower_of_another_model_of_the_hub_is_refused():
    with pytest.raises(InputError, match="its text tower is the model roberta-base of the hub"):
        text_tower("open_clip:roberta-ViT-B-32")
