"""Scores of a shortlist, compared with exact arithmetic of Python."""

import math

import numpy as np
import pytest

from orbithash.encoders.codes import hamming, outputs_of, pack, unpack
from orbithash.encoders.vectors import asymmetric_distances, cosine_scores


def exact_cosine(query, vector):
    query, vector = [int(q) for q in query], [int(v) for v in vector]
    dot = sum(q * v for q, v in zip(query, vector, strict=True))
    square = sum(q * q for q in query) * sum(v * v for v in vector)
    return dot / math.sqrt(square) if square else 0.0


@pytest.mark.parametrize("dims", [1, 7, 64, 300])
def test_cosines_are_those_of_exact_arithmetic(dims):
    rng = np.random.default_rng(dims)
    vectors = rng.integers(-127, 128, (40, dims)).astype(np.int8)
    vectors[3] = 0
    for query in (vectors[5], vectors[3], np.full(dims, -127, np.int8)):
        assert cosine_scores(query, vectors).tolist() == [exact_cosine(query, vector) for vector in vectors]


def test_the_score_of_a_row_does_not_depend_on_the_others():
    rng = np.random.default_rng(0)
    vectors = rng.integers(-127, 128, (301, 77)).astype(np.int8)
    together = cosine_scores(vectors[0], vectors)
    alone = [cosine_scores(vectors[0], vectors[row : row + 1])[0] for row in range(len(vectors))]
    assert together.tolist() == alone


def test_no_rows_have_no_scores():
    assert cosine_scores(np.ones(4, np.int8), np.empty((0, 4), np.int8)).shape == (0,)
    assert asymmetric_distances(np.ones(9, np.int8), np.empty((0, 2), np.uint8)).shape == (0,)


@pytest.mark.parametrize("bits", [8, 20, 64, 100])
def test_asymmetric_distances_add_the_outputs_of_differing_bits(bits):
    rng = np.random.default_rng(bits)
    outputs = rng.integers(-127, 128, bits).astype(np.int8)
    codes = pack(rng.random((50, bits)) < 0.5)
    expected = [
        sum(abs(int(o)) for o, bit in zip(outputs, row, strict=True) if (o >= 0) != bit) for row in unpack(codes, bits)
    ]
    assert asymmetric_distances(outputs, codes).tolist() == expected


def test_outputs_of_a_code_rank_as_its_bits():
    codes = pack(np.random.default_rng(1).random((30, 20)) < 0.5)
    found = asymmetric_distances(outputs_of(codes[:1], 20)[0], codes)
    assert found.tolist() == (127 * hamming(codes[:1], codes)[0]).tolist()
