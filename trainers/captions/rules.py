"""DUCH's rule-based captions: one noun or verb is replaced by a word of similar meaning.

Candidates replace one noun or verb by a near neighbour; the candidate most similar to the original is used. The
authors' code downloads data for NLTK, GloVe and BERTScore. Here, TextBlob tags the words; words are compared by their
embeddings from the text encoder, or from a GloVe file; sentences are compared by the cosine of the encoder's features.
Two rules are additions: a word of the sentence never replaces another one (no "beach beach"), and "a" or "an" is
adapted to the next word.

With MiniLM, 95 % of UC Merced's captions change, with a median cosine of 0.97 to the original: "lots of automobiles
parked neatly in the parking lot", "some houses are enclosed by lawn". Words without a close neighbour give odd
sentences, because similarity has no lower limit: "some different memory tanks", "an old baseman diamond".
"""

from collections.abc import Sequence

import numpy as np

from orbithash.encoders.networks.text import TextEncoder
from orbithash.trainers.captions.words import WordTable, part_of_speech, words_of

__all__ = ["candidates", "reworded"]

REPLACED = ("NN", "NNS", "NNP", "NNPS", "VB", "VBD", "VBG", "VBN")

# Smallest cosine of near neighbours, and the maximum number of them that are tried.
MIN_SIMILARITY = 0.65
MAX_NEIGHBOURS = 10

# Sentences whose candidates, about ten each, are encoded together; bounds the memory of their features.
CHUNK = 512


def reworded(sentences: Sequence[str], table: WordTable, encoder: TextEncoder) -> list[str]:
    """Return one reworded sentence per sentence, in lower case, with spaces between words and punctuation.

    A sentence without near neighbours keeps its words.
    """
    result = []
    for start in range(0, len(sentences), CHUNK):
        chunk = sentences[start : start + CHUNK]
        choices = [candidates(sentence, table) for sentence in chunk]
        features = encoder.encode([*chunk, *(choice for some in choices for choice in some)])
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        row = len(chunk)
        for original, some in zip(features, choices, strict=False):
            cosines = features[row : row + len(some)] @ original
            result.append(some[int(cosines.argmax())])
            row += len(some)
    return result


def candidates(sentence: str, table: WordTable) -> list[str]:
    """Return the sentences with a near neighbour in place of one noun or verb, or the sentence itself without any."""
    words = _it_is(words_of(sentence))
    tags = part_of_speech(words)
    found = []
    for place, (word, tag) in enumerate(zip(words, tags, strict=True)):
        if tag not in REPLACED:
            continue
        for other in table.neighbours(word, MIN_SIMILARITY, MAX_NEIGHBOURS):
            changed = [*words[:place], other, *words[place + 1 :]]
            if other not in words and part_of_speech(changed)[place] == tag:
                found.append(" ".join(_with_article(changed, place)))
    return found or [" ".join(words)]


def _it_is(words: list[str]) -> list[str]:
    """Return the words with "it is" in place of "there is"."""
    tags = [*part_of_speech(words), ""]
    return ["it" if tags[i] == "EX" and tags[i + 1] == "VBZ" else word for i, word in enumerate(words)]


def _with_article(words: list[str], place: int) -> list[str]:
    """Return the words with the right article, "a" or "an", before the word at `place`."""
    if place == 0 or words[place - 1] not in ("a", "an"):
        return words
    return [*words[: place - 1], "an" if words[place][0] in "aeiou" else "a", *words[place:]]
