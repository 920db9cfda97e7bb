"""Captions reworded by translation into another language and back."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

from orbithash.encoders.networks.hub import complete_model, model_folder, pretrained_tokenizer

__all__ = ["CHAIN", "WEIGHTS", "back_translated", "chain_translated", "translate"]

# As in DUCH: through Spanish or German, drawn with these weights, or through both.
WEIGHTS = {"es": 1.0, "de": 1.0}
CHAIN = ("en", "es", "de", "en")

MAX_TOKENS = 128
BATCH_SIZE = 8

# Translates sentences: (source language, target language, sentences).
Translate = Callable[[str, str, list[str]], list[str]]


def back_translated(sentences: Sequence[str], translate: Translate, rng: np.random.Generator) -> list[str]:
    """Return each sentence, in lower case, translated from English into a language drawn by `WEIGHTS` and back."""
    languages, weights = list(WEIGHTS), np.array(list(WEIGHTS.values()))
    drawn = rng.choice(len(languages), size=len(sentences), p=weights / weights.sum())
    result = list(sentences)
    for number, language in enumerate(languages):
        rows = np.flatnonzero(drawn == number).tolist()
        texts = _through(("en", language, "en"), [sentences[row] for row in rows], translate)
        for row, text in zip(rows, texts, strict=True):
            result[row] = text
    return result


def chain_translated(sentences: Sequence[str], translate: Translate) -> list[str]:
    """Return each sentence, in lower case, translated from English into Spanish, into German, and back."""
    return _through(CHAIN, sentences, translate)


def _through(languages: Sequence[str], sentences: Sequence[str], translate: Translate) -> list[str]:
    # Captions repeat often; each distinct one is translated once.
    distinct = list(dict.fromkeys(sentences))
    if not distinct:
        return []
    texts = distinct
    for source, target in pairwise(languages):
        # A model may return an empty sentence; then its input is kept.
        texts = [new.strip() or old for old, new in zip(texts, translate(source, target, texts), strict=True)]
    final = {sentence: text.lower() for sentence, text in zip(distinct, texts, strict=True)}
    return [final[sentence] for sentence in sentences]


def translate(model: str, sentences: Sequence[str], device: str = "cpu") -> list[str]:
    """Translate sentences by a Hugging Face model, a folder or a name as for `TextEncoder`.

    The result is the most probable translation of the model's beam search, at most `MAX_TOKENS` tokens long, and the
    same at every call with the same sentences. `InputError` if the model cannot be read or does not translate.
    """
    from transformers import AutoModelForSeq2SeqLM

    folder = model_folder(model)
    tokenizer = pretrained_tokenizer(folder)
    network = complete_model(AutoModelForSeq2SeqLM, folder).to(device).eval()
    # Sentences of similar length share a batch, which keeps padding short.
    order = sorted(range(len(sentences)), key=lambda row: len(sentences[row]))
    result = [""] * len(sentences)
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        inputs = tokenizer(
            [sentences[row] for row in rows],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(device)
        with torch.inference_mode():
            outputs = network.generate(**inputs, do_sample=False, max_length=MAX_TOKENS)
        for row, text in zip(rows, tokenizer.batch_decode(outputs, skip_special_tokens=True), strict=True):
            result[row] = text
    return result
