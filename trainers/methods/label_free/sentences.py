"""Sentences about overhead images of any place, whose mean stands for that of all sentences.

The features of sentences of a dual encoder lie around a mean of their own, far from that of images. It is removed
before bits are taken from signs; where no captions are given, it is the mean of these sentences.
"""

__all__ = ["neutral_sentences"]

_TEMPLATES = (
    "a satellite image of {}",
    "an aerial photograph of {}",
    "an overhead view of {}",
    "{} seen from above",
)

_THINGS = (
    *("farmland", "a forest", "a river", "a lake", "the sea and a beach", "a desert", "mountains", "snow and ice"),
    *("a meadow", "a wetland", "a village", "a residential area", "a city centre", "an industrial area", "a harbor"),
    *("an airport", "a railway station", "a road", "a bridge", "a parking lot", "a stadium", "a school", "a park"),
    *("a golf course", "storage tanks", "a quarry", "a solar power plant", "greenhouses", "boats", "bare land"),
)


def neutral_sentences() -> list[str]:
    """Return one sentence for each pair of a template and a kind of land cover or object."""
    return [template.format(thing) for template in _TEMPLATES for thing in _THINGS]
