"""Captions in other words, made once before a training: DUCH's second view of a text."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import write_file
from orbithash.encoders.networks.text import TextEncoder, file_hashes, model_folder
from orbithash.trainers.captions.rules import reworded
from orbithash.trainers.captions.translation import CHAIN, WEIGHTS, back_translated, chain_translated, translate
from orbithash.trainers.captions.words import WordTable, words_of

__all__ = ["KINDS", "TRANSLATORS", "augment_captions"]

# "rule": one noun or verb replaced. "translate": into Spanish or German and back. "translate-chain": through both.
KINDS = ("rule", "translate", "translate-chain")

# Where the models are that translate, each named by its two languages.
TRANSLATORS = "Helsinki-NLP"
TRANSLATOR = "{translators}/opus-mt-{source}-{target}"


def augment_captions(
    captions: Sequence[Sequence[str]],
    how: str,
    *,
    seed: int = 0,
    encoder: TextEncoder | None = None,
    glove: Path | None = None,
    translators: str = TRANSLATORS,
    device: str = "cpu",
    cache: Path | None = None,
) -> list[list[str]]:
    """One sentence in other words, in lower case, for each caption and in the same order; `how` is one of `KINDS`.

    "rule" needs the `encoder` that judges which sentence is nearest, and takes word vectors from `glove`, a text file,
    or, without one, from the encoder. The translations need a Hugging Face model for each pair of languages, such as
    `opus-mt-en-es`: in the folder `translators`, or of the organisation of that name on the hub. They run on `device`.
    `seed` draws the languages of "translate"; nothing else is random. With `cache`, a folder, what an earlier call made
    of the same captions with the same models is read from there.
    """
    sentences = [sentence for group in captions for sentence in group]
    if how == "rule":
        if encoder is None:
            raise InputError('captions of kind "rule" need a text encoder to judge them; give one')
        models: dict[str, Any] = {"encoder": encoder.sha256, "textblob": version("textblob"), "glove": _hash_of(glove)}
        make: Callable[[], list[str]] = functools.partial(_by_rule, sentences, encoder, glove)
    elif how in KINDS:
        names = _names(translators, [CHAIN] if how == "translate-chain" else [("en", via, "en") for via in WEIGHTS])
        models = {"-".join(pair): file_hashes(model_folder(name)) for pair, name in names.items()}
        make = functools.partial(_by_translation, sentences, how, seed, names, device)
    else:
        raise InputError(f"unknown kind of caption augmentation {how!r}; there are {', '.join(KINDS)}")
    if cache is None:
        augmented = make()
    else:
        content = json.dumps([version("orbithash"), how, seed, models, sentences], sort_keys=True)
        augmented = _cached(cache / f"{hashlib.sha256(content.encode()).hexdigest()}.json", len(sentences), make)
    in_order = iter(augmented)
    return [[next(in_order) for _ in group] for group in captions]


def _by_rule(sentences: list[str], encoder: TextEncoder, glove: Path | None) -> list[str]:
    distinct = list(dict.fromkeys(sentences))
    if glove is None:
        table = WordTable.from_encoder(encoder, [word for sentence in distinct for word in words_of(sentence)])
    else:
        table = WordTable.from_glove(glove)
    new = dict(zip(distinct, reworded(distinct, table, encoder), strict=True))
    return [new[sentence] for sentence in sentences]


def _by_translation(
    sentences: list[str], how: str, seed: int, names: dict[tuple[str, str], str], device: str
) -> list[str]:
    def through(source: str, target: str, texts: list[str]) -> list[str]:
        return translate(names[source, target], texts, device)

    if how == "translate-chain":
        return chain_translated(sentences, through)
    return back_translated(sentences, through, np.random.default_rng(seed))


def _names(translators: str, ways: Iterable[Sequence[str]]) -> dict[tuple[str, str], str]:
    """The name of the model for each pair of languages on these ways."""
    return {
        (source, target): TRANSLATOR.format(translators=translators, source=source, target=target)
        for way in ways
        for source, target in pairwise(way)
    }


def _hash_of(glove: Path | None) -> str | None:
    if glove is None:
        return None
    try:
        with glove.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise InputError(f"{glove}: word vectors that cannot be read ({err.strerror}); give a GloVe file") from err


def _cached(path: Path, num: int, make: Callable[[], list[str]]) -> list[str]:
    """The `num` sentences of the file at `path`, which is made where it is absent or not whole."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        found = None
    if isinstance(found, list) and len(found) == num and all(isinstance(text, str) for text in found):
        return found
    made = make()
    try:
        write_file(path, json.dumps(made))
    except OSError as err:
        raise InputError(
            f"{path.parent}: captions cannot be kept there ({err.strerror}); set ORBITHASH_CACHE to a folder with room"
        ) from err
    return made
