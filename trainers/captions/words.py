"""Parts of speech of words, and words of similar meaning."""

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
    """Return the words and punctuation marks of a sentence in lower case."""
    return re.findall(r"\w+(?:[-']\w+)*|[^\w\s]", sentence.lower())


def part_of_speech(words: Sequence[str]) -> list[str]:
    """Return the Penn Treebank tag of each word of a sentence, by TextBlob's tagger."""
    # TextBlob imports NLTK, which takes seconds.
    from textblob.en import parser

    return [tag for _, tag in parser.find_tags(list(words))]


@functools.cache
def english_words() -> frozenset[str]:
    """Return the common words of the tagger's lexicon, about 40,000, in lower case."""
    from textblob.en import lexicon

    return frozenset(word for word in lexicon if re.fullmatch("[a-z]{2,}", word))


class WordTable:
    """Words and their vectors, to find words of similar meaning.

    `words` are V distinct words, `vectors` float32 [V, D] without zero rows.
    """

    def __init__(self, words: Sequence[str], vectors: npt.NDArray[np.float32]) -> None:
        assert len(words) == len(vectors), "one vector per word"
        self.words = list(words)
        self._rows = {word: row for row, word in enumerate(words)}
        self._vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def neighbours(self, word: str, similarity: float, max_words: int) -> list[str]:
        """Return at most `max_words` other words with a cosine of at least `similarity` to `word`, nearest first.

        The list is empty for a word that is not in the table.
        """
        row = self._rows.get(word)
        if row is None:
            return []
        cosines = self._vectors @ self._vectors[row]
        cosines[row] = -np.inf
        near = np.flatnonzero(cosines >= similarity)
        return [self.words[i] for i in near[np.argsort(-cosines[near], kind="stable")][:max_words]]

    @classmethod
    def from_encoder(cls, encoder: TextEncoder, words: Sequence[str]) -> "WordTable":
        """Embed English words with a text encoder: those that are one token of it, and `words`."""
        common = sorted(english_words())
        whole = [word for word, is_one in zip(common, encoder.is_one_token(common), strict=True) if is_one]
        chosen = sorted({*whole, *(word for word in words if word in english_words())})
        return cls(chosen, encoder.encode(chosen))

    @classmethod
    def from_glove(cls, path: Path) -> "WordTable":
        """Read the English words of a GloVe text file; a line is a word and its numbers, separated by spaces."""
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
            raise InputError(f"{path}: the word vectors cannot be read ({err.strerror}); give a GloVe file") from err
        except InputError:
            raise
        except ValueError as err:
            raise InputError(f"{path}: not word vectors in GloVe's text format ({err}); give such a file") from err
        if not words:
            raise InputError(f"{path}: contains no English word; give word vectors in GloVe's text format")
        return cls(words, np.stack(vectors))


def _check(vector: npt.NDArray[np.float32], first: npt.NDArray[np.float32], where: str) -> None:
    if vector.shape != first.shape:
        raise InputError(f"{where} has another number of values than the first line; give a whole GloVe file")
    if not np.isfinite(vector).all() or not vector.any():
        raise InputError(f"{where} contains values that are not finite, or only zeros; remove the line")
