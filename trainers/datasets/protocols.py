"""Protocols: how images are assigned to training, validation, queries and database.

Queries are always the part "test". `validation` is the share of images that are held out to choose epochs and
settings: a share of the training images, or of all images in the protocols that define a validation part ("cdne",
"random"). It is at least one image per class, or none for a share of 0. The test part does not depend on it.

Each class has its own random generator, so that adding or removing a class does not change the split of another one.
Images without a class are treated as one more class, and so is a whole dataset whose images have several classes.

Duplicates, files of equal content, go to the same part: that of the first of them. If a duplicate changes between
training, test and database, the last image of its class without a duplicate takes its place, so that the parts keep
their sizes.
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

    Attributes:
        name: name of the protocol.
        split: `split(num_images, dataset, validation, rng)` returns the part of each image of one class, whose images
            are in natural order; of all images if not `by_class`. None: the dataset states the parts.
        database: parts that are searched.
        leave_one_out: whether the database is the test part itself; a query is not a hit of itself.
        by_class: whether classes are split separately.
        min_images: minimum number of images of a class, or of all, that fills all parts.
    """

    name: str
    split: Rule | None
    database: tuple[str, ...]
    leave_one_out: bool = False
    by_class: bool = True
    min_images: int = 5


def _share(fraction: float, count: int) -> int:
    """Return this share of `count`, at least 1; 0 for a fraction of 0."""
    return max(1, round(fraction * count)) if fraction else 0


def _shuffled(num_test: int, num_images: int, rng: np.random.Generator) -> list[str]:
    parts = ["test"] * num_test + ["train"] * (num_images - num_test)
    return [str(part) for part in rng.permutation(parts)]


def _hold_back(parts: list[str], validation: float, rng: np.random.Generator) -> list[str]:
    """Turn a share of the training images into validation images."""
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


def _fixed_queries(num_images: int, dataset: str, validation: float, rng: np.random.Generator) -> list[str]:
    num_test = 625 if dataset == "dsrsid" else 100
    return _hold_back(_shuffled(min(num_test, _share(0.2, num_images)), num_images, rng), validation, rng)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in [
        # By file number: of UCMD, files 00-79 are for training and 80-99 for test; of AID, the first half is for
        # training; of other datasets, the first 80 %. The training part is searched. The released code searches the
        # test part without the query.
        Protocol("dhcl", _by_number, database=("train", "validation")),
        # The same split; the test part is searched, as by the authors' code.
        Protocol("dhcl-released", _by_number, database=("test",), leave_one_out=True),
        # 60 % training; the rest are both queries and database.
        Protocol("mhcln", _sixty_forty, database=("test",), leave_one_out=True),
        # 70 % training and database, 10 % validation, 20 % test.
        Protocol("cdne", _seventy_ten_twenty, database=("train",)),
        # 50 % training, 10 % queries, 40 % database, independent of classes.
        Protocol("duch", _half_tenth_rest, database=("database",), by_class=False, min_images=10),
        # A fixed number of queries per class, at most a fifth: 625 for DSRSID, 100 for EuroSAT and others. The rest are
        # training images and database. The numbers are those of the authors' lists; the images are drawn.
        Protocol("mrhash", _fixed_queries, database=("train", "validation")),
        # 70 % training, 10 % validation, 20 % test; training and validation images are searched.
        Protocol("random", _seventy_ten_twenty, database=("train", "validation")),
        # The parts that the dataset states, such as BigEarthNet version 2; the share of validation images and the seed
        # have no effect. Training and validation images are searched.
        Protocol("official", None, database=("train", "validation"), by_class=False, min_images=2),
    ]
}


def split_images(
    protocol: Protocol,
    dataset: str,
    groups: Sequence[str],
    hashes: Sequence[bytes],
    seed: int,
    validation: float,
    stated: Sequence[str] = (),
) -> list[str]:
    """Return the part of each image.

    Args:
        protocol: how to split.
        dataset: its name; "dhcl" splits AID and "mrhash" splits DSRSID in their own ways.
        groups: the class of each image, "" without one; images of a class in natural order.
        hashes: hash of the content of each image.
        seed: seed of the draw, 0 or more.
        validation: share of images held out, 0 to 0.5.
        stated: the part that the dataset states for each image, for a protocol without a rule.
    """
    if protocol.split is None:
        # Duplicates follow the first of them; no other image changes its part.
        first: dict[bytes, str] = {}
        return [first.setdefault(name, part) for name, part in zip(hashes, stated, strict=True)]
    parts = [""] * len(groups)
    if not protocol.by_class:
        groups = [""] * len(groups)
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    for group, rows in members.items():
        if group == "" and len(rows) < protocol.min_images:
            # Too few images without a class for queries of their own.
            drawn = ["train"] * len(rows)
        else:
            drawn = protocol.split(len(rows), dataset, validation, np.random.default_rng([seed, *group.encode()]))
        for i, part in zip(rows, drawn, strict=True):
            parts[i] = part
    _join_duplicates(parts, groups, hashes)
    return parts


def _join_duplicates(parts: list[str], groups: Sequence[str], hashes: Sequence[bytes]) -> None:
    """Move each duplicate into the part of the first image of its content."""
    counts = Counter(hashes)
    # Images that may change places with a duplicate, by group and side.
    free = defaultdict(list)
    for i, (group, part) in enumerate(zip(groups, parts, strict=True)):
        if counts[hashes[i]] == 1:
            free[group, _side(part)].append(i)
    first: dict[bytes, int] = {}
    for i, name in enumerate(hashes):
        to = parts[first.setdefault(name, i)]
        if _side(to) != _side(parts[i]) and (others := free[groups[i], _side(to)]):
            parts[others.pop()] = parts[i]
        parts[i] = to


def _side(part: str) -> str:
    # Validation images are held-out training images; their number must not change the test part.
    return "train" if part == "validation" else part
