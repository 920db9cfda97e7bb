"""How each paper measured itself, and what it published: the other side of every table of `orbithash reproduce`.

A figure carries a tag that says how it is known. "paper": read in the paper itself; "issue": the authors in an issue of
their repository; "readme": the authors' README; "secondary": a third party's table. What is only remembered or inferred
is not here.
"""

import dataclasses

__all__ = ["LEARNED_BASELINES", "PUBLISHED", "REPRODUCTIONS", "Figure", "Reproduction"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One published figure. `direction` is that of a cross-modal search, `variant` of the method; "" otherwise."""

    method: str
    dataset: str
    bits: int
    value: float
    tag: str
    direction: str = ""
    variant: str = ""


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """The paper's own protocol and definition.

    Attributes:
        protocol: how training and test images are split.
        metric: the paper's metric by our name; "ap_hits@smallest" stands for k = the smallest class in the database.
        policy: how its code orders ties; "expected" where the code does not say.
        searched_by: the protocol of the paper's search, where it is another than that of the split.
        validation: share of the training images held back; the papers hold back none.
        directions: of a cross-modal method.
        note: what else to know of the comparison.
    """

    protocol: str
    metric: str
    policy: str = "index"
    searched_by: str = ""
    validation: float = 0.0
    directions: tuple[str, ...] = ("",)
    note: str = ""


REPRODUCTIONS = {
    "mhcln": Reproduction("mhcln", "ap_hits@20"),
    "dhcl": Reproduction(
        "dhcl",
        "success@20",
        searched_by="dhcl-released",
        note="The released code counts a query as success when any of its 20 neighbours is right, calls that map@20, "
        "and chose the epoch on the test part; the published figures are the README's.",
    ),
    "cdne": Reproduction(
        "cdne",
        "ap_min@100",
        policy="expected",
        validation=0.1,
        note="The paper's own split of queries and database is not known, and its figures are above what a classifier "
        "of its backbone reaches.",
    ),
    "duch": Reproduction(
        "duch",
        "ap_first_k@20",
        directions=("image->text", "text->image"),
        note="It trains without labels, but its default temperature was chosen by validation figures, which need them.",
    ),
    "mrhash": Reproduction("mrhash", "ap_hits@smallest", note="No published figure is known here."),
    "classifier": Reproduction("cdne", "ap_min@100", policy="expected", validation=0.1, note="Our baseline."),
    "triplet": Reproduction("cdne", "ap_min@100", policy="expected", validation=0.1, note="Our baseline."),
}


# What a supervised method has to beat: trained by its protocol beside it.
LEARNED_BASELINES = ("classifier", "triplet")


def _row(
    method: str, dataset: str, tag: str, values: dict[int, float], direction: str = "", variant: str = ""
) -> list[Figure]:
    return [Figure(method, dataset, bits, value, tag, direction, variant) for bits, value in values.items()]


PUBLISHED = [
    *_row("mhcln", "ucmd", "issue", {32: 0.904}),
    *_row("dhcl", "ucmd", "readme", {16: 0.9897, 32: 0.9934, 48: 0.9954, 64: 0.9960}),
    *_row("dhcl", "aid", "readme", {16: 0.9475, 32: 0.9808, 48: 0.9893, 64: 0.9902}),
    *_row("cdne", "nwpu-resisc45", "paper", {16: 0.9969, 32: 0.9983, 64: 0.9991, 128: 0.9997}, variant="memory-bank"),
    *_row("cdne", "nwpu-resisc45", "paper", {16: 0.9919, 32: 0.9986, 64: 0.9987, 128: 0.9996}, variant="momentum"),
    *_row("cdne", "eurosat", "paper", {16: 0.9989, 32: 0.9999, 64: 0.9997, 128: 0.9999}, variant="memory-bank"),
    *_row("cdne", "eurosat", "paper", {16: 0.9993, 32: 0.9997, 64: 1.0, 128: 1.0}, variant="momentum"),
    *_row("duch", "ucm-captions", "secondary", {16: 0.760, 32: 0.794, 64: 0.844, 128: 0.870}, "image->text"),
    *_row("duch", "ucm-captions", "secondary", {16: 0.799, 32: 0.851, 64: 0.916, 128: 0.927}, "text->image"),
    *_row("duch", "rsicd", "secondary", {16: 0.684, 32: 0.791, 64: 0.836, 128: 0.829}, "image->text"),
    *_row("duch", "rsicd", "secondary", {16: 0.697, 32: 0.780, 64: 0.824, 128: 0.826}, "text->image"),
]
