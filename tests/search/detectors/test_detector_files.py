import json

import pytest

from orbithash.encoders.vectors import VectorSpec
from orbithash.search.detectors import Detector
from orbithash.search.detectors.detector import MAX_JSON_CHARS
from orbithash.search.protocol.description import Description
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.rankings import Linear

DETECTOR = Detector(
    weights=(3, -4, 0),
    scale=0.5,
    offset=-1.25,
    model_id="abc",
    vector=VectorSpec(3, 0.01),
    num_good=7,
    num_bad=5,
    num_background=100,
    precision=0.75,
    recall=1.0,
    folds=5,
)


def test_a_file_gives_the_same_detector():
    assert Detector.from_json(DETECTOR.to_json()) == DETECTOR
    assert Detector.from_json(DETECTOR.to_json().encode()) == DETECTOR
    assert DETECTOR.linear(True) == Linear((3, -4, 0), 0.5, -1.25, least_certain=True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"weights": [1, 2]}, "2 weights for 3 dimensions"),
        ({"weights": [1, 2, 2**15]}, "weights: a weight is a whole number"),
        ({"weights": [1, 2, 0.5]}, "weights: a weight is a whole number"),
        ({"weights": [1, 2, True]}, "weights: a weight is a whole number"),
        ({"weights": "123"}, "weights is a list"),
        ({"weights": [[]] * 3}, "weights: a weight"),
        ({"scale": 0}, "scale: a finite number above 0"),
        ({"scale": "1"}, "scale is a finite number"),
        ({"offset": None}, "offset is a finite number"),
        ({"offset": 10**400}, "offset is a finite number"),
        ({"model_id": ""}, "model_id"),
        ({"model_id": 5}, "model_id"),
        ({"vector": [3, 0.01]}, "vector has dims"),
        ({"vector": {"dims": 3.0, "scale": 0.01}}, "vector has dims"),
        ({"vector": {"dims": 3, "scale": -1}}, "vector has dims"),
        ({"num_good": -1}, "num_good"),
        ({"num_bad": 1.5}, "num_bad"),
        ({"folds": 2**40}, "folds"),
        ({"precision": 1.5}, "precision is null or a number"),
        ({"recall": "high"}, "recall is null or a number"),
        ({"more": 1}, "'more' is not a field"),
        ({"version": 2}, "another version"),
        ({"format": "other"}, "not a detector"),
    ],
)
def test_damaged_files_are_refused_in_one_line(change, problem):
    text = json.dumps(json.loads(DETECTOR.to_json()) | change)
    with pytest.raises(InvalidQuery, match=problem) as caught:
        Detector.from_json(text)
    assert "\n" not in str(caught.value)
    assert caught.value.violations[0][0] == "detector"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not JSON"),
        (DETECTOR.to_json()[:50], "not JSON"),
        (DETECTOR.to_json().replace("0.5", "NaN", 1), "not JSON"),
        (DETECTOR.to_json().replace('"folds"', '"scale"'), "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[]", "not a detector"),
        ("null", "not a detector"),
        (" " * (MAX_JSON_CHARS + 1), "larger than"),
        (json.dumps({"format": "orbithash.detector", "version": 1}), "weights is missing"),
    ],
)
def test_other_files_are_refused_in_one_line(text, problem):
    with pytest.raises(InvalidQuery, match=problem):
        Detector.from_json(text)


def described(**changes):
    values = {"model_id": "abc", "vector_dims": 3, "vector_scale": 0.01} | changes
    description = object.__new__(Description)
    for name, value in values.items():
        object.__setattr__(description, name, value)
    return description


def test_a_detector_runs_on_archives_of_its_model_only():
    DETECTOR.check(described())
    with pytest.raises(InvalidQuery, match=r"made for another model \(abc\); the archive is of model xyz"):
        DETECTOR.check(described(model_id="xyz"))
    with pytest.raises(InvalidQuery, match="no stored vectors"):
        DETECTOR.check(described(vector_dims=0))
    with pytest.raises(InvalidQuery, match="3 dimensions"):
        DETECTOR.check(described(vector_dims=4))
