"""Protocols: which image is for training, for choosing, for asking, for searching in.

Queries are always the part "test". `validation` is a share of the images held back to choose epochs and settings: of
the training images, and in the protocols with a validation part of their own ("cdne", "random") of all images; at least
one of a class, or none where it is 0. What is drawn for the test part does not depend on it.

Everything is drawn class by class, from a generator of its own for each class, so one class more or less does not move
another's split. Images without a class are drawn like one more class; so is, as a whole, a dataset in which images have
several classes.

Copies, files of equal content, end in the same part: each in that of the first of them. Where that crosses the border
between training, test and database, the last image of the same class without a copy takes its place, so that the parts
keep their sizes.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["PROTOCOLS", "Protocol", "split_images"]

Rule = Callable[[int, str, float, np.random.Generator], list[str]]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How images are split and searched.

    `split(num_images, dataset, validation, rng)` names the part of each image of one class, whose images come in
    natural order; or of all images, where not `by_class`. Queries are searched in the parts `database`; with
    `leave_one_out` these are the queries themselves, and none finds itself. `min_images` of a class, or of all, fill
    all parts.
    """

    name: str
    split: Rule
    database: tuple[str, ...]
    leave_one_out: bool = False
    by_class: bool = True
    min_images: int = 5


def _share(fraction: float, count: int) -> int:
    """That share of `count`, at least one; none of a fraction of 0."""
    return max(1, round(fraction * count)) if fraction else 0


def _shuffled(num_test: int, num_images: int, rng: np.random.Generator) -> list[str]:
    parts = ["test"] * num_test + ["train"] * (num_images - num_test)
    return [str(part) for part in rng.permutation(parts)]


def _hold_back(parts: list[str], validation: float, rng: np.random.Generator) -> list[str]:
    """Turns a share of the training images into validation images."""
    train = [i for i, part in enumerate(parts) if part == "train"]
    for i in rng.choice(train, _share(validation, len(train)), replace=False).tolist():
        parts[i] = "validation"
    return parts


def _by_number(num_images: int, dataset: str, validation: float, rng: np.random.Generator) -> list[str]:
    num_train = num_images // 2 if dataset == "aid" else round(0.8 * num_images)
    return _hold_back(["train"] * num_train + ["test"] * (num_images - num_train), validation, rng)


def _sixty_forty(num_images: int, dataset: str, validation: float, rng: np.random.Generator) -> list[str]:
    num_train = (3 * num_images + 4) // 5
    return _hold_back(_shuffled(num_images - num_train, num_images, rng), validation, rng)


def _seventy_ten_twenty(num_images: int, dataset: str, validation: float, rng: np.random.Generator) -> list[str]:
    parts = ["test"] * _share(0.2, num_images) + ["validation"] * _share(validation, num_images)
    parts += ["train"] * (num_images - len(parts))
    return [str(part) for part in rng.permutation(parts)]


def _half_tenth_rest(num_images: int, dataset: str, validation: float, rng: np.random.Generator) -> list[str]:
    num_train = num_images // 2
    num_test = (num_images - num_train) // 5
    parts = ["train"] * num_train + ["test"] * num_test + ["database"] * (num_images - num_train - num_test)
    return _hold_back([str(part) for part in rng.permutation(parts)], validation, rng)


def _so_many(num_images: int, dataset: str, validation: float, rng: np.random.Generator) -> list[str]:
    num_test = 625 if dataset == "dsrsid" else 100
    return _hold_back(_shuffled(min(num_test, _share(0.2, num_images)), num_images, rng), validation, rng)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in [
        # By file number: UCMD's files 00-79 train and 80-99 test, AID's first half trains; of other datasets the first
        # 80 %. Searched in is the training part; the released code searches the test part, leaving the query out.
        Protocol("dhcl", _by_number, database=("train", "validation")),
        # The same, searched as the authors' code does: queries in the test part itself.
        Protocol("dhcl-released", _by_number, database=("test",), leave_one_out=True),
        # 60 % train; the rest are queries and database at once.
        Protocol("mhcln", _sixty_forty, database=("test",), leave_one_out=True),
        # 70 % train and database, 10 % validation, 20 % test.
        Protocol("cdne", _seventy_ten_twenty, database=("train",)),
        # 50 % train, 10 % queries, 40 % database, whatever the class.
        Protocol("duch", _half_tenth_rest, database=("database",), by_class=False, min_images=10),
        # So many queries of a class, a fifth at most: EuroSAT's and others' 100, DSRSID's 625. The rest are training
        # images and database. The numbers are those of the authors' lists; which images they are is drawn.
        Protocol("mrhash", _so_many, database=("train", "validation")),
        # 70 % train, 10 % validation, 20 % test; validation images are searched in, too.
        Protocol("random", _seventy_ten_twenty, database=("train", "validation")),
    ]
}


def split_images(
    protocol: Protocol, dataset: str, groups: Sequence[str], hashes: Sequence[str], seed: int, validation: float
) -> list[str]:
    """The part of each image.

    Args:
        protocol: how to split.
        dataset: its name; "dhcl" splits AID in another way.
        groups: the class of each image, "" where it has none; images of a class in natural order.
        hashes: of each image's content.
        seed: chooses the draw, 0 or more.
        validation: share of images held back, 0 to 0.5.
    """
    parts = [""] * len(groups)
    if not protocol.by_class:
        groups = [""] * len(groups)
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    for group, rows in members.items():
        if group == "" and len(rows) < protocol.min_images:
            # A few of no class: nothing can be asked about them.
            drawn = ["train"] * len(rows)
        else:
            drawn = protocol.split(len(rows), dataset, validation, np.random.default_rng([seed, *group.encode()]))
        for i, part in zip(rows, drawn, strict=True):
            parts[i] = part
    _join_copies(parts, groups, hashes)
    return parts


def _join_copies(parts: list[str], groups: Sequence[str], hashes: Sequence[str]) -> None:
    """Moves each copy into the part of the first of its kind."""
    counts = Counter(hashes)
    # The images that may change places with a copy, by group and side of the border.
    free = defaultdict(list)
    for i, (group, part) in enumerate(zip(groups, parts, strict=True)):
        if counts[hashes[i]] == 1:
            free[group, _side(part)].append(i)
    first: dict[str, int] = {}
    for i, name in enumerate(hashes):
        to = parts[first.setdefault(name, i)]
        if _side(to) != _side(parts[i]) and (others := free[groups[i], _side(to)]):
            parts[others.pop()] = parts[i]
        parts[i] = to


def _side(part: str) -> str:
    # Validation images are training images held back: how many they are must not move the test part.
    return "train" if part == "validation" else part
