"""Vectors, and several weighted examples as one query, from both clients over a gateway with a real archive."""

import array

import numpy as np
import pytest
from archive_parts import serving_archive
from search_parts import StubEncoder

from orbithash.encoders.codes import Encoded, pack
from orbithash.encoders.errors import InputError
from orbithash.search.client import Client, Example, Query, Row
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.forms import vector_bytes

# Four dimensions and a code of 16 bits: each dimension is the output of four bits.
DIMS = 4


def encoded(vectors):
    outputs = np.repeat(np.array(vectors).reshape(-1, DIMS), 4, axis=1)
    return Encoded(pack(outputs >= 0), outputs.astype(np.int8), None)


async def encode_images(images):
    return encoded([[100, 100, -100, -100] for _ in images])


async def encode_texts(texts):
    return encoded([[-60, 60, 60, -60] for _ in texts])


async def encode_vectors(vectors):
    assert all(vector.dtype == np.float32 and vector.shape == (DIMS,) for vector in vectors)
    return encoded(vectors)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    encoder = StubEncoder(encode_images, encode_texts, encode_vectors)
    with serving_archive(tmp_path_factory.mktemp("examples") / "archive", encoder=encoder) as (address, _, _):
        with Client(address) as client:
            client.upsert(Row(key=f"{number:04b}", vector=signs(number)) for number in range(16))
        yield address


def signs(number):
    """The vector of a number: 1 in the dimensions of its bits, from the left, -1 in the others."""
    return [1.0 if number >> (3 - place) & 1 else -1.0 for place in range(DIMS)]


def nearest(client, *arguments, **fields):
    return client.search(*arguments, k=1, **fields).hits[0].key


FORMS = {
    "list": list,
    "tuple": tuple,
    "integers": lambda vector: [int(number) for number in vector],
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "strided": lambda vector: np.float32([vector, [0] * DIMS]).T.copy()[:, 0],
    "read-only": lambda vector: np.frombuffer(np.float32(vector).tobytes(), np.float32),
    "array": lambda vector: array.array("d", vector),
    "bytes": lambda vector: np.array(vector, "<f4").tobytes(),
}


@pytest.mark.parametrize("form", FORMS)
def test_vectors_in_any_form(make_client, served, form):
    with make_client(served) as client:
        for number in (0, 5, 12):
            vector = FORMS[form](signs(number))
            assert vector_bytes(vector) == np.array(signs(number), "<f4").tobytes()
            assert nearest(client, vector=vector) == f"{number:04b}"
        assert client.describe().num_features == DIMS


def test_vectors_of_a_batch_and_of_rows(make_client, served):
    vectors = np.array([signs(number) for number in range(16)], np.float32)
    with make_client(served) as client:
        answers = client.search_batch(vectors=vectors, k=1)
        assert [answer.hits[0].key for answer in answers] == [f"{number:04b}" for number in range(16)]
        row = Row(key="vector", vector=vectors[3], label="here")
        assert client.upsert([row, Row(key="code", code=b"\0\0"), Row(key="image", image=b"any")]) == 3
        found = client.get(["vector", "0011", "image"], include=("code",))
        assert found["vector"].code == found["0011"].code == b"\x00\xff"
        assert (found["vector"].label, found["vector"].vector) == ("here", None)
        assert found["image"].code == b"\xff\x00"
        client.delete(["vector", "code", "image"])


INVALID = [
    ([], "vector: a vector has at least one dimension, got none"),
    ([0.0] * 3, "vector: this model takes vectors of 4 dimensions, got 3"),
    (np.zeros(1280, np.float32), "vector: this model takes vectors of 4 dimensions, got 1,280"),
    ([0, 1, float("nan"), 0], "vector: a vector is finite in float32, got nan in dimension 2"),
    ([0, 1, 0, -np.inf], "vector: a vector is finite in float32, got -inf in dimension 3"),
    ([1e300, 0, 0, 0], "vector: a vector is finite in float32, got inf in dimension 0"),
    (b"abc", "vector: a vector has 4 bytes for each of at most 16,384 dimensions, got 3 bytes"),
    (np.zeros(16_385, np.float32), "at most 16,384 dimensions, got 65,540 bytes"),
    (np.zeros(4, np.int8), r"of float16, float32 or float64, got shape \[4\] of format 'b'"),
    (np.zeros(4, np.bool_), r"got shape \[4\] of format '\?'"),
    (np.zeros((1, 4), np.float32), r"got shape \[1, 4\] of format 'f'"),
    (np.zeros(4, ">f4"), "of format '>f'"),
    (np.zeros(4, np.complex64), "of format 'Zf'"),
    (["a"], "a vector is a list of numbers"),
    ([[0.0]], "a vector is a list of numbers"),
    ("text", "a vector is a float array or a list of numbers, got str"),
    (5.0, "a vector is a float array or a list of numbers, got float"),
]


@pytest.mark.parametrize(("vector", "words"), INVALID)
def test_invalid_vectors_are_refused(served, vector, words):
    with Client(served) as client:
        for send in (
            lambda: client.search(vector=vector),
            lambda: client.search(positives=[Example(vector=vector)]),
            lambda: client.upsert([Row(key="a", vector=vector)]),
        ):
            with pytest.raises(InputError, match=words) as caught:
                send()
            assert "\n" not in str(caught.value)
        assert client.count("key = 'a'") == 0


def test_an_image_and_a_sentence_are_weighted(make_client, served):
    """The image is ++-- with 100, the sentence -++- with 60, which counts as much."""
    image, text = Example(image=b"any"), "with many boats"
    with make_client(served) as client:
        assert nearest(client, positives=[image]) == "1100"
        assert nearest(client, positives=[image, Example(text=text)]) == "1100"
        assert nearest(client, positives=[Example(text=text), image]) == "0110"
        assert nearest(client, positives=[image, Example(text=text, weight=0.5)]) == "1100"
        assert nearest(client, positives=[image, Example(text=text, weight=2)]) == "0110"
        assert nearest(client, positives=[Example(image=b"any", weight=0.5), Example(text=text)]) == "0110"
        assert nearest(client, positives=[image], negatives=[Example(text=text)]) == "1100"
        assert nearest(client, positives=[image], negatives=[Example(text=text, weight=3)]) == "1001"
        # Equal votes: the first positive decides.
        assert nearest(client, positives=[Example(key="1111", weight=2), Example(key="0000", weight=2)]) == "1111"
        assert nearest(client, positives=[Example(key="0000"), Example(key="1111", weight=1.001)]) == "1111"
        assert nearest(client, positives=[Example(key="0000"), Example(key="1111", weight=np.float32(2))]) == "1111"
        assert nearest(client, positives=[Example(vector=[9, -9, 1, 1]), Example(text=text)]) == "1010"
        answers = client.search_batch([Query(positives=(image, Example(text=text, weight=2)), k=1)] * 3)
        assert [answer.hits[0].key for answer in answers] == ["0110"] * 3


@pytest.mark.parametrize("weight", [0, -1, 1000.1, float("nan"), float("inf"), "1", True, 1j])
def test_invalid_weights_are_refused(served, weight):
    with Client(served) as client:
        for fields in (
            {"positives": [Example(key="0000", weight=weight)]},
            {"positives": [Example(key="0000")], "negatives": [Example(key="1111", weight=weight)]},
        ):
            with pytest.raises(InvalidQuery, match="weight: a weight is a number above 0 and at most 1,000, got"):
                client.search(**fields)
