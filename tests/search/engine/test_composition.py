"""Several examples as one query, compared with plain arithmetic of fractions."""

from fractions import Fraction

import numpy as np
import pytest

from orbithash.encoders.codes import Encoded, outputs_of, pack, unpack
from orbithash.search.engine.composition import compose


def random_examples(rng, num, bits, with_outputs=True, dims=5):
    """Return examples whose outputs agree with their codes; some outputs are 0."""
    examples = []
    for _ in range(num):
        outputs = rng.integers(-127, 128, (1, bits)).astype(np.int8)
        outputs[rng.random((1, bits)) < 0.2] = 0
        codes = pack(np.where(outputs == 0, rng.random((1, bits)) < 0.5, outputs > 0))
        if not with_outputs:
            outputs = outputs_of(codes, bits)
        vectors = rng.integers(-127, 128, (1, dims)).astype(np.int8) if dims else None
        examples.append(Encoded(codes, outputs, vectors))
    return examples


def exact_balance(positives, negatives, weights, field):
    """Return the votes as fractions, one number at a time."""
    num_columns = positives[0]._asdict()[field].shape[1]
    exact = [Fraction(weight) if isinstance(weight, int) else Fraction(str(weight)) for weight in weights]
    return [
        sum(
            weight * int(example._asdict()[field][0, column]) * sign / size / magnitude(example._asdict()[field])
            for weight, (example, sign, size) in zip(
                exact,
                [(example, 1, len(positives)) for example in positives]
                + [(example, -1, len(negatives)) for example in negatives],
                strict=True,
            )
        )
        for column in range(num_columns)
    ]


def magnitude(row):
    return max(1, sum(abs(int(value)) for value in row[0]))


def scaled(balance):
    largest = max(map(abs, balance)) or 1
    return [int(abs(value) * 127 / largest + Fraction(1, 2)) * (1 if value > 0 else -1) for value in balance]


@pytest.mark.parametrize("seed", range(20))
def test_votes_equal_fractions(seed):
    rng = np.random.default_rng(seed)
    bits = int(rng.choice([8, 13, 64]))
    positives = random_examples(rng, int(rng.integers(1, 6)), bits, bool(seed % 3))
    negatives = random_examples(rng, int(rng.integers(0, 5)), bits, bool(seed % 3))
    choices = [1, 0.5, 0.1, 0.2, 0.3, 1000, 1e-12, 3]
    weights = [choices[number] for number in rng.integers(0, len(choices), len(positives) + len(negatives))]
    composed = compose(positives, negatives, weights, bits)
    balance = exact_balance(positives, negatives, weights, "outputs")
    first = unpack(positives[0].codes, bits)[0]
    expected = [bool(bit) if value == 0 else value > 0 for value, bit in zip(balance, first, strict=True)]
    assert unpack(composed.codes, bits)[0].tolist() == expected
    assert composed.outputs.tolist() == [scaled(balance)]
    assert composed.vectors.tolist() == [scaled(exact_balance(positives, negatives, weights, "vectors"))]
    assert composed.outputs.dtype == composed.vectors.dtype == np.int8


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("weight", [1, 0.3, 7])
def test_codes_of_equal_weight_vote_by_majority(seed, weight):
    rng = np.random.default_rng(seed)
    positives = random_examples(rng, int(rng.integers(1, 5)), 32, with_outputs=False)
    negatives = random_examples(rng, int(rng.integers(0, 4)), 32, with_outputs=False)
    votes = [2 * unpack(example.codes, 32)[0].astype(int) - 1 for example in (*positives, *negatives)]
    balance = sum(votes[: len(positives)]) * max(1, len(negatives)) - sum(votes[len(positives) :]) * len(positives)
    expected = np.where(balance == 0, votes[0] > 0, balance > 0)
    composed = compose(positives, negatives, [weight] * len(votes), 32)
    assert (unpack(composed.codes, 32)[0] == expected).all()


def test_a_code_does_not_outvote_outputs():
    """Most outputs of an image are far below 127; a code has no other numbers."""
    outputs = np.array([[127, 20, -20, 30, -30, 20, -20, 10]], np.int8)
    image = Encoded(pack(outputs > 0), outputs, None)
    code = Encoded(pack(outputs < 0), np.where(outputs < 0, 127, -127).astype(np.int8), None)
    # The code is the opposite of the image in all bits: only the surest bit of the image is above its mean.
    assert unpack(compose([image, code], [], [1, 1], 8).codes, 8)[0].tolist() == [True, *(outputs[0, 1:] < 0).tolist()]
    assert compose([image, code], [], [1, 0.2], 8).codes.tolist() == image.codes.tolist()
    # Against a code that agrees in all bits.
    same = Encoded(image.codes, np.where(outputs > 0, 127, -127).astype(np.int8), None)
    assert compose([image], [same], [1, 0.2], 8).codes.tolist() == image.codes.tolist()


def test_an_example_without_any_output_does_not_vote():
    nothing = Encoded(np.array([[0]], np.uint8), np.zeros((1, 8), np.int8), np.zeros((1, 3), np.int8))
    known = Encoded(np.array([[255]], np.uint8), np.full((1, 8), 9, np.int8), np.full((1, 3), -4, np.int8))
    composed = compose([nothing, known], [], [1, 1], 8)
    assert (composed.codes.tolist(), composed.outputs.tolist(), composed.vectors.tolist()) == (
        [[255]],
        [[127] * 8],
        [[-127] * 3],
    )
    assert compose([nothing], [], [1], 8).codes.tolist() == [[0]]


def test_decimal_weights_tie_as_they_are_written():
    """The sum of 0.1 and 0.2 is 0.3 here; in float64 it is larger."""
    first = Encoded(pack(np.array([[False] * 8])), np.full((1, 8), -127, np.int8), None)
    other = Encoded(pack(np.array([[True] * 8])), np.full((1, 8), 127, np.int8), None)
    composed = compose([first, other, other], [], [0.3, 0.1, 0.2], 8)
    assert composed.codes.tolist() == [[0]]
    assert composed.outputs.tolist() == [[0] * 8]
    assert compose([first, other, other], [], [0.3, 0.1, 0.2000001], 8).codes.tolist() == [[255]]


def test_a_vector_needs_the_vectors_of_all_examples():
    rng = np.random.default_rng(0)
    (known,), (unknown,) = random_examples(rng, 1, 8), random_examples(rng, 1, 8, dims=0)
    assert compose([known, unknown], [], [1, 1], 8).vectors is None
    assert compose([known], [], [2], 8).vectors is not None


def test_weights_beyond_float_precision():
    """The smallest and the largest weights make sums that no machine integer holds."""
    rng = np.random.default_rng(0)
    positives = random_examples(rng, 64, 16)
    composed = compose(positives, [], [5e-324] * 32 + [1000.0] * 32, 16)
    balance = exact_balance(positives, [], [5e-324] * 32 + [1000.0] * 32, "outputs")
    assert composed.outputs.tolist() == [scaled(balance)]
