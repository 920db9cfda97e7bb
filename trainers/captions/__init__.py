"""Augmented captions, DUCH's second view of a text, made once before training; and the choice of a caption."""

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
from orbithash.encoders.networks.hub import model_folder
from orbithash.encoders.networks.text import TextEncoder, file_hashes
from orbithash.trainers.captions.rules import reworded
from orbithash.trainers.captions.translation import CHAIN, WEIGHTS, back_translated, chain_translated, translate
from orbithash.trainers.captions.words import WordTable, words_of
from orbithash.trainers.distributed import from_first_rank, on_every_rank

__all__ = ["KINDS", "TRANSLATORS", "augment_captions"]

# "rule": replace one noun or verb. "translate": into Spanish or German and back. "translate-chain": through both.
KINDS = ("rule", "translate", "translate-chain")

# Organisation or folder of the translation models, and their names by languages.
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
    """Return one augmented sentence in lower case per caption, in the order of `captions`.

    All ranks of a distributed training must call it together: the first one augments the captions, and each rank adds
    them to its cache.

    Args:
        captions: the captions of each image.
        how: one of `KINDS`.
        seed: draws the languages of "translate"; nothing else is random.
        encoder: of "rule"; it judges which sentence is nearest to the original.
        glove: of "rule"; word vectors in GloVe's text format. None: the encoder's.
        translators: of the translations; a folder of Hugging Face models such as `opus-mt-en-es`, or an organisation on
            the hub.
        device: `cpu`, `cuda` or `cuda:N`, for translations.
        cache: folder that keeps the sentences; the same captions and models are augmented once.

    Raises:
        InputError: a model or file cannot be read, or the cache cannot be written.
    """
    sentences = [sentence for group in captions for sentence in group]
    if how not in KINDS:
        raise InputError(f"caption augmentation is {how!r}; allowed are {', '.join(KINDS)}")
    if how == "rule" and encoder is None:
        raise InputError('captions of kind "rule" need a text encoder to judge them; give one')

    def make() -> tuple[str, list[str]]:
        """Return the name of the cache file and the augmented sentences."""
        if how == "rule":
            assert encoder is not None, "checked above"
            models: dict[str, Any] = {
                "encoder": encoder.sha256,
                "textblob": version("textblob"),
                "glove": _hash_of(glove),
            }
            augment: Callable[[], list[str]] = functools.partial(_by_rule, sentences, encoder, glove)
        else:
            ways = [CHAIN] if how == "translate-chain" else [("en", via, "en") for via in WEIGHTS]
            names = _names(translators, ways)
            models = {"-".join(pair): file_hashes(model_folder(name)) for pair, name in names.items()}
            augment = functools.partial(_by_translation, sentences, how, seed, names, device)
        content = json.dumps([version("orbithash"), how, seed, models, sentences], sort_keys=True)
        name = f"{hashlib.sha256(content.encode()).hexdigest()}.json"
        cached = None if cache is None else _read(cache / name, len(sentences))
        return name, augment() if cached is None else cached

    # On one rank: two machines may augment differently, and each rank needs the features of all captions.
    name, augmented = from_first_rank(make)
    if cache is not None:
        file = cache / name
        on_every_rank(lambda: _write(file, augmented))
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
    """Return the model name of each pair of languages on these ways of translation."""
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
        raise InputError(f"{glove}: the word vectors cannot be read ({err.strerror}); give a GloVe file") from err


def _read(path: Path, num: int) -> list[str] | None:
    """Return the `num` sentences of a cache file, None if it is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) and len(found) == num and all(isinstance(t, str) for t in found) else None


def _write(path: Path, sentences: list[str]) -> None:
    """Write a cache file unless it is there."""
    if _read(path, len(sentences)) == sentences:
        return
    try:
        write_file(path, json.dumps(sentences))
    except OSError as err:
        raise InputError(
            f"{path.parent}: captions cannot be written there ({err.strerror}); set ORBITHASH_CACHE to a folder on a "
            "disk with free space"
        ) from err
