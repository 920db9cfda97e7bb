"""The description of codes in files for other programs."""

import json

import pytest

from orbithash.encoders.errors import InputError
from orbithash.encoders.places.code_description import CodeDescription

FULL = CodeDescription(
    bits=12,
    model_id="abc",
    model="ucm-12",
    vector_dims=32,
    vector_scale=0.01,
    embedding="dino",
    method="itq",
    thresholds=(0.5,) * 12,
)


def test_round_trip_through_json_text_and_object():
    for description in (FULL, CodeDescription(64, "abc"), CodeDescription(8, "", bit_order="lsb-first")):
        content = description.to_json()
        assert CodeDescription.from_json(content) == description
        assert CodeDescription.from_json(json.dumps(content)) == description
        assert CodeDescription.from_json(json.dumps(content).encode()) == description


def test_json_states_what_a_reader_needs():
    assert CodeDescription(12, "abc").to_json() == {
        "version": 1,
        "bits": 12,
        "bytes": 2,
        "pad_bits": 4,
        "bit_order": "msb-first",
        "distance": "hamming",
        "model_id": "abc",
    }


def test_unknown_fields_are_ignored():
    assert CodeDescription.from_json({"bits": 8, "model_id": "a", "colour": "blue"}) == CodeDescription(8, "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "bits is 7"),
        ({"bits": "12"}, "bits is '12'"),
        ({"bits": True}, "bits is True"),
        ({"bytes": 3}, "states bytes = 3"),
        ({"pad_bits": 0}, "states pad_bits = 0"),
        ({"bit_order": "middle"}, "msb-first or lsb-first is allowed"),
        ({"bit_order": ["msb-first"]}, "msb-first or lsb-first is allowed"),
        ({"distance": "cosine"}, "hamming is allowed"),
        ({"model_id": 5}, "model_id of the codes is 5"),
        ({"version": 2}, "has version 2"),
        ({"vector_dims": None}, "both vector_dims and vector_scale"),
        ({"vector_scale": "x"}, "a number above 0"),
        ({"vector_scale": float("nan")}, "a number above 0"),
        ({"vector_dims": 0}, "vector_dims of the codes is 0"),
        ({"thresholds": [1, 2]}, "12 numbers"),
        ({"thresholds": 5}, "a list of numbers"),
        ({"thresholds": ["a"] * 12}, "12 numbers"),
    ],
)
def test_a_wrong_field_is_refused_in_one_line(change, message):
    with pytest.raises(InputError, match=message) as caught:
        CodeDescription.from_json({**FULL.to_json(), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", b"\xff", [], None, 5, "[1]", "[" * 100_000, "{}", '{"bits": 8}'])
def test_other_content_is_refused_in_one_line(content):
    with pytest.raises(InputError, match="description of the codes"):
        CodeDescription.from_json(content)
