"""Protocols as pure functions: the sizes of the papers, each image in one part, and stable draws."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orbithash.encoders.errors import InputError
from orbithash.trainers.datasets import PROTOCOLS, make_manifest
from orbithash.trainers.datasets.protocols import split_images

counts = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(5, 60), min_size=2, max_size=5)
# All but those whose parts the dataset states.
DRAWN = [name for name, rule in PROTOCOLS.items() if rule.split is not None]

names = st.sampled_from(sorted(DRAWN))
seeds = st.integers(0, 2**40)
shares = st.sampled_from([0.0, 0.1, 0.25, 0.5])


def split(name, classes, seed=0, validation=0.1, dataset="folder", hashes=None):
    groups = [group for group, count in sorted(classes.items()) for _ in range(count)]
    hashes = [str(i) for i in range(len(groups))] if hashes is None else hashes
    return groups, split_images(PROTOCOLS[name], dataset, groups, hashes, seed, validation)


def of(group, groups, parts):
    return [part for one, part in zip(groups, parts, strict=True) if one == group]


def joined(parts):
    """Validation images are held-out training images."""
    return ["train" if part == "validation" else part for part in parts]


def expected_tests(name, count):
    fifth = max(1, round(0.2 * count))
    return {
        "dhcl": count - round(0.8 * count),
        "dhcl-released": count - round(0.8 * count),
        "mhcln": count - math.ceil(round(0.6 * count, 9)),
        "cdne": fifth,
        "random": fifth,
        "mrhash": min(100, fifth),
    }[name]


@settings(max_examples=150, deadline=None)
@given(names, counts, seeds, shares)
def test_parts_are_whole_and_of_the_right_size(name, classes, seed, validation):
    groups, parts = split(name, classes, seed, validation)
    assert set(parts) <= {"train", "validation", "test", "database"}
    assert ("database" in parts) == (name == "duch")
    if name == "duch":
        num_train, rest = len(parts) // 2, len(parts) - len(parts) // 2
        assert joined(parts).count("train") == num_train
        assert parts.count("test") == rest // 5
        assert parts.count("validation") == (max(1, round(validation * num_train)) if validation else 0)
        return
    for group, count in classes.items():
        own = of(group, groups, parts)
        assert own.count("test") == expected_tests(name, count)
        base = count if name in ("cdne", "random") else joined(own).count("train")
        assert own.count("validation") == (max(1, round(validation * base)) if validation else 0)
        assert "train" in own


@settings(max_examples=60, deadline=None)
@given(names, counts, seeds, shares)
def test_the_test_part_does_not_depend_on_the_validation_share(name, classes, seed, validation):
    assert joined(split(name, classes, seed, validation)[1]) == joined(split(name, classes, seed, 0)[1])
    tests = [[part == "test" for part in split(name, classes, seed, share)[1]] for share in (0, validation)]
    assert tests[0] == tests[1]


@settings(max_examples=60, deadline=None)
@given(names, counts, seeds)
def test_the_same_seed_gives_the_same_split(name, classes, seed):
    assert split(name, classes, seed) == split(name, classes, seed)


@settings(max_examples=60, deadline=None)
@given(names.filter(lambda name: PROTOCOLS[name].by_class), counts, seeds)
def test_a_class_is_split_alike_without_the_others(name, classes, seed):
    groups, parts = split(name, classes, seed)
    for group, count in classes.items():
        assert split(name, {group: count}, seed)[1] == of(group, groups, parts)


@pytest.mark.parametrize("name", [name for name in DRAWN if not name.startswith("dhcl")])
def test_another_seed_gives_another_test_part(name):
    drawn = {tuple(part == "test" for part in split(name, {"a": 100}, seed)[1]) for seed in range(5)}
    assert len(drawn) == 5


def test_classes_of_one_size_are_not_split_alike():
    groups, parts = split("mhcln", {"a": 100, "b": 100})
    assert of("a", groups, parts) != of("b", groups, parts)


def test_dhcl_is_by_number_whatever_the_seed():
    for seed in (0, 1):
        assert joined(split("dhcl", {"a": 100}, seed)[1]) == ["train"] * 80 + ["test"] * 20
        assert joined(split("dhcl", {"a": 360}, seed, dataset="aid")[1]) == ["train"] * 180 + ["test"] * 180
        assert joined(split("dhcl", {"a": 7}, seed, dataset="aid")[1]) == ["train"] * 3 + ["test"] * 4


@pytest.mark.parametrize(
    ("name", "classes", "sizes"),
    [
        ("mhcln", dict.fromkeys("abcdefghijklmnopqrstu", 100), {"train": 1260, "test": 840}),
        ("duch", {"a": 2100}, {"train": 1050, "test": 210, "database": 840}),
        ("duch", {"a": 10921}, {"train": 5460, "test": 1092, "database": 4369}),
        # EuroSAT and DSRSID.
        ("mrhash", {"a": 3000, "b": 2500, "c": 2000}, {"train": 7200, "test": 300}),
        ("mrhash dsrsid", dict.fromkeys("abcdefgh", 10_000), {"train": 75_000, "test": 5000}),
        ("mrhash dsrsid", {"a": 10_000, "b": 50}, {"train": 9415, "test": 635}),
    ],
)
def test_the_sizes_of_the_papers(name, classes, sizes):
    protocol, _, dataset = name.partition(" ")
    assert Counter(split(protocol, classes, validation=0, dataset=dataset)[1]) == sizes


def test_the_parts_of_cdne():
    assert Counter(split("cdne", {"a": 700})[1]) == {"train": 490, "validation": 70, "test": 140}


# Duplicates.


@settings(max_examples=150, deadline=None)
@given(names, counts, seeds, shares, st.data())
def test_copies_are_in_one_part(name, classes, seed, validation, data):
    total = sum(classes.values())
    kinds = data.draw(st.lists(st.integers(0, total), min_size=total, max_size=total))
    _, parts = split(name, classes, seed, validation, hashes=[str(kind) for kind in kinds])
    by_kind = {}
    for kind, part in zip(kinds, parts, strict=True):
        assert by_kind.setdefault(kind, part) == part
    again = split(name, classes, seed, 0, hashes=[str(kind) for kind in kinds])[1]
    assert [part == "test" for part in again] == [part == "test" for part in parts]


@pytest.mark.parametrize("name", DRAWN)
def test_few_copies_leave_the_sizes(name):
    hashes = [str(i) for i in range(100)]
    for pair in range(0, 30, 2):
        hashes[pair + 1] = hashes[pair]
    for seed in range(10):
        with_copies = Counter(joined(split(name, {"a": 100}, seed, hashes=hashes)[1]))
        assert with_copies == Counter(joined(split(name, {"a": 100}, seed)[1]))


def test_a_class_of_copies_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(10):
            (tmp_path / name / f"{i}.png").write_text("same" if name == "a" else f"{i}")
    with pytest.raises(InputError, match="class 'a' has too many duplicates: no image is left for"):
        make_manifest(tmp_path, protocol="mhcln")
    for path in tmp_path.rglob("*.png"):
        path.write_text("same")
    with pytest.raises(InputError, match="it has too many duplicates: no image is left for database, t"):
        make_manifest(tmp_path, protocol="duch")


def test_a_few_images_of_no_class_are_for_training():
    parts = split_images(PROTOCOLS["random"], "rsicd", [""] * 4 + ["a"] * 5, list("123456789"), 0, 0.1)
    assert parts[:4] == ["train"] * 4
    parts = split_images(PROTOCOLS["random"], "rsicd", [""] * 10, list("123456789x"), 0, 0.1)
    assert Counter(parts) == {"train": 7, "validation": 1, "test": 2}
