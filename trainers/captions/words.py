"""Parts of speech of a sentence's words, and the words of nearly the same meaning."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.text import TextEncoder

__all__ = ["WordTable", "english_words", "part_of_speech", "words_of"]


def words_of(sentence: str) -> list[str]:
    """The words and punctuation marks of a sentence, in lower case."""
    return re.findall(r"\w+(?:[-']\w+)*|[^\w\s]", sentence.lower())


def part_of_speech(words: Sequence[str]) -> list[str]:
    """The Penn Treebank tag of each of a sentence's words, by TextBlob's tagger, whose lexicon is in its wheel."""
    # TextBlob brings NLTK along, which takes seconds to import.
    from textblob.en import parser

    return [tag for _, tag in parser.find_tags(list(words))]


@functools.cache
def english_words() -> frozenset[str]:
    """The common words that the tagger's lexicon lists, some 40,000 in lower case."""
    from textblob.en import lexicon

    return frozenset(word for word in lexicon if re.fullmatch("[a-z]{2,}", word))


class WordTable:
    """Words and their vectors; `neighbours` finds the nearest ones.

    `words` are V distinct words and `vectors` float32 [V, D], none of them zero.
    """

    def __init__(self, words: Sequence[str], vectors: npt.NDArray[np.float32]) -> None:
        assert len(words) == len(vectors), "one vector for each word"
        self.words = list(words)
        self._rows = {word: row for row, word in enumerate(words)}
        self._vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def neighbours(self, word: str, similarity: float, most: int) -> list[str]:
        """At most `most` other words with a cosine of at least `similarity` to `word`, nearest first.

        None of a word that the table does not have.
        """
        row = self._rows.get(word)
        if row is None:
            return []
        cosines = self._vectors @ self._vectors[row]
        cosines[row] = -np.inf
        near = np.flatnonzero(cosines >= similarity)
        return [self.words[i] for i in near[np.argsort(-cosines[near], kind="stable")][:most]]

    @classmethod
    def from_encoder(cls, encoder: TextEncoder, words: Sequence[str]) -> "WordTable":
        """English words as the encoder embeds each of them alone: those that are one token to it, and `words`."""
        common = sorted(english_words())
        ids = encoder.tokenizer(common, add_special_tokens=False)["input_ids"]
        whole = [word for word, tokens in zip(common, ids, strict=True) if len(tokens) == 1]
        chosen = sorted({*whole, *(word for word in words if word in english_words())})
        return cls(chosen, encoder.encode(chosen))

    @classmethod
    def from_glove(cls, path: Path) -> "WordTable":
        """English words of a GloVe text file, whose lines are a word and its numbers, separated by blanks."""
        words, vectors = [], []
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    word, *numbers = line.split(" ")
                    if word in english_words():
                        words.append(word)
                        vectors.append(np.array(numbers, np.float32))
                        _check(vectors[-1], vectors[0], f"{path}: line {number}")
        except OSError as err:
            raise InputError(f"{path}: word vectors that cannot be read ({err.strerror}); give a GloVe file") from err
        except InputError:
            raise
        except ValueError as err:
            raise InputError(f"{path}: not word vectors in GloVe's text format ({err}); give such a file") from err
        if not words:
            raise InputError(f"{path}: no English word in it; give word vectors in GloVe's text format")
        return cls(words, np.stack(vectors))


def _check(vector: npt.NDArray[np.float32], first: npt.NDArray[np.float32], where: str) -> None:
    if vector.shape != first.shape:
        raise InputError(f"{where} has not as many numbers as the lines before it")
    if not np.isfinite(vector).all() or not vector.any():
        raise InputError(f"{where} has numbers that are not finite, or only zeros; it cannot be compared to others")
