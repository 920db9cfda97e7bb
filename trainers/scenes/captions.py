"""Captions: five sentences about each scene, generated only from its facts, season and light."""

import re

import numpy as np

from orbithash.trainers.scenes.facts import compass
from orbithash.trainers.scenes.scene import Scene
from orbithash.trainers.scenes.sentences import ANY_SCENE, SENTENCES

__all__ = ["NUM_SENTENCES", "counted", "sentences", "tokens"]

NUM_SENTENCES = 5

_NUMBERS = (
    *("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)

# Month names of the standard library depend on the locale.
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def counted(count: int, noun: str) -> str:
    """Return a number and its noun in words: "no boats", "one boat", "twelve boats", "34 boats"."""
    number = _NUMBERS[count] if count < len(_NUMBERS) else str(count)
    return f"{number} {noun}" if count == 1 or noun == "aircraft" else f"{number} {noun}s"


def sentences(scene: Scene, seed: int) -> list[str]:
    """Return five different sentences in random order: four about the class, one about the light or the date."""
    rng = np.random.default_rng([seed, scene.index, 1])
    words = _words(scene)
    own = SENTENCES[scene.label]
    chosen = [own[i] for i in rng.permutation(len(own))[: NUM_SENTENCES - 1]]
    chosen.append(ANY_SCENE[rng.integers(len(ANY_SCENE))])
    return [_finished(chosen[i].format_map(words)) for i in rng.permutation(NUM_SENTENCES)]


def tokens(sentence: str) -> list[str]:
    """Return the words of a sentence in lower case, without punctuation."""
    return re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", sentence.lower())


def _words(scene: Scene) -> dict[str, str]:
    """Return the value of each placeholder: facts, counts such as "three boats", season and light."""
    toward_x, toward_y = scene.light.shadow
    return {
        **scene.facts.words,
        **{noun: counted(count, noun) for noun, count in scene.facts.counts.items()},
        "season": scene.season.phrase,
        "month": _MONTHS[scene.taken.month - 1],
        "subject": scene.label.replace("_", " ").replace("harbor", "harbour"),
        "shadow": compass(float(np.arctan2(toward_y, toward_x))),
        "length": "long" if scene.light.elevation < 40 else "short",
    }


def _finished(text: str) -> str:
    """Add the capital letter and the full stop to a sentence, and write "an" before vowels."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:] + "."
