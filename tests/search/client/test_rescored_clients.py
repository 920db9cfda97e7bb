"""Rescoring over gRPC: stored vectors of upserted images, through changes of the archive, in both clients."""

import math

import numpy as np
import pytest
from archive_parts import serving_archive

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Encoded
from orbithash.encoders.vectors import VectorSpec
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import Query
from orbithash.search.protocol.rows import Row


async def encode(images):
    """The first byte of an image is its code, the other two are its stored vector."""
    rows = np.array([list(image) for image in images], np.uint8)
    codes = np.stack([rows[:, 0], np.zeros(len(rows), np.uint8)], axis=1)
    return Encoded(codes, np.where(np.unpackbits(codes, axis=1) == 1, 5, -5).astype(np.int8), rows[:, 1:].view(np.int8))


@pytest.fixture
def served(tmp_path):
    """The address of a gateway over an archive with vectors, and the archive's folder."""
    with serving_archive(tmp_path / "archive", encode=encode, vector=VectorSpec(2, 0.01)) as (address, _, _):
        yield address, tmp_path / "archive"


def image(code, *vector):
    return bytes([code, *np.array(vector, np.int8).view(np.uint8)])


def scores(answer):
    return {hit.key: hit.score if hit.score is None else round(hit.score, 6) for hit in answer.hits}


def test_rescored_answers_follow_every_kind_of_change(make_client, served):
    address, folder = served
    half = round(math.sqrt(0.5), 6)
    with make_client(address) as client:

        def search(**given):
            return client.search(image=image(0, 10, 0), rescore="vector", **given)

        client.upsert([Row(key="near", image=image(1, 0, 10)), Row(key="far", image=image(7, 10, 0))])
        client.upsert([Row(key="middle", image=image(3, 20, 20), label="beach"), Row(key="code", code=b"\0\0")])
        answer = search()
        assert list(scores(answer).items()) == [("far", 1.0), ("middle", half), ("near", 0.0), ("code", None)]
        assert [hit.rank for hit in answer.hits] == [1, 2, 3, 4]
        assert (answer.shortlist_radius, answer.ties_at_cutoff, answer.is_shortlist_bounded) == (3, 1, False)
        # A shortlist of two rows does not reach the farthest.
        assert list(scores(search(k=2, oversampling=1))) == ["near", "code"]
        assert list(scores(search(filter="label = 'beach'")).items()) == [("middle", half)]
        assert list(scores(search(radius=1)).items()) == [("near", 0.0), ("code", None)]
        assert scores(client.search(key="near", rescore="vector"))["middle"] == half
        assert client.search(code=b"\0\0").hits[0].score is None

        client.update({"far": {"label": "harbor"}})
        assert scores(search())["far"] == 1.0
        client.upsert([Row(key="far", code=b"\7\0"), Row(key="near", image=image(1, -10, 0))])
        client.delete(["code"])
        assert scores(search()) == {"middle": half, "near": -1.0, "far": None}
        together = client.search_batch(
            [Query(image=image(0, 0, 10), rescore="vector"), Query(key="far", rescore="vector"), Query(key="middle")]
        )
        assert list(scores(together[0])) == ["middle", "near", "far"]
        assert isinstance(together[1], InvalidQuery)
        assert scores(together[2]) == dict.fromkeys(("middle", "near", "far"))
        client.refresh(shards=3)
        assert scores(search()) == {"middle": half, "near": -1.0, "far": None}
    assert Archive.open(folder).num_rows == 3


def test_asymmetric_distances_split_ties(make_client, served):
    with make_client(served[0]) as client:
        client.upsert([Row(key=f"k{code}", code=bytes([code, 0])) for code in (3, 1, 0)])
        answer = client.search(image=image(0, 1, 1), rescore="asymmetric", k=2)
        assert scores(answer) == {"k0": 0.0, "k1": 5.0}
        assert [hit.distance for hit in answer.hits] == [0, 1]


def test_what_cannot_be_rescored_is_refused_in_one_line(make_client, served):
    with make_client(served[0]) as client:
        client.upsert([Row(key="a", code=b"\0\0")])
        for given, words in (
            ({"code": b"\0\0", "rescore": "vector"}, "the query has no stored vector"),
            ({"key": "a", "rescore": "vector"}, "the query has no stored vector"),
            ({"key": "a", "rescore": "cosine"}, "allowed: vector and asymmetric"),
            ({"key": "a", "rescore": "vector", "oversampling": math.inf}, "oversampling"),
        ):
            with pytest.raises(InvalidQuery, match=words) as error:
                client.search(**given)
            assert "\n" not in str(error.value)
        with pytest.raises(InvalidQuery, match="has no pages"):
            list(client.pages(Query(key="a", rescore="asymmetric")))
