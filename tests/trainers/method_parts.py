"""Shared by the tests of all methods: a small data set with everything that a method needs, and runs on it."""

import dataclasses
import json

import numpy as np
import torch
from PIL import Image

from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import make_manifest
from orbithash.trainers.datasets.hashes import hash_files
from orbithash.trainers.loop.loop import train
from orbithash.trainers.loop.run import Run
from orbithash.trainers.methods import get_method

CLASSES = (("beach", 11, (200, 180, 90)), ("forest", 9, (30, 90, 40)), ("river", 8, (40, 60, 160)))


def write_data(root):
    """Write images of three classes with distinct colours, each with a grey second source.

    And, beside the folder, a text model.
    """
    rng = np.random.default_rng(0)
    for name, count, colour in CLASSES:
        (root / name).mkdir(parents=True)
        (root.with_name("second") / name).mkdir(parents=True)
        for i in range(count):
            noise = rng.integers(-30, 30, (44, 40, 3)) + colour
            image = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
            image.save(root / name / f"{name}{i}.png")
            image.convert("L").save(root.with_name("second") / name / f"{name}{i}.png")
    write_text_model(root.with_name("text"))
    return root


def write_text_model(folder):
    """A small BERT of random weights, with a tokenizer of the words in these captions and of letters."""
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = [f"{mark}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "one", "some", "this", "beach", "forest", "river"]
    folder.mkdir(parents=True, exist_ok=True)
    BertTokenizer(vocab={word: i for i, word in enumerate([*words, *letters])}).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    # Weights large enough for sentences to differ.
    config = BertConfig(
        vocab_size=len(words) + len(letters), max_position_embeddings=80, initializer_range=0.3, **sizes
    )
    BertModel(config).save_pretrained(folder)
    return folder


def write_transformers_clip(folder):
    """A small CLIP of transformers with random weights, and a tokenizer of letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    start, end = len(tokens) - 2, len(tokens) - 1
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        text_config={**sizes, **text, "max_position_embeddings": 32},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=12,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return folder


def write_translators(folder):
    """Small Marian models of random weights, one per pair of languages."""
    import sentencepiece
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text(
        "\n".join(["a river and some trees", "many houses near the road", "two grey boats on the sea"] * 40)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spm"), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    vocabulary = ["</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, len(pieces))), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    for number, (source, target) in enumerate([("en", "es"), ("en", "de"), ("es", "en"), ("de", "en"), ("es", "de")]):
        path = folder / f"opus-mt-{source}-{target}"
        MarianTokenizer(
            source_spm=str(folder / "spm.model"),
            target_spm=str(folder / "spm.model"),
            vocab=str(folder / "vocab.json"),
            source_lang=source,
            target_lang=target,
        ).save_pretrained(path)
        torch.manual_seed(number)
        config = MarianConfig(
            vocab_size=len(vocabulary),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=128,
            pad_token_id=len(vocabulary) - 1,
            decoder_start_token_id=len(vocabulary) - 1,
            eos_token_id=0,
            forced_eos_token_id=0,
            init_std=1.0,
            tie_word_embeddings=False,
            num_beams=2,
        )
        model = MarianMTModel(config)
        # The input sentence must matter far more than the words generated so far.
        model.model.decoder.layers[0].encoder_attn.out_proj.weight.data *= 30
        model.save_pretrained(path)
    return folder


def make_run(root, method, protocol="random", several_classes=False, **settings):
    """A run on `write_data`'s folder, with captions and second sources in its manifest.

    With `several_classes`, two of three images have one or two classes more.
    """
    given = {"backbone": "mobilenet_v3_small", "image_size": 32, "bits": 16, "batch_size": 4, "epochs": 2}
    given = {key: given[key] for key in given if key not in get_method(method).Config.unused} | settings
    if "text_encoder" in get_method(method).Config.model_fields:
        given = {"text_encoder": str(root.with_name("text")), **given}
    manifest = make_manifest(root, protocol=protocol)
    images = tuple(
        dataclasses.replace(
            image,
            labels=tuple(range(image.label, min(3, image.label + 1 + number % 3))) if several_classes else image.labels,
            captions=tuple(f"{word} {manifest.classes[image.label]}" for word in ("a", "the", "one", "some", "this")),
            second=f"../second/{image.path}",
            second_sha256=hash_files(root, [f"../second/{image.path}"])[0].hex(),
        )
        for number, image in enumerate(manifest.images)
    )
    config = load_config(get_method(method).Config, **given)
    return Run(method, config, dataclasses.replace(manifest, images=images), root)


def with_draws(method, batch):
    """A batch of one rank with what the method draws for it, as in the loop."""
    return batch._replace(draws=method.draw(batch, batch.rows, batch.labels))


class Recorder:
    """An observer that records progress and writes the checkpoint of each epoch."""

    def __init__(self, folder=None):
        self.folder = folder
        self.steps, self.history = [], []

    def on_step(self, epoch, step, num_steps, images_per_s):
        assert images_per_s > 0
        self.steps.append((epoch, step, num_steps))

    def on_epoch(self, history, write_checkpoint):
        self.history = json.loads(json.dumps(history))
        if self.folder is not None:
            part = self.folder / "part"
            write_checkpoint(part)
            part.rename(self.folder / f"epoch{len(history)}")


def trained(run, folder=None, **options):
    recorder = Recorder(folder)
    train(run, recorder, **options)
    return recorder


def timeless(history):
    """The history without times and memory."""

    def depends_on_the_run(key):
        return key in ("epoch", "lr", "score") or key.startswith(("train/", "validation/"))

    return [{key: value for key, value in record.items() if depends_on_the_run(key)} for record in history]


def flat(value, name=""):
    """The leaves of a checkpoint by path; tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return {name: (str(value.dtype), tuple(value.shape), value.numpy().tobytes())}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {name: value}
    return {path: leaf for key, item in items for path, leaf in flat(item, f"{name}/{key}").items()}
